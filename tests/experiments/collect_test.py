"""The table of a sweep: what a row says, and which rows it refuses."""

import contextlib
import csv
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax import conditions, models
from dit_jax.sampling import generate, runs
from dit_jax.system import json_files
from experiments.scaling.cells import collect, grid
from experiments.scaling.configs import smoke
from experiments.scaling.fits import selection, table


@pytest.fixture
def workdir(swept, tmp_path):
    """A copy of a finished sweep, to change."""
    return shutil.copytree(swept, tmp_path / "sweep")


@pytest.fixture
def append(workdir):
    """append(**changes): another row of the first cell, like its last but for the changes."""
    path = workdir / "XS-patch_size=2" / "evaluations.jsonl"

    def append(sample=(), **changes):
        row = json_files.read_json_lines(path)[-1]
        row |= {**changes, "sample": row["sample"] | dict(sample)}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return append


def test_rows_say_what_was_run(swept):
    rows = collect.collect(swept)
    assert [(row["cell"], row["step"]) for row in rows] == [
        ("XS-patch_size=4", 10),
        ("XS-patch_size=4", 20),
        ("XS-patch_size=2", 10),
        ("XS-patch_size=2", 20),
    ]
    row = rows[-1]
    config = smoke.get_config()
    cell = next(c for c in grid.make_cells(config) if c.name == row["cell"])
    counts = models.count(cell.config)
    expected = dict(
        grid="main",
        model="XS/2",
        size="XS",
        block="adaLN-Zero",
        depth=1,
        hidden_size=16,
        num_heads=1,
        patch_size=2,
        tokens=16,
        params=counts["params"],
        gmacs=counts["gmacs"],
        seed=0,
        learning_rate=0.003,
        batch_size=16,
        eval_draws=2,
        images_seen=320,
        train_gflops=320 * 6 * counts["gmacs"],
        sampler="ddim",
        sampling_steps=5,
        cfg_scale=1.0,
        num=100,
        extractor="pixels",
    )
    assert {name: row[name] for name in expected} == expected
    lines = json_files.read_json_lines(swept / row["cell"] / "metrics.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert [r["eval_loss"] for r in rows[2:]] == [losses[10], losses[20]]
    evaluated = json_files.read_json_lines(swept / row["cell"] / "evaluations.jsonl")
    assert [r["fd_pixels"] for r in rows[2:]] == [r["fd_pixels"] for r in evaluated]
    assert not {"seconds", "img_per_s", "picture", "workdir"} & row.keys()  # differ, run by run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sample=dict(cfg_scale=1.5)), "cfg_scale: 1.0 in 4 rows, 1.5 in 1 rows"),
        (dict(sample=dict(steps=9)), "steps: 5 in 4 rows, 9 in 1 rows"),
        (dict(sample=dict(sampler="ddpm")), 'sampler: "ddim" in 4 rows, "ddpm" in 1 rows'),
        (dict(sample=dict(num=50)), "num: 100 in 4 rows, 50 in 1 rows"),
        (dict(sample=dict(raw=True)), "raw: false in 4 rows, true in 1 rows"),
        (dict(sample=dict(vae_digest="x")), 'vae_digest: "" in 4 rows, "x" in 1 rows'),
        (dict(reference=dict(name="x", digest="y")), "reference.digest: "),
        (dict(extractor=dict(name="inception")), 'extractor.name: "pixels" in 4 rows'),
    ],
    ids=str,
)
def test_rows_that_were_not_measured_alike_are_refused(workdir, append, change, message):
    append(**change)
    with pytest.raises(ValueError, match=message) as refused:
        collect.collect(workdir)
    assert "--where" in str(refused.value)


def test_where_chooses_among_them(workdir, append):
    """Also among those of evaluations beside the sweep's, which do not count without."""
    append(sample=dict(cfg_scale=1.5), fd_pixels=7.0, picture="evaluations/other.png")
    assert len(collect.collect(workdir)) == 4
    (row,) = collect.collect(workdir, ["cfg_scale=1.5"])
    assert (row["fd_pixels"], row["cfg_scale"]) == (7.0, 1.5)
    assert len(collect.collect(workdir, ["cfg_scale=1"])) == 4


def test_bits_of_held_out_images_are_no_row(workdir):
    path = workdir / "XS-patch_size=2" / "evaluations.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 20, "likelihood": {}, "bits_per_dim": 3.0}) + "\n")
    assert collect.collect(workdir) == collect.collect(workdir, ["num=100"])
    assert collect.read_samples(workdir)["image"].shape == (2, 10, 8, 8, 1)


def test_other_axes_of_the_sweep_are_columns(workdir, tmp_path):
    for name, decay in (("XS-patch_size=2", 0.1), ("XS-patch_size=4", "none")):
        path = workdir / name / "cell.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"axes": {"optim.weight_decay": decay}}))
    rows = collect.collect(workdir)
    assert [row["optim.weight_decay"] for row in rows] == ["none", "none", 0.1, 0.1]
    table.write(tmp_path / "table.csv", rows)
    assert table.to_rows(table.read(tmp_path / "table.csv")) == rows
    others = [rows[0], {**rows[0], "seed": 5}, {**rows[0], "optim.weight_decay": [0.2]}]
    first, same, other = selection.name_models(table.from_rows(others))
    assert first == same != other


def test_of_rows_measured_again_the_last_counts(workdir, append):
    append(fd_pixels=7.0, git_revision="other")
    rows = collect.collect(workdir)
    assert len(rows) == 4
    assert (rows[-1]["fd_pixels"], rows[-1]["git_revision"]) == (7.0, "other")


def test_cells_without_samples_have_their_losses(workdir):
    """As of config.evaluate.num = 0; a run that goes on has the points that it has reached."""
    (workdir / "XS-patch_size=2" / "evaluations.jsonl").unlink()
    path = workdir / "XS-patch_size=2" / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < 20]
    path.write_text("\n".join(lines))
    rows = collect.collect(workdir)
    assert [(row["model"], row["step"]) for row in rows] == [
        ("XS/4", 10),
        ("XS/4", 20),
        ("XS/2", 10),
    ]
    assert rows[-1]["eval_loss"] > 0
    assert not {"fd_pixels", "sampler"} & rows[-1].keys()
    assert rows[-1]["git_revision"] == rows[0]["git_revision"]
    assert [row["model"] for row in collect.collect(workdir, ["num=100"])] == ["XS/4", "XS/4"]
    (workdir / "XS-patch_size=4" / "evaluations.jsonl").unlink()
    assert len(collect.collect(workdir)) == 3


@pytest.mark.parametrize("make", [shutil.copytree, shutil.move, os.symlink])
def test_directory_of_another_name_than_its_cell_s_is_refused(workdir, make, tmp_path):
    """A copy of it would have the same rows again."""
    cell, other = workdir / "XS-patch_size=2", workdir / "XS-patch_size=2 (copy)"
    make(cell, other)
    message = re.escape(f"{other} holds the cell of {cell}: ")
    with pytest.raises(ValueError, match=message):
        collect.write(workdir, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()
    # A sweep's own table has its own cells, wherever others lie.
    names = ["XS-patch_size=4", "XS-patch_size=2"][: 1 if make is shutil.move else 2]
    rows = collect.write(workdir, tmp_path / "table.csv", cells=names)
    assert len(rows) == 2 * len(names)
    assert json.loads((tmp_path / "table.cost.json").read_text())["cells"] == len(names)


STRANGE = (None, [], [1, 2], {}, "x", True, -1, 1e400, 10**400, {"a": [{}]}, [["x"]])


def _damage(path, text, key, value, tail=""):
    """Writes the JSON `text` with another value of 'key' or 'key.inner' to the path."""
    value_of = json.loads(text)
    *groups, name = key.split(".", 1)
    (value_of[groups[0]] if groups else value_of)[name] = value
    path.write_text(json.dumps(value_of) + tail)


def test_damaged_rows_are_left_out_and_said(workdir, caplog):
    """Each value of a row in turn; that of a later code is no damage."""
    directory = workdir / "XS-patch_size=2"
    path = directory / "evaluations.jsonl"
    first, last = path.read_text().splitlines()
    row = json.loads(last)
    keys = [*row, *(f"{outer}.{key}" for outer in ("sample", "extractor") for key in row[outer])]
    for key in keys:
        for value in (None, [1], {}, "x"):
            _damage(path, last, key, value, f"\n{first}\n")
            with contextlib.suppress(ValueError):  # of rows that were not measured alike
                assert len(collect.collect(workdir, cells=[directory.name])) == 2
    caplog.clear()
    damages = {"picture": 5, "sample": 5, "step": "x", "fd_pixels": "x", "extractor": None}
    for key, value in damages.items():
        _damage(path, last, key, value, f"\n{first}\n")
        rows = collect.collect(workdir, cells=[directory.name])
        assert [(row["step"], "fd_pixels" in row) for row in rows] == [(10, True), (20, False)]
        message = (
            f"1 damaged lines of {path} are left out, the first is line 1, with a wrong {key}."
        )
        assert caplog.messages.pop() == message
    path.write_text("\n".join([first, last.replace("picture", "piktures")]) + "\n")
    collect.collect(workdir)
    assert "line 2, with a wrong picture." in caplog.text


def test_damaged_record_of_a_cell_is_refused_with_the_way_out(workdir):
    path = workdir / "XS-patch_size=2" / "cell.json"
    text = path.read_text()
    legal = {"steps": ([], [1, 2]), "axes": ({},), "pictures": ([],), "wall_seconds": (-1,)}
    legal |= dict.fromkeys(("name", "grid", "size", "git_revision", "device"), ("x",))
    for key in (*legal, "state", "devices"):
        for value in STRANGE:
            if any(value is allowed or value == allowed for allowed in legal.get(key, ())):
                continue
            _damage(path, text, key, value)
            message = (
                f"{path} is damaged: it is no record of a cell, with a wrong {key}. Run the sweep "
            )
            with pytest.raises(ValueError, match=re.escape(message)):
                collect.collect(workdir)
            with pytest.raises(ValueError, match=re.escape(message)):
                collect.sum_costs(workdir, [path.parent.name])
    for columns in ({"step": "x"}, {"gmacs": [1]}, {"a": [[1]]}):
        _damage(path, text, "axes", columns)
        with pytest.raises(ValueError, match="with a wrong axes"):
            collect.collect(workdir)


@pytest.mark.parametrize(("key", "value"), [("model.depth", None), ("batch_size", None)], ids=str)
def test_damaged_config_of_a_cell_is_read_from_its_checkpoint(workdir, swept, key, value):
    path = workdir / "XS-patch_size=2" / "config.json"
    _damage(path, path.read_text(), key, value)
    assert collect.collect(workdir) == collect.collect(swept)
    for copy in path.parent.glob("checkpoints/*/config/metadata"):
        copy.write_text(path.read_text())
    with pytest.raises(ValueError, match=rf"config\.json is not used: {key}=None must be a whole"):
        collect.collect(workdir)


def test_directory_without_cells_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cells: .*experiments.scaling.sweep"):
        collect.collect(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no table .*experiments.scaling.collect"):
        table.read(tmp_path / "table.csv")


def test_samples_are_those_of_the_evaluation(swept):
    found = collect.read_samples(swept)
    assert found["cell"].tolist() == ["XS-patch_size=4", "XS-patch_size=2"]
    assert found["image"].shape == (2, 10, 8, 8, 1)
    assert found["label"].tolist() == list(range(10))
    trained = runs.load(swept / "XS-patch_size=2", 20)
    sample = trained.make_sample_fn()
    request = conditions.from_labels(np.arange(16) % 10, 10)
    arguments = sample, trained.params, request, 0, trained.mesh, trained.to_image
    images = generate.generate(*arguments)
    differences = np.abs(found["image"][1].astype(int) - images[:10])
    assert differences.max() <= 1  # another batch size
    assert images.std() > 10


def _outside(path):
    Image.new("RGB", (498, 498)).save(path.parents[2] / "x.png")
    return "../x.png"


def _absolute(path):
    return str((path.parents[2] / _outside(path)).resolve().with_name("x.png"))


def _elsewhere_in_the_cell(path):
    shutil.copy(path, path.parents[1] / "x.png")
    return "x.png"


def _link(path):
    path.rename(path.parents[1] / "x.png")
    path.symlink_to(path.parents[1] / "x.png")


def _linked_directory(path):
    path.parent.rename(path.parents[2] / "x")
    path.parent.symlink_to(path.parents[2] / "x")


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _eps(path):
    Image.new("RGB", (498, 498)).save(path, "EPS")


def _other_size(path):
    Image.new("RGB", (50, 49)).save(path, "PNG")


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (_outside, "it is not in the cell's directory evaluations"),
        (_absolute, "it is not in the cell's directory evaluations"),
        (_elsewhere_in_the_cell, "it is not in the cell's directory evaluations"),
        (_link, "it is no file there; links, pipes and devices are not read"),
        (_linked_directory, "it is no file there"),
        (_pipe, "it is no file there"),
        (pathlib.Path.unlink, "it is no file there"),
        (_eps, "it is an EPS image; PNG, JPEG, WEBP and BMP are read"),
        (_other_size, "pixels are no grid of images of 8 x 8 pixels"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_pictures_that_are_no_file_of_their_cell_are_refused(workdir, append, replace, message):
    directory = workdir / "XS-patch_size=2"
    name = json_files.read_json_lines(directory / "evaluations.jsonl")[-1]["picture"]
    append(picture=(changed := replace(directory / name) or name))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        collect.read_samples(workdir, ["num=100"])
    shown = f"cannot read the picture {changed} of XS-patch_size=2 row 3 in {directory}: "
    assert shown in str(refused.value)


def test_labels_of_the_picture_are_drawn_alone(workdir, append):
    """Whatever number of samples a row has: those of the first images stay the same."""
    with pytest.MonkeyPatch.context() as patch:
        draw = conditions.draw_labels

        def draw_few(kind, num, *rest):
            assert num <= 100
            return draw(kind, num, *rest)

        patch.setattr(conditions, "draw_labels", draw_few)
        append(sample=dict(num=2**40))
        assert collect.read_samples(workdir, [f"num={2**40}"])["image"].shape == (1, 10, 8, 8, 1)
    for kind in ("random", "balanced"):
        for num_classes in (1, 7, 10, 1000):
            first = conditions.draw_labels(kind, 100, num_classes, 3)
            np.testing.assert_array_equal(
                conditions.draw_labels(kind, 50_000, num_classes, 3)[:100], first
            )


def test_samples_of_several_shapes_are_refused(workdir):
    path = next((workdir / "XS-patch_size=4" / "evaluations").glob("20-*.png"))
    with Image.open(path) as image:
        cut = image.crop((0, 0, 248, 48))  # the first five alone
    cut.save(path)
    with pytest.raises(ValueError, match=r"have several shapes, \[\(5, 8, 8, 1\), \(10, 8, 8, 1"):
        collect.read_samples(workdir)


def test_command_writes_table_cost_and_samples(swept, tmp_path, run_command):
    out = tmp_path / "out" / "table.csv"
    npz = tmp_path / "out" / "samples.npz"
    printed = run_command(
        "experiments.scaling.collect", f"--workdir={swept}", f"--out={out}", f"--samples={npz}"
    )
    assert "4 rows of 2 cells" in printed
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 4
    cost = json.loads(out.with_suffix(".cost.json").read_text())
    assert cost["cells"] == 2
    assert cost["hours"] == pytest.approx(sum(cost["cells_seconds"].values()) / 3600, abs=1e-3)
    with np.load(npz) as file:
        assert set(file.files) == {"image", "label", "cell"}
