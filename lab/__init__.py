"""The evidence: the paper's tables, benchmarks, the script that makes the embedded models, the docs' pictures."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
