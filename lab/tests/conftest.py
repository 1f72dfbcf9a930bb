"""The models of tests/conftest.py, which pytest puts on the path (pyproject.toml), and the device of test_device.py."""

import pytest
from conftest import make_checkpoint, mixtral, olmoe  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="whose results test_device.py checks: cpu or cuda")
