"""The parts of reproduce.py: runs and their records, intervals and verdicts, tables, figures."""
