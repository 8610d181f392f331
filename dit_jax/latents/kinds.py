"""The kinds of x_0, selected by `config.latents.source`: pixels, or latents of a VAE."""

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
    """A kind of x_0: how it is made from a run's data, and how it becomes images.

    To add a kind, write a subclass and a row of `KINDS`.
    """

    uses_vae: ClassVar[bool] = True  # whether x_0 are latents: a VAE decodes them, without bounds
    encodes: ClassVar[bool] = False  # whether the VAE encodes images in every step
    stored: ClassVar[bool] = False  # whether the data are moments that `dit_jax.encode` stored

    def __init__(self, config: ConfigDict):
        self.config = config

    def check(self, draws: bool) -> None:
        """Raises ValueError for settings with which a run cannot train.

        Args: draws, whether the run draws images during training.
        """
        config = self.config
        if (self.encodes or draws) and not config.latents.vae:
            raise UserError(
                f"latents.source={config.latents.source!r} with sample_every_steps="
                f"{config.sample_every_steps} and fid.every_steps={config.fid.every_steps} needs "
                "latents.vae, the workdir of a VAE."
            )
        for key in ("scale", "shift"):
            values = config.latents[key]
            if len(values) not in (1, config.model.in_channels):
                raise UserError(
                    f"latents.{key}={values} must be one number, or one for each of "
                    f"model.in_channels={config.model.in_channels}."
                )

    def check_clip(self) -> None:
        """Raises ValueError if sampling would clip latents, because they have no bounds."""
        if self.uses_vae and self.config.sample.clip_x_0:
            raise UserError(
                "clip_x_0=True clips x_0 to [-1, 1], the range of pixels, but latents.source="
                f"{self.config.latents.source!r} has no bounds. Set clip_x_0=False."
            )

    def resolve(self, recorded: dict) -> ConfigDict:
        """Completes the config as `loading.resolve` from the metadata of the data."""
        return loading.resolve(self.config, recorded)

    @abc.abstractmethod
    def open_split(self, split: str) -> sources.Source:
        """Opens a split of a run's data, 'train' or 'eval'.

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
          batch: 'image' [B, H, W, C] uint8; or 'moments' [B, h, w, 2C] f16, not scaled; or
            'record' [B] int32, the indices of the moments in records['moments'].
          key: for the posterior samples: one key, or keys [B], one for each image.
          mesh: the mesh over which the batch is sharded.
          vae: encodes the images; None for kinds that do not encode.
          records: the result of `load_records`.
        """

    def load_vae(self, mesh: jax.sharding.Mesh) -> codec.Vae | None:
        """Loads the VAE of `config.latents`; returns None for pixels.

        Raises: as `loading.load_run_vae`.
        """
        return loading.load_run_vae(self.config, mesh, self.encodes)

    def make_to_image(self, vae: codec.Vae | None, mesh: jax.sharding.Mesh) -> Callable:
        """Returns a function that turns x_0 [B, h, w, C] f32 into images [B, H, W, C] uint8."""
        return functools.partial(codec.make_decode_fn(self.config.latents, mesh), vae)

    def load_records(
        self, source: sources.Source, mesh: jax.sharding.Mesh
    ) -> dict[str, jax.Array] | None:
        """Loads the records that a run keeps on the devices; returns None if it keeps none.

        Raises: as `device.load_moments`.
        """
        return None

    @abc.abstractmethod
    def make_batch(self, batch_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Makes random arrays of the form that `x_0` takes as its batch."""


class Pixels(Latents):
    """Pixels in [-1, 1] as x_0."""

    uses_vae = False

    def check(self, draws):
        config = self.config
        image_shape, input_shape = sizes.image_shape(config.data), sizes.input_shape(config.model)
        if image_shape != input_shape:
            raise UserError(
                f"the images are {sizes.show(image_shape)}, but the model takes "
                f"{sizes.show(input_shape)}. Set model.input_size and model.in_channels like "
                "data.image_size and data.image_channels, or set latents.source for latents."
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

    def make_batch(self, batch_size, rng):
        return _make_images(self.config, batch_size, rng)


class _Posterior(Latents):
    """Latents as x_0, sampled from the VAE's posterior."""

    def x_0(self, batch, key, mesh, vae=None, records=None):
        mean, log_variance = codec.posterior(self._moments(batch, mesh, vae, records))
        if key.ndim:
            eps = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(key)
        else:
            eps = jax.random.normal(key, mean.shape)
        return codec.scale(self.config.latents, codec.posterior_sample(mean, log_variance, eps))

    @abc.abstractmethod
    def _moments(self, batch, mesh, vae, records) -> jax.Array:
        """Returns the moments [B, h, w, 2C] f16 of a batch, not scaled."""


class Images(_Posterior):
    """Latents of images that the VAE encodes in every step."""

    encodes = True

    def open_split(self, split):
        return _open_images(self.config, split)

    def _moments(self, batch, mesh, vae, records):
        # In f16 like stored moments, so that a run on stored moments is equal.
        return codec.encode_in_groups(vae, batch["image"], mesh)

    def make_batch(self, batch_size, rng):
        return _make_images(self.config, batch_size, rng)


class Moments(_Posterior):
    """Latents of moments that `dit_jax.encode` stored."""

    stored = True

    def open_split(self, split):
        return moments.open_split(self.config, split)

    def _moments(self, batch, mesh, vae, records):
        return batch["moments"]

    def make_batch(self, batch_size, rng):
        *size, channels = sizes.input_shape(self.config.model)
        shape = batch_size, *size, 2 * channels
        return {"moments": rng.standard_normal(shape).astype(np.float16)}


class DeviceMoments(Moments):
    """Latents of stored moments that are all in device memory."""

    def open_split(self, split):
        # Training batches then hold the indices of records instead of moments.
        return dataclasses.replace(super().open_split(split), on_device=True)

    def _moments(self, batch, mesh, vae, records):
        if "record" not in batch:  # held-out images are not on the devices
            return batch["moments"]
        return records["moments"][batch["record"]]

    def load_records(self, source, mesh):
        return device.load_moments(mesh, source)


def _open_images(config, split):
    return conditions.open_images(config, config.data[f"{split}_split"])


def _make_images(config, batch_size, rng):
    return {"image": rng.integers(0, 256, (batch_size, *sizes.image_shape(config.data)), np.uint8)}


KINDS: dict[str, type[Latents]] = {
    "pixels": Pixels,
    "images": Images,
    "moments": Moments,
    "device": DeviceMoments,
}


def build(config: ConfigDict) -> Latents:
    """Builds the kind of x_0 that a config selects.

    Raises: ValueError for an unknown `latents.source`.
    """
    check_choice("latents.source", config.latents.source, KINDS)
    return KINDS[config.latents.source](config)


def open_split(config: ConfigDict, split: str) -> sources.Source:
    """Opens a split of a run's data: 'train', or 'eval' for held-out images.

    Raises: ValueError for an unknown `latents.source`; as `Latents.open_split`.
    """
    return build(config).open_split(split)
