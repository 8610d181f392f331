"""All moments of a dataset in device memory, for `latents.source=device`."""

import jax
import numpy as np
from tqdm import tqdm

from dit_jax import sharding
from dit_jax.data import loader, sources
from dit_jax.errors import UserError

RECORDS_AT_ONCE = 1024  # how many are read before they are copied into the full array


def load_moments(mesh: jax.sharding.Mesh, source: sources.Source) -> dict[str, jax.Array]:
    """Loads all 'moments' [N, h, w, 2C] f16 of a source, with the label or caption of each record.

    The arrays are sharded along the first axis, which is padded to a multiple of the shards. Host
    memory holds this process's part once, until it is on the devices. The size check leaves no room
    for the model's activations, whose size is not known here.
    Raises: ValueError, with the sizes in bytes, if the arrays do not fit on the devices; ValueError
      if images have several captions.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    # Rounded up to a multiple of the shards; repeats of the last record pad it.
    num_rows = -(-len(source) // shards) * shards
    # All records have the size of the first, so the check need not read the others.
    first_batch = loader.with_caption(loader.gather(source, [0]))
    example = {name: array[0] for name, array in first_batch.items()}
    needed = num_rows // shards * sum(array.nbytes for array in example.values())
    free = _free_bytes(mesh.local_devices[0])
    if free is not None and needed > free:
        raise UserError(
            f"{source.origin} needs {needed:,} bytes on each device, but only {free:,} are free, "
            "and training steps need some too. Use more devices, or set latents.source=moments."
        )
    if (captions := source.annotations.captions_per_image) > 1:
        raise UserError(
            f"{source.origin} has {captions} captions of each image, but latents.source=device "
            "keeps only one. Set latents.source=moments to use all."
        )
    # Each process reads only the records for its own devices.
    indices = np.minimum(sharding.local_rows(mesh, num_rows), len(source) - 1)
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
            bar.update(len(batch["label"]))
    return sharding.put_batch(mesh, arrays)


def _free_bytes(device):
    """Returns the free bytes of a device, or None if it has no memory statistics."""
    memory = device.memory_stats()  # None on CPUs
    return memory and memory["bytes_limit"] - memory["bytes_in_use"]
