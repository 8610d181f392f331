"""Parameters, labels or captions, and seeds to images, sharded, one key per image."""

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

# Images per device and call; a device's share of a batch does not change what is drawn.
BATCH_PER_DEVICE = 64
PLAIN = edits.Edit()


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
    """The jitted `sample(params, key, index, cond, null, encoder, guide_params, **arrays)`.

    Args:
      sample_config: `config.sample`.   prediction: `config.objective.prediction`.
      guide: a worse model, which takes the null condition's place in guidance.
      strength: of an edit, the share of the steps that is taken.
    Returns:
      sample: index [B] int32, the image's number, cond and null [B, ...] as
        `conditions.Request`, arrays [B, ...] of the edit, all sharded over the batch, to (x_0
        [B, h, w, C] f32, finite [steps] bool, whether every x_t was). Image i depends on key and i
        alone, not on the others. encoder: of captions, for a model of condition 'context'.
    Raises: ValueError as `samplers.build`, or for guidance of a model without a null condition.
    """
    sampler = samplers.build(sample_config, process, prediction, strength)
    runs = _guided_runs(sample_config, sampler)
    _check_guidance(sample_config, model, guide)
    scale = sample_config.cfg_scale
    options = dict(channels=sample_config.cfg_channels, rescale=sample_config.cfg_rescale)
    shape = sizes.input_shape(model)

    def sample(params, key, index, cond, null, encoder=None, guide_params=None, **arrays):
        if arrays.keys() != set(edit.names):
            raise UserError(f"the edit takes arrays {edit.names}, not {tuple(arrays)}.")

        def draw(i, index):
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

        def bind(model, params, cond):
            """predict(x_t, network_time, cond) of a network, by default of this condition."""
            network = models.bind(model, params, mesh)
            encoded = conditions.encode(model, params, encoder, cond, mesh)
            return lambda x_t, time, cond=encoded: network(x_t, time, cond), encoded

        def networks(cond):
            """The network, unguided and guided."""
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
        for guided, count in runs:
            denoise = solvers.make_denoise(process, prediction, predict[guided], sampler.times)
            if sample_config.clip_x_0:
                denoise = solvers.clip_x_0(denoise, process, sampler.times)
            parts.append((edit.wrap(denoise, process, sampler.times, arrays), count))
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
    """(image numbers, output(x_0) on the devices) of batch after batch.

    Image i is a function of (params, seed, i, request.cond[i], request.null[i]). The last batch
    repeats its last image; its numbers are those that count. The next is under way when one is
    yielded.

    Args:
      sample: of `make_sample_fn`.   batch_size: images at a time over all devices, rounded up to
        a multiple of the batch shards; does not change the images.   wanted: numbers of the images,
        by default of all.
    Raises: FloatingPointError with the step at which x_t was not finite.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or BATCH_PER_DEVICE * shards, len(request))
    batch_size = -(-batch_size // shards) * shards
    key, rows = jax.random.key(seed), sharding.local_rows(mesh, batch_size)
    previous = None
    wanted = [range(len(request))] if wanted is None else wanted
    for numbers in _split(wanted, batch_size):
        index = np.minimum(numbers.start + rows, numbers.stop - 1).astype(np.int32)
        batch = {"index": index, **request.rows(index)}
        x_0, finite = sample(params, key, **sharding.put_batch(mesh, batch))
        current = numbers, output(x_0), finite
        if previous:
            yield _finished(*previous)
        previous = current
    if previous:
        yield _finished(*previous)


def _split(parts, size):
    """The ranges, each cut into ranges of at most this size."""
    return (part[i : i + size] for part in parts for i in range(0, len(part), size))


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
    request: conditions.Request,
    seed: int,
    mesh: Mesh,
    to_image: Callable,
    progress: bool = False,
    batch_size: int | None = None,
) -> np.ndarray:
    """All images [N, H, W, C] uint8, in host memory; arguments as `batches`."""
    images = []
    with tqdm(total=len(request), unit="img", disable=not progress) as bar:
        for numbers, batch in batches(sample, params, request, seed, mesh, to_image, batch_size):
            images.append(to_host(batch)[: len(numbers)])
            bar.update(len(numbers))
    return np.concatenate(images)


def _check_guidance(config, model, guide):
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
    """A global array, whole, in every process."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
