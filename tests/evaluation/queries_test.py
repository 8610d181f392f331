"""Rows are read from files and selected by --where; damaged rows are left out."""

import contextlib
import json
import re

import pytest
from helpers.evaluations import make_row

from dit_jax.evaluation import curves, queries


def test_where_selects_rows_by_typed_values():
    rows = [make_row(cfg_scale=cfg, raw=raw) for cfg in (1.0, 1.5) for raw in (False, True)]
    assert queries.select(rows, "cfg_scale=1,raw=true") == [rows[1]]
    assert queries.select(rows, "cfg_interval=0,1,cfg_scale=1.50,sampler=ddpm") == rows[2:]
    assert queries.select(rows, "step=400") == rows  # 'steps' is another setting
    for condition, message in {
        "sampler=ddim": "no row has sampler=ddim. The rows have sampler ddpm.",
        "cfg_scale=1,cfg_scale=1.5": "no row has cfg_scale=1.5. The rows have cfg_scale 1.",
        "sampel=ddpm": "no row has 'sampel' of --where. The rows have .*sampler",
        "sampler": "'sampler' is not of the form NAME=VALUE",
    }.items():
        with pytest.raises(ValueError, match=message):
            queries.select(rows, condition)


def test_rows_have_the_name_of_their_workdir(tmp_path):
    for name in ("x/dit/evaluations.jsonl", "y/dit/evaluations.jsonl", "adm.evaluations.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"fid": 1.0}\n{"fid": 2.0}\n{"fi')
    rows = queries.read([f"{tmp_path}/*/dit/*.jsonl", f"{tmp_path}/x/**/*.jsonl"])
    assert [row["workdir"] for row in rows] == ["x/dit"] * 2 + ["y/dit"] * 2
    assert rows[3]["place"] == f"{tmp_path}/y/dit/evaluations.jsonl row 2"
    names = {row["workdir"] for row in queries.read([f"{tmp_path}/*.jsonl", f"{tmp_path}/x/*/*"])}
    assert names == {"adm", "dit"}
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file {tmp_path}/z*")):
        queries.read([f"{tmp_path}/x/*/*", f"{tmp_path}/z*"])


VALUES = (None, [], [1, 2], {}, "x", True, -1, 0, 1e400, 10**400, {"a": [{}]}, [["x"]], ["x", 1])


def _list_keys(row, prefix=()):
    """Yields each key of a row as a tuple, with the keys of the objects that contain it."""
    for name, value in row.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _list_keys(value, (*prefix, name))


@pytest.mark.parametrize("kind", ["sample", "samples", "likelihood"])
def test_wrong_values_raise_no_error_but_value_error(tmp_path, kind):
    """A wrong value for each key in turn: rows are drawn, left out or refused."""
    row = make_row(fid=3.0, jax="0.10")
    if kind == "likelihood":
        row = {"step": 400, "likelihood": {"kind": "vlb", "num": 100, "steps": 9}, "fid": 3.0}
        row["bits_per_dim"] = 3.5
    elif kind == "samples":
        row["samples"] = {"name": "a.npz", "num": 50, "digest": "d"}
        del row["sample"], row["step"]
    path, text = tmp_path / "evaluations.jsonl", json.dumps(row)
    for key in [*_list_keys(row), ("other",)]:
        for value in VALUES:
            damaged = json.loads(text)
            section = damaged
            for name in key[:-1]:
                section = section[name]
            section[key[-1]] = value
            path.write_text(f"{json.dumps(damaged)}\n{text}\n{json.dumps(damaged)}\n")
            rows = queries.read([str(path)])
            assert len(rows) in (1, 3)
            for x in ("cfg_scale", "step", key[-1], ".".join(key)):
                with contextlib.suppress(ValueError):
                    queries.select(rows, f"{x}=1")
                with contextlib.suppress(ValueError):
                    curves.from_rows(rows, x, "fid")


@pytest.mark.parametrize(
    ("key", "value"),
    [("sample", 5), ("sample", [1]), ("step", "x"), ("step", []), ("samples", 7), ("fid", "x")],
    ids=str,
)
def test_damaged_row_is_left_out_with_a_warning(tmp_path, caplog, key, value):
    path = tmp_path / "evaluations.jsonl"
    rows = [make_row(cfg_scale=1, fid=2.0), make_row(cfg_scale=2, fid=2.0) | {key: value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (curve,) = curves.from_rows(queries.read([str(path)]), "cfg_scale", "fid")
    assert curve.means() == [(1, 2.0)]
    expected_message = (
        f"1 damaged lines of {path} are left out, the first is line 2, with a wrong {key}."
    )
    assert caplog.messages == [expected_message]
