"""The device mesh, and how batches and parameters lie on it."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import UserError
from dit_jax.sharding import axes

logger = logging.getLogger("dit_jax")

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over devices, by default all; one axis may be -1, the rest of them.

    Raises: ValueError if the axes do not multiply to the number of devices.
    """
    sizes = [config[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if min(sizes) < 1 or np.prod(sizes) != num_devices:
        wanted = ", ".join(f"mesh.{axis}={config[axis]}" for axis in AXES)
        raise UserError(
            f"{wanted} do not multiply to the {num_devices} devices; set at most one of them to -1 "
            "(the rest of the devices)."
        )
    # Auto: under jax.make_mesh's default, Explicit, constraints inside jit may be ignored.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def local_mesh() -> Mesh:
    """All devices of this process, over the batch: for what processes do each for itself."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())


def pin_batch(x: jax.Array) -> jax.Array:
    """Pins activations x [B, ...] to rows over the batch axes of the mesh in context.

    The mesh is that of `jax.sharding.use_abstract_mesh` while tracing; without one x is returned
    as it is. Needed for right numbers, not only for speed: where a product that is partial over
    the tensor axis was left to XLA, the gradients of the gates, or of what lies before the
    blocks, missed some of its parts (data=2, fsdp=2, tensor=2, one row of a micro-batch per shard;
    jax 0.10.2).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; a tensor group holds the same rows."""
    return NamedSharding(mesh, BATCH)


def with_shardings(mesh: Mesh, tree):
    """The tree of jax.ShapeDtypeStruct with the sharding of every leaf, by its path's end.

    Serves parameters, EMA and optimizer moments alike; other leaves (counters) are replicated.
    An axis that the mesh axes do not divide stays whole and is logged.
    """
    logged = set()

    def attach(key_path, leaf):
        sharding = leaf_sharding(key_path, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def leaf_sharding(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        name = next(
            (name for name in axes.PARAMETER_AXES if ("/" + path).endswith("/" + name)), None
        )
        if name is None:
            if leaf.ndim:
                logger.warning("no sharding for %s %s: every device holds it", path, leaf.shape)
            return replicated(mesh)
        spec, whole = _fit(mesh, axes.PARAMETER_AXES[name], leaf.shape)
        if whole and name not in logged:
            logged.add(name)
            logger.info("not sharded: %s %s over %s", name, leaf.shape, ", ".join(whole))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(attach, tree)


def _fit(mesh, spec, shape):
    """The spec with the mesh axes that divide, and those that had to be left out."""
    fitted, whole = [], []
    for size, entry in zip(shape, spec, strict=True):
        kept = []
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if size % mesh.shape[axis]:
                whole.append(f"{axis}={mesh.shape[axis]}")
            else:
                kept.append(axis)
                size //= mesh.shape[axis]
        fitted.append(tuple(kept) or None)
    return fitted, whole


def check_batch_size(mesh: Mesh, batch_size: int, grad_accumulation_steps: int = 1) -> None:
    """Demands that every device gets the same number of rows of every micro-batch.

    Raises: ValueError with the sizes.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * grad_accumulation_steps
    if grad_accumulation_steps < 1 or batch_size < unit or batch_size % unit:
        raise UserError(
            f"{batch_size=} must be a multiple of {unit}: {shards} batch shards (mesh.data x "
            f"mesh.fsdp) x {grad_accumulation_steps=}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process feeds, sorted."""
    slices = batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[slices[device]] for device in mesh.local_devices]
    return np.unique(np.concatenate(rows))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from each process's `local_rows`."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def map_groups(mesh: Mesh, f: Callable, x: jax.Array, at_once: int) -> jax.Array:
    """f(x) for x [B, ...], computed for a group of rows after another, to bound the memory.

    Every device's rows stay where they are. For use inside jit, where f is a function of each row.

    Args: at_once, the most rows of a group on each device; a group is the largest that divides
      the device's rows, which B must give every device alike.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = next(n for n in range(at_once, 0, -1) if x.shape[0] // shards % n == 0)
    groups = x.reshape(shards, -1, rows, *x.shape[1:]).swapaxes(0, 1)
    groups = groups.reshape(-1, shards * rows, *x.shape[1:])
    grouped = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    groups = jax.lax.with_sharding_constraint(groups, grouped)
    y = jax.lax.map(f, groups)
    y = y.reshape(-1, shards, rows, *y.shape[2:]).swapaxes(0, 1)
    return y.reshape(-1, *y.shape[3:])
