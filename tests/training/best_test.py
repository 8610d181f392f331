"""The best step's parameters: kept when the metric says so, in a workdir of their own."""

import json

import numpy as np
import pytest
from conftest import random_params

from configs import vae_digits
from dit_jax import models, train, workdirs
from dit_jax.sampling import runs
from dit_jax.system import json_files
from dit_jax.training import best
from dit_jax.workdirs import checkpoint


@pytest.fixture
def config(smoke_config):
    smoke_config.checkpoint_best_metric = "eval_loss"
    return smoke_config


@pytest.fixture
def params(config):
    return random_params(models.build(config.model))


def _kept(workdir):
    steps = sorted(path.name for path in (workdir / "best" / "checkpoints").iterdir())
    trained = runs.load(workdir / "best")
    return steps, trained.step, float(np.mean(trained.params["x_embedder"]["bias"]))


def test_parameters_of_the_best_step_stay(tmp_path, config, params):
    keeper = best.Best(tmp_path, config, {}, {})

    def update(step, loss, value):
        params["x_embedder"]["bias"] = np.full_like(params["x_embedder"]["bias"], value)
        keeper.update(step, {"eval_loss": loss, "eval_mse": 0.0}, params)

    update(10, 0.5, 1)
    assert _kept(tmp_path) == (["10"], 10, 1)
    update(20, 0.6, 2)  # worse
    keeper.update(25, {"fid5k": 0.0}, params)  # another measure
    assert _kept(tmp_path) == (["10"], 10, 1)
    update(30, 0.4, 3)
    assert _kept(tmp_path) == (["30"], 30, 3)
    keeper = best.Best(tmp_path, config, {}, {})  # resumed
    update(40, 0.45, 4)
    update(30, 0.4, 5)  # measured again
    assert _kept(tmp_path) == (["30"], 30, 3)
    update(50, 0.3, 6)
    assert _kept(tmp_path) == (["50"], 50, 6)
    with pytest.raises(ValueError, match="holds only EMA parameters"):
        runs.load(tmp_path / "best", raw=True)


def test_larger_psnr_is_better(tmp_path, config, params):
    config = vae_digits.get_config()
    config.checkpoint_best_metric = "eval_psnr"
    keeper = best.Best(tmp_path, config, {}, {})
    for step, psnr in ((1, 20.0), (2, 21.0), (3, 19.0)):
        keeper.update(step, {"eval_psnr": psnr}, params)
    assert checkpoint.saved_values(tmp_path / "best")["value"] == 21.0


def test_value_that_is_not_finite_is_no_best(tmp_path, config, params):
    keeper = best.Best(tmp_path, config, {}, {})
    for step, loss in ((1, float("nan")), (2, 1.0), (3, float("nan")), (4, 7.0)):
        keeper.update(step, {"eval_loss": loss}, params)
    assert _kept(tmp_path)[0] == ["2"]


MEASURED_BY = {
    "fid": {"steps": 50, "cfg_scale": 1.0},
    "sample": {"sampler": "ddim", "last_step_t": None},
    "extractor": {"name": "pixels", "digest": "a"},
    "reference": "b",
}


@pytest.fixture
def distance(config):
    config.fid.update(every_steps=10, num_images=5_000, extractor="pixels")
    config.checkpoint_best_metric = "fd_pixels_5k"
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"fid": {"cfg_scale": 4.0}},
        {"sample": {"sampler": "ddpm"}},
        {"sample": {"last_step_t": 0.01}},
        {"extractor": {"digest": "c"}},
        {"reference": "c"},
    ],
    ids=str,
)
def test_best_of_other_measures_is_replaced(tmp_path, distance, params, change):
    """The same name, another distance."""
    best.Best(tmp_path, distance, {}, MEASURED_BY).update(10, {"fd_pixels_5k": 5.0}, params)
    best.Best(tmp_path, distance, {}, MEASURED_BY).update(20, {"fd_pixels_5k": 20.0}, params)
    assert _kept(tmp_path)[0] == ["10"]
    best.Best(tmp_path, distance, {}, MEASURED_BY | change).update(
        20, {"fd_pixels_5k": 20.0}, params
    )
    assert _kept(tmp_path)[0] == ["20"]


def test_best_of_another_run_is_refused(tmp_path, config, params):
    best.Best(tmp_path, config, {}, {}).update(10, {"eval_loss": 5.0}, params)
    config.optim.learning_rate = 1.0
    with pytest.raises(ValueError, match="best belongs to a run with another config"):
        best.Best(tmp_path, config, {}, {})


def test_best_of_an_older_version_stays(tmp_path, distance, params, monkeypatch):
    """Which said last_step_size=0.0 where now last_step_t is None, and less of the measure."""
    best.Best(tmp_path, distance, {}, MEASURED_BY).update(10, {"fd_pixels_5k": 5.0}, params)
    older = checkpoint.saved_values(tmp_path / "best")
    del older["sample"]["last_step_t"], older["extractor"], older["reference"]
    older["sample"]["last_step_size"] = 0.0
    older["fid"]["weights"] = "inception.npz"
    monkeypatch.setattr(checkpoint, "saved_values", lambda _: older)
    best.Best(tmp_path, distance, {}, MEASURED_BY).update(20, {"fd_pixels_5k": 20.0}, params)
    assert _kept(tmp_path)[0] == ["10"]


def test_best_is_whole_with_its_checkpoint(tmp_path, config, params, workdir):
    """A kill right after the checkpoint is there leaves nothing to be written later."""
    data = workdirs.load_data(workdir)
    best.Best(tmp_path, config, data, {}).update(10, {"eval_loss": 0.5}, params)
    (tmp_path / "best" / "config.json").unlink()
    (checkpoints,) = (tmp_path / "best").glob("checkpoints")
    assert workdirs.load_data(checkpoints.parent) == data != {}
    assert runs.load(checkpoints.parent).data == data


@pytest.mark.parametrize("damage", [{"value": "x"}, {"sample": 5}, {"fid": None}], ids=str)
def test_best_whose_record_is_damaged_begins_again(tmp_path, config, params, caplog, damage):
    best.Best(tmp_path, config, {}, {}).update(10, {"eval_loss": 0.5}, params)
    path = tmp_path / "best" / "checkpoints" / "10" / "data" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    keeper = best.Best(tmp_path, config, {}, {})
    (key,) = damage
    assert f"cannot read how {tmp_path / 'best'} was chosen: {key}" in caplog.text
    keeper.update(20, {"eval_loss": 0.75}, params)
    assert _kept(tmp_path)[0] == ["20"]


def test_metric_that_is_not_measured_is_refused(tmp_path, config):
    config.checkpoint_best_metric = "fid5k"
    with pytest.raises(
        ValueError, match="'fid5k' is not measured in this run, which measures eval_loss"
    ):
        best.Best(tmp_path, config, {}, {})
    config.checkpoint_best_metric = "eval_los"
    with pytest.raises(ValueError, match="'eval_los' is not measured"):
        best.Best(tmp_path, config, {}, {})
    config.checkpoint_best_metric = "fid5k"
    config.fid.update(every_steps=10, extractor="pixels")
    with pytest.raises(ValueError, match="which measures fd_pixels_5k and eval_loss"):
        best.Best(tmp_path, config, {}, {})
    config.checkpoint_best_metric = "fd_pixels_5k"
    best.Best(tmp_path, config, {}, {})
    config.update(checkpoint_best_metric="eval_loss", eval_every_steps=0)
    with pytest.raises(
        ValueError, match=r"measures fd_pixels_5k\. Set eval_every_steps .* for eval_loss;"
    ):
        best.Best(tmp_path, config, {}, {})


def test_training_measures_the_distance_and_keeps_the_best(tmp_path, config):
    config.update(total_steps=20, eval_every_steps=0, sample_every_steps=0)
    config.fid.update(every_steps=10, num_images=80, steps=2)
    config.checkpoint_best_metric = "fd_pixels_80"
    train.train_and_evaluate(config, tmp_path)
    lines = json_files.read_json_lines(tmp_path / "metrics.jsonl")
    values = {line["step"]: line["fd_pixels_80"] for line in lines if "fd_pixels_80" in line}
    assert list(values) == [10, 20]
    step = min(values, key=values.get)
    assert runs.load(tmp_path / "best").step == step
    assert checkpoint.saved_values(tmp_path / "best")["value"] == values[step]


@pytest.mark.slow
def test_run_that_measures_otherwise_says_so(tmp_path, config, caplog):
    config.update(total_steps=20, eval_every_steps=0, sample_every_steps=0)
    config.fid.update(every_steps=10, num_images=80, steps=2)
    config.checkpoint_best_metric = "fd_pixels_80"
    train.train_and_evaluate(config, tmp_path)
    config.total_steps, config.fid.cfg_scale = 25, 2.0
    train.train_and_evaluate(config, tmp_path)
    how = (
        "fd_pixels_80 is measured with other settings from here on: fid.cfg_scale was 1.0, now 2.0"
    )
    assert how in caplog.text
    assert runs.load(tmp_path / "best").step == 25
