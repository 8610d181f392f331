"""Digests of JSON values and of arrays; the devices compute a number per array."""

import hashlib
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.system import files


def digest(params) -> str:
    """Returns a digest of parameters, 16 hexadecimal digits.

    It depends on their names and bits only.
    """
    return digest_json(digest_items({"params": params}, 0, {}))


def digest_json(values: object) -> str:
    """Returns a digest of a JSON value: the first 16 hexadecimal digits of its SHA-256."""
    # Keys are sorted, so that the digest does not depend on their order.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def with_digest(values: dict) -> dict:
    """Returns the values with their digest under the key 'digest'."""
    return values | {"digest": digest_json(values)}


def without_digest(values: object, name: object) -> dict:
    """Returns the values without their digest, which must match them.

    Raises: ValueError, with the name of the values' file, if the digest does not match.
    """
    if isinstance(values, dict):
        remaining = {key: value for key, value in values.items() if key != "digest"}
        # Older versions wrote no digest; such values are accepted as they are.
        if values.get("digest", digest_json(remaining)) == digest_json(remaining):
            return remaining
    raise UserError(f"{files.printable(name)} is not as it was written")


def digest_items(trees, step, data_state):
    """Returns the digests of a checkpoint: {'params/blocks/...': number} of all arrays.

    The result also has 'step', and 'data' with a digest of the JSON value data_state.
    """
    # Only the digests leave the devices, not the arrays.
    digests = name_leaves(jax.device_get(digest_arrays(trees)))
    values = {name: int(digest) for name, digest in digests.items()}
    data_digest = zlib.crc32(json.dumps(data_state, sort_keys=True).encode())
    return values | {"step": step, "data": data_digest}


def name_leaves(tree) -> dict:
    """Returns {path: leaf} of a tree, with paths like 'blocks/norm1/scale'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit
def digest_arrays(trees):
    """Returns a uint32 per array: the sum over its elements of a hash of bits and position.

    The sum of integers is the same on every mesh. Any single changed bit changes the digest.
    """

    def digest(array):
        # The bits, not the values, so that NaN and -0.0 count as they are.
        bits = array.view(jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
        # The flat index of each element. Without it, swapped elements would have the same digest.
        index = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            along_axis = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            index = index * np.uint32(size) + along_axis
        return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)

    return jax.tree.map(digest, trees)


def _mix(bits):
    """Scrambles uint32, as a bijection.   Source: the finalizer of MurmurHash3, Appleby."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
