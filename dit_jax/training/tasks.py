"""The tasks that a run can train: noise prediction, and reconstruction of images by a VAE.

To add a task, write a subclass of `Task`, and let `choose` return it.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax import conditions, diffusion, latents, models, sharding
from dit_jax.config import sizes
from dit_jax.data import loader, sources
from dit_jax.diffusion import objectives, samplers
from dit_jax.errors import UserError, check_choice
from dit_jax.latents import loading
from dit_jax.models import lpips
from dit_jax.sampling import generate, pictures, requests
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


@struct.dataclass
class Frozen:
    """Constant inputs of every step, a pytree; an input that a run does not need is None."""

    vae: latents.Vae | None = None  # encodes images in each step, or decodes pictures
    text_encoder: conditions.TextEncoder | None = None
    null: jax.Array | None = None  # from `Condition.load_null`, such as the empty caption [M]
    lpips: dict | None = None  # the LPIPS network's parameters
    records: dict[str, jax.Array] | None = None  # all moments, with their labels or captions

    def with_records(self, config: ConfigDict, mesh: Mesh, source: sources.Source) -> "Frozen":
        """Returns a copy with the records that the run keeps on the devices, if it keeps any.

        Raises: ValueError as `Latents.load_records`, for data that do not fit.
        """
        return self.replace(records=latents.build(config).load_records(source, mesh))


@struct.dataclass
class NoisyExamples:
    """The inputs of a noise predictor's loss, for a batch."""

    x_0: jax.Array  # [B, h, w, C] f32
    cond: jax.Array  # [B, ...]
    t: jax.Array  # [B]
    eps: jax.Array  # like x_0
    keys: jax.Array | None = None  # [B], for dropout inside the model; None without dropout


@struct.dataclass
class ImageExamples:
    """The inputs of an autoencoder's loss, for a batch."""

    pixels: jax.Array  # [B, H, W, C] in [-1, 1]
    eps: jax.Array  # [B, h, w, c], the posterior's noise


@dataclasses.dataclass(frozen=True, eq=False)
class Task(abc.ABC):
    """A model, with its frozen networks, its initial parameters, its losses and its picture.

    All random values are drawn with the examples, for the whole batch. So gradient accumulation
    does not change what the model learns.
    """

    config: ConfigDict
    model: nn.Module
    mesh: Mesh

    @classmethod
    @abc.abstractmethod
    def load_frozen(
        cls, config: ConfigDict, mesh: Mesh, metadata: dict
    ) -> tuple[ConfigDict, Frozen]:
        """Loads the frozen networks onto the mesh; returns the completed config and the networks.

        Empty digests, scales and shifts of the config are filled in from the metadata and the
        networks. A network must have the digest that the config or the metadata record.
        Args: metadata, of the moments that the run trains on; {} for other data.
        Raises: as `Latents.resolve`, `Latents.load_vae`, `Condition.resolve` and
          `checkpoint.load_model`.
        """

    @classmethod
    @abc.abstractmethod
    def build(cls, config: ConfigDict, mesh: Mesh) -> "Task":
        """Builds the task of a config, with its model.

        Raises: ValueError for values that do not fit together.
        """

    def init_params(self, key: jax.Array) -> dict:
        """Returns the initial parameters, f32: those of the model.

        A task may add top-level groups that only training uses. Samplers do not load them.
        """
        return models.init_params(self.model, key)

    @abc.abstractmethod
    def draw_examples(self, batch: dict, key: jax.Array, frozen: Frozen, dropout: bool):
        """Turns a batch into the inputs of `compute_losses`, a pytree of [B, ...].

        Args: dropout, whether training drops conditions and activations.
        """

    @abc.abstractmethod
    def compute_losses(self, params, frozen: Frozen, examples) -> dict[str, jax.Array]:
        """Returns 'loss', its parts and other measures of the examples, each [B]."""

    @abc.abstractmethod
    def compile_picture(self, frozen: Frozen, source: sources.Source) -> Callable:
        """Returns `draw(params) -> [height, width, 3] uint8`; all calls use the same inputs."""

    @abc.abstractmethod
    def describe_model(self) -> str:
        """Returns a description of the model in one line."""


def choose(config: ConfigDict) -> type[Task]:
    """Returns the class of a config's task."""
    return Autoencoding if config.model.name == "vae" else Denoising


@dataclasses.dataclass(frozen=True, eq=False)
class Denoising(Task):
    """Noise prediction, where x_0 is pixels or latents."""

    process: diffusion.Process
    condition: conditions.Condition
    latents: latents.Latents

    @classmethod
    def load_frozen(cls, config, mesh, metadata):
        draws = config.sample_every_steps or config.fid.every_steps
        # The metadata come first, because the networks are compared with their digests.
        config = latents.build(config).resolve(metadata)
        config, text_encoder = conditions.build(config).resolve(metadata, mesh)
        condition, x_0 = conditions.build(config), latents.build(config)
        vae = x_0.load_vae(mesh) if x_0.uses_vae and config.latents.vae else None
        if vae and x_0.encodes:  # the metadata of images have no digest of a VAE
            recorded = dict(vae_digest=vae.digest, published=vae.published)
            config = loading.resolve(config, recorded)
        elif not draws:  # the VAE was loaded to check its digest, and device memory is scarce
            vae = None
        # Made before the encoder is dropped: a stored null condition is an output of the encoder.
        null = condition.load_null(text_encoder)
        if null is not None:
            null = jax.device_put(null, sharding.replicated(mesh))
        # Steps read stored outputs of the encoder, so only drawing still needs it.
        if config.text.stored and not draws:
            text_encoder = None
        return config, Frozen(vae, text_encoder, null)

    @classmethod
    def build(cls, config, mesh):
        model = models.build(config.model)
        condition, x_0 = conditions.build(config), latents.build(config)
        x_0.check(draws=bool(config.sample_every_steps or config.fid.every_steps))
        if config.text.stored and not (condition.needs_encoder and x_0.stored):
            raise UserError(
                f"text.stored=True reads the outputs of a text encoder from stored moments. It "
                f"needs model.condition='context', not {config.model.condition!r}, and "
                f"latents.source='moments' or 'device', not {config.latents.source!r}."
            )
        x_0.check_clip()
        # A run that begins with trained weights may have a trained null condition already.
        if config.model.null_condition and not (
            config.objective.condition_dropout or config.init_from
        ):
            raise UserError(
                "objective.condition_dropout=0 with model.null_condition=True: the null condition "
                "would never be trained. Set model.null_condition=False."
            )
        process = diffusion.build(config.diffusion)
        objectives.check(process, config.objective, config.model.learn_sigma)
        task = cls(config, model, mesh, process, condition, x_0)
        task._check_sampling()
        return task

    def _check_sampling(self):
        """Raises ValueError for sampling settings that cannot draw images."""
        config = self.config
        # Checked even if the run draws nothing, because later commands sample with these settings.
        samplers.check(config.sample)
        # Making the functions below checks their settings; nothing is compiled yet.
        if config.sample_every_steps:
            self.make_sample_fn(config.sample)
            pictures.check_grid(config.sample_num_images, sizes.image_shape(config.data))
        if config.fid.every_steps:
            settings = config.sample.copy_and_resolve_references()
            settings.update(steps=config.fid.steps, cfg_scale=config.fid.cfg_scale)
            self.make_sample_fn(settings)

    def make_sample_fn(self, settings: ConfigDict) -> Callable:
        """Returns the sampler of this model, from `generate.make_sample_fn`.

        Args: settings, a `config.sample`.
        """
        prediction = self.config.objective.prediction
        return generate.make_sample_fn(self.model, settings, self.process, prediction, self.mesh)

    def draw_examples(self, batch, key, frozen, dropout) -> NoisyExamples:
        posterior_key, noise_key, drop_key = jax.random.split(key, 3)
        cond = self.condition.from_batch(batch, frozen.records)
        if dropout and self.model.null_condition:
            null, prob = self.condition.null(frozen.null), self.config.objective.condition_dropout
            cond = conditions.drop(drop_key, cond, prob, null)
        # Encoded after the dropout, because a null condition of token ids is encoded too.
        cond = self.condition.apply_frozen(frozen.text_encoder, cond)
        x_0 = self.latents.x_0(batch, posterior_key, self.mesh, frozen.vae, frozen.records)
        t, eps = objectives.draw(self.process, self.config.objective, noise_key, x_0.shape)
        keys = None
        if dropout and getattr(self.model, "dropout", 0):
            # One key per example, so that gradient accumulation splits the keys with the batch.
            keys = jax.random.split(jax.random.fold_in(drop_key, 1), len(x_0))
        return NoisyExamples(x_0, cond, t, eps, keys)

    def compute_losses(self, params, frozen, examples):
        # One key is enough for a micro-batch: a mask of dropout differs between its examples.
        rngs = None if examples.keys is None else {"dropout": examples.keys[0]}
        network = models.bind(self.model, params, self.mesh)

        def predict(x_t, network_time):
            return network(x_t, network_time, examples.cond, rngs=rngs)

        objective, x_0 = self.config.objective, examples.x_0
        return objectives.denoising_loss(
            self.process, objective, predict, x_0, examples.t, examples.eps
        )

    def to_image(self, frozen: Frozen) -> Callable:
        """Returns the function that maps x_0 [B, h, w, C] f32 to images [B, H, W, C] uint8."""
        return self.latents.make_to_image(frozen.vae, self.mesh)

    def compile_picture(self, frozen, source):
        """As `Task.compile_picture`; the picture shows samples."""
        config, num = self.config, self.config.sample_num_images
        to_image, request = self.to_image(frozen), requests.draw_for_picture(config, num)
        sample = functools.partial(self.make_sample_fn(config.sample), encoder=frozen.text_encoder)

        def draw(params):
            images = generate.generate(sample, params, request, config.seed, self.mesh, to_image)
            return pictures.image_grid(images, pictures.grid_columns(num))

        return draw

    def describe_model(self):
        counts, model = models.count(self.config), self.model
        kind = f"{self.config.model.name} of {self.condition.description}"
        if self.config.model.name == "dit":
            loop = "unrolled" if model.scan_unroll else "in a loop"
            kind += f", {counts['tokens']} tokens, {model.block} blocks {loop}"
        return (
            f"{counts['params']:,} parameters, {counts['gmacs']:.4g} GMACs, {model.dtype}, "
            f"attention {model.attention}, remat {model.remat}, {kind}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoding(Task):
    """Reconstruction of images from samples of the VAE's posterior."""

    @classmethod
    def load_frozen(cls, config, mesh, metadata):
        if not config.autoencoder.lpips_weight:
            return config, Frozen()
        workdir = files.to_path(config.autoencoder.lpips, "autoencoder.lpips")
        _, params = checkpoint.load_model(workdir, mesh, config.model.dtype, "lpips")
        return config, Frozen(lpips=params)

    @classmethod
    def build(cls, config, mesh):
        model = models.build(config.model)
        *size, channels = sizes.image_shape(config.data)
        model.latent_shape((*size, channels))  # raises unless the images fit
        if latents.build(config).uses_vae:
            raise UserError(
                f"latents.source={config.latents.source!r}: a VAE is trained on 'pixels'."
            )
        loss = config.autoencoder
        check_choice("autoencoder.distance", loss.distance, objectives.DISTANCES)
        if config.sample_every_steps:  # the picture has pairs of an image and its reconstruction
            pair_shape = *size[:-1], 2 * size[-1], channels
            pictures.check_grid(config.sample_num_images, pair_shape)
        if loss.lpips_weight and (not loss.lpips or min(size) < 16):
            raise UserError(
                f"autoencoder.lpips_weight={loss.lpips_weight} needs autoencoder.lpips, the "
                f"workdir that dit_jax.convert lpips writes, and data.image_size="
                f"{sizes.simplify(size)} of at least 16."
            )
        return cls(config, model, mesh)

    def draw_examples(self, batch, key, frozen, dropout) -> ImageExamples:
        pixels = latents.pixels_from_image(batch["image"])
        shape = len(pixels), *self.model.latent_shape(pixels.shape[1:])
        return ImageExamples(pixels, jax.random.normal(key, shape))

    def compute_losses(self, params, frozen, examples):
        pixels, eps = examples.pixels, examples.eps

        def apply(x, method):
            return self.model.apply({"params": params}, x, method=method)

        mean, log_variance = latents.posterior(apply(pixels, "encode"))
        reconstruction = apply(latents.posterior_sample(mean, log_variance, eps), "decode")
        weights = self.config.autoencoder
        losses = objectives.autoencoder_loss(
            pixels,
            reconstruction,
            mean,
            log_variance,
            distance=weights.distance,
            kl_weight=weights.kl_weight,
        )
        if weights.lpips_weight:
            distance = lpips.LPIPS(self.model.dtype).apply(
                {"params": frozen.lpips}, pixels, reconstruction
            )
            losses |= {"lpips": distance, "loss": losses["loss"] + weights.lpips_weight * distance}
        return losses

    def compile_picture(self, frozen, source):
        """As `Task.compile_picture`; the picture shows the first images, each reconstructed."""
        num = min(self.config.sample_num_images, len(source))
        images = loader.gather(source, range(num))["image"]
        everywhere = sharding.replicated(self.mesh)

        @functools.partial(jax.jit, out_shardings=everywhere)
        def reconstruct(params, images):
            return latents.reconstruct(latents.Vae(params, self.model, digest=""), images)

        def draw(params):
            reconstruction = reconstruct(params, jax.device_put(images, everywhere))
            pairs = np.concatenate([images, np.asarray(reconstruction)], axis=-2)
            return pictures.image_grid(pairs, pictures.grid_columns(num))

        return draw

    def describe_model(self):
        counts, model = models.count(self.config), self.model
        return (
            f"{counts['params']:,} parameters, {counts['encode_gmacs']:.4g} + "
            f"{counts['decode_gmacs']:.4g} GMACs, factor {model.factor}, {model.dtype}, remat "
            f"{model.remat}"
        )
