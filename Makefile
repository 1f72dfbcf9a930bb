# make demo: the whole method on the embedded model.   make test: the test suite.   make lint: ruff.
# make gpu: checks and measures a GPU. make gpu DEVICE=cpu SHAPE=small: the rehearsal.
# The packages go into $(VENV), which is made first. PYTHON and VENV can be set: make test PYTHON=python3.13 VENV=.venv-313
PYTHON ?= python3
VENV ?= .venv
RUN := runs/demo
DEVICE ?= cuda
SHAPE ?= full

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test lint gpu clean
demo: $(VENV)/run
	$(VENV)/bin/python evaluate.py tiny --task tiny-math --out $(RUN)/before
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc_per_node 2 train.py --method hellora --k 8 --out $(RUN)/hellora
	$(VENV)/bin/python evaluate.py $(RUN)/hellora --task tiny-math --out $(RUN)/after

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest -q -n 2
	HELLORA_PLAIN=1 $(VENV)/bin/python -m pytest -q tests/test_tour.py tests/test_trajectory.py

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

gpu: $(VENV)/dev
	$(VENV)/bin/python bench.py gpu --device $(DEVICE) --shape $(SHAPE) --json $(if $(filter cuda,$(DEVICE)),results,runs)/gpu.json

clean:
	rm -rf runs
