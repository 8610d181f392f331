"""Loads all moments of a dataset to device memory, for `latents.source=device`."""

import math

import jax
import numpy as np
from tqdm import tqdm

from dit_jax import sharding
from dit_jax.data import loader, sources
from dit_jax.errors import UserError

RECORDS_AT_ONCE = 1024  # records that are read before they are copied into the full array


def load_moments(mesh: jax.sharding.Mesh, source: sources.Source) -> dict[str, jax.Array]:
    """Loads all 'moments' [N, h, w, 2C] f16 of a source, with the label or caption of each record.

    The arrays are sharded along the first axis. Copies of the last record pad it to a multiple of
    the shards. Host memory holds this process's part of the arrays until the devices have it.
    Raises: ValueError if the arrays do not fit on the devices, or if images have several captions.
    """
    num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows_per_shard = math.ceil(len(source) / num_shards)
    # All records have the same size, so the first is enough for the check.
    first_batch = loader.with_caption(loader.gather(source, [0]))
    example = {name: array[0] for name, array in first_batch.items()}
    needed_bytes = rows_per_shard * sum(array.nbytes for array in example.values())
    free_bytes = _read_free_bytes(mesh.local_devices[0])
    # The model's activations need memory too, but their size is not known here.
    if free_bytes is not None and needed_bytes > free_bytes:
        raise UserError(
            f"{source.origin} needs {needed_bytes:,} bytes on each device, but only {free_bytes:,} "
            "are free, and training steps need some too. Use more devices, or set "
            "latents.source=moments."
        )
    if (captions := source.annotations.captions_per_image) > 1:
        raise UserError(
            f"{source.origin} has {captions} captions of each image, but latents.source=device "
            "keeps only one. Set latents.source=moments to train on all."
        )
    # Each process reads only the records for its own devices.
    rows = sharding.local_rows(mesh, num_shards * rows_per_shard)
    indices = np.minimum(rows, len(source) - 1)
    arrays = {
        name: np.empty((len(indices), *array.shape), array.dtype) for name, array in example.items()
    }
    # disable=None shows the bar on terminals only.
    with tqdm(total=len(indices), desc="moments", disable=None) as bar:
        for start in range(0, len(indices), RECORDS_AT_ONCE):
            block = slice(start, start + RECORDS_AT_ONCE)
            batch = loader.with_caption(loader.gather(source, indices[block]))
            for name, array in arrays.items():
                array[block] = batch[name]
            bar.update(len(indices[block]))
    return sharding.put_batch(mesh, arrays)


def _read_free_bytes(device):
    """Returns the free bytes of a device; None without memory statistics, as on CPUs."""
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
