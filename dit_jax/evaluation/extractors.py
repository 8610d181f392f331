"""Feature extractors: networks that turn images into the features by which sets are compared."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import sharding
from dit_jax.data import loader
from dit_jax.errors import MissingFileError, UserError, check_choice
from dit_jax.evaluation import image_sets
from dit_jax.workdirs import checkpoint, digests

MAX_PIXEL_VALUES = 4096  # of an image; a covariance costs their cube, and means little beyond
# Extractor -> the address of its weights, for the message if they are missing.
WEIGHTS = {
    "inception": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}
NAMES = (*WEIGHTS, "pixels")


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A named function from images to features.

    inception: 'features' [B, 2048], 'spatial' [B, 2023], 'probabilities' [B, 1008].
    dinov2: 'features' [B, width].
    pixels: 'features' [B, H W C], in [-1, 1].
    """

    name: str
    dtype: str  # of the activations
    digest: str  # of the weights; '' if it has none
    apply: Callable  # (params, image [B, H, W, C] uint8) to a dict of f32
    params: dict  # on this process's devices

    @property
    def identity(self) -> dict[str, str]:
        """Name, dtype and digest. Only features of equal identities can be compared."""
        return {"name": self.name, "dtype": self.dtype, "digest": self.digest}

    def compile(self, mesh: Mesh) -> Callable:
        """Returns the jitted function of a sharded batch; every process gets all features."""
        everywhere = sharding.replicated(mesh)
        # The parameters are on the devices of this process only. As global arrays, replicated over
        # the mesh, they go with batches of several processes.
        params = jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                leaf.shape, everywhere, np.asarray(leaf).__getitem__
            ),
            self.params,
        )
        return functools.partial(jax.jit(self.apply, out_shardings=everywhere), params)


def load(name: str, weights: pathlib.Path | None = None, dtype: str = "float32") -> Extractor:
    """Returns the extractor of this name, with weights from a workdir of `dit_jax.convert`.

    Args:
      weights: the workdir, by default runs/<name>.
      dtype: of the activations. Published features are in float32.
    Raises: ValueError for an unknown name or another model's weights; FileNotFoundError that says
      how to get them, if there are none.
    """
    if name == "pixels":
        if weights or dtype != "float32":
            raise UserError("extractor pixels has no weights and is float32.")
        return Extractor("pixels", "float32", "", _pixels, {})
    check_choice("extractor", name, NAMES)
    weights = weights or pathlib.Path("runs") / name
    sharding.in_every_process(lambda: _check_weights(name, weights))
    model, params = checkpoint.load_model(weights, sharding.local_mesh(), dtype, name)

    def apply(params, image):
        return model.apply({"params": params}, image)

    return Extractor(name, dtype, digests.digest(params), apply, params)


def _check_weights(name, weights):
    """Raises FileNotFoundError, with the commands that get them, if there are no weights."""
    if not (weights / "config.json").is_file():
        url = WEIGHTS[name]
        raise MissingFileError(
            f"no weights of {name} in {weights}. Two commands get them, see docs/weights.md:\n"
            f"  curl -LO {url}\n"
            f"  python -m dit_jax.convert {name} {url.rpartition('/')[2]} {weights}"
        )


def _pixels(_, image):
    """Returns the features of extractor pixels: the image's values in [-1, 1]."""
    values = int(np.prod(image.shape[1:]))
    if values > MAX_PIXEL_VALUES:
        raise UserError(
            f"extractor pixels is for small images, at most {MAX_PIXEL_VALUES} values; these have "
            f"{values}. Use --extractor inception."
        )
    return {"features": image.reshape(-1, values).astype(jnp.float32) / 127.5 - 1}


def extract(
    extractor: Extractor, images: image_sets.ImageSet, batch_size: int, part: range | None = None
) -> Iterator[tuple[range, loader.Batch, dict[str, np.ndarray]]]:
    """Yields (numbers, images, features) of part of a set, by this process's devices.

    The devices compute the next batch while the caller handles one.
    Args: part, the numbers of the images, by default all.
    """
    part = part or range(images.num)
    mesh = sharding.local_mesh()
    padded_size = -(-batch_size // mesh.size) * mesh.size
    compute, previous, start = extractor.compile(mesh), None, part.start

    def finished(numbers, block, extracted):
        return numbers, block, {k: np.asarray(a)[: len(numbers)] for k, a in extracted.items()}

    for block in images.blocks(batch_size, part.start, part.stop):
        numbers = range(start, start + len(block["image"]))
        start = numbers.stop
        # The last block is filled up with its own images: another shape would be compiled again.
        image = np.resize(block["image"], (padded_size, *block["image"].shape[1:]))
        current = numbers, block, compute(sharding.put_batch(mesh, {"image": image})["image"])
        if previous:
            yield finished(*previous)
        previous = current
    if previous:
        yield finished(*previous)


def check_finite(extracted: dict[str, np.ndarray], numbers: range) -> None:
    """Raises unless the features are finite.

    Args: numbers, of the images, for the message.
    Raises: FloatingPointError with the first image whose features are not finite.
    """
    for name, array in extracted.items():
        finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if not finite.all():
            raise FloatingPointError(
                f"{np.sum(~finite)} of the images {numbers[0]} to {numbers[-1]} have {name} that "
                f"are NaN or infinite, first image {numbers[int(finite.argmin())]}. Are the "
                "extractor's weights whole? Convert them again, and compare their digest."
            )
