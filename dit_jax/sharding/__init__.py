"""Devices and processes: the mesh, the axes that shard each parameter, several processes."""

from dit_jax.sharding.axes import DIT_GROWING_KERNELS, find_name
from dit_jax.sharding.hosts import (
    all_true,
    broadcast_result,
    broadcast_text,
    in_every_process,
    in_first_process,
)
from dit_jax.sharding.mesh import (
    AXES,
    BATCH,
    batch_sharding,
    check_batch_size,
    local_mesh,
    local_rows,
    make_mesh,
    map_groups,
    pin_batch,
    put_batch,
    replicated,
    with_shardings,
)

__all__ = [
    "AXES",
    "BATCH",
    "DIT_GROWING_KERNELS",
    "all_true",
    "batch_sharding",
    "broadcast_result",
    "broadcast_text",
    "check_batch_size",
    "find_name",
    "in_every_process",
    "in_first_process",
    "local_mesh",
    "local_rows",
    "make_mesh",
    "map_groups",
    "pin_batch",
    "put_batch",
    "replicated",
    "with_shardings",
]
