"""Sampling of images from parameters, a request and a seed, with one random key per image."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dit_jax import conditions, diffusion, models, sharding
from dit_jax.config import sizes
from dit_jax.diffusion import edits, guidance, objectives, samplers, solvers
from dit_jax.errors import UserError

# Images per device in one call. The drawn images do not depend on it.
BATCH_PER_DEVICE = 64


def make_sample_fn(
    model: nn.Module,
    sample_config,
    process: diffusion.Process,
    prediction: str,
    mesh: Mesh,
    guide: nn.Module | None = None,
    edit: type[edits.Edit] = edits.Edit,
    strength: float = 1.0,
) -> Callable:
    """Returns a jitted function that samples a batch of images.

    Args:
      sample_config: `config.sample`.
      prediction: `config.objective.prediction`.
      guide: a worse model for autoguidance, used instead of the null condition.
      strength: the share of the steps that an edit takes.
    Returns: sample(params, key, index, cond, null, encoder, guide_params, **arrays), which returns
      x_0 [B, h, w, C] f32, and [steps] bool: whether all of x_t was finite after each step.
      index: [B] int32, the images' indices. Image i depends on key and i, not on the batch.
      cond, null: [B, ...], from a `conditions.Request`.
      encoder: the frozen text encoder, for a model of condition 'context'.
      arrays: [B, ...], the fields of the edit. These and the other [B, ...] are sharded over B.
    Raises: ValueError as `samplers.build`, or for guidance of a model without a null condition.
    """
    # Fixed before tracing: the times of the steps, and which of them are guided.
    sampler = samplers.build(sample_config, process, prediction, strength)
    scale, interval = sample_config.cfg_scale, sample_config.cfg_interval
    spans = guidance.split_steps(sampler.grid[:-1], scale, interval)
    bind_networks = _make_bind_fn(model, guide, sample_config, mesh)
    draw_noise = functools.partial(_draw_noise, sizes.input_shape(model))

    def sample(params, key, index, cond, null, encoder=None, guide_params=None, **arrays):
        # An interpolation binds the networks to two conditions.
        bind = functools.partial(bind_networks, params, guide_params, encoder, null)
        bound_edit = edit(**arrays)
        unguided, guided = bound_edit.predict(bind, cond)
        parts = []
        # Each span has its own denoiser, so that unguided steps evaluate only one condition.
        for is_guided, num_steps in spans:
            predict = guided if is_guided else unguided
            arguments = predict, sampler.times, sample_config.clip_x_0
            denoise = solvers.make_denoise(process, prediction, *arguments)
            parts.append((bound_edit.wrap(denoise, process, sampler.times), num_steps))
        # x_T takes noise 0, so step i takes noise i + 1.
        noise = bound_edit.noise(functools.partial(draw_noise, key), index)
        problem = solvers.Problem(process, sampler.grid, parts, lambda i: noise(i + 1))
        x_T = bound_edit.begin(process, sampler.grid[0], noise)
        x_0, finite = sampler.solve(problem, x_T)
        return bound_edit.finish(x_0), finite

    return jax.jit(
        sample,
        compiler_options=models.compiler_options(),
        out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)),
    )


def _make_bind_fn(model, guide, config, mesh):
    """Returns a function that binds the networks to parameters and conditions.

    Returns: bind(params, guide_params, encoder, null, cond), which returns two
      `objectives.Predict`: [unguided, guided].
    Raises: ValueError for guidance that the model does not allow.
    """
    _check_guidance(config, model, guide)
    options = config.cfg_scale, config.cfg_channels, config.cfg_rescale

    def bind(params, guide_params, encoder, null, cond):
        def encode(model, params, cond):
            return conditions.encode(model, params, encoder, cond, mesh)

        network, encoded = models.bind(model, params, mesh), encode(model, params, cond)
        predict = bind_condition(network, encoded)
        if guide is None:
            null = encode(model, params, null)
            return [predict, guidance.classifier_free_guidance(network, encoded, null, *options)]
        worse = models.bind(guide, guide_params, mesh), encode(guide, guide_params, cond)
        return [predict, guidance.autoguidance(predict, bind_condition(*worse), *options)]

    return bind


def bind_condition(network: Callable, cond: jax.Array) -> objectives.Predict:
    """Binds a network to encoded conditions [B, ...]; returns predict(x_t, network_time)."""
    return lambda x_t, network_time: network(x_t, network_time, cond)


def _draw_noise(shape, key, i, index):
    """Draws noise i [B, *shape] of the images with these indices."""
    # Each image has a key of its own, so the noise does not depend on the batch.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def count_forward_passes(sample_config, process: diffusion.Process, prediction: str) -> int:
    """Counts an image's passes through the network; classifier-free guidance doubles them."""
    sampler = samplers.build(sample_config, process, prediction)
    scale, interval = sample_config.cfg_scale, sample_config.cfg_interval
    spans = guidance.split_steps(sampler.grid[:-1], scale, interval)
    is_guided, num_steps = zip(*spans, strict=True)
    return int((1 + np.repeat(is_guided, num_steps)) @ sampler.evaluations)


def batches(
    sample: Callable,
    params,
    request: conditions.Request,
    seed: int,
    mesh: Mesh,
    output: Callable,
    batch_size: int | None = None,
    wanted: Sequence[range] | None = None,
) -> Iterator[tuple[range, Any]]:
    """Samples images batch by batch; yields (image indices, output(x_0) on the devices).

    Image i is a function of (params, seed, i, request.cond[i], request.null[i]), whatever the batch
    size. Repeats of the last image pad the last batch; the indices leave them out. The devices
    compute a batch while the caller handles the one before.
    Args:
      sample: from `make_sample_fn`.
      batch_size: images at a time over all devices, rounded up to a multiple of the batch shards.
      wanted: ranges of image indices to sample, by default all.
    Raises: FloatingPointError with the step at which x_t was not finite.
    """
    # Devices of a tensor group hold the same rows, so they do not divide the batch.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or BATCH_PER_DEVICE * shards, len(request))
    batch_size = -(-batch_size // shards) * shards
    key, process_rows = jax.random.key(seed), sharding.local_rows(mesh, batch_size)
    previous = None
    wanted = [range(len(request))] if wanted is None else wanted
    spans = [part[i : i + batch_size] for part in wanted for i in range(0, len(part), batch_size)]
    for indices in spans:
        index = np.minimum(indices.start + process_rows, indices.stop - 1).astype(np.int32)
        batch = {"index": index, **request.rows(index)}
        # sample returns before the devices are done.
        x_0, finite = sample(params, key, **sharding.put_batch(mesh, batch))
        current = indices, output(x_0), finite
        if previous:
            yield _wait(*previous)
        previous = current
    if previous:
        yield _wait(*previous)


def _wait(indices, output, finite):
    """Waits for a batch; returns (indices, output), or raises if an x_t was not finite."""
    finite = np.asarray(finite)
    if not finite.all():
        raise FloatingPointError(
            f"sampling became NaN or infinite at step {int(finite.argmin()) + 1} of {len(finite)}, "
            f"among the images {indices[0]} to {indices[-1]}. Is the loss of this checkpoint "
            "finite? Try an earlier --step, --cfg_scale 1, more steps or another sampler."
        )
    return indices, output


def generate(
    sample: Callable,
    params,
    request: conditions.Request,
    seed: int,
    mesh: Mesh,
    to_image: Callable,
    progress: bool = False,
    batch_size: int | None = None,
) -> np.ndarray:
    """Samples all images [N, H, W, C] uint8 into host memory; arguments as for `batches`."""
    images = []
    with tqdm(total=len(request), unit="img", disable=not progress) as bar:
        for indices, batch in batches(sample, params, request, seed, mesh, to_image, batch_size):
            images.append(to_host(batch)[: len(indices)])
            bar.update(len(indices))
    return np.concatenate(images)


def _check_guidance(config, model, guide):
    """Raises ValueError for guidance that the model was not trained for, or that has no effect."""
    if config.cfg_channels > model.in_channels:
        raise UserError(
            f"cfg_channels={config.cfg_channels} must be in 0..{model.in_channels}; 0 is all."
        )
    if config.cfg_scale != 1 and guide is None and not model.null_condition:
        raise UserError(
            f"cfg_scale={config.cfg_scale} needs a null class or empty captions, but the model was "
            "trained with null_condition=False. Use cfg_scale 1, or --guide with a worse model."
        )
    if guide is not None and config.cfg_scale == 1:
        raise UserError("a guide has no effect with cfg_scale=1. Set --cfg_scale above 1.")


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copies a global array to the host memory of every process."""
    # A process can read only the shards on its own devices.
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
