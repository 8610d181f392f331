"""A UNet behind the trainer: on any mesh, stopped and resumed, and able to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from dit_jax import data, files, sources, train
from dit_jax.models import unet


@pytest.fixture
def config(digits_dir):
    """unet-tiny with dropout on the digits' pixels."""
    config = default.get_config("unet")
    config.model.update(unet.named("unet-tiny") | dict(dropout=0.1, learn_sigma=True))
    config.update(total_steps=6, batch_size=16, log_every_steps=1, eval_every_steps=6)
    config.update(checkpoint_every_steps=3)
    config.data.update(name="digits", eval_split="test", image_size=8, image_channels=1)
    config.data.update(flip=False, data_dir=str(digits_dir))
    config.data.update(cache=True, num_threads=0, prefetch_batches=0)
    config.latents.source = "pixels"
    config.optim.learning_rate = 1e-3
    config.sample.update(steps=4)
    return config


def _run(config, workdir):
    """(final state, its lines of metrics without what is timed)."""
    state = train.train_and_evaluate(config, workdir)
    lines = files.read_json_lines(workdir / "metrics.jsonl")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_meshes_train_alike(config, tmp_path, mesh):
    """Without dropout, whose mask is of the batch as it lies on the mesh."""
    config.model.dropout = 0.0
    config.mesh.update(dict(data=1, fsdp=1, tensor=1) | mesh)
    _, lines = _run(config, tmp_path / "mesh")
    config.mesh.update(data=1, fsdp=1, tensor=1)
    program = train.make_program(config, jax.devices()[:1])
    state = train.new_state(program, jax.random.key(config.seed))
    batches = data.TrainIterator(sources.open_split(config, "train"), config, np.arange(16))
    step = train.compile_train_step(program)
    losses = []
    for _ in range(6):
        state, scalars = step(state, next(batches), jax.random.key(config.seed), {})
        losses.append(float(scalars["loss"]))
    found = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(found, losses, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_16_images(config):
    """The noise of images seen often enough is told far better than by their mean."""
    config.model.update(dropout=0.0, class_dropout_prob=0.0, learn_sigma=False)
    config.data.train_split = "train[:16]"
    config.total_steps = 400
    config.optim.update(learning_rate=3e-3, warmup_steps=20)
    program = train.make_program(config, jax.devices()[:1])
    state = train.new_state(program, jax.random.key(0))
    batches = data.TrainIterator(sources.open_split(config, "train"), config, np.arange(16))
    step = train.compile_train_step(program)
    losses = []
    for _ in range(400):
        state, scalars = step(state, next(batches), jax.random.key(0), {})
        losses.append(scalars["loss"])
    losses = np.array(jnp.stack(losses))
    assert losses[0] > 0.9
    assert losses[-50:].mean() < 0.1


def test_dropout_is_drawn_afresh_in_every_step_and_for_every_example(config):
    """And not while evaluating."""
    program = train.make_program(config, jax.devices()[:1])
    batch = next(data.TrainIterator(sources.open_split(config, "train"), config, np.arange(16)))
    one, two = (program.task.examples(batch, jax.random.key(i), {}, dropout=True) for i in range(2))
    assert len(one) == len(two) == 5
    keys = [jax.random.key_data(examples[-1]) for examples in (one, two)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 32
    assert len(program.task.examples(batch, jax.random.key(0), {}, dropout=False)) == 4
    params = jax.tree.map(
        lambda a: 0.1 + jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape) % 7 / 70,
        program.state.params,
    )
    losses = jax.jit(program.task.losses)
    with_keys = [losses(params, {}, *one[:4], keys)["loss"] for keys in (one[4], two[4])]
    assert not np.allclose(*with_keys)
