"""Hostile sweeps, tables and pages of a scaling study are refused; see helpers/hostile.py."""

import json
import os
import shutil

import pytest
from helpers import hostile, sweep

from experiments.scaling.fits import table


@pytest.fixture
def search_path(tmp_path, marker):
    """Returns PATH with a Ghostscript, which Pillow starts for an EPS, that writes the marker."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


PICTURES = {
    "eps": lambda path: path.write_bytes(hostile.EPS),
    "pipe": hostile.replace_by_pipe,
    "zeros": hostile.replace_by_zeros,
    "large": lambda path: path.write_bytes(hostile.make_png(20_000, 20_000)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_hostile_pictures_of_a_sweep_are_refused(refuse, swept, tmp_path, search_path, kind):
    cells = shutil.copytree(swept, tmp_path / "sweep")
    path = next((cells / "XS-patch_size=2" / "evaluations").glob("20-*.png"))
    PICTURES[kind](path)
    flags = ["--workdir", cells, "--out", tmp_path / "x.csv", "--samples", tmp_path / "x.npz"]
    message = refuse("experiments.scaling.collect", *flags, PATH=search_path)
    assert f"evaluations/{path.name} of XS-patch_size=2 row" in message


def test_rows_that_name_pictures_elsewhere_are_refused(refuse, swept, tmp_path):
    cells = shutil.copytree(swept, tmp_path / "sweep")
    path = cells / "XS-patch_size=2" / "evaluations.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    for picture in ("../../secret.png", "/etc/passwd", "evaluations/\x1b[31m.png", "a\0"):
        path.write_text(json.dumps(row | {"picture": picture}) + "\n")
        flags = ["--workdir", cells, "--out", tmp_path / "x.csv", "--where", "num=100"]
        message = refuse("experiments.scaling.collect", *flags, "--samples", tmp_path / "x.npz")
        assert "cannot read the picture" in message


@pytest.mark.parametrize("command", ["sweep", "cell"])
def test_cells_are_not_written_through_links(refuse, digits_dir, tmp_path, outside, command):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "XS-patch_size=2").symlink_to(outside)
    flags = ["--config", "experiments/scaling/configs/smoke.py", "--workdir", tmp_path / "sweep"]
    flags += [f"--config.base.data.data_dir={digits_dir}"]
    if command == "cell":
        flags.append("--name=XS-patch_size=2")
    assert "XS-patch_size=2 is a link" in refuse(f"experiments.scaling.{command}", *flags)


@pytest.fixture
def study_table(tmp_path):
    table.write(tmp_path / "study.csv", sweep.study())
    return tmp_path / "study.csv"


TABLES = {
    "pipe": hostile.replace_by_pipe,
    "zeros": hostile.replace_by_zeros,
    "text": lambda path: path.write_bytes(b"\x89PNG\x1b[31m"),
    "columns": lambda path: path.write_text("cell,\x1b[31m\n1,2\n"),
    "number": lambda path: path.write_text(path.read_text().replace(",adaLN-Zero,", ",x,\x1b", 1)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_hostile_tables_are_refused(refuse, study_table, tmp_path, kind):
    page = tmp_path / "page.md"
    page.write_text("{eval_mse_summary}")
    TABLES[kind](study_table)
    flags = ["--table", study_table]
    refuse("experiments.scaling.fit", *flags)
    refuse("experiments.scaling.plot", *flags)
    refuse("experiments.scaling.report", *flags, "--page", page, "--out", tmp_path / "x.md")


@pytest.mark.parametrize("value", ["1.7e308", "-1.7e308", "5e-324", "inf", "9" * 4000])
def test_numbers_that_cannot_be_drawn_are_refused(refuse, study_table, value):
    lines = [line.split(",") for line in study_table.read_text().splitlines()]
    lines[1][lines[0].index("eval_mse")] = value
    study_table.write_text("\n".join(map(",".join, lines)) + "\n")
    assert "study.csv:2 has eval_mse=" in refuse("experiments.scaling.plot", "--table", study_table)


@pytest.mark.parametrize(
    "kind", hostile.mark_slow(["pickle", "huge", "bomb", "names", "text"], quick=["pickle"])
)
def test_hostile_samples_of_a_study_are_refused(refuse, study_table, marker, tmp_path, kind):
    hostile.ARRAYS[kind](tmp_path / "x.npz", marker)
    flags = ["--table", study_table, "--qualities=", "--samples", tmp_path / "x.npz"]
    refuse("experiments.scaling.plot", *flags)


PAGES = {
    "wide": b"{table:>3000000000}",
    "attribute": b"{rows.__class__.__init__}",
    "code": b"{rows.__class__.__subclasses__()}",
    "bytes": b"\xff\xfe{\0",
    "open": b"{\x1b[31m",
    "name": b"{\x1b[31m}",
}


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_pages_are_refused(refuse, study_table, tmp_path, kind):
    page, out = tmp_path / "page.md", tmp_path / "x.md"
    page.write_bytes(PAGES[kind])
    flags = ["--table", study_table, "--page", page, "--out", out]
    assert "page.md" in refuse("experiments.scaling.report", *flags)
    assert not out.exists()
