"""The mesh, the table of axes, and that sharding saves memory and changes no numbers."""

import functools
import itertools
import logging
import re

import flax.traverse_util
import jax
import numpy as np
import pytest
from conftest import make_mesh_of_all
from helpers.close import assert_close, assert_trees_close
from ml_collections import ConfigDict

from configs import default
from dit_jax import models, sharding
from dit_jax.models import blocks
from dit_jax.sharding import axes
from dit_jax.training import initial_state, programs, tasks


def _mesh(**sizes):
    return make_mesh_of_all(ConfigDict(dict(data=1, fsdp=1, tensor=1) | sizes))


def test_one_axis_takes_the_remaining_devices():
    assert dict(_mesh(data=-1, tensor=2).shape) == dict(data=4, fsdp=1, tensor=2)
    assert dict(_mesh(fsdp=-1).shape) == dict(data=1, fsdp=8, tensor=1)


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=-1, fsdp=3)])
def test_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="do not multiply to the 8 devices"):
        _mesh(**sizes)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (8, 2), (0, 1), (16, 0)])
def test_batch_that_does_not_divide_is_refused(batch_size, accumulation):
    with pytest.raises(ValueError, match=f"{batch_size=} must be a multiple of"):
        sharding.check_batch_size(_mesh(data=8), batch_size, accumulation)


def test_table_has_every_parameter_of_every_block_and_no_other(smoke_config):
    """Told a label or a caption, whose encoder has blocks that some of the models have too."""
    paths = {}
    smoke_config.model.context_size = 16
    for block, condition in itertools.product(blocks.BLOCKS, ("label", "tokens")):
        smoke_config.model.update(block=block, condition=condition)
        model = models.build(smoke_config.model)
        shapes = models.param_shapes(model)
        flat = flax.traverse_util.flatten_dict(shapes, sep="/")
        for path, leaf in flat.items():
            own = path in axes.DIT_AXES  # parts of the encoder's blocks have rows of their own
            paths[path if own else path.removeprefix("text_encoder/")] = leaf.ndim
    assert paths == {name: len(spec) for name, spec in axes.DIT_AXES.items()}


def test_table_has_the_last_two_names_of_every_parameter_of_a_vae():
    config = default.get_config("vae")
    shapes = models.param_shapes(models.build(config.model))
    ends = {path[-2:]: leaf.ndim for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    assert {"/".join(end): ndim for end, ndim in ends.items()} == {
        name: len(spec) for name, spec in axes.VAE_AXES.items()
    }


def test_fsdp_holds_an_eighth_of_the_state_on_each_device(smoke_config):
    """Of parameters, EMA and both Adam moments; only biases too small to divide stay whole."""
    smoke_config.mesh.update(data=1, fsdp=8)
    smoke_config.model.hidden_size = 64
    program = programs.make_program(smoke_config)
    state = initial_state.new_state(program, jax.random.key(0))
    for part in (state.params, state.ema_params, state.opt_state):
        leaves = jax.tree.leaves(part)
        total = sum(leaf.nbytes for leaf in leaves)
        on_device = [0] * 8
        for leaf in leaves:
            for shard in leaf.addressable_shards:
                on_device[shard.device.id] += shard.data.nbytes
        assert_close(on_device, np.full(8, total / 8), 0.005)


def test_axis_that_does_not_divide_stays_whole_and_is_logged(smoke_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    smoke_config.mesh.update(data=2, tensor=4)  # the smoke model has 2 heads
    with caplog.at_level(logging.INFO, "dit_jax"):
        program = programs.make_program(smoke_config)
    qkv = program.state.params["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.sharding.spec[3] is None
    logged = [r.getMessage() for r in caplog.records if "qkv/kernel" in r.getMessage()]
    assert logged == ["not sharded: blocks/attn/qkv/kernel (2, 32, 3, 2, 16) over tensor=4"]


def test_local_rows_are_all_rows_of_a_single_process():
    np.testing.assert_array_equal(sharding.local_rows(_mesh(data=4, tensor=2), 8), range(8))


@pytest.mark.parametrize(
    ("sizes", "devices", "shares"),
    [
        (dict(data=8), 4, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        (dict(data=2, fsdp=2, tensor=2), 2, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (dict(data=2, fsdp=1, tensor=4), 2, [list(range(8)), list(range(8)), list(range(8, 16))]),
        (dict(data=1, fsdp=4, tensor=2), 1, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=str,
)
def test_every_process_feeds_the_rows_of_its_devices(monkeypatch, sizes, devices, shares):
    """The mesh's devices, so many to a process; those of a tensor group feed the same rows."""
    mesh = _mesh(**sizes)
    for i, expected in enumerate(shares):
        own = list(mesh.devices.flat)[i * devices : (i + 1) * devices]
        monkeypatch.setitem(vars(mesh), "local_devices", own)
        np.testing.assert_array_equal(sharding.local_rows(mesh, 16), expected)


@pytest.mark.parametrize(("batch_size", "rows"), [(96, 4), (40, 5), (28, 1), (4, 1)])
def test_groups_are_computed_in_turn_where_their_rows_are(batch_size, rows):
    """At most 5 of a device's rows at a time, so many as divide all of them."""
    mesh, shapes = _mesh(data=2, fsdp=2, tensor=2), []
    x = np.arange(batch_size * 3, dtype=np.float32).reshape(batch_size, 3)

    def f(x):
        shapes.append(x.shape)
        return 2 * x[:, :2]

    placed = sharding.put_batch(mesh, {"x": x})["x"]
    compiled = jax.jit(lambda x: sharding.map_groups(mesh, f, x, 5)).lower(placed).compile()
    y = compiled(placed)
    np.testing.assert_array_equal(y, 2 * x[:, :2])
    assert set(shapes) == {(4 * rows, 3)}
    assert y.sharding.is_equivalent_to(placed.sharding, 2)
    assert not re.search("all-|collective-|reduce-scatter", compiled.as_text())


def _five_steps(config, devices=None):
    """Losses and final parameters of five steps on fixed batches."""
    program = programs.make_program(config, devices)
    key = jax.random.key(0)
    state = initial_state.new_state(program, key)
    step = programs.compile_train_step(program)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(5):
        image = rng.integers(0, 256, (config.batch_size, 8, 8, 1), np.uint8)
        label = rng.integers(0, 10, config.batch_size, np.int32)
        batch = sharding.put_batch(program.mesh, {"image": image, "label": label})
        state, scalars = step(state, batch, key, tasks.Frozen())
        losses.append(jax.device_get(scalars))
    assert int(state.step) == 5
    return losses, jax.device_get((state.params, state.ema_params))


@pytest.fixture(scope="module")
def one_device(digits_dir):
    from configs import smoke

    return _five_steps(smoke.get_config(), jax.devices()[:1])


def _assert_same_run(actual, expected, tolerance=1e-5):
    """The losses, each by itself, and all parameters, of which the largest counts.

    Adam divides by the gradient's size: where it is near 0 a step is as large as elsewhere, of its
    rounding's sign.
    """
    assert_trees_close(actual[0], expected[0], 1e-5)
    parameters = (jax.flatten_util.ravel_pytree(run[1])[0] for run in (actual, expected))
    assert_close(*parameters, tolerance)


MESHES = [
    dict(data=8),
    dict(data=1, fsdp=8),
    dict(data=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
]
# All axes at once and, accumulated, one row of a micro-batch per shard: where XLA went wrong.
QUICK = ("adaLN", MESHES[3])


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=[pytest.mark.slow] * (m != MESHES[0])) for m in MESHES],
    ids=str,
)
def test_eight_devices_compute_what_one_does(smoke_config, one_device, mesh):
    smoke_config.mesh.update(mesh)
    _assert_same_run(_five_steps(smoke_config), one_device)


@functools.cache
def _block_on_one_device(block):
    return _five_steps(_block_config(block), jax.devices()[:1])


def _block_config(block):
    """A large Adam eps makes updates smooth in the gradients, whose sums run in another order.

    With the usual one, elements near zero take a step of their noise's sign.
    """
    from configs import smoke

    config = smoke.get_config()
    config.model.block = block
    config.optim.update(eps=1.0, learning_rate=1.0)
    return config


@pytest.mark.parametrize(
    ("block", "mesh"),
    [
        pytest.param(block, mesh, marks=[] if (block, mesh) == QUICK else pytest.mark.slow)
        for block in blocks.BLOCKS
        for mesh in MESHES
    ],
    ids=str,
)
def test_eight_devices_train_every_block_as_one_does(block, mesh):
    """Accumulated gradients are those of the whole batch, on the last mesh."""
    expected = _block_on_one_device(block)
    assert expected[0][-1]["loss"] < 0.6 * expected[0][0]["loss"]
    config = _block_config(block)
    config.mesh.update(mesh)
    config.grad_accumulation_steps = 4 if mesh == MESHES[3] else 1
    actual = _five_steps(config)
    _assert_same_run(actual, expected, 1e-6)
    assert_trees_close(actual[1], expected[1], 1e-5)
