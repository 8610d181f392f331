"""The mesh, the axes tables, and training results and memory under every sharding."""

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
from dit_jax.training import frozen_networks, initial_state, programs


def _mesh(**sizes):
    return make_mesh_of_all(ConfigDict(dict(data=1, fsdp=1, tensor=1) | sizes))


def test_axis_of_size_minus_1_takes_the_remaining_devices():
    assert dict(_mesh(data=-1, tensor=2).shape) == dict(data=4, fsdp=1, tensor=2)
    assert dict(_mesh(fsdp=-1).shape) == dict(data=1, fsdp=8, tensor=1)


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=-1, fsdp=3)])
def test_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="do not multiply to the 8 devices"):
        _mesh(**sizes)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (8, 2), (0, 1), (16, 0)])
def test_batch_sizes_that_devices_or_accumulation_do_not_divide_are_refused(
    batch_size, accumulation
):
    with pytest.raises(ValueError, match=f"{batch_size=} must be a multiple of"):
        sharding.check_batch_size(_mesh(data=8), batch_size, accumulation)


def test_dit_axes_have_exactly_the_parameters_of_all_blocks_and_conditions(smoke_config):
    paths = {}
    smoke_config.model.context_size = 16
    for block, condition in itertools.product(blocks.BLOCKS, ("label", "tokens")):
        smoke_config.model.update(block=block, condition=condition)
        model = models.build(smoke_config.model)
        shapes = models.param_shapes(model)
        flat = flax.traverse_util.flatten_dict(shapes, sep="/")
        # The text encoder's blocks have the same names and axes as the network's.
        paths |= {p.replace("text_encoder/blocks", "blocks"): a.ndim for p, a in flat.items()}
    assert paths == {name: len(spec) for name, spec in axes.DIT_AXES.items()}


def test_vae_axes_have_exactly_the_last_two_names_of_every_parameter():
    config = default.get_config("vae")
    shapes = models.param_shapes(models.build(config.model))
    ends = {path[-2:]: leaf.ndim for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    assert {"/".join(end): ndim for end, ndim in ends.items()} == {
        name: len(spec) for name, spec in axes.VAE_AXES.items()
    }


def test_fsdp_keeps_an_eighth_of_the_state_on_each_device(smoke_config):
    """Apart from biases that are too small to divide, hence the tolerance."""
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


def test_indivisible_axis_is_not_sharded_and_is_logged(smoke_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dit_jax"), "propagate", True)
    smoke_config.mesh.update(data=2, tensor=4)  # the smoke model has 2 heads
    with caplog.at_level(logging.INFO, "dit_jax"):
        program = programs.make_program(smoke_config)
    qkv = program.state.params["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.sharding.spec[3] is None
    logged = [r.getMessage() for r in caplog.records if "qkv/kernel" in r.getMessage()]
    assert logged == ["not sharded: blocks/attn/qkv/kernel (2, 32, 3, 2, 16) over tensor=4"]


def test_single_process_feeds_all_rows():
    np.testing.assert_array_equal(sharding.local_rows(_mesh(data=4, tensor=2), 8), range(8))


@pytest.mark.parametrize(
    ("sizes", "devices_per_process", "rows"),
    [
        (dict(data=8), 4, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        (dict(data=2, fsdp=2, tensor=2), 2, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (dict(data=2, fsdp=1, tensor=4), 2, [list(range(8)), list(range(8)), list(range(8, 16))]),
        (dict(data=1, fsdp=4, tensor=2), 1, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=str,
)
def test_every_process_feeds_the_rows_of_its_devices(monkeypatch, sizes, devices_per_process, rows):
    """The devices of a tensor group need the same rows."""
    mesh = _mesh(**sizes)
    for process, expected in enumerate(rows):
        first = process * devices_per_process
        local_devices = list(mesh.devices.flat)[first : first + devices_per_process]
        monkeypatch.setitem(vars(mesh), "local_devices", local_devices)
        np.testing.assert_array_equal(sharding.local_rows(mesh, 16), expected)


@pytest.mark.parametrize(("batch_size", "group_rows"), [(96, 4), (40, 5), (28, 1), (4, 1)])
def test_map_groups_computes_groups_in_turn_without_communication(batch_size, group_rows):
    """A group has the most rows of a device, up to 5, that divide all of them."""
    mesh, shapes = _mesh(data=2, fsdp=2, tensor=2), []
    x = np.arange(batch_size * 3, dtype=np.float32).reshape(batch_size, 3)

    def f(x):
        shapes.append(x.shape)
        return 2 * x[:, :2]

    placed = sharding.put_batch(mesh, {"x": x})["x"]
    compiled = jax.jit(lambda x: sharding.map_groups(mesh, f, x, 5)).lower(placed).compile()
    y = compiled(placed)
    np.testing.assert_array_equal(y, 2 * x[:, :2])
    assert set(shapes) == {(4 * group_rows, 3)}
    assert y.sharding.is_equivalent_to(placed.sharding, 2)
    assert not re.search("all-|collective-|reduce-scatter", compiled.as_text())


def _train_five_steps(config, devices=None):
    """Returns the losses, and the final parameters, of five steps on fixed batches."""
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
        state, scalars = step(state, batch, key, frozen_networks.Frozen())
        losses.append(jax.device_get(scalars))
    assert int(state.step) == 5
    return losses, jax.device_get((state.params, state.ema_params))


@pytest.fixture(scope="module")
def one_device(digits_dir):
    from configs import smoke

    return _train_five_steps(smoke.get_config(), jax.devices()[:1])


def _assert_same_run(actual, expected, tolerance=1e-5):
    """Compares each loss alone, but all parameters as one array, relative to the largest.

    Adam divides by the gradient's size. Where a gradient is nearly 0, its rounding decides the sign
    of a full step.
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
# All axes at once, with one example of a micro-batch per shard, is the case that XLA got wrong.
QUICK = ("adaLN", MESHES[3])


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=[pytest.mark.slow] * (m != MESHES[0])) for m in MESHES],
    ids=str,
)
def test_eight_devices_compute_the_same_as_one(smoke_config, one_device, mesh):
    smoke_config.mesh.update(mesh)
    _assert_same_run(_train_five_steps(smoke_config), one_device)


@functools.cache
def _block_on_one_device(block):
    return _train_five_steps(_block_config(block), jax.devices()[:1])


def _block_config(block):
    """Returns the smoke config with this block, and with updates that are smooth in the gradients.

    With Adam's usual eps, the rounding of a gradient near 0 decides the sign of its step.
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
def test_eight_devices_train_every_block_like_one(block, mesh):
    """The last mesh also accumulates gradients, which must equal those of the whole batch."""
    expected = _block_on_one_device(block)
    assert expected[0][-1]["loss"] < 0.6 * expected[0][0]["loss"]
    config = _block_config(block)
    config.mesh.update(mesh)
    config.grad_accumulation_steps = 4 if mesh == MESHES[3] else 1
    actual = _train_five_steps(config)
    _assert_same_run(actual, expected, 1e-6)
    assert_trees_close(actual[1], expected[1], 1e-5)
