"""Sampling: images from parameters, a request and a seed, sharded, with one key per image."""

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

# Images per device and call; what is drawn does not depend on it.
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
    """Returns the jitted `sample(params, key, index, cond, null, encoder, guide_params, **arrays)`.

    Args:
      sample_config: `config.sample`.
      prediction: `config.objective.prediction`.
      guide: a worse model for autoguidance, used instead of the null condition.
      strength: the share of the steps that an edit takes.
    Returns:
      sample: returns (x_0 [B, h, w, C] f32, finite [steps] bool, whether every x_t was finite).
        It takes index [B] int32, the images' numbers; cond and null [B, ...] of a
        `conditions.Request`; and the edit's arrays [B, ...]; all are sharded over the batch.
        encoder is the frozen text encoder, for a model of condition 'context'. Image i depends on
        key and i alone, not on the rest of the batch.
    Raises: ValueError as `samplers.build`, or for guidance of a model without a null condition.
    """
    # Fixed before tracing: the times of the steps, and which of them are guided.
    sampler = samplers.build(sample_config, process, prediction, strength)
    scale, interval = sample_config.cfg_scale, sample_config.cfg_interval
    spans = guidance.split_steps(sampler.grid[:-1], scale, interval)
    bind_networks = _make_bind_fn(model, guide, sample_config, mesh)
    draw_noise = functools.partial(_draw_noise, sizes.input_shape(model))

    def sample(params, key, index, cond, null, encoder=None, guide_params=None, **arrays):
        # An edit may bind the networks twice, such as to both conditions of an interpolation.
        networks = functools.partial(bind_networks, params, guide_params, encoder, null)
        edited = edit(**arrays)
        predict, parts = edited.predict(networks, cond), []
        # Each span has its own denoiser, so that unguided steps evaluate one condition.
        for guided, count in spans:
            arguments = predict[guided], sampler.times, sample_config.clip_x_0
            denoise = solvers.make_denoise(process, prediction, *arguments)
            parts.append((edited.wrap(denoise, process, sampler.times), count))
        # Noise 0 is x_T's, so step i takes noise i + 1.
        noise = edited.noise(functools.partial(draw_noise, key), index)
        problem = solvers.Problem(process, sampler.grid, parts, lambda i: noise(i + 1))
        x_0, finite = sampler.solve(problem, edited.begin(process, sampler.grid[0], noise))
        return edited.finish(x_0), finite

    return jax.jit(
        sample,
        compiler_options=models.compiler_options(),
        out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)),
    )


def _make_bind_fn(model, guide, config, mesh):
    """Returns `bind(params, guide_params, encoder, null, cond)` -> networks [unguided, guided].

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
    """Returns predict(x_t, network_time) of a network with encoded conditions [B, ...]."""
    return lambda x_t, network_time: network(x_t, network_time, cond)


def _draw_noise(shape, key, i, index):
    """Returns noise i of the images with these numbers, [B, *shape]."""
    # It comes from the image's own key, so the batch does not matter.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)


def forward_passes(sample_config, process: diffusion.Process, prediction: str) -> int:
    """Returns how often an image passes through the network.

    An evaluation that the null condition guides is two passes.
    """
    sampler = samplers.build(sample_config, process, prediction)
    scale, interval = sample_config.cfg_scale, sample_config.cfg_interval
    spans = guidance.split_steps(sampler.grid[:-1], scale, interval)
    guided, counts = zip(*spans, strict=True)
    return int((1 + np.repeat(guided, counts)) @ sampler.evaluations)


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
    """Yields (image numbers, output(x_0) on the devices), batch after batch.

    Image i is a function of (params, seed, i, request.cond[i], request.null[i]), whatever the
    batch size. The last batch repeats its last image to be full; its numbers leave the repeats out.
    When a batch is yielded, the next one is already computing.

    Args:
      sample: from `make_sample_fn`.
      batch_size: images at a time over all devices, rounded up to a multiple of the batch shards.
      wanted: ranges of image numbers to draw, by default all.
    Raises: FloatingPointError with the step at which x_t was not finite.
    """
    # Devices of a tensor group hold the same rows, so only these shards divide the batch.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or BATCH_PER_DEVICE * shards, len(request))
    batch_size = -(-batch_size // shards) * shards
    key, rows = jax.random.key(seed), sharding.local_rows(mesh, batch_size)
    previous = None
    wanted = [range(len(request))] if wanted is None else wanted
    spans = [part[i : i + batch_size] for part in wanted for i in range(0, len(part), batch_size)]
    for numbers in spans:
        # Rows beyond the last image repeat it.
        index = np.minimum(numbers.start + rows, numbers.stop - 1).astype(np.int32)
        batch = {"index": index, **request.rows(index)}
        # Returns before the devices are done, so the host can use the batch before meanwhile.
        x_0, finite = sample(params, key, **sharding.put_batch(mesh, batch))
        current = numbers, output(x_0), finite
        if previous:
            yield _finished(*previous)
        previous = current
    if previous:
        yield _finished(*previous)


def _finished(numbers, output, finite):
    """Returns (numbers, output) when the batch is done, and all its x_t were finite."""
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
    request: conditions.Request,
    seed: int,
    mesh: Mesh,
    to_image: Callable,
    progress: bool = False,
    batch_size: int | None = None,
) -> np.ndarray:
    """Returns all images [N, H, W, C] uint8, in host memory; arguments as `batches`."""
    images = []
    with tqdm(total=len(request), unit="img", disable=not progress) as bar:
        for numbers, batch in batches(sample, params, request, seed, mesh, to_image, batch_size):
            images.append(to_host(batch)[: len(numbers)])
            bar.update(len(numbers))
    return np.concatenate(images)


def _check_guidance(config, model, guide):
    """Raises ValueError for guidance that the model was not trained for, or that does nothing."""
    if config.cfg_channels > model.in_channels:
        raise UserError(
            f"cfg_channels={config.cfg_channels} must lie in 0 (all) .. {model.in_channels}."
        )
    if config.cfg_scale != 1 and guide is None and not model.null_condition:
        raise UserError(
            f"cfg_scale={config.cfg_scale} needs a null class or empty captions, but the model was "
            "trained with null_condition=False; use cfg_scale 1, or --guide with a worse model."
        )
    if guide is not None and config.cfg_scale == 1:
        raise UserError("a guide without --cfg_scale above 1 changes nothing.")


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a global array as a whole, in every process."""
    # A process can read only the shards on its own devices.
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
