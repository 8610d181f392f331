"""DiTs beside UNets: sweeps of both, what the table says of each, and what compares them."""

import json

import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close
from matplotlib.colors import to_hex
from PIL import Image

from configs import default, openmoji32_text, openmoji64_text, smoke
from dit_jax import models
from dit_jax.evaluation import plot_style
from experiments.scaling.cells import cell_run, collect, grid
from experiments.scaling.configs import default as sweep_default
from experiments.scaling.figures import comparisons, plot, subsets
from experiments.scaling.fits import contrasts, fit, report, selection, table
from experiments.unet_vs_dit import caption_effect, sample_sheet
from experiments.unet_vs_dit.configs import emoji

PROMPTS = ["a red square", "a blue one", "grey", "green", "all black"]
COLORS = [(255, 0, 0), (0, 0, 255), (99, 99, 99), (0, 255, 0), (0, 0, 0)]
SIZES = {"S": 1e-3, "M": 4e-3, "L": 1.6e-2}  # gmacs


def _rows(network, factor, seed=0, **more):
    """Losses 0.4 gmacs^-0.1 times the factor, a hundredth more for the second seed."""
    of_dit = dict(block="adaLN-Zero", depth=2, hidden_size=64, patch_size=2, tokens=16)
    of_unet = dict.fromkeys(of_dit)
    return [
        dict(
            cell=f"{network}-{size}-{seed}",
            model=f"{network}-{size}",
            network=network,
            size=f"{network}-{size}",
            **(of_dit if network == "dit" else of_unet),
            num_heads=2 if network == "dit" else None,
            params=round(1e9 * gmacs),
            gmacs=gmacs,
            seed=seed,
            learning_rate=1e-3,
            batch_size=8,
            eval_draws=2,
            step=step,
            train_gflops=48 * step * gmacs,
            eval_mse=0.4 * gmacs**-0.1 * factor * (1 + 0.01 * seed) * (10 / step) ** 0.1,
            **more,
        )
        for size, gmacs in SIZES.items()
        for step in (10, 20)
    ]


@pytest.fixture
def rows():
    return [
        row
        for seed in (0, 1)
        for network, factor in (("dit", 1), ("unet", 1.1))
        for row in _rows(network, factor, seed)
    ]


def test_pairs_of_equal_cost_are_of_both_networks(rows):
    found = contrasts.compare_networks(table.from_rows(rows), "eval_mse")
    assert found["step"] == 20
    pairs = [[row["model"] for row in pair["pair"]] for pair in found["pairs"]]
    assert sorted(pairs) == [[f"dit-{size}", f"unet-{size}"] for size in "LMS"]
    for pair in found["pairs"]:
        assert pair["log_ratio"] == pytest.approx(np.log(1.1))
        assert pair["better"] == pair["pair"][0]["model"]
        # Two seeds a hundredth apart: a deviation of 0.7% of each, and so of their means' ratio.
        assert pair["deviations"] == pytest.approx(np.log(1.1) / (np.log(1.01) / 2**0.5), rel=1e-6)
    for row in rows:
        row["gmacs"] *= 1 + 0.2 * (row["network"] == "unet")
    with pytest.raises(
        ValueError, match="2 models that differ in network and whose gmacs are within 10%"
    ):
        contrasts.compare_networks(table.from_rows(rows), "eval_mse")


def test_networks_are_compared_nowhere_else(rows):
    for call in (selection.select_comparable, fit.fit_study):
        with pytest.raises(ValueError, match="across network: dit in 12 rows, unet in 12 rows"):
            call(table.from_rows(rows), "eval_mse")
    unets = table.from_rows([row for row in rows if row["network"] == "unet"])
    assert fit.fit_study(unets, "eval_mse")["models"] == 3
    for name, draw in plot.FIGURES.items():
        if name != "networks":
            with pytest.raises(subsets.NoRowsError):
                draw(table.from_rows(rows), "eval_mse")


def test_unets_of_other_channels_are_other_models(rows):
    """They differ in none of a DiT's sizes, which they do not have."""
    unets = table.from_rows([row for row in rows if row["network"] == "unet"])
    assert len(selection.average_seeds(unets, "eval_mse")) == 6


def test_figure_has_a_color_to_a_network(rows):
    figure = comparisons.draw_networks(table.from_rows(rows), "eval_mse")
    by_size, by_compute = figure.axes
    lines = [line for line in by_size.lines if line.get_label() != "_seeds"]
    assert [to_hex(line.get_color()).upper() for line in lines] == list(plot_style.COLORS[:2])
    for line, factor in zip(lines, (1, 1.1), strict=True):
        assert_trees_close(list(line.get_xdata()), list(SIZES.values()), 1e-6)
        expected = [0.4 * g**-0.1 * factor * 1.005 * 2**-0.1 for g in SIZES.values()]
        assert_trees_close(list(line.get_ydata()), expected, 1e-6)
    lines = [line for line in by_compute.lines if line.get_label() != "_seeds"]
    assert len(lines) == 6
    assert_trees_close(list(lines[0].get_xdata()), [0.48, 0.96], 1e-6)  # GFLOPs
    assert by_compute.get_xlabel() == "training compute (GFLOPs)"
    assert [t.get_text() for t in figure.legends[0].texts if t.get_text()] == [
        "network",
        "DiT",
        "UNet",
    ]
    with pytest.raises(subsets.NoRowsError, match="all rows are of one network, unet"):
        comparisons.draw_networks(
            table.from_rows([r for r in rows if r["network"] == "unet"]), "eval_mse"
        )
    rows[0]["batch_size"] = 9
    with pytest.raises(ValueError, match="cannot be compared across batch_size"):
        comparisons.draw_networks(table.from_rows(rows), "eval_mse")


def test_page_has_both(rows, tmp_path):
    table.write(tmp_path / "results" / "study.csv", rows)
    arguments = tmp_path / "results" / "study.csv", ["eval_mse"], tmp_path / "README.md"
    fields = report.make_fields(*arguments, {"eval_mse_networks"})
    lines = fields["table"].splitlines()
    assert len(lines) == 2 + 6
    assert "| dit-S | 64 | 2 | 16 | 1,000,000 | 0.001 |" in fields["table"]
    assert "| unet-S |  |  |  | 1,000,000 | 0.001 |" in fields["table"]
    text = fields["eval_mse_networks"]
    assert "dit-S (depth 2, 16 tokens) 0.7484, unet-S 0.8232, at 1.00 x the gmacs: dit-S" in text


def test_sizes_can_be_whole_models():
    base = smoke.get_config()
    base.optim.update(schedule="constant", warmup_steps=0)
    sweep = sweep_default.get_config(base)
    unet = default.get_config("unet").model
    unet.update(input_size=8, in_channels=1, num_classes=10, base_channels=8, norm_groups=8)
    unet.update(channel_mult=(1, 2), blocks_per_level=1, attention_levels=(1,), head_dim=8)
    sweep.sizes = dict(U=unet, D=dict(depth=1))
    sweep.grids = dict(main=dict(size=("U", "D")))
    sweep.steps = (5,)
    cells = {cell.name: cell for cell in grid.make_cells(sweep)}
    assert cells["U"].config.model.to_dict() == unet.to_dict()
    assert cells["D"].config.model.to_dict() == base.model.to_dict() | dict(depth=1)
    assert [(cell.name, cell.size) for cell in cells.values()] == [("D", "D"), ("U", "U")]
    sweep.grids = dict(main=dict(size=("U",), model=dict(base_channels=(16,))))
    with pytest.raises(ValueError, match=r"a unet must be one of config\.sizes"):
        grid.make_cells(sweep)


def test_networks_of_the_study_cost_the_same():
    cells = {cell.size: cell for cell in grid.make_cells(emoji.get_config())}
    assert len(cells) == 6
    for size in "SML":
        dit, unet = (cells[f"{network}-{size}"] for network in ("dit", "unet"))
        assert unet.counts["gmacs"] == pytest.approx(dit.counts["gmacs"], rel=0.02)
        assert (dit.config.model.name, unet.config.model.name) == ("dit", "unet")
        others = [
            {key: value for key, value in cell.config.to_dict().items() if key != "model"}
            for cell in (dit, unet)
        ]
        assert others[0] == others[1]
    for network in ("dit", "unet"):
        config = openmoji32_text.get_config(network)
        assert cells[f"{network}-L"].counts["gmacs"] == models.count(config)["gmacs"]


@pytest.mark.parametrize(
    ("config", "names"),
    [(openmoji32_text, ("dit", "unet")), (openmoji64_text, ("DiT-S/2", "unet"))],
)
def test_networks_of_one_config_cost_the_same_and_as_it_says(config, names):
    dit, unet = (models.count(config.get_config(name))["gmacs"] for name in names)
    assert unet == pytest.approx(dit, rel=0.02)
    scale, unit = (1e3, "M") if dit < 0.1 else (1, "G")
    digits = 1 if unit == "M" else 2
    counts = f"{scale * dit:.{digits}f} {unit} ({'DiT' if unit == 'M' else names[0]}), "
    assert counts + f"{scale * unet:.{digits}f} {unit} (UNet)" in config.__doc__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of five colors and their captions, the last one held out."""
    root = tmp_path_factory.mktemp("captioned")
    for split, chosen in (("train", slice(4)), ("test", slice(4, 5))):
        (root / split).mkdir()
        examples = list(zip(PROMPTS, COLORS, strict=True))[chosen]
        rows = []
        for i, (caption, color) in enumerate(examples):
            Image.new("RGB", (8, 8), color).save(root / split / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
        (root / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return root


# The study's smallest, without the levels that 8x8 images do not have.
SMALL = {
    "dit-S": dict(emoji.DITS["dit-S"], text_length=20),
    "unet-S": dict(base_channels=8, channel_mult=(1, 2), attention_levels=(1,), text_length=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SMALL)
def test_captions_learnt_by_heart_draw_their_pictures(folder, tmp_path, train_as_users, size):
    """By the study's settings, its encoder of captions among them; another's caption is worse."""
    config = openmoji32_text.get_config(size.split("-")[0])
    config.model.update(SMALL[size], input_size=8)
    config.data.update(source="folder", name=str(folder), image_size=8, caption_feature="text")
    config.update(total_steps=800, batch_size=8, sample_every_steps=0, eval_every_steps=0)
    config.optim.update(warmup_steps=20, ema_decay=0.9)
    train_as_users(config, tmp_path)
    _, images = sample_sheet.sample(tmp_path, PROMPTS[:4], 8, 0, dict(cfg_scale=1.0))
    found = images.astype(float).mean(axis=(2, 3))  # [prompts, num, 3]
    distances = np.abs(found[:, :, None] - COLORS[:4]).max(axis=-1)
    assert np.all(distances.argmin(axis=-1) == np.arange(4)[:, None])
    assert np.median(np.diagonal(distances, axis1=0, axis2=2)) < 20
    own, others, _ = caption_effect.measure_losses(tmp_path, draws=1)["trained"].T
    assert others[-1] > 2 * own[-1]


def test_figure_of_captions_has_the_extra_loss_of_every_model():
    losses = np.array([[0.2, 0.2, 0.2]] * 5 + [[0.4, 0.5, 0.45]])
    figure = caption_effect.draw(
        {name: {"trained": losses, "held out": losses} for name in ("DiT", "UNet")}
    )
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["DiT", "UNet"]
        assert_close(axes.lines[1].get_ydata(), [0] * 5 + [25], 1e-12)
    assert [axes.get_title() for axes in figure.axes] == ["trained images", "held out images"]


def test_figure_of_captions_names_every_model_as_it_is():
    losses = np.full((6, 3), 0.2)
    names = ["_small", "a$b$"]
    figure = caption_effect.draw({name: {"trained": losses, "held out": losses} for name in names})
    texts = figure.axes[0].get_legend().texts
    assert [text.get_text() for text in texts] == ["_small", r"a\$b\$"]
    assert [t.get_marker() for t in figure.axes[0].get_legend().legend_handles] == ["o", "s"]


@pytest.mark.slow
def test_a_sweep_of_both_ends_in_a_table_figures_and_a_sheet(folder, tmp_path, run_command):
    config = emoji.get_config().unlock()
    base = config.base
    base.data.update(source="folder", name=str(folder), image_size=8, caption_feature="text")
    base.update(batch_size=8, eval_draws=1, log_every_steps=1)
    base.optim.warmup_steps = 1
    base.sample.steps = 2
    for size in ("dit-S", "unet-S"):
        config.sizes[size].update(SMALL[size], input_size=8)
    config.grids = dict(main=dict(size=("dit-S", "unet-S")))
    config.steps = (1, 2)
    config.evaluate.num = 4
    for cell in grid.make_cells(config):
        cell_run.run(cell, config.evaluate, tmp_path / "sweep" / cell.name)
    rows = collect.write(tmp_path / "sweep", tmp_path / "table.csv")
    assert table.to_rows(table.read(tmp_path / "table.csv")) == rows
    found = [(row["model"], row["network"], row["patch_size"], row["step"]) for row in rows]
    assert found == [
        *(("unet-S", "unet", None, step) for step in (1, 2)),
        *(("dit-S/4", "dit", 4, step) for step in (1, 2)),
    ]
    assert all(row["eval_mse"] > 0 and row["fd_pixels"] > 0 for row in rows)
    with pytest.raises(ValueError, match="with labels"):
        collect.read_samples(tmp_path / "sweep")
    written = plot.write(
        table.from_rows(rows), ["eval_mse", "fd_pixels"], None, tmp_path / "figures"
    )
    assert {path.stem for path in written} == {"networks_eval_mse", "networks_fd_pixels"}
    workdirs = [f"--workdir={tmp_path / 'sweep' / name}" for name in ("dit-S", "unet-S")]
    prompts = [f"--prompt={prompt}" for prompt in (*PROMPTS[3:], "never heard of")]
    out = tmp_path / "sheet.png"
    names = ["--name=DiT", "--name=UNet"]
    command = "experiments.unet_vs_dit.sample_sheet", *workdirs, *prompts, "--num=2", f"--out={out}"
    run_command(*command, *names)
    picture = np.asarray(Image.open(out).convert("RGB"))
    for color in COLORS[3:]:  # the data's own
        assert np.all(picture == color, axis=-1).sum() >= 48 * 48
    error = run_command(*command, *names[:1], fails=True)
    assert "2 workdirs have the names DiT. Give every --workdir its own --name." in error


def test_sheet_says_what_the_data_have(folder):
    config = emoji.get_config().base
    config.data.update(source="folder", name=str(folder), image_size=8, caption_feature="text")
    found = sample_sheet.find_real(config, [*PROMPTS[1:], "never heard of"])
    assert {prompt: name for prompt, (name, _) in found.items()} == {
        PROMPTS[1]: "trained",
        PROMPTS[2]: "trained",
        PROMPTS[3]: "trained",
        PROMPTS[4]: "held out",
    }
    for prompt, color in zip(PROMPTS[1:], COLORS[1:], strict=True):
        np.testing.assert_array_equal(found[prompt][1], np.broadcast_to(color, (8, 8, 3)))
    panels = {name: np.zeros((2, 3, 8, 8, 3), np.uint8) for name in ("dit-S", "unet-S")}
    figure = sample_sheet.draw(["all black", "never heard of"], panels, found)
    texts = [text.get_text() for text in figure.texts]
    assert texts == [
        "data",
        "dit-S",
        "unet-S",
        "all black\n(held out)",
        "never heard of\n(in no caption)",
    ]
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert [image.shape[1] for image in shown] == [64, 196, 196]
    assert shown[0].shape[0] == 130
