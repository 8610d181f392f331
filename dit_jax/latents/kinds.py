"""What x_0 is, by `config.latents.source`: pixels, or latents that a VAE makes or has made."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from dit_jax import conditions
from dit_jax.config import sizes
from dit_jax.data import sources
from dit_jax.errors import UserError
from dit_jax.latents import codec, device, loading, moments


class Latents(abc.ABC):
    """Where x_0 comes from and how it becomes images, made once from the config.

    A new kind is a subclass and a row of `KINDS`.
    """

    uses_vae: ClassVar[bool] = True  # x_0 has no bounds, and a VAE decodes it
    encodes: ClassVar[bool] = False  # images, in every step
    stored: ClassVar[bool] = False  # by dit_jax.encode, perhaps with the context of captions

    def __init__(self, config: ConfigDict):
        self.config = config

    def check(self, draws: bool) -> None:
        """Demands what a run needs.   Args: draws, images while it trains.   Raises: ValueError."""
        config = self.config
        if (self.encodes or draws) and not config.latents.vae:
            raise UserError(
                f"latents.source={config.latents.source!r} with sample_every_steps="
                f"{config.sample_every_steps} and fid.every_steps={config.fid.every_steps} needs "
                "latents.vae, the workdir of a VAE."
            )
        for key in ("scale", "shift"):
            numbers = config.latents[key]
            if len(numbers) not in (1, config.model.in_channels):
                raise UserError(
                    f"latents.{key}={numbers} must be one number, or one for each of "
                    f"model.in_channels={config.model.in_channels}."
                )

    def check_clip(self) -> None:
        """Raises: ValueError if x_0 is to be clipped in sampling and has no bounds."""
        if self.uses_vae and self.config.sample.clip_x_0:
            raise UserError(
                f"clip_x_0=True is of pixels, which lie in [-1, 1]; latents.source="
                f"{self.config.latents.source!r} has no bounds."
            )

    def resolve(self, recorded: dict) -> ConfigDict:
        """Returns the config with what only the data know.   As `loading.resolve`."""
        return loading.resolve(self.config, recorded)

    @abc.abstractmethod
    def open_split(self, split: str) -> sources.Source:
        """Opens the data of a run, 'train' or 'eval'.

        Raises: as `sources.open_images` or `moments.open_split`.
        """

    def x_0(
        self, batch: dict[str, jax.Array], key: jax.Array, frozen, mesh: jax.sharding.Mesh
    ) -> jax.Array:
        """Returns the clean x_0 [B, h, w, C] f32 of a batch, scaled and shifted nowhere else.

        Args:
          batch: 'image' [B, H, W, C] uint8, 'moments' [B, h, w, 2C] f16: mean, log-variance,
            unscaled; or 'record' [B] int32, their places in frozen.records['moments'].
          key: draws the posterior sample of moments, afresh for each call; or keys [B], one for
            each image, whose sample is then a function of its own alone.
          frozen: a `Frozen`, with the VAE of images to be encoded, or the records.
          mesh: that the batch's rows lie on.
        """
        mean, log_variance = codec.posterior(self._moments(batch, frozen, mesh))
        if key.ndim:
            eps = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(key)
        else:
            eps = jax.random.normal(key, mean.shape)
        return codec.scale(self.config.latents, codec.posterior_sample(mean, log_variance, eps))

    @abc.abstractmethod
    def _moments(self, batch, frozen, mesh) -> jax.Array:
        """[B, h, w, 2C] f16, unscaled."""

    def load_vae(self, mesh: jax.sharding.Mesh) -> codec.Vae | None:
        """Loads the VAE that decodes, if x_0 needs one.   Raises: as `loading.load_run_vae`."""
        return loading.load_run_vae(self.config, mesh, self.encodes)

    def make_to_image(self, vae: codec.Vae | None, mesh: jax.sharding.Mesh) -> Callable:
        """Returns the function from x_0 [B, h, w, C] f32 to images [B, H, W, channels] uint8."""
        return functools.partial(codec.make_decode_fn(self.config.latents, mesh), vae)

    def load_records(
        self, source: sources.Source, mesh: jax.sharding.Mesh
    ) -> dict[str, jax.Array] | None:
        """Loads the data that a run keeps on the devices, if any.

        Raises: as `device.load_moments`, if they do not fit.
        """
        return None

    @abc.abstractmethod
    def make_batch(self, rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the part of any batch that x_0 is made of."""


class Pixels(Latents):
    """The images themselves, in [-1, 1]."""

    uses_vae = False

    def check(self, draws):
        config = self.config
        pixels, takes = sizes.image_shape(config.data), sizes.input_shape(config.model)
        if pixels != takes:
            raise UserError(
                f"data.image_size, data.image_channels make images {pixels}, but model.input_size, "
                f"model.in_channels take {takes}: a model of pixels needs the same. For latents "
                "set latents.source."
            )

    def resolve(self, recorded):
        return self.config

    def open_split(self, split):
        return _open_images(self.config, split)

    def x_0(self, batch, key, frozen, mesh):
        return codec.pixels_from_image(batch["image"])

    def _moments(self, batch, frozen, mesh):
        raise NotImplementedError("pixels have no posterior.")

    def load_vae(self, mesh):
        return None

    def make_to_image(self, vae, mesh):
        return codec.image_from_x_0

    def make_batch(self, rows, rng):
        return _make_images(self.config, rows, rng)


class Images(Latents):
    """Latents of images that every step encodes."""

    encodes = True

    def open_split(self, split):
        return _open_images(self.config, split)

    def _moments(self, batch, frozen, mesh):
        # Rounded as they are stored, so that a run on moments stored in the same dtype is the same.
        return codec.encode_in_groups(frozen.vae, batch["image"], mesh)

    def make_batch(self, rows, rng):
        return _make_images(self.config, rows, rng)


class Moments(Latents):
    """Latents of moments that `dit_jax.encode` stored."""

    stored = True

    def open_split(self, split):
        return moments.open_split(self.config, split)

    def _moments(self, batch, frozen, mesh):
        return batch["moments"]

    def make_batch(self, rows, rng):
        height, width, channels = sizes.input_shape(self.config.model)
        shape = rows, height, width, 2 * channels
        return {"moments": rng.standard_normal(shape).astype(np.float16)}


class DeviceMoments(Moments):
    """Latents of stored moments, all of which lie in device memory."""

    def open_split(self, split):
        return dataclasses.replace(super().open_split(split), on_device=True)

    def _moments(self, batch, frozen, mesh):
        if "record" not in batch:  # of held-out images
            return batch["moments"]
        return frozen.records["moments"][batch["record"]]

    def load_records(self, source, mesh):
        return device.load_moments(mesh, source)


def _open_images(config, split):
    return conditions.open_images(config, config.data[f"{split}_split"])


def _make_images(config, rows, rng):
    return {"image": rng.integers(0, 256, (rows, *sizes.image_shape(config.data)), np.uint8)}


KINDS: dict[str, type[Latents]] = {
    "pixels": Pixels,
    "images": Images,
    "moments": Moments,
    "device": DeviceMoments,
}


def build(config: ConfigDict) -> Latents:
    """Returns what x_0 is of a config.   Raises: ValueError for an unknown `latents.source`."""
    name = config.latents.source
    if name not in KINDS:
        raise UserError(f"latents.source={name!r} is unknown; choose one of {', '.join(KINDS)}.")
    return KINDS[name](config)


def open_split(config: ConfigDict, split: str) -> sources.Source:
    """Opens what a run trains on or, with split 'eval', is evaluated on.

    Raises: ValueError for an unknown `latents.source`; as `Latents.open_split`.
    """
    return build(config).open_split(split)
