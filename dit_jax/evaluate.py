"""Measures the samples of a checkpoint: a JSON row in DIR/evaluations.jsonl, a picture beside it.

  python -m dit_jax.evaluate --workdir runs/digits --num 1000
  python -m dit_jax.evaluate --workdir runs/digits --bpd --num 100

The measures are of raw pixels: `fd_pixels`, a Frechet distance, and `label_accuracy`. With --bpd
held-out images are measured instead, by a row of their own: bits per dimension under the model.
"""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from dit_jax import (
    cli,
    data,
    diffusion,
    fid,
    flops,
    generate,
    grids,
    latents,
    likelihood,
    metrics,
    models,
    samplers,
    sharding,
)

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3
ODE_STEPS = 50  # of the probability flow's density: on N(0.7, 0.5^2) within 2e-6 nats a value
MAX_VALUES = 4096  # of an image: the measures of raw pixels cost its cube, and mean little beyond


def label_accuracy(
    images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray
) -> float:
    """Share of images that a 3-nearest-neighbour classifier on the real ones gives their label.

    Args: images [N, H, W, C] uint8, labels [N]; distances are Euclidean in pixels.
    """
    # Imported here: only this needs it, and it takes a second.
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(NEIGHBOURS)
    classifier.fit(_pixels(real_images), real_labels)
    return float(classifier.score(_pixels(images), labels))


def fd_pixels(images: np.ndarray, real_images: np.ndarray) -> dict[str, float]:
    """Frechet distance of pixels in [-1, 1] to the real images, and between halves of those.

    Returns: 'fd_pixels', and 'fd_pixels_real_halves', what two sets of real images come to.
    """
    values = int(np.prod(images.shape[1:]))
    if min(len(images), len(real_images) // 2) <= values:
        logger.warning(
            "fd_pixels: %d samples and %d real images in each half are too few for the covariance "
            "of %d values; compare it only with others of the same numbers.",
            len(images),
            len(real_images) // 2,
            values,
        )
    real = _pixels(real_images)[np.random.RandomState(0).permutation(len(real_images))]
    halves = [fid.Statistics.of(half) for half in np.array_split(real, 2)]
    statistics, both = fid.Statistics.of(_pixels(images)), halves[0].merge(halves[1])
    return {
        "fd_pixels": fid.frechet_distance(statistics.gaussian, both.gaussian),
        "fd_pixels_real_halves": fid.frechet_distance(*(half.gaussian for half in halves)),
    }


def _pixels(images):
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def evaluate(
    trained: generate.Trained,
    workdir: pathlib.Path,
    num: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """The row of `num` samples, labels in equal shares; one that was measured before is read back.

    Its 'picture' in the workdir shows 100 of the samples, with a class per row when there are ten.
    Raises: ValueError for images of more than MAX_VALUES values.
    """
    config = trained.config
    values = config.data.image_size**2 * config.data.image_channels
    if values > MAX_VALUES:
        raise ValueError(
            f"label_accuracy and fd_pixels are for small images, at most {MAX_VALUES} values; "
            f"these have {values}. Use dit_jax.sample to look at them."
        )
    sample = {**config.sample.to_dict(), "num": num, "seed": seed, "raw": trained.raw}
    if guide := trained.guide:
        sample |= {"guide": guide.workdir, "guide_step": guide.step}
    row = _row(trained, "sample", sample)
    settings_hash = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]
    row["picture"] = f"evaluations/{trained.step}-{settings_hash}.png"
    row["git_revision"] = _git_revision()
    if measured := sharding.from_first_process(_measured_before(workdir, row)):
        logger.info("measured before: %s", workdir / "evaluations.jsonl")
        return json.loads(measured)

    speed = metrics.training_speed(workdir, trained.step, config.batch_size)
    source = data.open_images(config, config.data.train_split)
    real = [source[i] for i in range(len(source))]
    real_images = np.stack([example["image"] for example in real])
    real_labels = np.array([example["label"] for example in real])
    labels = np.arange(num) * trained.model.num_classes // num
    images = generate.generate(
        trained.make_sample_fn(),
        trained.params,
        labels,
        seed,
        trained.mesh,
        trained.to_image,
        progress,
        batch_size,
    )
    row["label_accuracy"] = label_accuracy(images, labels, real_images, real_labels)
    row |= fd_pixels(images, real_images)
    row |= speed
    if jax.process_index() == 0:
        shown = images[np.linspace(0, num - 1, min(num, 100)).astype(int)]
        _write(workdir, row, generate.image_grid(shown, columns=10))
    return row


def evaluate_likelihood(
    trained: generate.Trained,
    workdir: pathlib.Path,
    num: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict:
    """The row of the bits per dimension of `num` held-out images, spread evenly, or of all.

    Conditional on their labels, without guidance. 'bits_per_dim' is of pixels, 'bits_per_latent_
    dim' of latents, where it is a density: compare it only where VAE and scale are the same.
    Args: steps, as `make_bits_fn`; None is all levels of a chain, ODE_STEPS else.
    Returns: the mean, its standard error, and of a chain the means of the prior's part and of the
      first level's; a row that was measured before is read back.
    Raises: ValueError if there are less than two held-out images, or as `make_bits_fn`;
      FloatingPointError for bits that are not finite.
    """
    config, mesh = trained.config, trained.mesh
    if not config.data.eval_split:
        raise ValueError(
            f"data.eval_split of {workdir} is empty: bits per dimension are of held-out images. "
            "Train with a split that data.train_split leaves out, such as 'test'."
        )
    source = data.open_split(config, "eval")
    available = len(source) // source.views
    num = min(num, available)
    if num < 2:
        raise ValueError(f"{num} of {available} held-out images have no standard error; take 2.")
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    steps = steps or (trained.process.num_steps if chain else ODE_STEPS)
    bits = make_bits_fn(trained, steps)
    settings = {"kind": "vlb" if chain else "ode", "steps": steps, "num": num, "seed": seed}
    if chain:
        settings["variance"] = "learned" if config.model.learn_sigma else config.sample.variance
    row = _row(trained, "likelihood", settings | {"raw": trained.raw})
    row["git_revision"] = _git_revision()
    if measured := sharding.from_first_process(_measured_before(workdir, row)):
        logger.info("measured before: %s", workdir / "evaluations.jsonl")
        return json.loads(measured)

    resident = {}
    if config.latents.source == "images":
        resident = {"vae": generate.load_vae(config, mesh)}
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(batch_size or generate.BATCH_PER_DEVICE * shards, num)
    batch_size = -(-batch_size // shards) * shards
    rows, key, parts = sharding.local_rows(mesh, batch_size), jax.random.key(seed), []
    for start in tqdm(range(0, num, batch_size), "images", disable=not progress):
        index = np.minimum(start + rows, num - 1) * available // num
        batch = {**data.gather(source, source.views * index), "index": index.astype(np.int32)}
        part = bits(trained.params, resident, key, sharding.put_batch(mesh, batch))
        parts.append(jax.tree.map(np.asarray, part))
    name = "bits_per_dim" if config.latents.source == "pixels" else "bits_per_latent_dim"
    values = {part: np.concatenate([p[part] for p in parts])[:num] for part in parts[0]}
    if not np.isfinite(values[""]).all():
        raise FloatingPointError(
            f"{name} of {np.sum(~np.isfinite(values['']))} of {num} images is NaN or infinite. Is "
            "the loss of this checkpoint finite? Try an earlier --step, or more --bpd_steps."
        )
    row |= {name + part: float(value.mean(dtype=np.float64)) for part, value in values.items()}
    row[f"{name}_standard_error"] = float(values[""].std(ddof=1, dtype=np.float64) / num**0.5)
    if jax.process_index() == 0:
        _write(workdir, row)
    return row


def make_bits_fn(trained: generate.Trained, steps: int) -> Callable:
    """The jitted `bits(params, resident, key, batch)` per dimension of each image.

    Args: steps, of a respaced chain whose bound is taken, or of the probability flow, of four
      evaluations, and their derivatives, each.
    Returns:
      bits: of a batch of images or moments, 'label' and 'index' [B], the image's number: {'': [B],
        and of a chain '_prior' and '_first_level'}. resident: as `latents.x_0_from_batch`. Image
        i's randomness depends on key and i alone.
    Raises: ValueError as the process's grid, or for an unknown variance.
    """
    config, process, mesh = trained.config, trained.process, trained.mesh
    prediction, pixels = config.objective.prediction, config.latents.source == "pixels"
    chain = isinstance(process, diffusion.DiscreteProcess)
    if chain:
        times = grids.build(process, steps, prediction=prediction)
    else:
        times = likelihood.ode_times(process, steps)

    def bits(params, resident, key, batch):
        def predict(x_t, network_time):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return trained.model.apply({"params": params}, x_t, network_time, batch["label"])

        def keys(i):  # 0 is the posterior's
            return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), i))(
                batch["index"]
            )

        def draw(distribution, i):
            return jax.vmap(lambda k: distribution(k, x_0.shape[1:], jnp.float32))(keys(i))

        x_0 = latents.x_0_from_batch(batch, keys(0), config.latents, resident, mesh)
        denoise = samplers.make_denoise(process, prediction, predict, times)
        if chain:
            bound = likelihood.variational_bound(
                process,
                denoise,
                x_0,
                times,
                noise=lambda i: draw(jax.random.normal, i + 1),
                variance=config.sample.variance,
                discretised=pixels,
            )
            return {"": bound.total, "_prior": bound.prior, "_first_level": bound.steps[-1]}
        if pixels:
            x_0 = likelihood.dequantise(x_0, draw(jax.random.uniform, 1))
        probe = draw(jax.random.rademacher, 2)
        log_p = likelihood.ode_log_likelihood(process, denoise, x_0, times, probe)
        return {"": likelihood.bits_per_dim(log_p, x_0, dequantised=pixels)}

    return jax.jit(
        bits,
        compiler_options=models.compiler_options(),
        out_shardings=sharding.replicated(mesh),
    )


def _row(trained, kind, settings):
    """What a row of this kind says of the checkpoint, and how it is measured."""
    config, counts = trained.config, flops.count(trained.config)
    images_seen = trained.step * config.batch_size
    return {
        "step": trained.step,
        kind: json.loads(json.dumps(settings)),  # as it will be read back
        "params": counts["params"],
        "gmacs": counts["gmacs"],
        "images_seen": images_seen,
        "train_gflops": images_seen * counts["train_gflops_per_image"],
    }


def _measured_before(workdir, row):
    """The same row with its measures as JSON, if a picture of it is still there; else ''."""
    picture_lost = "picture" in row and not (workdir / row["picture"]).is_file()
    if row["git_revision"].endswith("-dirty") or picture_lost:
        return ""
    rows = metrics.read_json_lines(workdir / "evaluations.jsonl")
    return next((json.dumps(r) for r in rows if row.items() <= r.items()), "")


def _write(workdir, row, picture=None):
    path = workdir / "evaluations.jsonl"
    try:
        if picture is not None:
            (workdir / row["picture"]).parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(workdir / row["picture"])
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"cannot write to {workdir}: {error}\nMeasured: {json.dumps(row)}") from error


def _git_revision():
    """The commit of this code, with '-dirty' if it has changes; of an installation its version."""
    root = pathlib.Path(__file__).parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if (root / ".git").exists() and shutil.which("git"):
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    return importlib.metadata.version("dit_jax")


def main(_):
    workdir, progress = pathlib.Path(FLAGS.workdir), sys.stderr.isatty()
    loading = cli.loading()
    if FLAGS.bpd:
        _print_bpd(workdir, loading, progress)
        return
    if FLAGS.bpd_steps:
        raise ValueError(f"--bpd_steps={FLAGS.bpd_steps} goes with --bpd; samples have --steps.")
    trained = generate.load(**loading)
    row = evaluate(trained, workdir, FLAGS.num, FLAGS.seed, FLAGS.batch_size, progress)
    print(f"picture: {workdir / row['picture']}")
    print(
        f"label_accuracy {row['label_accuracy']:.3f}  fd_pixels {row['fd_pixels']:.3f} (between "
        f"halves of the real images: {row['fd_pixels_real_halves']:.3f})  "
        f"img_per_s {row['img_per_s'] or 0:.0f}  steps {row['step']}  "
        f"seconds {row['seconds'] or 0:.0f}"
    )


def _print_bpd(workdir, loading, progress):
    variance = loading["settings"].pop("variance", None)
    others = [f"--{name}" for name in loading["settings"]]
    if loading["guide_workdir"] or loading["guide_step"] is not None:
        others.append("--guide or --guide_step")
    if others:
        raise ValueError(f"--bpd draws no samples, so it takes no {', '.join(others)}.")
    trained = generate.load(**loading)
    chain = isinstance(trained.process, diffusion.DiscreteProcess)
    if variance and (not chain or trained.model.learn_sigma):
        raise ValueError(f"--variance={variance} is of process ddpm without a learned variance.")
    trained.config.sample.variance = variance or trained.config.sample.variance
    row = evaluate_likelihood(
        trained,
        workdir,
        FLAGS.num,
        FLAGS.seed,
        FLAGS.bpd_steps,
        FLAGS.batch_size,
        progress,
    )
    name = next(name for name in row if name.startswith("bits_per_"))
    parts = (f"  {key.removeprefix(name + '_')} {row[key]:.4f}" for key in row if name + "_" in key)
    settings = "  ".join(f"{key} {value}" for key, value in row["likelihood"].items())
    print(f"{name} {row[name]:.4f}{''.join(parts)}  {settings}")


if __name__ == "__main__":
    cli.define_sampling()
    flags.DEFINE_integer("num", 1000, "Samples; with --bpd held-out images.", lower_bound=2)
    flags.DEFINE_bool("bpd", False, "Bits per dimension of held-out images instead.")
    flags.DEFINE_integer(
        "bpd_steps",
        None,
        f"By default all levels of process ddpm (a bound); else {ODE_STEPS}, of an ODE.",
        lower_bound=1,
    )
    cli.run(main)
