"""The page of a study: numbers out of its table, and templates that ask for more than there is."""

import json
import re
import types

import pytest

from experiments.scaling import report as report_command
from experiments.scaling.fits import report, table


def _row(size, patch_size, seed, step, eval_mse, block="adaLN-Zero", **more):
    gmacs = {"S": 1e-3, "M": 4e-3, "L": 2e-2}[size] * 16 / patch_size**2
    return dict(
        cell=f"{size}-{patch_size}-{seed}-{block}",
        grid="main",
        model=f"{size}/{patch_size}",
        size=size,
        block=block,
        depth=2,
        hidden_size={"S": 32, "M": 64, "L": 128}[size],
        num_heads=1,
        patch_size=patch_size,
        tokens=16 // patch_size**2,
        params=1000,
        gmacs=gmacs,
        seed=seed,
        step=step,
        batch_size=8,
        learning_rate=1e-3,
        images_seen=8 * step,
        train_gflops=48 * step * gmacs,
        eval_mse=eval_mse,
        fd_pixels=3 * eval_mse,
        sampler="ddim",
        sampling_steps=5,
        cfg_scale=1.0,
        num=100,
        extractor="pixels",
        reference="digits:train",
        **more,
    )


@pytest.fixture
def rows():
    """Three sizes, one patch size, two seeds, two steps; eval_mse 0.5 and 0.7 at the last of S."""
    return [
        _row(size, 2, seed, step, loss - step / 1000 + 0.2 * seed)
        for size, loss in (("S", 0.52), ("M", 0.42), ("L", 0.32))
        for seed in (0, 1)
        for step in (10, 20)
    ]


@pytest.fixture
def study(rows, tmp_path):
    """The table's path, with its cost and a figure."""
    table.write(tmp_path / "results" / "study.csv", rows)
    cost = dict(cells=6, hours=1.25, devices=["1 x cpu"])
    (tmp_path / "results" / "study.cost.json").write_text(json.dumps(cost))
    (tmp_path / "results" / "figures").mkdir()
    (tmp_path / "results" / "figures" / "gflops_eval_mse.png").write_bytes(b"")
    return tmp_path / "results" / "study.csv"


def test_models_are_means_over_seeds_at_the_last_step(rows):
    at = report.average_last_step(table.from_rows(rows[::-1]), ["eval_mse"])
    assert list(at) == ["S/2", "M/2", "L/2"]
    assert at["S/2"]["seeds"] == 2
    assert at["S/2"]["eval_mse"] == pytest.approx(0.6)
    assert at["S/2"]["eval_mse_std"] == pytest.approx(0.2 / 2**0.5)
    text = report.format_models(at, ["eval_mse"])
    assert text.splitlines()[0] == "| model | hidden | depth | tokens | params | gmacs | eval_mse |"
    assert text.splitlines()[2] == "| S/2 | 32 | 2 | 4 | 1,000 | 0.004 | 0.6 ± 0.14 |"


def test_blocks_are_models_of_their_own(rows):
    rows += [_row("S", 2, 0, 20, 0.9, block="in-context")]
    at = report.average_last_step(table.from_rows(rows), ["eval_mse"])
    assert at["S/2 in-context"]["eval_mse"] == 0.9
    assert at["S/2"]["eval_mse"] == pytest.approx(0.6)


def test_models_that_differ_otherwise_are_not_seeds(rows):
    rows += [{**_row("S", 2, 0, 20, 0.9), "depth": 4}]
    at = report.average_last_step(table.from_rows(rows), ["eval_mse"])
    assert at["S/2"]["eval_mse"] == pytest.approx(0.6)
    assert at["S/2 32x4"]["eval_mse"] == 0.9
    decayed = [row | {"optim.weight_decay": decay} for row in rows[:12] for decay in (0.0, 0.1)]
    at = report.average_last_step(table.from_rows(decayed), ["eval_mse"])
    assert list(at)[:2] == ["S/2 weight_decay=0.0", "S/2 weight_decay=0.1"]
    assert at["S/2 weight_decay=0.1"]["seeds"] == 2


def test_page_is_written_from_table_fits_and_figures(study, tmp_path, run_command):
    page, out = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text(
        "{rows} rows, {models} models, range {range:.0f}, steps {steps}.\n{table}\n"
        "{figures[gflops_eval_mse]}\n{cost}\nS/2: {at[S/2][fd_pixels]:.2f}\n"
        "{eval_mse[seeds]} seeds\n{eval_mse_summary}\n"
    )
    flags = [f"--table={study}", f"--page={page}", f"--out={out}"]
    assert str(out) in run_command("experiments.scaling.report", *flags)
    text = out.read_text()
    page.write_bytes(b"\xef\xbb\xbf" + page.read_bytes().replace(b"\n", b"\r\n"))
    run_command("experiments.scaling.report", *flags)
    assert out.read_text() == text  # also of a page as other editors save it
    assert "12 rows, 3 models, range 20, steps 10, 20." in text
    assert "![gflops_eval_mse](results/figures/gflops_eval_mse.png)" in text
    assert "6 cells, 1.2 hours added up, each on 1 x cpu" in text
    assert "S/2: 1.80" in text
    assert "2 seeds" in text
    page.write_text("{at[XL/2][fd_pixels]}")
    error = run_command("experiments.scaling.report", *flags, fails=True)
    assert "page.md uses the field 'XL/2'" in error
    assert "Traceback" not in error
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"{table:>3000000000}", "cannot be filled: the format '>3000000000' is wider than 999."),
        (b"{table:>{wide}}", "cannot be filled: the format '>3000000000' is wider than 999."),
        (b"{range:.2000f}", "cannot be filled: the format '.2000f' is wider than 999."),
        ("{table:>\u0661\u0661\u0661\u0661}".encode(), "is wider than 999."),
        (b"{table}" * 10**6, "cannot be filled: its fields have more than 16,777,216 characters."),
        (b"{rows.__class__}", "cannot be filled: 'rows.__class__' is an attribute; write [KEY]"),
        (b"{at[M/1.5 x].__init__.__globals__}", "is an attribute; write [KEY]"),
        (b"{table[x]}", "cannot be filled: string ind"),
        (b"{at:>5}", "cannot be filled: unsupported format string passed to dict.__format__."),
        (b"{at[M/1.5 x][eval_mse]:y}", "cannot be filled: Unknown format code 'y'"),
        (b"{}", "which study.csv does not give. The fields are rows, table,"),
        (b"{a", "is no template: expected '}' before end of string."),
        (b"caf\xe9", "is not in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (b"x" * (2**24 + 1), "has more than 16,777,216 bytes, the most of a page."),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:30]),
)
def test_pages_that_a_stranger_has_written(tmp_path, monkeypatch, template, message):
    """None of them reaches Python's objects, or makes a text as large as no memory."""
    values = {"rows": 3, "table": "x" * 100, "wide": "3000000000", "range": 1.5}
    values["at"] = {"M/1.5 x": {"eval_mse": 0.5}}
    monkeypatch.setattr(report, "make_fields", lambda *_: values)
    monkeypatch.setattr(report_command.cli, "check_out", lambda *_: None)
    given = {"page": tmp_path / "page.md", "out": tmp_path / "x.md", "table": "study.csv"}
    monkeypatch.setattr(report_command, "FLAGS", types.SimpleNamespace(qualities=[], **given))
    given["page"].write_bytes(template)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        report_command.main([])
    assert str(refused.value).startswith(f"{tmp_path / 'page.md'} ")
    assert not given["out"].exists()
    given["page"].write_bytes(b"{at[M/1.5 x][eval_mse]:+.1%} {{{rows!r:>3}}} {table:.2}\r\n")
    report_command.main([])
    assert given["out"].read_bytes() == b"+50.0% {  3} xx\n"


def test_cost_that_was_not_recorded_is_not_measured(tmp_path):
    assert report.describe_cost(tmp_path / "study.cost.json") == "not measured"
