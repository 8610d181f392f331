"""Rows become points of curves, or are refused if they cannot be compared."""

import pytest
from helpers.evaluations import make_row

from dit_jax.evaluation import curves, queries


def _get_means(drawn):
    return {curve.label: curve.means() for curve in drawn}


def test_each_setting_has_a_curve_with_points_in_order():
    rows = [
        make_row(sampler, steps, cfg_scale, fid=steps + cfg_scale)
        for sampler, steps in (("dpmpp2m", 20), ("ddpm", 250))
        for cfg_scale in (4, 1, 1.5)
    ]
    assert _get_means(curves.from_rows(rows, "cfg_scale", "fid")) == {
        "ddpm, 250 steps": [(1, 251), (1.5, 251.5), (4, 254)],
        "dpmpp2m, 20 steps": [(1, 21), (1.5, 21.5), (4, 24)],
    }
    assert list(_get_means(curves.from_rows(rows, "steps", "fid"))) == [
        f"{sampler}, guidance scale {cfg}" for sampler in ("ddpm", "dpmpp2m") for cfg in (1, 1.5, 4)
    ]
    assert _get_means(curves.from_rows(rows[3:], "cfg_scale", "fid")).keys() == {""}
    by_sampler = _get_means(curves.from_rows(queries.select(rows, "cfg_scale=1"), "sampler", "fid"))
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
    rows = [make_row(cfg_scale=cfg, fid=cfg, **change) for change in changes for cfg in (1, 2)]
    assert [curve.label for curve in curves.from_rows(rows, "cfg_scale", "fid")] == labels


def test_settings_that_a_sampler_ignores_make_no_curve():
    rows = [
        make_row("dpmpp2m", cfg_scale=1, variance="large", rho=7, fid=1),
        make_row("dpmpp2m", cfg_scale=2, variance="small", rho=5, fid=2),
    ]
    assert _get_means(curves.from_rows(rows, "cfg_scale", "fid")) == {"": [(1, 1), (2, 2)]}


def test_rows_of_older_versions_belong_to_the_same_curve():
    """They call last_step_t last_step_size, with 0 for the default, and never clipped x_0."""
    steps = (10, 20, 10, 20)
    rows = [make_row("euler_maruyama", steps=n, fid=n + i) for i, n in enumerate(steps)]
    settings = ("size", 0.0), ("t", None), ("size", 0.1), ("t", 0.1)
    for row, (name, value) in zip(rows, settings, strict=True):
        row["sample"][f"last_step_{name}"] = value
    actual = _get_means(curves.from_rows(rows, "steps", "fid"))
    assert sorted(actual.values()) == [[(10, 10), (20, 21)], [(10, 12), (20, 23)]]
    older, plain, clipped = (
        {"step": step, "likelihood": {"kind": "vlb", "num": 100} | more, "bits_per_dim": 3.0}
        for step, more in ((1, {}), (2, {"clip_x_0": False}), (1, {"clip_x_0": True}))
    )
    actual = _get_means(curves.from_rows([older, plain, clipped], "step", "bits_per_dim"))
    assert list(actual.values()) == [[(1, 3), (2, 3)], [(1, 3)]]


def test_row_measured_again_replaces_the_earlier_one():
    rows = [make_row(fid=4.0, git_revision="a"), make_row(fid=5.0, git_revision="b")]
    assert _get_means(curves.from_rows(rows, "cfg_scale", "fid")) == {"": [(1.5, 5)]}
    rows[1]["workdir"] = "other"
    assert len(curves.from_rows(rows, "cfg_scale", "fid")) == 2


@pytest.mark.parametrize("x", ["step", "images_seen", "train_gflops"])
def test_checkpoints_of_a_run_make_one_curve(x):
    rows = [
        make_row(step=step, workdir=workdir, fid=1e4 / step)
        for workdir in ("a", "b")
        for step in (1000, 400)
    ]
    actual = _get_means(curves.from_rows(rows, x, "fid"))
    assert actual["a"] == actual["b"] == [(rows[1][x], 25), (rows[0][x], 10)]


@pytest.mark.parametrize(
    ("change", "message", "way_out"),
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
def test_rows_that_cannot_be_compared_are_refused_with_a_way_out(change, message, way_out):
    rows = [make_row(cfg_scale=cfg, fid=2.0, place=f"a row {i}") for i, cfg in enumerate((1, 2), 1)]
    rows.append(make_row(cfg_scale=3, fid=2.0, place="b row 1", **change))
    with pytest.raises(ValueError, match="cannot be compared") as error:
        curves.from_rows(rows, "cfg_scale", "fid")
    assert message in str(error.value)
    assert "in a row 1 and 1 more" in str(error.value)
    assert str(error.value).endswith(f"--where {way_out}")
    assert (
        len(_get_means(curves.from_rows(queries.select(rows, way_out), "cfg_scale", "fid"))[""])
        == 2
    )


def test_rows_may_differ_in_num_if_x_is_num():
    rows = [make_row(num=num, fid=3.0) for num in (50_000, 10_000)]
    assert _get_means(curves.from_rows(rows, "num", "fid")) == {"": [(10_000, 3), (50_000, 3)]}
    rows[0]["reference"] = {"digest": "r1"}
    with pytest.raises(ValueError, match=r"reference\.digest=r1"):
        curves.from_rows(rows, "num", "fid")


def test_rows_without_the_measure_are_left_out_or_refused():
    rows = [make_row(fid=2.0), make_row(cfg_scale=2, extractor={"name": "dinov2"}, fd_dinov2=9.0)]
    assert _get_means(curves.from_rows(rows, "cfg_scale", "fid")) == {"": [(1.5, 2)]}
    with pytest.raises(
        ValueError, match=r"no row has kid\. The rows have .*cfg_scale.* fid, "
    ) as e:
        curves.from_rows(rows, "cfg_scale", "kid")
    assert "img_per_s" not in str(e.value)  # None in every row
    with pytest.raises(ValueError, match="no row has both fd_dinov2 and fid"):
        curves.from_rows(rows, "fd_dinov2", "fid")
    with pytest.raises(ValueError, match="no row has guidance and no row has kid"):
        curves.from_rows(rows, "guidance", "kid")
    with pytest.raises(ValueError, match="nothing"):
        curves.from_rows([], "cfg_scale", "fid")
    with pytest.raises(ValueError, match="sampler is not a number, but 'ddpm'"):
        curves.from_rows(rows, "cfg_scale", "sampler")


def test_strings_among_numbers_are_refused_with_their_rows():
    rows = [make_row(fid=2.0, size=size, place=f"a row {size}") for size in (1, "x")]
    with pytest.raises(ValueError, match=r"size is a number in some rows .*: 1 in a row 1, 'x' in"):
        curves.from_rows(rows, "size", "fid")


def test_images_without_a_run_are_compared_with_runs():
    images = make_row(
        fid=9.0, workdir="adm", samples={"name": "adm.npz", "num": 50_000, "digest": "s"}
    )
    del images["sample"], images["step"]
    drawn = curves.from_rows([make_row(fid=2.0), images], "workdir", "fid")
    assert sorted(point for curve in drawn for point in curve.means()) == [("adm", 9), ("dit", 2)]
