"""Writes a published checkpoint as a workdir that the other commands read.

  python -m dit_jax.convert vae SRC DST
  python -m dit_jax.convert dit SRC DST --config configs/imagenet256.py:DiT-XL/2
  python -m dit_jax.convert lpips SRC DST

SRC is the directory that diffusers wrote (`vae`), a .npz, .safetensors or .pt file (`dit`), or a
directory with vgg16-397923af.pth and vgg.pth (`lpips`).
"""

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from dit_jax import checkpoint, cli, convert
from dit_jax.convert import lpips, vae

FLAGS = flags.FLAGS


def convert_vae(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes diffusers' AutoencoderKL at `source` to a new workdir, and returns its config.

    Args: source, the directory, or the weights in it; config.json must lie beside them.
    Raises: ValueError or FileNotFoundError for files that are not this VAE's.
    """
    weights = source / "diffusion_pytorch_model.safetensors" if source.is_dir() else source
    config = ConfigDict({"model": vae.read_config(weights.parent / "config.json")})
    params = convert.load("vae", weights, config.model)
    checkpoint.save_params(workdir, config, params)
    return config


def convert_lpips(source: pathlib.Path, workdir: pathlib.Path) -> ConfigDict:
    """Writes VGG-16 and LPIPS's weights in the directory `source` to a new workdir."""
    config = ConfigDict({"model": {"name": "lpips", "dtype": "float32"}})
    params = convert.load("lpips", lpips.read(source), config.model)
    checkpoint.save_params(workdir, config, params)
    return config


def convert_dit(source: pathlib.Path, workdir: pathlib.Path, config: ConfigDict) -> ConfigDict:
    """Writes the published DiT in the file `source` to a new workdir; its sizes are config's."""
    checkpoint.save_params(workdir, config, convert.load("dit", source, config.model))
    return config


def main(argv):
    if len(argv) != 4 or argv[1] not in convert.FORMATS:
        formats = ", ".join(convert.FORMATS)
        raise ValueError(f"say which of {formats}, then SRC and DST, not {argv[1:]}.")
    _, kind, source, workdir = argv
    source, workdir = pathlib.Path(source), pathlib.Path(workdir)
    if kind == "vae":
        config = convert_vae(source, workdir)
    elif kind == "lpips":
        config = convert_lpips(source, workdir)
    elif FLAGS.config is None:
        raise ValueError("the file of a DiT does not tell all its sizes: give --config.")
    else:
        config = convert_dit(source, workdir, FLAGS.config)
    print(f"{workdir}: {json.dumps(config.model.to_dict())}")


if __name__ == "__main__":
    cli.define_config(required=False)
    cli.run(main)
