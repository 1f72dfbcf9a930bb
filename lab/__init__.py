"""What proves the project: the paper's tables, benchmarks, the maker of the embedded models, the docs' pictures."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
