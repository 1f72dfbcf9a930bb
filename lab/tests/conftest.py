"""The models of tests/conftest.py, which pytest puts on the path (pyproject.toml), and the device of test_device.py."""

import pytest
from conftest import all_rows, make_checkpoint, mixtral, olmoe  # noqa: F401


@pytest.fixture(autouse=True)
def committed_rows(all_rows):  # noqa: F811
    """The rows of the committed runs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="whose results test_device.py checks: cpu or cuda")
