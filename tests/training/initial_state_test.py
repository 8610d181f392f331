"""The state that a run begins with, if training adds parameters that the model does not have."""

import logging

import jax
import numpy as np
import pytest

from dit_jax import models, train
from dit_jax.sampling import runs
from dit_jax.training import initial_state, programs, tasks
from dit_jax.workdirs import checkpoint


@pytest.fixture
def projector(monkeypatch):
    """Makes training add a group of parameters, as for a loss of its own."""
    plain = tasks.Denoising.init_params

    def init_params(self, key):
        return plain(self, key) | {"projector": {"kernel": jax.random.normal(key, (4, 4))}}

    monkeypatch.setattr(tasks.Denoising, "init_params", init_params)


def _new_state(config):
    program = programs.make_program(config, jax.devices()[:1])
    return initial_state.new_state(program, jax.random.key(0))


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def _load_weights(config, workdir):
    """The weights of the model of a config."""
    model = models.param_shapes(models.build(config.model))
    shapes = programs.make_program(config, jax.devices()[:1]).state.params
    return checkpoint.restore_params(workdir, {group: shapes[group] for group in model})[0]


def test_parameters_of_training_alone_begin_anew(smoke_config, trained_workdir, projector, caplog):
    added = _new_state(smoke_config).params["projector"]
    smoke_config.init_from = str(trained_workdir)
    with caplog.at_level(logging.INFO, "dit_jax"):
        state = _new_state(smoke_config)
    weights = _load_weights(smoke_config, trained_workdir)
    assert "projector" not in weights
    _assert_equal(state.params, weights | {"projector": added})
    (logged,) = [r.getMessage() for r in caplog.records if "EMA weights" in r.getMessage()]
    assert set(logged.partition(": ")[2].split(", ")) == weights.keys()


def test_weights_without_a_part_of_the_model_are_no_beginning(
    smoke_config, trained_workdir, tmp_path
):
    weights = _load_weights(smoke_config, trained_workdir)
    del weights["final_layer"]
    checkpoint.save_params(tmp_path, smoke_config, weights)
    smoke_config.init_from = str(tmp_path)
    with pytest.raises(OSError, match="step 0: it lacks ema_params/final_layer/"):
        _new_state(smoke_config)


def test_model_is_sampled_and_passed_on_without_them(smoke_config, projector, tmp_path):
    smoke_config.update(total_steps=2, checkpoint_every_steps=1, sample_every_steps=0)
    smoke_config.update(eval_every_steps=0)
    smoke_config.optim.warmup_steps = 0
    state = train.train_and_evaluate(smoke_config, tmp_path)
    ema = jax.device_get(state.ema_params)
    assert ema.pop("projector")
    _assert_equal(runs.load(tmp_path).params, ema)
    smoke_config.init_from = str(tmp_path)
    again = _new_state(smoke_config).params
    again.pop("projector")
    _assert_equal(again, ema)


def test_a_resumed_run_has_them_still(smoke_config, projector, tmp_path):
    smoke_config.update(total_steps=1, sample_every_steps=0, eval_every_steps=0)
    smoke_config.optim.update(warmup_steps=0, schedule="constant")
    state = train.train_and_evaluate(smoke_config, tmp_path)
    _assert_equal(train.train_and_evaluate(smoke_config, tmp_path).params, state.params)
