"""Parameters, labels or captions, and seeds to images, sharded, one key per image."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from dit_jax import (
    checkpoint,
    conditions,
    diffusion,
    edits,
    guidance,
    latents,
    models,
    samplers,
    sampling,
    sharding,
    workdirs,
)

# Images per device and call; a device's share of a batch does not change what is drawn.
BATCH_PER_DEVICE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, its parameters on a mesh of all devices."""

    config: ConfigDict
    step: int
    raw: bool  # not the EMA
    mesh: Mesh
    model: nn.Module
    process: diffusion.Process
    params: dict
    to_image: Callable  # x_0 [B, h, w, C] f32 to images [B, H, W, channels] uint8
    vae: latents.Vae | None = None  # that decodes; None in pixels
    guide: "Guide | None" = None
    encoder: conditions.TextEncoder | None = None  # of captions, where it is frozen

    @property
    def vae_digest(self) -> str:
        """Of the VAE that decodes; '' in pixels."""
        return self.vae.digest if self.vae else ""

    def asked(
        self,
        num: int,
        labels: str = "",
        prompts: Sequence[str] = (),
        negative: str = "",
        seed: int = 0,
    ) -> conditions.Conditions:
        """As `conditions.asked`; ValueError also for a negative prompt that nothing heeds."""
        told = conditions.asked(self.config, num, labels, prompts, negative, seed)
        if negative and (self.guide or self.config.sample.cfg_scale == 1):
            instead = f"--guide={self.guide.workdir}" if self.guide else "cfg_scale=1, no guidance"
            raise ValueError(
                f"--negative_prompt={negative!r} is what --cfg_scale above 1 leads away from, "
                f"without a guide; here is {instead}."
            )
        return told

    def make_sample_fn(self, strength: float = 1.0) -> Callable:
        """As the function of that name, with guide and text encoder bound."""
        prediction = self.config.objective.prediction
        arguments = self.model, self.config.sample, self.process, prediction, self.mesh
        sample = make_sample_fn(*arguments, self.guide and self.guide.model, strength)
        guide_params = self.guide and self.guide.params
        return functools.partial(sample, encoder=self.encoder, guide_params=guide_params)


@dataclasses.dataclass(frozen=True, eq=False)
class Guide:
    """A worse model for autoguidance, on the mesh of the better one."""

    workdir: str
    step: int
    model: nn.Module
    params: dict


def load(
    workdir: pathlib.Path,
    step: int | None = None,
    raw: bool = False,
    vae_workdir: pathlib.Path | None = None,
    settings: dict | None = None,
    guide_workdir: pathlib.Path | None = None,
    guide_step: int | None = None,
) -> Trained:
    """The EMA parameters (with raw the trained ones) of a workdir; step None is the newest.

    Args:
      settings: override keys of `config.sample`.
      guide_workdir, guide_step: of the worse model, for autoguidance, always its EMA parameters; by
        default the same workdir, and the newest step.
    Raises: FileNotFoundError if there is no such checkpoint, OSError if it cannot be read;
      ValueError for a model of latents without its VAE, or of pixels with one, or for a guide of
      another input, process or prediction.
    """
    config = _load_config(workdir)
    if vae_workdir and config.latents.source == "pixels":
        raise ValueError(f"{workdir} holds a model of pixels, which takes no --vae={vae_workdir}.")
    if vae_workdir:
        config.latents.vae = str(vae_workdir)
    if config.latents.source != "pixels" and not config.latents.vae:
        raise ValueError(
            f"{workdir} holds a model of latents: give --vae, the workdir of the VAE that decodes "
            f"them, with digest {config.latents.vae_digest or 'not recorded'}."
        )
    config.sample.update(settings or {})
    sampling.check_used(config.sample, settings or {}, config.model.learn_sigma)
    mesh = sharding.make_mesh(config.mesh)
    model, params, step = _load_model(workdir, config, mesh, step, raw)
    to_image, vae = latents.image_from_x_0, None
    if config.latents.source != "pixels":
        vae = load_vae(config, mesh)
        to_image = functools.partial(make_decode_fn(config.latents, mesh), vae)
    guide = None
    if guide_workdir or guide_step is not None:
        guide_workdir = guide_workdir or workdir
        guide_config = _load_config(guide_workdir)
        _check_guide(guide_config, config, guide_workdir)
        loaded = _load_model(guide_workdir, guide_config, mesh, guide_step, raw=False)
        guide = Guide(str(guide_workdir), loaded[2], *loaded[:2])
    process = diffusion.build(config.diffusion)
    encoder = conditions.load_encoder(config, mesh)
    return Trained(config, step, raw, mesh, model, process, params, to_image, vae, guide, encoder)


def _load_config(workdir):
    config = workdirs.load_config(workdir)
    if config.model.name == "vae":
        raise ValueError(f"{workdir} holds a 'vae', which decodes latents but draws none.")
    _find_in_workdir(workdir, config)
    with config.unlocked():  # the run's devices need not be here
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
        config.model.attention = "auto"
    return config


def _find_in_workdir(workdir, config):
    """Paths to other workdirs are taken from this one where it has such a directory.

    So a workdir that `dit_jax.convert sd` wrote may be moved.
    """
    for part, key in (("latents", "vae"), ("text", "encoder")):
        path = config.get(part, {}).get(key)
        if path and (workdir / path).is_dir():
            config[part][key] = str(workdir / path)


def _load_model(workdir, config, mesh, step, raw):
    model = models.build(config.model)
    shapes = jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
    shapes = sharding.with_shardings(mesh, shapes)
    return model, *checkpoint.restore_params(workdir, shapes, step, raw)


def _check_guide(guide, config, workdir):
    def of(config):
        keys = ["input_size", "in_channels", "condition", "num_classes", "context_size"]
        if config.model.condition == "tokens":  # which both read
            keys += ["text_vocab_size", "text_length"]
        return {
            **{f"model.{key}": config.model[key] for key in keys},
            "text.encoder_digest": config.text.encoder_digest,
            "diffusion": config.diffusion.to_dict(),
            "objective.prediction": config.objective.prediction,
            **{f"latents.{key}": config.latents[key] for key in ("vae_digest", "scale", "shift")},
        }

    theirs, ours = of(guide), of(config)
    if differing := [key for key in ours if theirs[key] != ours[key]]:
        lines = [f"  {key}: guide {theirs[key]!r}, model {ours[key]!r}" for key in differing]
        raise ValueError(
            f"--guide={workdir} must be a model of the same inputs and outputs; these differ:\n"
            + "\n".join(lines)
        )


def load_vae(config: ConfigDict, mesh: jax.sharding.Mesh) -> latents.Vae:
    """The VAE of `config.latents`, which must be the one that the moments are of.

    Raises: ValueError for another one, or one of another factor; as `checkpoint.load_vae`.
    """
    vae = checkpoint.load_vae(pathlib.Path(config.latents.vae), mesh, config.model.dtype)
    latents.check_digest(config, vae.digest, f"latents.vae={config.latents.vae}")
    image_size, image_channels = config.data.image_size, config.data.image_channels
    encodes = config.latents.source == "images"
    if image_size % vae.model.factor or (encodes and image_channels != vae.model.image_channels):
        raise ValueError(
            f"latents.vae={config.latents.vae} takes images of {vae.model.image_channels} channels "
            f"and multiples of {vae.model.factor} pixels, not {image_channels=} and {image_size=}."
        )
    size, channels = image_size // vae.model.factor, vae.model.latent_channels
    takes = config.model.input_size, config.model.in_channels
    if (size, channels) != takes:
        raise ValueError(
            f"latents.vae={config.latents.vae} makes latents of size and channels "
            f"{(size, channels)} of data.image_size={config.data.image_size}, but the model takes "
            f"{takes}."
        )
    return vae


def make_sample_fn(
    model: nn.Module,
    sample_config,
    process: diffusion.Process,
    prediction: str,
    mesh: Mesh,
    guide: nn.Module | None = None,
    strength: float = 1.0,
) -> Callable:
    """The jitted `sample(params, key, index, cond, null, encoder=None, guide_params=None, ...)`.

    Args:
      sample_config: `config.sample`.   prediction: `config.objective.prediction`.
      guide: a worse model, which takes the null condition's place in guidance.
      strength: of an edit, the share of the steps that is taken.
    Returns:
      sample: index [B] int32, the image's number, cond and null [B, ...], all sharded over the
        batch, as `conditions.Conditions`, to (x_0 [B, h, w, C] f32, finite [steps] bool, whether
        every x_t was). Image i depends on key and i alone, not on the others. encoder: of captions,
        for a model of condition 'context'.
        Of edits: image, x_0 of given images, which are noised to begin with; mask, like it or of
        one channel, 1 where something new is wanted; x_T instead of noise; share [B] of the image
        of number `other` [B], told cond_of_other, that is drawn from together with this one.
    Raises: ValueError as `samplers.build`, or for guidance of a model without a null condition.
    """
    sampler = samplers.build(sample_config, process, prediction, strength)
    runs = _guided_runs(sample_config, sampler)
    _check_guidance(sample_config, model, guide)
    scale = sample_config.cfg_scale
    options = dict(channels=sample_config.cfg_channels, rescale=sample_config.cfg_rescale)
    shape = (model.input_size, model.input_size, model.in_channels)

    def sample(
        params,
        key,
        index,
        cond,
        null,
        encoder=None,
        guide_params=None,
        image=None,
        mask=None,
        x_T=None,
        other=None,
        cond_of_other=None,
        share=None,
    ):
        def normal(i, index=index):
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

        def noise(i):
            if share is None:
                return normal(i)
            return edits.interpolate(normal(i), normal(i, other), share)

        def encode(model, params, cond):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return conditions.encode(model, params, encoder, cond)

        def networks(cond):
            """predict(x_t, network_time) told cond, and the same guided."""

            def apply(model, params):
                encoded = encode(model, params, cond)

                def predict(x_t, network_time, cond=encoded):
                    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                        return model.apply({"params": params}, x_t, network_time, cond)

                return predict, encoded

            predict, encoded = apply(model, params)
            if guide is not None:
                worse, _ = apply(guide, guide_params)
                return predict, guidance.autoguidance(predict, worse, scale, **options)
            null_encoded = encode(model, params, null)
            return predict, guidance.classifier_free_guidance(
                predict, encoded, null_encoded, scale, **options
            )

        predict = networks(cond)
        if share is not None:
            both = zip(predict, networks(cond_of_other), strict=True)
            predict = [edits.mix(one, other, share) for one, other in both]
        parts = []
        for guided, count in runs:
            times = sampler.times
            denoise = samplers.make_denoise(process, prediction, predict[guided], times)
            if mask is not None:
                denoise = edits.keep_known(denoise, process, times, image, mask)
            parts.append((denoise, count))
        # 0 is x_T's noise, i + 1 that of step i.
        problem = samplers.Problem(process, sampler.grid, parts, lambda i: noise(i + 1))
        if x_T is None and image is not None:
            t = jnp.full(len(index), sampler.grid[0], jnp.float32)
            x_T = diffusion.q_sample(process, image, t, noise(0))
        elif x_T is None:
            x_T = process.x_T_std * noise(0)
        x_0, finite = sampler.solve(problem, x_T)
        if mask is not None:  # where ddim_level1 ends there is noise
            x_0 = mask * x_0 + (1 - mask) * image
        return x_0, finite

    return jax.jit(
        sample,
        compiler_options=models.compiler_options(),
        out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)),
    )


def forward_passes(sample_config, process: diffusion.Process, prediction: str) -> int:
    """How often an image passes through the network; guidance by the null one counts twice."""
    sampler = samplers.build(sample_config, process, prediction)
    runs = _guided_runs(sample_config, sampler)
    passes = np.repeat([1 + guided for guided, _ in runs], [count for _, count in runs])
    return int(passes @ sampler.evaluations)


def _guided_runs(config, sampler):
    """The steps as runs of (guided, count)."""
    steps = sampler.grid[:-1]
    runs = guidance.in_interval(steps, config.cfg_interval)
    if config.cfg_scale == 1:
        return [(False, len(steps))]
    if not any(guided for guided, _ in runs):
        shown = ", ".join(f"{t:.3g}" for t in steps)
        raise ValueError(
            f"cfg_scale={config.cfg_scale} guides no step: none of their times lies in "
            f"cfg_interval={','.join(map(str, config.cfg_interval))}; they are {shown}."
        )
    return runs


def make_decode_fn(config, mesh: Mesh) -> Callable:
    """The jitted `decode(vae, x_0 [B, h, w, C]) -> [B, H, W, channels] uint8` of latents.

    Args: config, `config.latents`.
    """
    return jax.jit(lambda vae, x_0: latents.decode_in_groups(vae, config, x_0, mesh))


def batches(
    sample: Callable,
    params,
    told: conditions.Conditions,
    seed: int,
    mesh: Mesh,
    output: Callable,
    batch_size: int | None = None,
    start: int = 0,
) -> Iterator[tuple[range, Any]]:
    """(image numbers, output(x_0) on the devices) of batch after batch, from image `start` on.

    Image i is a function of (params, seed, i, told.cond[i], told.null[i]). The last batch repeats
    its last image; its numbers are those that count. The next is under way when one is yielded.

    Args:
      sample: of `make_sample_fn`.   batch_size: images at a time over all devices, rounded up to
        a multiple of the batch shards; does not change the images.
    Raises: FloatingPointError with the step at which x_t was not finite.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or BATCH_PER_DEVICE * shards, len(told))
    batch_size = -(-batch_size // shards) * shards
    key, rows = jax.random.key(seed), sharding.local_rows(mesh, batch_size)
    previous = None
    for first in range(start, len(told), batch_size):
        index = np.minimum(first + rows, len(told) - 1).astype(np.int32)
        batch = {"index": index, **told.rows(index)}
        x_0, finite = sample(params, key, **sharding.put_batch(mesh, batch))
        numbers = range(first, min(first + batch_size, len(told)))
        current = numbers, output(x_0), finite
        if previous:
            yield _finished(*previous)
        previous = current
    if previous:
        yield _finished(*previous)


def _finished(numbers, output, finite):
    finite = np.asarray(finite)
    if not finite.all():
        raise FloatingPointError(
            f"sampling became NaN or infinite at step {int(finite.argmin()) + 1} of {len(finite)}, "
            f"among the images {numbers[0]} to {numbers[-1]}. Is the loss of this checkpoint "
            "finite? Try an earlier --step, --cfg_scale 1, more steps or another sampler."
        )
    return numbers, output


def generate(
    sample: Callable,
    params,
    told: conditions.Conditions,
    seed: int,
    mesh: Mesh,
    to_image: Callable,
    progress: bool = False,
    batch_size: int | None = None,
) -> np.ndarray:
    """All images [N, H, W, C] uint8, in host memory; arguments as `batches`."""
    images = []
    with tqdm(total=len(told), unit="img", disable=not progress) as bar:
        for numbers, batch in batches(sample, params, told, seed, mesh, to_image, batch_size):
            images.append(to_host(batch)[: len(numbers)])
            bar.update(len(numbers))
    return np.concatenate(images)


def _check_guidance(config, model, guide):
    if not 1 <= config.cfg_scale < np.inf:
        raise ValueError(
            f"cfg_scale={config.cfg_scale} must be a number of at least 1 (no guidance)."
        )
    if not 0 <= config.cfg_channels <= model.in_channels:
        raise ValueError(
            f"cfg_channels={config.cfg_channels} must lie in 0 (all) .. {model.in_channels}."
        )
    if not 0 <= config.cfg_rescale <= 1:
        raise ValueError(f"cfg_rescale={config.cfg_rescale} must lie in [0, 1].")
    if config.cfg_scale != 1 and guide is None and not model.class_dropout_prob:
        raise ValueError(
            f"cfg_scale={config.cfg_scale} needs a null class or empty captions, but the model was "
            "trained with class_dropout_prob=0; use cfg_scale 1, or --guide with a worse model."
        )
    if guide is not None and config.cfg_scale == 1:
        raise ValueError("a guide without --cfg_scale above 1 changes nothing.")


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """A global array, whole, in every process."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
