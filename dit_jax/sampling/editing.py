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
    edit: edits.Edit  # arrays [N, ...], or [1, ...] if all images share them

    def __len__(self) -> int:
        return len(self.request)

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {name: array [B, ...]} for the images with indices `index` [B]."""
        arrays = {name: array[index % len(array)] for name, array in vars(self.edit).items()}
        return self.request.rows(index) | arrays


def read_image(path: pathlib.Path, config) -> np.ndarray:
    """Reads an image file, and crops it like the model's data: [1, H, W, C] uint8.

    Raises: FileNotFoundError; ValueError if the file is damaged, is not an image, or has
      transparent pixels.
    """
    height, width, channels = sizes.image_shape(config.data)
    image = pixels.to_channels(_decode(path, "--image"), channels)
    cropped = np.asarray(pixels.adm_crop(image, config.data.image_size), np.uint8)
    return cropped.reshape(1, height, width, channels)


def read_mask(path: pathlib.Path, image_path: pathlib.Path, config) -> np.ndarray:
    """Reads a mask [1, h, w, 1] f32 for x_0: 1 is drawn anew, 0 is kept.

    A value is 1 if any of its pixels is nearer to white than to black.
    Args: image_path, of the image that `read_image` read.
    Raises: as `read_image`; ValueError if the mask has another size than the image, or if its crop
      is all white or all black.
    """
    # Only files of one size are cropped to the same pixels.
    mask, (image_width, image_height) = _decode(path, "--mask"), pixels.read_size(image_path)
    if mask.size != (image_width, image_height):
        raise UserError(
            f"--mask={files.printable(path)} has {mask.width} x {mask.height} pixels, but "
            f"--image={files.printable(image_path)} has {image_width} x {image_height}. Give both "
            "the same size."
        )
    height, width, _ = sizes.image_shape(config.data)
    rows, columns, _ = sizes.input_shape(config.model)
    cropped = pixels.adm_crop(pixels.to_channels(mask, 1), config.data.image_size)
    is_new = np.asarray(cropped) >= 128
    # Each value of x_0 covers a block of pixels, in a model of pixels a single one.
    is_new = is_new.reshape(rows, height // rows, columns, width // columns).any(axis=(1, 3))
    if is_new.all() or not is_new.any():
        color = "white" if is_new.all() else "black"
        raise UserError(
            f"--mask={files.printable(path)} is {color} all over the crop of {height} x {width} "
            "pixels. Draw white what is to be drawn anew, and black what is to be kept."
        )
    return is_new.astype(np.float32).reshape(1, rows, columns, 1)


def _decode(path, flag):
    """Decodes an image file to 8 bits; warns of an EXIF orientation, which is not applied."""
    name = f"{flag}={files.printable(path)}"
    if not path.is_file():
        raise MissingFileError(f"there is no file {name}.")
    try:
        image = pixels.decode(pixels.read_file(path))
        least_alpha = image.convert("RGBA").getextrema()[3][0]
        decoded = pixels.to_8_bits(image)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read the image {name}: {error}.") from error
    if least_alpha < 255:
        raise UserError(
            f"{name} has transparent pixels. Save an image on an opaque background, and a mask in "
            "black and white."
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
    """Encodes images [N, H, W, C] uint8 as x_0 [N, h, w, C] f32, for latents the posterior mean."""
    if trained.vae is None:
        return np.asarray(latents.pixels_from_image(jnp.asarray(image)))
    mean, _ = latents.posterior(jax.jit(latents.encode)(trained.vae, image))
    return np.asarray(latents.scale(trained.config.latents, mean))


def invert(trained: runs.Trained, request: conditions.Request, x_0: np.ndarray) -> np.ndarray:
    """Returns the noise x_T [1, h, w, C] from which DDIM draws x_0 [1, h, w, C].

    DDIM is inverted without guidance. x_0 is clipped if config.sample.clip_x_0 is on.
    Raises: ValueError unless config.sample is DDIM with eta 0.
    """
    settings, process = trained.config.sample, trained.process
    prediction, mesh = trained.config.objective.prediction, trained.mesh
    if not settings.sampler.startswith("ddim") or settings.eta:
        raise UserError(
            f"sampler={settings.sampler!r} with eta={settings.eta} cannot be inverted. Set "
            "--sampler ddim --eta 0."
        )
    sampler = samplers.build(settings, process, prediction)

    def invert(params, encoder, x_0, cond):
        encoded = conditions.encode(trained.model, params, encoder, cond, mesh)
        predict = generate.bind_condition(models.bind(trained.model, params, mesh), encoded)
        arguments = predict, sampler.times, settings.clip_x_0
        denoise = solvers.make_denoise(process, prediction, *arguments)
        # Without guidance all steps use the same denoiser. With eta 0 no noise is drawn.
        parts = [(denoise, len(sampler.grid) - 1)]
        problem = solvers.Problem(process, sampler.grid, parts, noise=None)
        x_T, _ = solvers.invert_ddim(problem, x_0)
        return x_T

    invert = jax.jit(
        invert,
        compiler_options=models.compiler_options(),
        out_shardings=sharding.batch_sharding(mesh),
    )
    # A batch has a row for each device, so the image is repeated.
    num_rows = len(sharding.local_rows(mesh, mesh.size))
    batch = {"x_0": x_0.repeat(num_rows, 0), "cond": request.cond.repeat(num_rows, 0)}
    x_T = invert(trained.params, trained.encoder, **sharding.put_batch(mesh, batch))
    return generate.to_host(x_T)[:1]


def make_interpolation(
    first: conditions.Request, second: conditions.Request, indices: tuple[int, int]
) -> EditRequest:
    """Returns the request for N images that lead from one image to another in equal steps.

    Args:
      first, second: the conditions of the two images, each repeated N times.
      indices: the images' indices, which determine their noise. The ends are the images that
        `dit_jax.sample` draws for these indices.
    Raises: ValueError for an index out of range.
    """
    if not all(map(ranges.FROM_0.holds, indices)):
        raise UserError(f"--numbers={indices[0]},{indices[1]} must each be {ranges.FROM_0}.")
    first_index, second_index = (np.full(len(first), index, np.int32) for index in indices)
    share = np.linspace(0, 1, len(first), dtype=np.float32)
    return EditRequest(first, edits.Interpolate(first_index, second_index, second.cond, share))


def draw(trained: runs.Trained, request: EditRequest, seed: int = 0, strength: float = 1.0):
    """Draws the edited images [N, H, W, C] uint8.

    Args: strength, the share of the sampling steps that are taken; these are the last steps.
    """
    sample = trained.make_sample_fn(type(request.edit), strength)
    return trained.generate(request, seed, sample, progress=sys.stderr.isatty())


def parse_ends(
    trained: runs.Trained, num: int, **flags: str | list
) -> tuple[conditions.Request, conditions.Request]:
    """Makes the requests for the two ends of an interpolation, each repeated `num` times.

    A single class or prompt is that of both ends.
    Raises: ValueError for more than two classes or prompts, or none; as `Trained.make_request`.
    """
    name = trained.condition.flag
    ends = trained.condition.split_flags(flags)
    if len(ends) not in (1, 2) or not all(any(end[name]) for end in ends):
        raise UserError(
            f"interpolate takes one or two values of --{name}, not --{name}={flags.get(name)}."
        )
    return trained.make_request(num, **ends[0]), trained.make_request(num, **ends[-1])


def parse_before_and_after(
    trained: runs.Trained, after: Mapping[str, str] | None = None, **flags: str | list
) -> tuple[conditions.Request, conditions.Request]:
    """Makes the requests for inverting an image and for drawing it again, by default the same.

    Args: after, {name: value} of the flags --NAME_after, for the image that is drawn again.
    Raises: ValueError for several conditions, or for no class; as `Trained.make_request`.
    """
    condition, after = trained.condition, {k: value for k, value in (after or {}).items() if value}
    name = condition.flag
    for other in after.keys() - {name}:
        raise UserError(f"--{other}_after={after[other]}: this model takes --{name}_after.")
    if condition.has_classes and not flags.get(name):
        raise UserError(
            "invert needs the class of the image, because the noise depends on it. Set --labels to "
            f"a class in 0..{trained.config.model.num_classes - 1}."
        )
    after_flags = dict(flags)
    if after:
        # A flag that may be repeated has a list.
        after_flags[name] = [after[name]] if condition.flags[name].repeated else after[name]
    # Sampling takes several conditions or random ones, but there is only one image here.
    for flag, values in ((name, flags), (f"{name}_after", after_flags)):
        if len(condition.split_flags(values)) > 1 or values.get(name) == "random":
            raise UserError(f"--{flag}={values[name]}: invert takes a single value.")
    # Equal flags give equal requests.
    return trained.make_request(1, **flags), trained.make_request(1, **after_flags)
