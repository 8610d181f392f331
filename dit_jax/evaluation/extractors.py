"""Images to the features that their distributions are compared by, on the devices."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import sharding
from dit_jax.errors import MissingFileError, UserError
from dit_jax.workdirs import checkpoint, digests

MAX_PIXEL_VALUES = 4096  # of an image: covariances cost its cube, and mean little beyond
# How to get the weights: each extractor's file.
WEIGHTS = {
    "inception": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}
NAMES = (*WEIGHTS, "pixels")


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A named function of images.

    inception: 'features' [B, 2048], 'spatial' [B, 2023], 'probabilities' [B, 1008].
    dinov2: 'features' [B, width].   pixels: 'features' [B, H W C], in [-1, 1].
    """

    name: str
    dtype: str  # of the activations
    digest: str  # of the weights; '' without any
    apply: Callable  # (params, image [B, H, W, C] uint8) to a dict of f32
    params: dict  # on this process's devices

    @property
    def identity(self) -> dict[str, str]:
        """What every result carries: features of another one are not comparable."""
        return {"name": self.name, "dtype": self.dtype, "digest": self.digest}

    def compile(self, mesh: Mesh) -> Callable:
        """The jitted `extract(image)` of a batch sharded over the mesh; every process gets all."""
        everywhere = sharding.replicated(mesh)
        params = jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                leaf.shape, everywhere, np.asarray(leaf).__getitem__
            ),
            self.params,
        )
        return functools.partial(jax.jit(self.apply, out_shardings=everywhere), params)


def load(name: str, weights: pathlib.Path | None = None, dtype: str = "float32") -> Extractor:
    """The extractor of a name, with the weights of a workdir that `dit_jax.convert` wrote.

    Args: weights, by default runs/<name>.   dtype: of the activations; float32 is the published.
    Raises: ValueError for an unknown name or other weights; FileNotFoundError, with the way to
      get them, where there are none.
    """
    if name == "pixels":
        if weights or dtype != "float32":
            raise UserError("extractor pixels has no weights and is float32.")
        return Extractor("pixels", "float32", "", _pixels, {})
    if name not in NAMES:
        raise UserError(f"unknown extractor {name!r}; choose one of {', '.join(NAMES)}.")
    weights = weights or pathlib.Path("runs") / name
    sharding.in_every_process(lambda: _check_weights(name, weights))
    model, params = checkpoint.load_model(weights, sharding.local_mesh(), dtype, name)
    return Extractor(name, dtype, digests.digest(params), _apply(model), params)


def _check_weights(name, weights):
    if not (weights / "config.json").is_file():
        url = WEIGHTS[name]
        raise MissingFileError(
            f"no weights of {name} in {weights}. Two commands get them, see docs/weights.md:\n"
            f"  curl -LO {url}\n"
            f"  python -m dit_jax.convert {name} {url.rpartition('/')[2]} {weights}"
        )


def _apply(model: nn.Module):
    return lambda params, image: model.apply({"params": params}, image)


def _pixels(_, image):
    values = int(np.prod(image.shape[1:]))
    if values > MAX_PIXEL_VALUES:
        raise UserError(
            f"extractor pixels is for small images, at most {MAX_PIXEL_VALUES} values; these have "
            f"{values}. Use --extractor inception."
        )
    return {"features": image.reshape(-1, values).astype(jnp.float32) / 127.5 - 1}
