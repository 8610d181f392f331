"""The device mesh, and the sharding of batches and parameters over it."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError
from dit_jax.sharding import axes

logger = logging.getLogger("dit_jax")

AXES = ("data", "fsdp", "tensor")
# All devices along the axis tensor hold the same rows, so the other axes shard the batch.
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `config.mesh` over the devices, by default all devices.

    One axis may be -1: its size follows from the number of devices.
    Raises: ValueError if the product of the sizes is not the number of devices.
    """
    sizes = [config[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if min(sizes) < 1 or np.prod(sizes) != num_devices:
        shown = ", ".join(f"mesh.{axis}={config[axis]}" for axis in AXES)
        raise UserError(
            f"{shown} do not multiply to the {num_devices} devices. Set one of them to -1, which "
            "stands for the remaining devices."
        )
    # Auto: under jax.make_mesh's default, Explicit, constraints inside jit may be ignored.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def local_mesh() -> Mesh:
    """Returns a mesh that shards the batch over this process's devices."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())


def pin_batch(x: jax.Array) -> jax.Array:
    """Pins activations x [B, ...]: their rows are sharded over the batch axes of the current mesh.

    `jax.sharding.use_abstract_mesh` sets the mesh while tracing. Without a mesh x is returned as it
    is. Pinning is needed for correct numbers, not only for speed. Without it, XLA chose the
    sharding of products that are partial over the tensor axis. Then gradients of the gates, or of
    layers before the blocks, missed some of the partial sums (data=2, fsdp=2, tensor=2, one row of
    a micro-batch per shard; jax 0.10.2).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of rows over data and fsdp; devices along tensor hold the same rows."""
    return NamedSharding(mesh, BATCH)


def with_shardings(mesh: Mesh, tree):
    """Returns the tree of jax.ShapeDtypeStruct with the sharding of every leaf.

    The tree may hold parameters, their EMA or optimizer moments. Leaves without a row in
    PARAMETER_AXES, such as counters, are replicated. An axis that its mesh axes do not divide stays
    whole, which is logged.
    """
    logged = set()  # names, because the EMA and the moments would repeat each line

    def attach(key_path, leaf):
        name = axes.find_name(key_path)
        if name is None and leaf.ndim:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            logger.warning("no sharding for %s %s: every device holds it", path, leaf.shape)
        spec, left_out = _fit(mesh, axes.PARAMETER_AXES[name], leaf.shape) if name else ((), ())
        if left_out and name not in logged:
            logged.add(name)
            logger.info("not sharded: %s %s over %s", name, leaf.shape, ", ".join(left_out))
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(attach, tree)


def _fit(mesh, spec, shape):
    """Returns the spec with the mesh axes that divide the shape, and the mesh axes left out."""
    fitted, left_out = [], []
    for size, entry in zip(shape, spec, strict=True):
        candidates = (entry,) if isinstance(entry, str) else entry or ()
        dividing = []
        for axis in candidates:
            if size % mesh.shape[axis]:
                left_out.append(f"{axis}={mesh.shape[axis]}")
            else:
                dividing.append(axis)
                size //= mesh.shape[axis]  # the next mesh axis must divide the quotient
        fitted.append(tuple(dividing) or None)
    return fitted, left_out


def check_batch_size(mesh: Mesh, batch_size: int, grad_accumulation_steps: int = 1) -> None:
    """Raises ValueError unless all devices get the same number of rows of each micro-batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * grad_accumulation_steps
    if grad_accumulation_steps < 1 or batch_size < unit or batch_size % unit:
        raise UserError(
            f"{batch_size=} must be a multiple of {unit}: {shards} batch shards (mesh.data x "
            f"mesh.fsdp) x {grad_accumulation_steps=}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the sorted indices of the rows of a global batch that this process feeds."""
    slices = batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[slices[device]] for device in mesh.local_devices]
    return np.unique(np.concatenate(rows))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays on the mesh from the `local_rows` of each process."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def map_groups(mesh: Mesh, f: Callable, x: jax.Array, at_once: int) -> jax.Array:
    """Computes f(x) for x [B, ...], one group of rows after another, to save memory.

    Use it inside jit, with an f that maps each row alone. All rows stay on their devices.

    Args: at_once, the most rows of a group on each device. A group has the largest number of rows
      that divides the device's rows. B must give every device the same number of rows.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    group_rows = next(n for n in range(at_once, 0, -1) if x.shape[0] // shards % n == 0)
    # Each group has rows of every shard, so that no row moves to another device.
    groups = x.reshape(shards, -1, group_rows, *x.shape[1:]).swapaxes(0, 1)
    groups = groups.reshape(-1, shards * group_rows, *x.shape[1:])
    sharding = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    groups = jax.lax.with_sharding_constraint(groups, sharding)
    y = jax.lax.map(f, groups)
    y = y.reshape(-1, shards, group_rows, *y.shape[2:]).swapaxes(0, 1)
    return y.reshape(-1, *y.shape[3:])
