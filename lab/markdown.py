"""Markdown tables."""

from collections.abc import Iterable


def grid(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, padded so that it also reads in a terminal. Numbers stand to the right."""
    table = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [True] + [not any(row[i].lstrip("+-")[:1].isdigit() for row in table[1:]) for i in range(1, len(widths))]
    align = [f"{{:{'<' if is_left else '>'}{width}}}" for is_left, width in zip(left, widths, strict=True)]
    ruler = ["-" * width if is_left else "-" * (width - 1) + ":" for is_left, width in zip(left, widths, strict=True)]
    lines = [[cell.format(text) for cell, text in zip(align, row, strict=True)] for row in table]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], ruler, *lines[1:]]]
