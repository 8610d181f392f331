"""The kinds of x_0 by `config.latents.source`: pixels, or latents from a VAE."""

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
from dit_jax.errors import UserError, check_choice
from dit_jax.latents import codec, device, loading, moments


class Latents(abc.ABC):
    """A source of x_0 and its conversion to images, built from the config.

    To add a kind, write a subclass and a row of `KINDS`.
    """

    uses_vae: ClassVar[bool] = True  # whether a VAE decodes x_0, which then has no bounds
    encodes: ClassVar[bool] = False  # whether the VAE encodes images in every step
    # Whether dit_jax.encode stored x_0's moments, perhaps with the captions' context.
    stored: ClassVar[bool] = False

    def __init__(self, config: ConfigDict):
        self.config = config

    def check(self, draws: bool) -> None:
        """Raises ValueError if the config lacks what a run needs.

        Args: draws, whether the run draws images while it trains.
        """
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
        """Raises ValueError if sampling would clip an x_0 that has no bounds."""
        if self.uses_vae and self.config.sample.clip_x_0:
            raise UserError(
                f"clip_x_0=True is of pixels, which lie in [-1, 1]; latents.source="
                f"{self.config.latents.source!r} has no bounds."
            )

    def resolve(self, recorded: dict) -> ConfigDict:
        """Returns the config completed by what the data record; as `loading.resolve`."""
        return loading.resolve(self.config, recorded)

    @abc.abstractmethod
    def open_split(self, split: str) -> sources.Source:
        """Opens one split of a run's data, 'train' or 'eval'.

        Raises: as `formats.open_images` or `moments.open_split`.
        """

    @abc.abstractmethod
    def x_0(
        self,
        batch: dict[str, jax.Array],
        key: jax.Array,
        mesh: jax.sharding.Mesh,
        vae: codec.Vae | None = None,
        records: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the clean x_0 [B, h, w, C] f32 of a batch, with scale and shift applied.

        Args:
          batch: 'image' [B, H, W, C] uint8; or 'moments' [B, h, w, 2C] f16, the unscaled mean and
            log-variance; or 'record' [B] int32, their row numbers in records['moments'].
          key: draws the posterior samples, new ones at each call. With keys [B], one per image,
            the sample of an image depends on its own key alone.
          mesh: the mesh over which the batch is sharded.
          vae: the one that encodes images, if they are encoded in every step.
          records: what `load_records` returned.
        """

    def load_vae(self, mesh: jax.sharding.Mesh) -> codec.Vae | None:
        """Loads the VAE that decodes x_0; returns None for pixels.

        Raises: as `loading.load_run_vae`.
        """
        return loading.load_run_vae(self.config, mesh, self.encodes)

    def make_to_image(self, vae: codec.Vae | None, mesh: jax.sharding.Mesh) -> Callable:
        """Returns the function from x_0 [B, h, w, C] f32 to images [B, H, W, channels] uint8."""
        return functools.partial(codec.make_decode_fn(self.config.latents, mesh), vae)

    def load_records(
        self, source: sources.Source, mesh: jax.sharding.Mesh
    ) -> dict[str, jax.Array] | None:
        """Loads the data that a run keeps on the devices; returns None if it keeps none.

        Raises: as `device.load_moments`, if the data do not fit.
        """
        return None

    @abc.abstractmethod
    def make_batch(self, rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays for x_0 in a batch of `rows` arbitrary examples."""


class Pixels(Latents):
    """The images themselves as x_0, in [-1, 1]."""

    uses_vae = False

    def check(self, draws):
        config = self.config
        shape, expected = sizes.image_shape(config.data), sizes.input_shape(config.model)
        if shape != expected:
            raise UserError(
                f"data.image_size, data.image_channels make images {shape}, but model.input_size, "
                f"model.in_channels take {expected}: a model of pixels needs the same. For latents "
                "set latents.source."
            )

    def resolve(self, recorded):
        return self.config

    def open_split(self, split):
        return _open_images(self.config, split)

    def x_0(self, batch, key, mesh, vae=None, records=None):
        return codec.pixels_from_image(batch["image"])

    def load_vae(self, mesh):
        return None

    def make_to_image(self, vae, mesh):
        return codec.image_from_x_0

    def make_batch(self, rows, rng):
        return _make_images(self.config, rows, rng)


class _Posterior(Latents):
    """Latents that are samples of the VAE's posterior."""

    def x_0(self, batch, key, mesh, vae=None, records=None):
        mean, log_variance = codec.posterior(self._moments(batch, mesh, vae, records))
        if key.ndim:
            eps = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(key)
        else:
            eps = jax.random.normal(key, mean.shape)
        return codec.scale(self.config.latents, codec.posterior_sample(mean, log_variance, eps))

    @abc.abstractmethod
    def _moments(self, batch, mesh, vae, records) -> jax.Array:
        """Returns the moments [B, h, w, 2C] f16 of a batch, unscaled."""


class Images(_Posterior):
    """Latents of images that the VAE encodes in every step."""

    encodes = True

    def open_split(self, split):
        return _open_images(self.config, split)

    def _moments(self, batch, mesh, vae, records):
        # In f16 like stored moments: a run on moments stored in the same dtype is then equal.
        return codec.encode_in_groups(vae, batch["image"], mesh)

    def make_batch(self, rows, rng):
        return _make_images(self.config, rows, rng)


class Moments(_Posterior):
    """Latents of moments that `dit_jax.encode` stored."""

    stored = True

    def open_split(self, split):
        return moments.open_split(self.config, split)

    def _moments(self, batch, mesh, vae, records):
        return batch["moments"]

    def make_batch(self, rows, rng):
        *size, channels = sizes.input_shape(self.config.model)
        shape = rows, *size, 2 * channels
        return {"moments": rng.standard_normal(shape).astype(np.float16)}


class DeviceMoments(Moments):
    """Latents of stored moments, all kept in device memory."""

    def open_split(self, split):
        # Training batches then hold record numbers in place of moments.
        return dataclasses.replace(super().open_split(split), on_device=True)

    def _moments(self, batch, mesh, vae, records):
        if "record" not in batch:  # held-out images are not on the devices
            return batch["moments"]
        return records["moments"][batch["record"]]

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
    """Returns the kind of x_0 of a config.

    Raises: ValueError for an unknown `latents.source`.
    """
    check_choice("latents.source", config.latents.source, KINDS)
    return KINDS[config.latents.source](config)


def open_split(config: ConfigDict, split: str) -> sources.Source:
    """Opens the data that a run trains on or, with split 'eval', is evaluated on.

    Raises: ValueError for an unknown `latents.source`; as `Latents.open_split`.
    """
    return build(config).open_split(split)
