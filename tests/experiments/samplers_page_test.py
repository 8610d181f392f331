"""The comparisons of samplers keep what they do not measure; their page has their results."""

import json
import pathlib

import pytest

from experiments.samplers import compare, compare_published, page

ROOT = pathlib.Path(__file__).parents[2]


def _lines(name="results"):
    path = ROOT / "experiments" / "samplers" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_speeds_alone_are_measured_anew(monkeypatch):
    monkeypatch.setattr(compare, "measure_speed", lambda process, settings: {"img_per_s": 1.0})
    for line, before in zip(compare.measure_speeds(_lines()), _lines(), strict=True):
        guided = before["cfg_scale"] == compare.GUIDANCE[0]
        assert line == before | ({"img_per_s": 1.0} if guided else {})
    other = _lines()
    other[2]["steps"] = 99
    with pytest.raises(ValueError, match=r"'steps': 99.* where ddpm, .*'steps': 100.* is expected"):
        list(compare.measure_speeds(other))


def test_page_has_the_table_of_the_results():
    text = (ROOT / "docs" / "samplers.md").read_text()
    table = page.make_results_table(_lines())
    assert table in text
    assert table.count("\n") == 1 + len(compare.ROWS)


def test_page_has_the_table_of_the_originals():
    text = (ROOT / "docs" / "samplers.md").read_text()
    assert page.make_originals_table(_lines("originals")) in text


def test_originals_are_as_far_away_as_the_page_says():
    """Measured anew; from 11 steps on DPM-Solver's are ours, so its steps are written out right."""
    rows = [row for row in compare_published.ROWS if row[1] != "dpmpp2m" or row[4] > 8][::2]
    known = {tuple(list(line.values())[:5]): line for line in _lines("originals")}
    measured = list(compare_published.measure(tuple(rows)))
    for line in measured:
        line_before = known[tuple(list(line.values())[:5])]
        for name in ("difference", "error", "original_error"):
            assert line[name] == pytest.approx(line_before[name], rel=0.02, abs=1e-9)
    assert {line["sampler"] for line in measured} == {"ab4", "dpmpp2m", "euler"}
    assert len(known) == len(compare_published.ROWS)
    assert all(
        (line["difference"] < 1e-12) == (line["steps"] == 11)
        for line in _lines("originals")
        if line["sampler"] == "dpmpp2m"
    )
