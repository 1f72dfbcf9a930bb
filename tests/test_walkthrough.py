"""examples/walkthrough.ipynb runs as it is committed, and prints the numbers that it shows.

The test trains for two steps where the notebook trains for sixty. Cells tagged `trained` print numbers that depend on
this: of them only the words are compared. Those tagged `answers` print what a model says.

    python tests/test_walkthrough.py        # after a change: runs the notebook in full and writes what it shows
"""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parent.parent / "examples/walkthrough.ipynb"
COMMITTED = nbformat.read(FILE, as_version=4)
CODE = [i for i, cell in enumerate(COMMITTED.cells) if cell.cell_type == "code"]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook in examples/, where Jupyter runs it."""
    folder = {"metadata": {"path": FILE.parent}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, resources=folder).execute()


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> nbformat.NotebookNode:
    notebook = copy.deepcopy(COMMITTED)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    parameters.source += f"\nSTEPS, QUESTIONS, OUT = 2, 3, Path({str(tmp_path_factory.mktemp('walkthrough'))!r})"
    execute(notebook)
    return notebook


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell: nbformat.NotebookNode, stream: str = "stdout") -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell shows besides text: "display_data" for a picture."""
    return [output.output_type for output in cell.outputs if output.output_type != "stream"]


def words(text: str) -> list[str]:
    """A text without its numbers."""
    return NUMBER.sub("#", text).split()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("i", CODE)
def test_a_cell_prints_and_draws_what_is_committed(i, executed):
    committed, now = COMMITTED.cells[i], executed.cells[i]
    assert kinds(now) == kinds(committed)
    if "answers" not in tags(committed):
        assert words(printed(now)) == words(printed(committed))
    if not tags(committed):
        assert numbers(printed(now)) == pytest.approx(numbers(printed(committed)), rel=0.01)


def test_the_committed_outputs_are_of_one_run_from_top_to_bottom_without_a_complaint():
    cells = [COMMITTED.cells[i] for i in CODE]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells for output in cell.outputs} == {"stream", "display_data"}
    assert not [printed(cell, "stderr") for cell in cells if printed(cell, "stderr")]


def test_the_committed_numbers_bear_out_what_the_text_says_of_them():
    text = "".join(printed(COMMITTED.cells[i]) for i in CODE)
    base, trained = re.findall(r"(\d+) of 100 answers", text)
    assert int(base) == 0 and int(trained) > 20  # section 8: none, and many
    losses = [float(loss) for loss in re.findall(r"^(?:all|hot|random|cold) .* ([\d.]+)$", text, re.M)]
    assert len(losses) == 4 and losses == sorted(losses)  # section 10: the more tokens, the lower the loss


def test_it_has_twelve_sections_each_with_a_number_or_a_picture_in_a_small_file():
    titles = [i for i, cell in enumerate(COMMITTED.cells) if cell.source.startswith("## ")]
    assert [COMMITTED.cells[i].source.split(".")[0] for i in titles] == [f"## {n}" for n in range(1, 13)]
    assert all(COMMITTED.cells[i + 1].outputs for i in titles)
    assert FILE.stat().st_size < 1_500_000


if __name__ == "__main__":
    execute(COMMITTED)
    nbformat.write(COMMITTED, FILE)
