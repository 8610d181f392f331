"""Which rows become which points of which curve, and which are refused."""

import contextlib
import io
import json
import re
import warnings

import pytest

from dit_jax.evaluation import plots
from dit_jax.system import files


def _row(sampler="ddpm", steps=250, cfg_scale=1.5, seed=0, step=400, **values):
    """As evaluate.py writes it; keys of 'sample' and others may be overridden by `values`."""
    sample = {
        "sampler": sampler,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "grid": "uniform",
        "rho": 7.0,
        "eta": 0.0,
        "variance": "large",
        "cfg_interval": [0.0, 1.0],
        "num": 50_000,
        "seed": seed,
        "raw": False,
    }
    sample |= {key: values.pop(key) for key in list(values) if key in sample or "guide" in key}
    row = {"workdir": "dit", "step": step, "sample": sample, "gmacs": 118.6, "picture": "a.png"}
    row |= {"images_seen": step * 256, "train_gflops": step * 1e5, "img_per_s": None}
    row["extractor"] = {"name": "inception", "dtype": "float32", "digest": "i0"}
    row["reference"] = {"name": "imagenet256.npz", "digest": "r0"}
    return row | values


def _means(found):
    return {curve.label: curve.means() for curve in found}


def test_curves_are_of_settings_that_differ_and_points_in_order():
    rows = [
        _row(sampler, steps, cfg_scale, fid=steps + cfg_scale)
        for sampler, steps in (("dpmpp2m", 20), ("ddpm", 250))
        for cfg_scale in (4, 1, 1.5)
    ]
    assert _means(plots.curves(rows, "cfg_scale", "fid")) == {
        "ddpm, 250 steps": [(1, 251), (1.5, 251.5), (4, 254)],
        "dpmpp2m, 20 steps": [(1, 21), (1.5, 21.5), (4, 24)],
    }
    assert list(_means(plots.curves(rows, "steps", "fid"))) == [
        f"{sampler}, guidance scale {cfg}" for sampler in ("ddpm", "dpmpp2m") for cfg in (1, 1.5, 4)
    ]
    assert _means(plots.curves(rows[3:], "cfg_scale", "fid")).keys() == {""}
    by_sampler = _means(plots.curves(plots.where(rows, "cfg_scale=1"), "sampler", "fid"))
    assert by_sampler == {"20 steps": [("dpmpp2m", 21)], "250 steps": [("ddpm", 251)]}


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{}, dict(step=1000)], ["step 400", "step 1,000"]),
        ([{}, dict(workdir="xl2", gmacs=5)], ["dit", "xl2"]),
        ([{}, dict(raw=True)], ["EMA", "raw parameters"]),
        (
            [{}, dict(guide="runs/s", guide_step=100)],
            ["no guide", "guided by runs/s, guide step 100"],
        ),
        ([{}, dict(grid="karras")], ["karras grid", "uniform grid"]),
        ([{}, dict(cfg_interval=[0.1, 0.8])], ["cfg interval 0 to 1", "cfg interval 0.1 to 0.8"]),
        ([{}, dict(sampler="ddim", eta=0.0)], ["ddim", "ddpm"]),
        ([dict(variance="small"), {}], ["large variance", "small variance"]),
        ([dict(grid="karras", rho=rho) for rho in (7, 5)], ["rho 5", "rho 7"]),
    ],
    ids=str,
)
def test_legend_names_only_what_differs(changes, labels):
    rows = [_row(cfg_scale=cfg, fid=cfg, **change) for change in changes for cfg in (1, 2)]
    assert [curve.label for curve in plots.curves(rows, "cfg_scale", "fid")] == labels


def test_settings_that_a_sampler_does_not_heed_make_no_curve():
    rows = [
        _row("dpmpp2m", cfg_scale=1, variance="large", rho=7, fid=1),
        _row("dpmpp2m", cfg_scale=2, variance="small", rho=5, fid=2),
    ]
    assert _means(plots.curves(rows, "cfg_scale", "fid")) == {"": [(1, 1), (2, 2)]}


def test_rows_of_an_older_version_are_of_the_same_curve():
    """Its last_step_size is last_step_t, 0 the default; its likelihoods were not clipped."""
    steps = (10, 20, 10, 20)
    rows = [_row("euler_maruyama", steps=n, fid=n + i) for i, n in enumerate(steps)]
    settings = ("size", 0.0), ("t", None), ("size", 0.1), ("t", 0.1)
    for row, (name, value) in zip(rows, settings, strict=True):
        row["sample"][f"last_step_{name}"] = value
    found = _means(plots.curves(rows, "steps", "fid"))
    assert sorted(found.values()) == [[(10, 10), (20, 21)], [(10, 12), (20, 23)]]
    older, plain, clipped = (
        {"step": step, "likelihood": {"kind": "vlb", "num": 100} | more, "bits_per_dim": 3.0}
        for step, more in ((1, {}), (2, {"clip_x_0": False}), (1, {"clip_x_0": True}))
    )
    found = _means(plots.curves([older, plain, clipped], "step", "bits_per_dim"))
    assert list(found.values()) == [[(1, 3), (2, 3)], [(1, 3)]]


def test_seeds_are_averaged_and_shown():
    rows = [_row(cfg_scale=1, seed=seed, fid=fid) for seed, fid in enumerate((4.0, 6.0, 8.0))]
    rows.append(_row(cfg_scale=2, fid=3.0))
    (curve,) = plots.curves(rows, "cfg_scale", "fid")
    assert curve.means() == [(1, 6), (2, 3)]
    axes = plots.draw(rows, "cfg_scale", "fid").axes[0]
    line, points = axes.lines
    assert line.get_xydata().tolist() == [[1, 6], [2, 3]]
    assert points.get_xydata().tolist() == [[1, 4], [1, 6], [1, 8]]
    assert points.get_linestyle() == "None"
    assert [text.get_text() for text in axes.get_legend().texts] == ["mean of 1 to 3 seeds"]
    rows[-1:] = [_row(cfg_scale=2, seed=seed, fid=3.0) for seed in range(3)]
    assert plots.curves(rows, "cfg_scale", "fid")[0].seeds() == "mean of 3 seeds"


def test_row_measured_again_replaces_the_former():
    rows = [_row(fid=4.0, git_revision="a"), _row(fid=5.0, git_revision="b")]
    assert _means(plots.curves(rows, "cfg_scale", "fid")) == {"": [(1.5, 5)]}
    rows[1]["workdir"] = "other"
    assert len(plots.curves(rows, "cfg_scale", "fid")) == 2


@pytest.mark.parametrize("x", ["step", "images_seen", "train_gflops"])
def test_checkpoints_of_a_run_are_one_curve(x):
    rows = [
        _row(step=step, workdir=workdir, fid=1e4 / step)
        for workdir in ("a", "b")
        for step in (1000, 400)
    ]
    found = _means(plots.curves(rows, x, "fid"))
    assert found["a"] == found["b"] == [(rows[1][x], 25), (rows[0][x], 10)]


def test_measure_against_measure_is_joined_and_labelled_by_guidance():
    recall = {1: 0.6, 1.5: 0.7, 4: 0.2}  # not monotonic
    rows = [_row(cfg_scale=cfg, recall=recall[cfg], precision=cfg / 5) for cfg in (4, 1, 1.5)]
    axes = plots.draw(rows, "recall", "precision").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.6, 0.2], [0.7, 0.3], [0.2, 0.8]]
    named = {text.get_text(): text.xy for text in axes.texts}
    assert named == {"1": (0.6, 0.2), "1.5": (0.7, 0.3), "4": (0.2, 0.8)}
    assert axes.get_legend().get_title().get_text() == "at points: guidance scale"
    assert axes.get_xlabel() == "recall"
    assert axes.get_ylabel() == "precision (50,000 samples)"


def test_models_are_named_points_that_no_line_joins():
    gmacs = {"s": 6.06, "b": 23.0, "xl": 118.6}
    rows = [_row(workdir=name, gmacs=g, fid=100 / g) for name, g in gmacs.items()]
    axes = plots.draw(rows, "gmacs", "fid").axes[0]
    (line,) = axes.lines
    assert line.get_linestyle() == "None"
    assert line.get_xdata().tolist() == [6.06, 23.0, 118.6]
    assert [text.get_text() for text in axes.texts] == ["s", "b", "xl"]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "multiply-adds of one pass (G)"


@pytest.mark.parametrize(
    ("x", "fids", "scales"),
    [
        ("cfg_scale", (2.0, 19.0), ("linear", "linear")),
        ("cfg_scale", (2.0, 21.0), ("linear", "log")),
        ("steps", (2.0, 3.0), ("log", "linear")),
        ("train_gflops", (2.0, 3.0), ("log", "linear")),
        ("step", (2.0, 3.0), ("linear", "linear")),
    ],
)
def test_scale_of_the_axes(x, fids, scales):
    rows = [_row(steps=10 * n, cfg_scale=n, step=n, fid=fid) for n, fid in enumerate(fids, 1)]
    axes = plots.draw(rows, x, "fid").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == scales


@pytest.mark.parametrize("values", [(250, 250), (240, 250), (5, 250), (3, 10_000)])
def test_log_axes_have_readable_ticks(values):
    figure = plots.draw([_row(steps=steps, fid=2.0) for steps in values], "steps", "fid")
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    shown = [label.get_text() for at, label in ticks if low <= at <= high]
    assert len(shown) >= 2
    assert all(shown)


def test_axis_labels_are_for_people():
    rows = [_row(fid=2.0, fd_dinov2=200.0, precision_pixels=0.5)]
    assert plots.axis_label(rows, "fid", with_num=True) == "FID (50,000 samples)"
    assert plots.axis_label(rows, "fd_dinov2") == "FD of DINOv2"
    assert plots.axis_label(rows, "precision_pixels") == "precision of pixels"
    assert plots.axis_label(rows, "cfg_scale", with_num=True) == "guidance scale"
    assert plots.axis_label(rows, "steps") == "sampling steps"
    bits = [{"step": 1, "likelihood": {"kind": "vlb", "num": 1000}, "bits_per_dim": 3.0}]
    label = plots.axis_label(bits, "bits_per_dim", with_num=True)
    assert " ".join(label.split()) == "bits per dimension (1,000 held-out images)"
    other = _row(num=10), bits[0]  # in the same files
    other[0]["precision_pixels"] = 0.5
    axes = plots.draw([*rows, *other], "cfg_scale", "fid").axes[0]
    assert axes.get_ylabel() == "FID (50,000 samples)"


@pytest.mark.parametrize(
    ("change", "message", "way"),
    [
        (dict(num=10_000), "num=10000 in b row 1", "num=50000"),
        (
            dict(reference={"name": "other", "digest": "r1"}),
            "reference.digest=r1 in b row 1",
            "reference.digest=r0",
        ),
        (
            dict(extractor={"name": "inception", "dtype": "bfloat16", "digest": "i1"}, num=100),
            "extractor.dtype=bfloat16 in b row 1",
            "extractor.dtype=float32,extractor.digest=i0,num=50000",
        ),
        (dict(reference=None), "reference.digest=none in b row 1", "reference.digest=r0"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_with_a_way_out(change, message, way):
    rows = [_row(cfg_scale=cfg, fid=2.0, place=f"a row {i}") for i, cfg in enumerate((1, 2), 1)]
    rows.append(_row(cfg_scale=3, fid=2.0, place="b row 1", **change))
    with pytest.raises(ValueError, match="cannot be compared") as error:
        plots.curves(rows, "cfg_scale", "fid")
    assert message in str(error.value)
    assert "in a row 1 and 1 more" in str(error.value)
    assert str(error.value).endswith(f"--where {way}")
    assert len(_means(plots.curves(plots.where(rows, way), "cfg_scale", "fid"))[""]) == 2


def test_numbers_of_samples_are_compared_where_they_are_asked_for():
    rows = [_row(num=num, fid=3.0) for num in (50_000, 10_000)]
    assert _means(plots.curves(rows, "num", "fid")) == {"": [(10_000, 3), (50_000, 3)]}
    rows[0]["reference"] = {"digest": "r1"}
    with pytest.raises(ValueError, match=r"reference\.digest=r1"):
        plots.curves(rows, "num", "fid")


def test_missing_measures_are_left_out_or_told():
    rows = [_row(fid=2.0), _row(cfg_scale=2, extractor={"name": "dinov2"}, fd_dinov2=9.0)]
    assert _means(plots.curves(rows, "cfg_scale", "fid")) == {"": [(1.5, 2)]}
    with pytest.raises(
        ValueError, match=r"no row has kid\. The rows have .*cfg_scale.* fid, "
    ) as e:
        plots.curves(rows, "cfg_scale", "kid")
    assert "img_per_s" not in str(e.value)  # nowhere measured
    with pytest.raises(ValueError, match="no row has both fd_dinov2 and fid"):
        plots.curves(rows, "fd_dinov2", "fid")
    with pytest.raises(ValueError, match="no row has guidance and no row has kid"):
        plots.curves(rows, "guidance", "kid")
    with pytest.raises(ValueError, match="nothing"):
        plots.curves([], "cfg_scale", "fid")
    with pytest.raises(ValueError, match="sampler is no number, but 'ddpm'"):
        plots.curves(rows, "cfg_scale", "sampler")


def test_where_selects_by_names_as_they_are_typed():
    rows = [_row(cfg_scale=cfg, raw=raw) for cfg in (1.0, 1.5) for raw in (False, True)]
    assert plots.where(rows, "cfg_scale=1,raw=true") == [rows[1]]
    assert plots.where(rows, "cfg_interval=0,1,cfg_scale=1.50,sampler=ddpm") == rows[2:]
    assert plots.where(rows, "step=400") == rows  # not 'steps'
    for condition, message in {
        "sampler=ddim": "no row has sampler=ddim: the rows have sampler ddpm.",
        "cfg_scale=1,cfg_scale=1.5": "no row has cfg_scale=1.5: the rows have cfg_scale 1.",
        "sampel=ddpm": "no row has 'sampel' of --where. They have .*sampler",
        "sampler": "'sampler' is no NAME=VALUE",
    }.items():
        with pytest.raises(ValueError, match=message):
            plots.where(rows, condition)


def test_files_name_their_rows_by_workdirs(tmp_path):
    for name in ("x/dit/evaluations.jsonl", "y/dit/evaluations.jsonl", "adm.evaluations.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"fid": 1.0}\n{"fid": 2.0}\n{"fi')
    rows = plots.read([f"{tmp_path}/*/dit/*.jsonl", f"{tmp_path}/x/**/*.jsonl"])
    assert [row["workdir"] for row in rows] == ["x/dit"] * 2 + ["y/dit"] * 2
    assert rows[3]["place"] == f"{tmp_path}/y/dit/evaluations.jsonl row 2"
    names = {row["workdir"] for row in plots.read([f"{tmp_path}/*.jsonl", f"{tmp_path}/x/*/*"])}
    assert names == {"adm", "dit"}
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file {tmp_path}/z*")):
        plots.read([f"{tmp_path}/x/*/*", f"{tmp_path}/z*"])


STRANGE = (None, [], [1, 2], {}, "x", True, -1, 0, 1e400, 10**400, {"a": [{}]}, [["x"]], ["x", 1])


def _keys(row, prefix=()):
    for name, value in row.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _keys(value, (*prefix, name))


@pytest.mark.parametrize("kind", ["sample", "samples", "likelihood"])
def test_rows_of_any_values_are_drawn_left_out_or_refused(tmp_path, kind):
    """Each value of a row in turn: whatever its type, there is no other error than a message."""
    row = _row(fid=3.0, jax="0.10")
    if kind == "likelihood":
        row = {"step": 400, "likelihood": {"kind": "vlb", "num": 100, "steps": 9}, "fid": 3.0}
        row["bits_per_dim"] = 3.5
    elif kind == "samples":
        row["samples"] = {"name": "a.npz", "num": 50, "digest": "d"}
        del row["sample"], row["step"]
    path, text = tmp_path / "evaluations.jsonl", json.dumps(row)
    for key in [*_keys(row), ("other",)]:
        for value in STRANGE:
            damaged = json.loads(text)
            section = damaged
            for name in key[:-1]:
                section = section[name]
            section[key[-1]] = value
            path.write_text(f"{json.dumps(damaged)}\n{text}\n{json.dumps(damaged)}\n")
            found = plots.read([str(path)])
            assert len(found) in (1, 3)
            for x in ("cfg_scale", "step", key[-1], ".".join(key)):
                with contextlib.suppress(ValueError):
                    plots.where(found, f"{x}=1")
                with contextlib.suppress(ValueError):
                    plots.curves(found, x, "fid")


@pytest.mark.parametrize(
    ("key", "value"),
    [("sample", 5), ("sample", [1]), ("step", "x"), ("step", []), ("samples", 7), ("fid", "x")],
    ids=str,
)
def test_damaged_row_is_left_out_and_said(tmp_path, caplog, key, value):
    path = tmp_path / "evaluations.jsonl"
    rows = [_row(cfg_scale=1, fid=2.0), _row(cfg_scale=2, fid=2.0) | {key: value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (curve,) = plots.curves(plots.read([str(path)]), "cfg_scale", "fid")
    assert curve.means() == [(1, 2.0)]
    told = f"1 damaged lines of {path} are left out, the first is line 2, with a wrong {key}."
    assert caplog.messages == [told]


def test_words_among_numbers_are_refused_with_their_places():
    rows = [_row(fid=2.0, size=size, place=f"a row {size}") for size in (1, "x")]
    with pytest.raises(ValueError, match=r"size is a number in some rows .*: 1 in a row 1, 'x' in"):
        plots.curves(rows, "size", "fid")


@pytest.mark.parametrize("name", ["fid", "cfg_scale"])
def test_numbers_that_matplotlib_cannot_draw_are_refused_with_their_place(name):
    for value in (1.7e308, -1.7e308, 5e-324, -1e-200, 10**308):
        rows = [_row(fid=2.0), _row(seed=1, fid=2.0, place="runs/a row 3") | {name: value}]
        told = re.escape(f"runs/a row 3 has {name}={str(value)[:100]}")
        with pytest.raises(ValueError, match=told):
            plots.curves(rows, "cfg_scale", "fid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ((1e100, -1e100), (1e100, 1e-100), (0, -1e-100)):
            rows = [_row(cfg_scale=c, fid=2.0) | {name: c} for c in values]
            plots.draw(rows, "cfg_scale", "fid").savefig(io.BytesIO(), format="svg")


def test_images_are_compared_with_runs():
    images = _row(fid=9.0, workdir="adm", samples={"name": "adm.npz", "num": 50_000, "digest": "s"})
    del images["sample"], images["step"]
    found = plots.curves([_row(fid=2.0), images], "workdir", "fid")
    assert sorted(point for curve in found for point in curve.means()) == [("adm", 9), ("dit", 2)]


def test_many_curves_look_different_and_leave_the_axes_free():
    rows = [_row(workdir=f"run{i:02}", cfg_scale=c, fid=3.0) for i in range(12) for c in (1, 2)]
    figure = plots.draw(rows, "cfg_scale", "fid")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12
    assert figure.axes[0].get_legend() is None
    assert len(figure.legends[0].texts) == 12


@pytest.mark.parametrize("count", [2, 6])  # in the axes, and outside of them
def test_names_are_drawn_as_they_are(count):
    """matplotlib has a meaning of its own for a leading underscore and for dollar signs."""
    names = ["_small", "a$b$c", "$\\nothing$", "__", "_curve", "_seeds"][:count]
    rows = [_row(workdir=n, cfg_scale=c, fid=3.0, gmacs=c) for n in names for c in (1, 2)]
    figure = plots.draw(rows, "cfg_scale", "fid")
    legend = figure.axes[0].get_legend() or figure.legends[0]
    assert sorted(map(_drawn, legend.texts)) == sorted(names)
    assert len({handle.get_marker() for handle in legend.legend_handles}) == count
    figure = plots.draw(rows, "workdir", "fid")
    figure.canvas.draw()
    assert sorted(map(_drawn, figure.axes[0].get_xticklabels())) == sorted(names)
    figure = plots.draw(rows, "gmacs", "fid")
    figure.canvas.draw()
    assert {_drawn(text) for text in figure.axes[0].texts} == {*names}


def test_control_characters_of_names_are_drawn_as_escapes():
    """No font has them: matplotlib would warn of each."""
    rows = [_row(sampler=f"a\x1b[31m\n{c}", cfg_scale=c, fid=c, gmacs=c) for c in (1, 2)]
    rows = [row | {"workdir": "b\x07"} for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in ("cfg_scale", "sampler", "gmacs"):
            figure = plots.draw(rows, x, "fid")
            figure.savefig(io.BytesIO(), format="png")
            texts = [*figure.axes[0].texts, *figure.axes[0].get_xticklabels()]
            for legend in (figure.axes[0].get_legend(), *figure.legends):
                texts += legend.texts if legend else []
            shown = " ".join(map(_drawn, texts))
            assert r"a\x1b[31m\n1" in shown or (x == "gmacs" and r"b\x07" in shown)
            assert files.printable(shown) == shown


def _drawn(text):
    """What matplotlib draws of a Text."""
    drawn, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    return drawn


def test_command_draws_a_png_and_refuses_without_a_traceback(run_command, tmp_path):
    path, out = tmp_path / "dit" / "evaluations.jsonl", tmp_path / "plots" / "fid.png"
    path.parent.mkdir()
    rows = [_row(sampler, cfg_scale=c, fid=c) for sampler in ("ddpm", "ddim") for c in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = "plot", "--rows", f"{tmp_path}/*/evaluations.jsonl", "--x", "cfg_scale"
    printed = run_command(*given, "--y", "fid", "--where", "sampler=ddpm", "--out", out)
    assert printed.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    error = run_command(*given, "--y", "fid", "--where", "sampler=heun", "--out", out, fails=True)
    assert "error: no row has sampler=heun: the rows have sampler ddpm, ddim." in error
    assert "Traceback" not in error


def test_svg_is_one(tmp_path):
    plots.plot([_row(fid=2.0)], "cfg_scale", "fid", tmp_path / "fid.svg")
    assert "<svg" in (tmp_path / "fid.svg").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["fid.svg"]
