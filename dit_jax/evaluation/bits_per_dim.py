"""Bits per dimension of held-out images under a trained model: `evaluate --bpd`."""

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

ODE_STEPS = 50  # of the probability flow: within 2e-6 nats a value on data N(0.7, 0.5^2)


def evaluate(
    trained: runs.Trained,
    workdir: pathlib.Path,
    num: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """Returns the row with the bits per dimension of `num` held-out images, spread evenly over all.

    The model gets the images' conditions, and there is no guidance. The denoiser is the one that
    samples, so x_0 is clipped if `config.sample.clip_x_0` is on. 'bits_per_latent_dim' is a
    density: compare it only between runs with the same VAE and scale.
    Args:
      num: the number of images; all are taken if there are fewer.
      steps: as for `make_bits_fn`. None is all levels of a chain, or ODE_STEPS for other processes.
    Returns: the mean and its standard error; for a chain, also the means of the prior's part and of
      the first level's. A row that was measured before is read back.
    Raises: ValueError if there are less than two held-out images, or as `make_bits_fn`;
      FloatingPointError if the bits are not finite.
    """
    config = trained.config
    if not config.data.eval_split:
        raise UserError(
            f"data.eval_split of {workdir} is empty: bits per dimension are of held-out images. "
            "Train with a split that data.train_split leaves out, such as 'test'."
        )
    x_0 = latents.build(config)
    source = x_0.open_split("eval")
    available = len(source) // source.views
    num = min(num, available)
    if num < 2:
        raise UserError(f"{num} of {available} held-out images have no standard error; take 2.")
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    steps = steps or (trained.process.num_steps if chain else ODE_STEPS)
    # All that the result depends on apart from the parameters: `rows.find` compares it.
    settings = {"kind": "vlb" if chain else "ode", "steps": steps, "num": num, "seed": seed}
    settings["images"] = identity.digest(identity.check_splits({"eval": source}, workdir)["eval"])
    if x_0.encodes:
        settings["vae_digest"] = trained.vae_digest
    if chain:
        settings["variance"] = "learned" if config.model.learn_sigma else config.sample.variance
    settings |= {"clip_x_0": config.sample.clip_x_0, "raw": trained.raw}
    row = rows.describe_checkpoint(trained, "likelihood", settings)
    path = workdir / "evaluations.jsonl"
    # Held, so that no other command measures the same in the meantime.
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
    bits, available = make_bits_fn(trained, steps), len(source) // source.views
    x_0 = latents.build(config)
    vae = x_0.load_vae(mesh) if x_0.encodes else None
    # All shards get the same number of rows.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or generate.BATCH_PER_DEVICE * shards, num)
    batch_size = -(-batch_size // shards) * shards
    rows_here, key, parts = sharding.local_rows(mesh, batch_size), jax.random.key(seed), []
    for start in tqdm(range(0, num, batch_size), "images", disable=not progress):
        # Images are spread evenly. The last batch repeats its last image, so that all batches have
        # one shape. Of several views of an image, the first is the unmirrored one.
        index = np.minimum(start + rows_here, num - 1) * available // num
        batch = loader.with_caption(loader.gather(source, source.views * index))
        batch["index"] = index.astype(np.int32)
        part = bits(trained.params, vae, key, sharding.put_batch(mesh, batch))
        parts.append(jax.tree.map(np.asarray, part))
    name = "bits_per_latent_dim" if x_0.uses_vae else "bits_per_dim"
    values = {part: np.concatenate([p[part] for p in parts])[:num] for part in parts[0]}
    if wrong := np.sum(~np.isfinite(values[""])):
        raise FloatingPointError(
            f"{name} of {wrong} of {num} images is NaN or infinite. Is the loss of this checkpoint "
            "finite? Try an earlier --step, or more --bpd_steps."
        )
    means = {name + part: float(value.mean(dtype=np.float64)) for part, value in values.items()}
    means[f"{name}_standard_error"] = float(values[""].std(ddof=1, dtype=np.float64) / num**0.5)
    rows.check(means)
    return means


def make_bits_fn(trained: runs.Trained, steps: int) -> Callable:
    """Returns the jitted `bits(params, vae, key, batch)` per dimension of each image.

    Args:
      steps: of the respaced chain whose bound is taken, or of the probability flow. Each step of
        the flow takes four evaluations of the network and of its derivatives.
    Returns: bits, which maps a batch to {'': [B]}, and of a chain also '_prior' and '_first_level'.
      The batch holds images or moments, their condition, and 'index' [B], the images' numbers.
      vae is as for `Latents.x_0`. Image i's randomness depends on key and i alone.
    Raises: ValueError as the process's grid, or for an unknown variance.
    """
    config, process, mesh = trained.config, trained.process, trained.mesh
    prediction, data = config.objective.prediction, latents.build(config)
    # A chain has a bound over its levels. Other processes have a density by their flow.
    if isinstance(process, diffusion.DiscreteProcess):
        times, measure = grids.build(process, steps, prediction=prediction), _measure_bound
    else:
        times, measure = likelihood.ode_times(process, steps), _measure_density

    def bits(params, vae, key, batch):
        network = models.bind(trained.model, params, mesh)
        # The null condition is not needed: there is no guidance.
        cond = trained.condition.from_batch(batch)
        cond = conditions.encode(trained.model, params, trained.encoder, cond, mesh)

        def predict(x_t, network_time):
            return network(x_t, network_time, cond)

        def keys(i):  # i = 0 draws the posterior sample of moments, i > 0 the noise
            return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), i))(
                batch["index"]
            )

        def draw(distribution, i):
            return jax.vmap(lambda k: distribution(k, x_0.shape[1:], jnp.float32))(keys(i))

        x_0 = data.x_0(batch, keys(0), mesh, vae)
        clip_x_0 = config.sample.clip_x_0
        denoise = solvers.make_denoise(process, prediction, predict, times, clip_x_0)
        return measure(trained, denoise, x_0, times, draw, pixels=not data.uses_vae)

    return jax.jit(
        bits,
        compiler_options=models.compiler_options(),
        out_shardings=sharding.replicated(mesh),
    )


def _measure_bound(trained, denoise, x_0, times, draw, pixels):
    """Returns the bits of the variational bound of a chain, and its first and last parts."""
    bound = likelihood.variational_bound(
        trained.process,
        denoise,
        x_0,
        times,
        noise=lambda i: draw(jax.random.normal, i + 1),
        variance=trained.config.sample.variance,
        # Pixels are discrete: the last step gives the probability of a grey level, not a density.
        discretised=pixels,
    )
    return {"": bound.total, "_prior": bound.prior, "_first_level": bound.steps[-1]}


def _measure_density(trained, denoise, x_0, times, draw, pixels):
    """Returns the bits of the density by the probability flow."""
    if pixels:
        # A density needs continuous values: pixels are spread over their bins.
        x_0 = likelihood.dequantise(x_0, draw(jax.random.uniform, 1))
    probe = draw(jax.random.rademacher, 2)
    log_p = likelihood.ode_log_likelihood(trained.process, denoise, x_0, times, probe)
    return {"": likelihood.bits_per_dim(log_p, x_0, dequantised=pixels)}
