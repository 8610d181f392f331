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
from dit_jax.diffusion import edits, guidance, samplers, solvers
from dit_jax.errors import UserError

# Images per device and call; what is drawn does not depend on it.
BATCH_PER_DEVICE = 64
PLAIN = edits.Edit()  # sampling without an edit


def make_sample_fn(
    model: nn.Module,
    sample_config,
    process: diffusion.Process,
    prediction: str,
    mesh: Mesh,
    guide: nn.Module | None = None,
    edit: edits.Edit = PLAIN,
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
    runs = _guided_runs(sample_config, sampler)
    _check_guidance(sample_config, model, guide)
    scale = sample_config.cfg_scale
    options = dict(channels=sample_config.cfg_channels, rescale=sample_config.cfg_rescale)
    shape = sizes.input_shape(model)

    def sample(params, key, index, cond, null, encoder=None, guide_params=None, **arrays):
        if arrays.keys() != set(edit.names):
            raise UserError(f"the edit takes arrays {edit.names}, not {tuple(arrays)}.")

        # Noise i of an image comes from its own key, so the batch does not matter.
        def draw(i, index):
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

        def bind(model, params, cond):
            """Returns predict(x_t, network_time, cond=encoded), and encoded, the encoded cond."""
            network = models.bind(model, params, mesh)
            encoded = conditions.encode(model, params, encoder, cond, mesh)
            return lambda x_t, time, cond=encoded: network(x_t, time, cond), encoded

        # An edit may call it twice, such as for the two conditions of an interpolation.
        def networks(cond):
            """Returns the network [unguided, guided] for the conditions."""
            predict, encoded = bind(model, params, cond)
            if guide is not None:
                worse, _ = bind(guide, guide_params, cond)
                return [predict, guidance.autoguidance(predict, worse, scale, **options)]
            null_encoded = conditions.encode(model, params, encoder, null, mesh)
            guided = guidance.classifier_free_guidance(
                predict, encoded, null_encoded, scale, **options
            )
            return [predict, guided]

        predict, parts = edit.predict(networks, cond, arrays), []
        # Each run of steps has its own denoiser, so that unguided steps evaluate one condition.
        for guided, count in runs:
            denoise = solvers.make_denoise(process, prediction, predict[guided], sampler.times)
            if sample_config.clip_x_0:
                denoise = solvers.clip_x_0(denoise, process, sampler.times)
            parts.append((edit.wrap(denoise, process, sampler.times, arrays), count))
        # Noise 0 is x_T's, so step i takes noise i + 1.
        noise = edit.noise(draw, index, arrays)
        problem = solvers.Problem(process, sampler.grid, parts, lambda i: noise(i + 1))
        x_T = edit.begin(process, sampler.grid[0], noise, arrays)
        x_0, finite = sampler.solve(problem, x_T)
        return edit.finish(x_0, arrays), finite

    return jax.jit(
        sample,
        compiler_options=models.compiler_options(),
        out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)),
    )


def forward_passes(sample_config, process: diffusion.Process, prediction: str) -> int:
    """Returns how often an image passes through the network.

    An evaluation that the null condition guides is two passes.
    """
    sampler = samplers.build(sample_config, process, prediction)
    runs = _guided_runs(sample_config, sampler)
    passes = np.repeat([1 + guided for guided, _ in runs], [count for _, count in runs])
    return int(passes @ sampler.evaluations)


def _guided_runs(config, sampler):
    """Returns the steps as consecutive runs of (guided, count).

    Raises: ValueError for an invalid interval, or one that holds no step's time.
    """
    steps = sampler.grid[:-1]
    # Before the early return, so that an invalid interval always raises.
    runs = guidance.in_interval(steps, config.cfg_interval)
    if config.cfg_scale == 1:
        return [(False, len(steps))]
    if not any(guided for guided, _ in runs):
        shown = ", ".join(f"{t:.3g}" for t in steps)
        raise UserError(
            f"cfg_scale={config.cfg_scale} guides no step: none of their times lies in "
            f"cfg_interval={','.join(map(str, config.cfg_interval))}; they are {shown}."
        )
    return runs


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

    Image i is a function of (params, seed, i, request.cond[i], request.null[i]). The last batch
    repeats its last image to be full; its numbers leave the repeats out. When a batch is yielded,
    the next one is already computing.

    Args:
      sample: from `make_sample_fn`.
      batch_size: images at a time over all devices, rounded up to a multiple of the batch shards.
        It does not change the images.
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
    for numbers in _split(wanted, batch_size):
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


def _split(parts, size):
    """Yields the ranges, each cut into ranges of at most `size`."""
    return (part[i : i + size] for part in parts for i in range(0, len(part), size))


def _finished(numbers, output, finite):
    """Returns (numbers, output) when the batch is done.

    Raises: FloatingPointError if an x_t was not finite.
    """
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
    """Raises ValueError for guidance out of range, or that the model was not trained for."""
    if not 1 <= config.cfg_scale < np.inf:
        raise UserError(
            f"cfg_scale={config.cfg_scale} must be a number of at least 1 (no guidance)."
        )
    if not 0 <= config.cfg_channels <= model.in_channels:
        raise UserError(
            f"cfg_channels={config.cfg_channels} must lie in 0 (all) .. {model.in_channels}."
        )
    if not 0 <= config.cfg_rescale <= 1:
        raise UserError(f"cfg_rescale={config.cfg_rescale} must lie in [0, 1].")
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
