"""A UNet behind the trainer: on any mesh, stopped and resumed, and able to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close

from configs import default
from dit_jax import latents, sharding, train
from dit_jax.data import loader
from dit_jax.models import unet_presets
from dit_jax.system import json_files
from dit_jax.training import initial_state, programs, tasks


@pytest.fixture
def config(digits_dir):
    """unet-tiny with dropout on the digits' pixels."""
    config = default.get_config("unet")
    config.model.update(unet_presets.get("unet-tiny") | dict(dropout=0.1, learn_sigma=True))
    config.update(total_steps=6, batch_size=16, log_every_steps=1, eval_every_steps=6)
    config.update(checkpoint_every_steps=3)
    config.data.update(name="digits", eval_split="test", image_size=8, image_channels=1)
    config.data.update(flip=False, data_dir=str(digits_dir))
    config.data.update(cache=True, num_threads=0, prefetch_batches=0)
    config.latents.source = "pixels"
    config.optim.learning_rate = 1e-3
    return config


def _run(config, workdir):
    """(final state, its lines of metrics without what is timed)."""
    state = train.train_and_evaluate(config, workdir)
    lines = json_files.read_json_lines(workdir / "metrics.jsonl")
    return state, [{k: v for k, v in line.items() if k != "img_per_s"} for line in lines]


@pytest.mark.slow
def test_a_stopped_run_ends_as_the_uninterrupted_one(config, tmp_path):
    """To the bit, what was dropped out included."""
    whole, lines = _run(config, tmp_path / "whole")
    config.total_steps = 3
    _run(config, tmp_path / "broken")
    config.total_steps = 6
    resumed, again = _run(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert [line for line in again if line["step"] > 3] == [
        line for line in lines if line["step"] > 3
    ]


def _losses(config, devices=1):
    """The loss [total_steps] of every step, on so many devices."""
    program = programs.make_program(config, jax.devices()[:devices])
    state = initial_state.new_state(program, jax.random.key(config.seed))
    rows = np.arange(config.batch_size)
    batches = loader.TrainIterator(latents.open_split(config, "train"), config, rows)
    step, losses = programs.compile_train_step(program), []
    for _ in range(config.total_steps):
        batch = sharding.put_batch(program.mesh, next(batches))
        state, scalars = step(state, batch, jax.random.key(config.seed), tasks.Frozen())
        losses.append(scalars["loss"])
    return np.array(jnp.stack(losses))


@pytest.mark.slow
def test_meshes_train_alike(config):
    """On all axes at once. Without dropout, whose mask is of the batch as it lies on the mesh."""
    config.model.dropout = 0.0
    one = _losses(config)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    assert_close(_losses(config, devices=8), one, 1e-5)


@pytest.mark.slow
def test_it_learns_16_images(config):
    """The noise of images seen often enough is told far better than by their mean."""
    config.model.update(dropout=0.0, null_condition=False, learn_sigma=False, base_channels=16)
    config.data.train_split = "train[:16]"
    config.total_steps = 400
    config.optim.update(learning_rate=3e-3, warmup_steps=20)
    losses = _losses(config)
    assert losses[0] > 0.9
    assert losses[-50:].mean() < 0.1


def test_dropout_is_drawn_afresh_in_every_step_and_for_every_example(config):
    """And not while evaluating."""
    program = programs.make_program(config, jax.devices()[:1])
    batch = next(loader.TrainIterator(latents.open_split(config, "train"), config, np.arange(16)))
    frozen = tasks.Frozen()

    def examples(i, dropout):
        return program.task.draw_examples(batch, jax.random.key(i), frozen, dropout)

    one, two = examples(0, True), examples(1, True)
    keys = [jax.random.key_data(drawn.keys) for drawn in (one, two)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 32
    assert examples(0, False).keys is None
    params = jax.tree.map(
        lambda a: 0.1 + jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape) % 7 / 70,
        program.state.params,
    )
    losses = jax.jit(program.task.compute_losses)
    with_keys = [losses(params, frozen, one.replace(keys=a.keys))["loss"] for a in (one, two)]
    assert np.abs(with_keys[0] / with_keys[1] - 1).max() > 1e-3


def test_posterior_noise_and_both_dropouts_have_keys_of_their_own(config, monkeypatch):
    """Else what is dropped would depend on the noise, or on the time."""
    keys = {}

    def record(module, name, place):
        plain = getattr(module, name)

        def call(*arguments):
            keys[name] = arguments[place]
            return plain(*arguments)

        monkeypatch.setattr(module, name, call)

    record(tasks.latents.KINDS["pixels"], "x_0", 2)
    record(tasks.objectives, "draw", 2)
    record(tasks.conditions, "drop", 0)
    program = programs.make_program(config, jax.devices()[:1])
    batch = {"image": np.zeros((16, 8, 8, 1), np.uint8), "label": np.zeros(16, np.int32)}
    own = program.task.draw_examples(batch, jax.random.key(0), tasks.Frozen(), dropout=True).keys
    drawn = [jax.random.key(0), *keys.values()]
    drawn += [part for key in drawn for part in jax.random.split(key, 16)] + list(own)
    data_of = {tuple(jax.random.key_data(key).tolist()) for key in drawn}
    assert len(drawn) == 1 + 3 + 4 * 16 + 16
    # The step's key is split into the three.
    assert len(data_of) == len(drawn) - 3
