"""The comparison of samplers keeps what it does not measure; its page has its results."""

import json
import pathlib

import pytest

from experiments.samplers import compare, page

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "samplers" / "results.jsonl"


def _lines():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def test_speeds_alone_are_measured_anew(monkeypatch):
    monkeypatch.setattr(compare, "speed", lambda process, settings: {"img_per_s": 1.0})
    for line, before in zip(compare.measure_speeds(_lines()), _lines(), strict=True):
        guided = before["cfg_scale"] == compare.GUIDANCE[0]
        assert line == before | ({"img_per_s": 1.0} if guided else {})
    other = _lines()
    other[2]["steps"] = 99
    with pytest.raises(ValueError, match=r"'steps': 99.* where ddpm, .*'steps': 100.* is expected"):
        list(compare.measure_speeds(other))


def test_page_has_the_table_of_the_results():
    text = (ROOT / "docs" / "samplers.md").read_text()
    table = page.table(_lines())
    assert table in text
    assert table.count("\n") == 1 + len(compare.ROWS)
