"""All moments of a dataset in device memory, for `latents.source=device`."""

import jax
import numpy as np
from tqdm import tqdm

from dit_jax import sharding
from dit_jax.data import loader, sources
from dit_jax.errors import UserError

RECORDS_AT_ONCE = 1024  # read at a time, before they are copied into the whole array


def load_moments(mesh: jax.sharding.Mesh, source: sources.Source) -> dict[str, jax.Array]:
    """Loads all 'moments' [N, h, w, 2C] f16 of a source, with the labels or captions of each.

    The arrays are sharded over the batch. Host memory holds this process's part once, until it is
    on the devices.
    Raises: ValueError, with the bytes, if the arrays do not fit on the devices; for several
      captions of an image. No room is kept for the model's activations: their size is not known.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    count = -(-len(source) // shards) * shards  # a multiple; the last record fills it up
    # One record tells the bytes of all, before the others are read.
    example = {name: a[0] for name, a in loader.with_caption(loader.gather(source, [0])).items()}
    needed = count // shards * sum(a.nbytes for a in example.values())
    free = _free_bytes(mesh.local_devices[0])
    if free is not None and needed > free:
        raise UserError(
            f"{source.origin} needs {needed:,} bytes on each device, where {free:,} are free "
            "and training steps need some too: use more devices, or latents.source=moments."
        )
    if (captions := source.annotations.captions_per_image) > 1:
        raise UserError(
            f"{source.origin} has {captions} captions of each image, but "
            "latents.source=device keeps one: use latents.source=moments."
        )
    # Each process reads only the records for its own devices.
    numbers = np.minimum(sharding.local_rows(mesh, count), len(source) - 1)
    arrays = {n: np.empty((len(numbers), *a.shape), a.dtype) for n, a in example.items()}
    with tqdm(total=len(numbers), desc="moments", disable=None) as bar:  # None: on terminals only
        for start in range(0, len(numbers), RECORDS_AT_ONCE):
            block = slice(start, start + RECORDS_AT_ONCE)
            batch = loader.with_caption(loader.gather(source, numbers[block]))
            for name, array in arrays.items():
                array[block] = batch[name]
            bar.update(len(batch["label"]))
    return sharding.put_batch(mesh, arrays)


def _free_bytes(device):
    memory = device.memory_stats()  # None on CPUs
    return memory and memory["bytes_limit"] - memory["bytes_in_use"]
