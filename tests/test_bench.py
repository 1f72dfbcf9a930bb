"""Benchmarks run, and compare what does the same work."""

import json
import random
import statistics

import pytest

import bench


def test_decoding_is_timed_on_the_same_tokens_as_transformers(olmoe, tmp_path, capsys):
    flags = ["--model", str(olmoe.folder), "--prompts", "5", "--batch", "2", "--repeats", "2"]
    rows = bench.main(["generate", *flags, "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["name"] for row in rows] == ["hellora", "transformers"]
    ours, theirs = rows
    assert ours["samples_per_s"] == pytest.approx(5 / statistics.median(ours["seconds"]))
    turns = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert ours["over_transformers"] == pytest.approx(statistics.median(turns)) and theirs["over_transformers"] == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("100.0 % of 5 answers are the same token for token")


def test_drawn_lengths_have_the_deciles_they_are_drawn_from():
    from benchmarks.generate import LENGTHS, draw_lengths

    for deciles in LENGTHS.values():
        drawn = draw_lengths(deciles, 300_000, random.Random(0))
        assert min(drawn) >= deciles[0] and max(drawn) <= deciles[-1]
        assert statistics.quantiles(drawn, n=10) == pytest.approx(deciles[1:-1], abs=1)
