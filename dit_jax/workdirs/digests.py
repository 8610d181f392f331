"""Digests of parameters: one number for the bits of each array."""

import hashlib
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def digest(params) -> str:
    """16 hexadecimal digits that tell parameters apart, wherever they were read from."""
    digests = json.dumps(digest_items({"params": params}, 0, {}), sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def digest_items(trees, step, data_state):
    """{'params/blocks/...': number} for every array of the trees, the step and the data's state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(digest_arrays(trees)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    digests = dict(zip(names, (int(digest) for _, digest in leaves), strict=True))
    return digests | {
        "step": step,
        "data": zlib.crc32(json.dumps(data_state, sort_keys=True).encode()),
    }


@jax.jit
def digest_arrays(trees):
    """A uint32 per array, the sum of a hash of every element's bits and place.

    Whole numbers add up to the same on every mesh, and one changed bit always shows.
    """

    def digest(array):
        bits = array.view(jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, array.shape, axis
            )
        return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)

    return jax.tree.map(digest, trees)


def _mix(bits):
    """A bijection of uint32 that scatters its bits.   Source: MurmurHash3's finalizer, Appleby."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
