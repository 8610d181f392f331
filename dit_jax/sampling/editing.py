"""Edits of images by a trained model: image-to-image, inpainting, interpolation, inversion."""

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import conditions, latents, models, sharding
from dit_jax.config import ranges, sizes
from dit_jax.data import pixels
from dit_jax.diffusion import edits, samplers, solvers
from dit_jax.errors import MissingFileError, UserError
from dit_jax.sampling import generate, runs
from dit_jax.system import files

logger = logging.getLogger("dit_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class EditRequest:
    """A request for N edited images: their conditions, and their edit."""

    request: conditions.Request
    edit: edits.Edit  # its arrays are [N, ...], or [1, ...] for all images

    def __len__(self) -> int:
        return len(self.request)

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the images with these numbers, by name."""
        arrays = {name: a[index % len(a)] for name, a in vars(self.edit).items()}
        return self.request.rows(index) | arrays


def read_image(path: pathlib.Path, config) -> np.ndarray:
    """Reads an image file, cropped like the model's data: [1, H, W, C] uint8.

    Raises: FileNotFoundError; ValueError for a file that is no image, a damaged one, or one with
      transparent pixels.
    """
    height, width, channels = sizes.image_shape(config.data)
    image = pixels.to_channels(_decode(path, "--image"), channels)
    cropped = np.asarray(pixels.adm_crop(image, config.data.image_size), np.uint8)
    return cropped.reshape(1, height, width, channels)


def read_mask(path: pathlib.Path, image_path: pathlib.Path, config) -> np.ndarray:
    """Reads a mask [1, h, w, 1] f32 for x_0: 1 is drawn anew, 0 is kept.

    A value is 1 where any of its pixels is nearer to white than to black.
    Args: image_path, of the image that `read_image` read.
    Raises: as `read_image`; ValueError if the mask has another size than the image, or if its crop
      is all white or all black.
    """
    # Only equal sizes are cropped alike, so that the mask lies on the right pixels.
    mask, image_size = _decode(path, "--mask"), pixels.read_size(image_path)
    if mask.size != image_size:
        raise UserError(
            f"--mask={files.printable(path)} has {mask.size[0]} x {mask.size[1]} pixels, but "
            f"--image={files.printable(image_path)} {image_size[0]} x {image_size[1]}: they must "
            "be of one size."
        )
    height, width, _ = sizes.image_shape(config.data)
    rows, columns, _ = sizes.input_shape(config.model)
    # Each value of x_0 covers a block of pixels; for a model of pixels that is one pixel.
    new = np.asarray(pixels.adm_crop(pixels.to_channels(mask, 1), config.data.image_size)) >= 128
    new = new.reshape(rows, height // rows, columns, width // columns).any(axis=(1, 3))
    if new.all() or not new.any():
        raise UserError(
            f"--mask={files.printable(path)} is {'white' if new.all() else 'black'} all over the "
            f"crop of {height} x {width} pixels; white is drawn anew, black stays."
        )
    return new.astype(np.float32).reshape(1, rows, columns, 1)


def _decode(path, flag):
    """Decodes an image file to 8 bits; warns of an EXIF orientation, which is not applied.

    Raises: FileNotFoundError or ValueError, with the flag.
    """
    name = f"{flag}={files.printable(path)}"
    if not path.is_file():
        raise MissingFileError(f"no file {name}.")
    try:
        image = pixels.decode(pixels.read_file(path))
        least_alpha = image.convert("RGBA").getextrema()[3][0]
        decoded = pixels.to_8_bits(image)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read the image {name}: {error}.") from error
    if least_alpha < 255:
        raise UserError(
            f"{name} has transparent pixels: save it on an opaque background; a mask, in black and "
            "white."
        )
    if (orientation := pixels.orientation(image)) != 1:
        logger.warning(
            "%s has EXIF orientation %d, which is not applied, as in training: %s",
            name,
            orientation,
            pixels.ORIENTATION_WAY_OUT,
        )
    return decoded


def encode(trained: runs.Trained, image: np.ndarray) -> np.ndarray:
    """Returns x_0 [N, h, w, C] f32 of images [N, H, W, C] uint8, for latents the posterior mean."""
    if trained.vae is None:
        return np.asarray(latents.pixels_from_image(jnp.asarray(image)))
    mean, _ = latents.posterior(jax.jit(latents.encode)(trained.vae, image))
    return np.asarray(latents.scale(trained.config.latents, mean))


def invert(trained: runs.Trained, request: conditions.Request, x_0: np.ndarray) -> np.ndarray:
    """Returns the noise x_T, like x_0 [1, h, w, C], from which the request's image is drawn.

    Sampling is inverted without guidance; x_0 is clipped if config.sample.clip_x_0 is on.
    Raises: ValueError unless config.sample is DDIM with eta 0.
    """
    settings, process = trained.config.sample, trained.process
    prediction, mesh = trained.config.objective.prediction, trained.mesh
    if not settings.sampler.startswith("ddim") or settings.eta:
        raise UserError(
            f"sampler={settings.sampler!r} with eta={settings.eta} is not inverted; take --sampler "
            "ddim --eta 0."
        )
    sampler = samplers.build(settings, process, prediction)

    def invert(params, encoder, x_0, cond):
        encoded = conditions.encode(trained.model, params, encoder, cond, mesh)
        predict = generate.bind_condition(models.bind(trained.model, params, mesh), encoded)
        arguments = predict, sampler.times, settings.clip_x_0
        denoise = solvers.make_denoise(process, prediction, *arguments)
        # One part: without guidance all steps use the same denoiser. With eta 0 no noise is drawn.
        parts = [(denoise, len(sampler.grid) - 1)]
        problem = solvers.Problem(process, sampler.grid, parts, noise=None)
        x_T, _ = solvers.invert_ddim(problem, x_0)
        return x_T

    invert = jax.jit(
        invert,
        compiler_options=models.compiler_options(),
        out_shardings=sharding.batch_sharding(mesh),
    )
    # A batch has a row for each device, so all of them get the same image.
    rows = sharding.local_rows(mesh, mesh.size)
    batch = {"x_0": x_0.repeat(len(rows), 0), "cond": request.cond.repeat(len(rows), 0)}
    x_T = invert(trained.params, trained.encoder, **sharding.put_batch(mesh, batch))
    return generate.to_host(x_T)[:1]


def interpolate(
    first: conditions.Request, second: conditions.Request, numbers: tuple[int, int]
) -> EditRequest:
    """Returns the request for images from the first to the second, in N equal shares from 0 to 1.

    Args:
      first, second: of N images each.
      numbers: of the two images whose noise is interpolated. The ends are the images that `sample`
        draws for these numbers.
    Raises: ValueError for a number that no image has.
    """
    if not all(map(ranges.FROM_0.holds, numbers)):
        raise UserError(f"--numbers={numbers[0]},{numbers[1]} must each be {ranges.FROM_0}.")
    indices = (np.full(len(first), number, np.int32) for number in numbers)
    share = np.linspace(0, 1, len(first), dtype=np.float32)
    return EditRequest(first, edits.Interpolate(*indices, second.cond, share))


def draw(trained: runs.Trained, request: EditRequest, seed: int = 0, strength: float = 1.0):
    """Returns the edited images [N, H, W, C] uint8.

    Args: strength, the share of the sampling steps that are taken, the last ones.
    """
    sample = trained.make_sample_fn(type(request.edit), strength)
    return trained.generate(request, seed, sample, progress=sys.stderr.isatty())


def parse_ends(
    trained: runs.Trained, num: int, **flags: str | list
) -> tuple[conditions.Request, conditions.Request]:
    """Returns the requests for the first and the last of `num` interpolated images.

    A single class or prompt is both ends.
    Raises: ValueError for more than two classes or prompts, or none; as `Trained.request`.
    """
    name = trained.condition.flag
    ends = trained.condition.split_flags(flags)
    if len(ends) not in (1, 2) or not all(any(end[name]) for end in ends):
        raise UserError(f"interpolate takes one or two of --{name}={flags.get(name)}, the ends.")
    first, last = (trained.request(num, **ends[i]) for i in (0, -1))
    return first, last


def parse_before_and_after(
    trained: runs.Trained, after: Mapping[str, str] | None = None, **flags: str | list
) -> tuple[conditions.Request, conditions.Request]:
    """Returns the requests to invert an image with and to draw it again with; by default the same.

    Args: after, the flags with which the image is drawn again, without '_after'.
    Raises: ValueError for several conditions, or for no class; as `Trained.request`.
    """
    condition, after = trained.condition, {k: text for k, text in (after or {}).items() if text}
    name = condition.flag
    # The flags for the second request must fit the model's condition.
    for other in after.keys() - {name}:
        raise UserError(f"--{other}_after={after[other]}: this model takes --{name}_after.")
    if condition.has_classes and not flags.get(name):
        raise UserError(
            "invert needs --labels, the class of the image, in "
            f"0..{trained.config.model.num_classes - 1}: with another it comes from another noise."
        )
    # The flags for the image that is drawn again; a flag that is repeated has a list.
    changed = dict(flags)
    if after:
        changed[name] = [after[name]] if condition.flags[name].repeated else after[name]
    # Several conditions or random ones are fine for sampling, but there is only one image here.
    for flag, values in ((name, flags), (f"{name}_after", changed)):
        if len(condition.split_flags(values)) > 1 or values.get(name) == "random":
            raise UserError(f"--{flag}={values[name]}: invert takes one.")
    before = trained.request(1, **flags)
    return before, trained.request(1, **changed) if after else before
