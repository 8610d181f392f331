"""The inputs of the campaign's commands: a dataset, a VAE, a reference and a trained run."""

import functools
import pathlib

import jax
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from configs import smoke
from dit_jax import models, train
from dit_jax.datasets import digits
from dit_jax.evaluation import extractors, references
from dit_jax.workdirs import checkpoint

VAE = dict(
    name="vae",
    image_channels=1,
    latent_channels=2,
    block_channels=[8],
    layers_per_block=1,
    norm_groups=4,
    use_quant_conv=True,
    mid_attention=False,
    dtype="float32",
    remat=False,
)


def make(inputs: pathlib.Path) -> None:
    """Makes data/, vae/, reference.npz and run/ in the directory."""
    tfds.disable_progress_bar()
    digits.prepare(inputs / "data")
    config = ConfigDict({"model": VAE})
    init = jax.jit(functools.partial(models.init_params, models.build(config.model)))
    checkpoint.save_params(inputs / "vae", config, init(jax.random.key(0)))
    config = smoke.get_config()
    config.data.data_dir = str(inputs / "data")
    config.update(total_steps=2, checkpoint_every_steps=2, eval_every_steps=0)
    config.update(sample_every_steps=0, optim=dict(warmup_steps=1))
    train.train_and_evaluate(config, inputs / "run")
    extractor = extractors.load("pixels")
    references.load_for_run(config, None, extractor).save(inputs / "reference.npz")
