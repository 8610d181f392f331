"""matplotlib is imported in one place, whatever MPLBACKEND is."""

import ast
import json
import pathlib

import numpy as np
from helpers.sweep import rows_of, samples_of

from experiments.scaling.fits import table

ROOT = pathlib.Path(__file__).parents[2]
JUPYTER = "module://matplotlib_inline.backend_inline"


def _list_imports(path):
    """Yields the names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_matplotlib_is_imported_in_one_place():
    paths = [p for folder in ("dit_jax", "experiments") for p in (ROOT / folder).rglob("*.py")]
    actual = {
        str(path.relative_to(ROOT))
        for path in paths
        if any(name.partition(".")[0] == "matplotlib" for name in _list_imports(path))
    }
    assert actual == {"dit_jax/evaluation/plot_style.py"}


def test_plots_are_drawn_whatever_the_backend(zygote, tmp_path):
    """A terminal inside Jupyter sets MPLBACKEND to a module that may not be installed."""
    rows, out = tmp_path / "evaluations.jsonl", tmp_path / "x.png"
    rows.write_text(json.dumps({"step": 1, "fid": 2.0}) + "\n")
    plot = ["plot", "--rows", rows, "--x", "step", "--y", "fid", "--out", out]
    table.write(tmp_path / "toy.csv", rows_of("XS", 2, seeds=1))
    np.savez(tmp_path / "samples.npz", **samples_of(["XS/2"]))
    study = ["experiments.scaling.plot", "--table", tmp_path / "toy.csv", "--qualities="]
    study += ["--samples", tmp_path / "samples.npz"]
    for backend in ("nonsense", JUPYTER):
        for command in (plot, study):
            answer, _, error = zygote(*command, MPLBACKEND=backend)
            assert answer["status"] == 0, error
    assert out.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "samples.svg").exists()
