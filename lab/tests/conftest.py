"""The models of tests/conftest.py, which pytest puts on the path (pyproject.toml)."""

from conftest import make_checkpoint, mixtral, olmoe  # noqa: F401
