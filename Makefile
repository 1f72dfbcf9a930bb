# make demo: the whole method on the embedded model.  make test: the whole suite.  Both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test lint clean
demo: .venv/run
	$(BIN)/python evaluate.py tiny --task tiny-math --out $(RUN)/before
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 train.py --method hellora --k 8 --out $(RUN)/hellora
	$(BIN)/python evaluate.py $(RUN)/hellora --task tiny-math --out $(RUN)/after

test: .venv/dev
	$(BIN)/python -m pytest -q

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs
