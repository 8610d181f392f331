"""Feature extractors: functions from images to the features by which sets are compared."""

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

# The most values of an image for extractor pixels. The Frechet distance costs their cube.
MAX_PIXEL_VALUES = 4096
# Extractor -> the URL of its weights, for the message if they are missing.
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
    digest: str  # of the weights; '' without weights
    apply: Callable  # maps (params, image [B, H, W, C] uint8) to {kind: f32 array}
    params: dict  # on this process's devices

    @property
    def identity(self) -> dict[str, str]:
        """Name, dtype and digest. Only features of equal identities can be compared."""
        return {"name": self.name, "dtype": self.dtype, "digest": self.digest}

    def compile(self, mesh: Mesh) -> Callable:
        """Returns a jitted function that gives every process all features of a sharded batch."""
        everywhere = sharding.replicated(mesh)
        # A jitted function takes batches of several processes only with parameters that are global
        # arrays. So far they are on the devices of this process.
        params = jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                leaf.shape, everywhere, np.asarray(leaf).__getitem__
            ),
            self.params,
        )
        return functools.partial(jax.jit(self.apply, out_shardings=everywhere), params)


def load(name: str, weights: pathlib.Path | None = None, dtype: str = "float32") -> Extractor:
    """Loads an extractor with weights from a workdir that `dit_jax.convert` wrote.

    Args:
      weights: the workdir, by default runs/<name>.
      dtype: of the activations. Published features are in float32.
    Raises: ValueError for an unknown name or another model's weights; FileNotFoundError, with the
      commands that get the weights, if they are missing.
    """
    if name == "pixels":
        if weights or dtype != "float32":
            raise UserError("extractor pixels has no weights and is float32.")
        return Extractor("pixels", "float32", "", _scale_pixels, {})
    check_choice("extractor", name, NAMES)
    weights = weights or pathlib.Path("runs") / name
    sharding.in_every_process(lambda: _check_weights(name, weights))
    model, params = checkpoint.load_model(weights, sharding.local_mesh(), dtype, name)

    def apply(params, image):
        return model.apply({"params": params}, image)

    return Extractor(name, dtype, digests.digest(params), apply, params)


def _check_weights(name, weights):
    """Raises FileNotFoundError, with the commands that get the weights, if they are missing."""
    if not (weights / "config.json").is_file():
        url = WEIGHTS[name]
        raise MissingFileError(
            f"no weights of {name} in {weights}. Run these commands, see docs/weights.md:\n"
            f"  curl -LO {url}\n"
            f"  python -m dit_jax.convert {name} {url.rpartition('/')[2]} {weights}"
        )


def _scale_pixels(_, image):
    """Returns the features of extractor pixels: the image's values, scaled to [-1, 1]."""
    num_values = int(np.prod(image.shape[1:]))
    if num_values > MAX_PIXEL_VALUES:
        raise UserError(
            f"extractor pixels is for images of at most {MAX_PIXEL_VALUES} values, but these have "
            f"{num_values}. Use --extractor inception."
        )
    return {"features": image.reshape(-1, num_values).astype(jnp.float32) / 127.5 - 1}


def extract(
    extractor: Extractor, images: image_sets.ImageSet, batch_size: int, part: range | None = None
) -> Iterator[tuple[range, loader.Batch, dict[str, np.ndarray]]]:
    """Yields (image indices, batch, features) for part of a set, by this process's devices.

    The devices compute a batch while the caller handles the one before.
    Args: part, the indices of the images, by default all.
    """
    part = part or range(images.num)
    mesh = sharding.local_mesh()
    padded_size = -(-batch_size // mesh.size) * mesh.size
    compute, previous, start = extractor.compile(mesh), None, part.start

    def wait(indices, batch, extracted):
        features = {kind: np.asarray(array)[: len(indices)] for kind, array in extracted.items()}
        return indices, batch, features

    for batch in images.blocks(batch_size, part.start, part.stop):
        indices = range(start, start + len(batch["image"]))
        start = indices.stop
        # Repeats of its images pad the last batch, because another shape would be compiled again.
        image = np.resize(batch["image"], (padded_size, *batch["image"].shape[1:]))
        current = indices, batch, compute(sharding.put_batch(mesh, {"image": image})["image"])
        if previous:
            yield wait(*previous)
        previous = current
    if previous:
        yield wait(*previous)


def check_finite(extracted: dict[str, np.ndarray], indices: range) -> None:
    """Raises FloatingPointError, with the first image, if features are not finite.

    Args: indices, of the images, for the message.
    """
    for name, array in extracted.items():
        finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if not finite.all():
            raise FloatingPointError(
                f"{np.sum(~finite)} of the images {indices[0]} to {indices[-1]} have {name} that "
                f"are NaN or infinite. The first is image {indices[int(finite.argmin())]}. Are the "
                "extractor's weights undamaged? Convert them again, and compare their digest."
            )
