"""Bits per dimension of held-out images under a trained model: `evaluate --bpd`."""

import functools
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax import conditions, diffusion, latents, models, sharding
from dit_jax.data import loader
from dit_jax.diffusion import grids, likelihood, solvers
from dit_jax.errors import UserError
from dit_jax.evaluation import rows
from dit_jax.sampling import generate, runs
from dit_jax.workdirs import identity

logger = logging.getLogger("dit_jax")

# Steps of the probability flow. On data N(0.7, 0.5^2) the error is at most 2e-6 nats per dimension.
ODE_STEPS = 50


def evaluate(
    trained: runs.Trained,
    workdir: pathlib.Path,
    num: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """Measures the bits per dimension of `num` held-out images, and writes them to a row.

    The images are spread evenly over the split. The model gets their conditions, and there
    is no guidance. x_0 is clipped as in sampling, if `config.sample.clip_x_0` is on.
    'bits_per_latent_dim' is a density: compare it only between runs with the same VAE and scale.
    Args:
      num: the number of images; the split may have fewer.
      steps: as for `make_bits_fn`. None is all levels of a chain, or ODE_STEPS for other processes.
    Returns: the row, with the mean and its standard error; for a chain also with the mean bits of
      the prior and of the first level. A row that was measured before is read back.
    Raises: ValueError for fewer than two held-out images, or as `make_bits_fn`; FloatingPointError
      if the bits are not finite.
    """
    config = trained.config
    if not config.data.eval_split:
        raise UserError(
            f"data.eval_split of {workdir} is empty, but bits per dimension need held-out images. "
            "Train with a split that data.train_split leaves out, such as 'test'."
        )
    latent_kind = latents.build(config)
    source = latent_kind.open_split("eval")
    available = len(source) // source.views
    num = min(num, available)
    if num < 2:
        raise UserError(
            f"{num} of {available} held-out images have no standard error. Take at least 2."
        )
    is_chain = isinstance(trained.process, diffusion.DiscreteProcess)
    steps = steps or (trained.process.num_steps if is_chain else ODE_STEPS)
    # `rows.find` compares all that the result depends on. The parameters have their own digest.
    settings = {"kind": "vlb" if is_chain else "ode", "steps": steps, "num": num, "seed": seed}
    settings["images"] = identity.digest(identity.check_splits({"eval": source}, workdir)["eval"])
    if latent_kind.encodes:
        settings["vae_digest"] = trained.vae_digest
    if is_chain:
        settings["variance"] = "learned" if config.model.learn_sigma else config.sample.variance
    settings |= {"clip_x_0": config.sample.clip_x_0, "raw": trained.raw}
    row = rows.describe_checkpoint(trained, "likelihood", settings)
    path = workdir / "evaluations.jsonl"
    # The lock keeps other commands from measuring the same row in the meantime.
    with rows.hold(path, row):
        if measured := rows.find(path, row):
            logger.info("measured before: %s", path)
            return measured
        row |= _measure(trained, source, num, seed, steps, batch_size, progress)
        if jax.process_index() == 0:
            rows.append(path, row)
    return row


def _measure(trained, source, num, seed, steps, batch_size, progress):
    """Returns {name: mean} of the bits of `num` images, with their standard error."""
    config, mesh = trained.config, trained.mesh
    compute_bits, available = make_bits_fn(trained, steps), len(source) // source.views
    latent_kind = latents.build(config)
    vae = latent_kind.load_vae(mesh) if latent_kind.encodes else None
    # All shards get the same number of rows.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or generate.BATCH_PER_DEVICE * shards, num)
    batch_size = -(-batch_size // shards) * shards
    process_rows, key, batches = sharding.local_rows(mesh, batch_size), jax.random.key(seed), []
    for start in tqdm(range(0, num, batch_size), "images", disable=not progress):
        # Repeats of the last image pad the last batch, so that all batches have one shape.
        index = np.minimum(start + process_rows, num - 1) * available // num
        # The first of an image's views is the unmirrored one.
        batch = loader.with_caption(loader.gather(source, source.views * index))
        batch["index"] = index.astype(np.int32)
        bits = compute_bits(trained.params, vae, key, sharding.put_batch(mesh, batch))
        batches.append(jax.tree.map(np.asarray, bits))
    name = "bits_per_latent_dim" if latent_kind.uses_vae else "bits_per_dim"
    bits = {part: np.concatenate([batch[part] for batch in batches])[:num] for part in batches[0]}
    if num_wrong := np.sum(~np.isfinite(bits[""])):
        raise FloatingPointError(
            f"{name} of {num_wrong} of {num} images is NaN or infinite. Is the loss of this "
            "checkpoint finite? Try an earlier --step, or more --bpd_steps."
        )
    means = {name + part: float(values.mean(dtype=np.float64)) for part, values in bits.items()}
    means[f"{name}_standard_error"] = float(bits[""].std(ddof=1, dtype=np.float64) / num**0.5)
    rows.check(means)
    return means


def make_bits_fn(trained: runs.Trained, steps: int) -> Callable:
    """Returns a jitted function that computes the bits per dimension of each image in a batch.

    Args:
      steps: the number of steps of the respaced chain, or of the probability flow. Each step of
        the flow takes four evaluations of the network and of its derivatives.
    Returns: compute_bits(params, vae, key, batch), which returns {'': [B]}, for a chain also with
      '_prior' and '_first_level'. The batch has images or moments, their condition, and 'index'
      [B], the images' indices. vae is as for `Latents.x_0`. The randomness of image i depends on
      key and i alone.
    Raises: ValueError as the process's grid, or for an unknown variance.
    """
    config, process, mesh = trained.config, trained.process, trained.mesh
    prediction, latent_kind = config.objective.prediction, latents.build(config)
    # A chain has a bound over its levels. Other processes have a density by their flow.
    if isinstance(process, diffusion.DiscreteProcess):
        times, measure = grids.build(process, steps, prediction=prediction), _measure_bound
    else:
        times, measure = likelihood.ode_times(process, steps), _measure_density

    def compute_bits(params, vae, key, batch):
        network = models.bind(trained.model, params, mesh)
        # The null condition is not needed: there is no guidance.
        cond = trained.condition.from_batch(batch)
        cond = conditions.encode(trained.model, params, trained.encoder, cond, mesh)

        def predict(x_t, network_time):
            return network(x_t, network_time, cond)

        def make_keys(i):  # 0 is for the posterior sample of moments, the others are for noise
            image_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            return jax.vmap(jax.random.fold_in, (0, None))(image_keys, i)

        def draw(distribution, i):
            draw_image = functools.partial(distribution, shape=x_0.shape[1:], dtype=jnp.float32)
            return jax.vmap(draw_image)(make_keys(i))

        x_0 = latent_kind.x_0(batch, make_keys(0), mesh, vae)
        clip_x_0 = config.sample.clip_x_0
        denoise = solvers.make_denoise(process, prediction, predict, times, clip_x_0)
        return measure(trained, denoise, x_0, times, draw, pixels=not latent_kind.uses_vae)

    return jax.jit(
        compute_bits,
        compiler_options=models.compiler_options(),
        out_shardings=sharding.replicated(mesh),
    )


def _measure_bound(trained, denoise, x_0, times, draw, pixels):
    """Returns the bits of a chain's variational bound, of its prior and of its first level."""
    bound = likelihood.variational_bound(
        trained.process,
        denoise,
        x_0,
        times,
        noise=lambda i: draw(jax.random.normal, i + 1),
        variance=trained.config.sample.variance,
        # The last step gives the probability of a pixel's grey level, which is discrete.
        discretised=pixels,
    )
    return {"": bound.total, "_prior": bound.prior, "_first_level": bound.steps[-1]}


def _measure_density(trained, denoise, x_0, times, draw, pixels):
    """Returns the bits of the density by the probability flow."""
    if pixels:
        # A density needs continuous values, so pixels are spread over their bins.
        x_0 = likelihood.dequantise(x_0, draw(jax.random.uniform, 1))
    probe = draw(jax.random.rademacher, 2)
    log_p = likelihood.ode_log_likelihood(trained.process, denoise, x_0, times, probe)
    return {"": likelihood.bits_per_dim(log_p, x_0, dequantised=pixels)}
