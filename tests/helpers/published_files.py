"""Published files of tiny models, and models restored from the workdirs that come from them."""

import json
import re

import jax
import numpy as np
import safetensors.numpy
from conftest import GOLDENS
from helpers import published_configs
from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.convert import inception
from dit_jax.workdirs import checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Published module of a DiT -> diffusers' module: its own one in every block, or one of the model.
DIT_MODULES = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def read_golden(name):
    """Returns published name -> array of a recorded model: 'clip', 'dit', 'unet' or 'vae'."""
    with np.load(GOLDENS / f"{name}_tiny_reference.npz") as file:
        return {n.removeprefix("w/"): file[n] for n in file.files if n.startswith("w/")}


def write(directory, tensors, config, weights=WEIGHTS):
    """Writes weights and config.json as diffusers does, or transformers; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, directory / weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_dit(directory, published):
    """Writes the recorded DiT as diffusers does; returns the directory."""
    tensors = {}
    for name, array in published.items():
        module, _, leaf = name.rpartition(".")
        block = f"transformer_blocks.{name.split('.')[1]}." if name.startswith("blocks.") else ""
        module = re.sub(r"^blocks\.\d+\.", "", module)
        if module == "attn.qkv":
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                tensors[f"{block}attn1.to_{part}.{leaf}"] = rows
        elif module.startswith(("t_embedder", "y_embedder")):  # a copy in each of the blocks
            for i in range(published_configs.DIT["num_layers"]):
                tensors[f"transformer_blocks.{i}.{DIT_MODULES[module]}.{leaf}"] = array
        elif name != "pos_embed":
            tensors[f"{block}{DIT_MODULES[module]}.{leaf}"] = array
    return write(directory, tensors, published_configs.DIT)


def restore(workdir, name, dtype="float32"):
    """Returns (model, parameters) of a workdir, whose model must have this name."""
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    return checkpoint.load_model(workdir, mesh, dtype, name)


def make_inception(model_config):
    """Returns arrays of Inception-2015 with which activations neither fade nor grow."""
    rng, tensors = np.random.default_rng(0), {"fc.bias": np.ones(1008, np.float32)}
    for name, shape in inception.list_published(model_config).items():
        normal = rng.standard_normal(shape, np.float32)
        if name.endswith(("bn.weight", "running_var")):
            tensors[name] = 0.5 + rng.random(shape, np.float32)
        elif name.endswith("conv.weight"):
            tensors[name] = normal * np.float32(2 / np.prod(shape[1:])) ** 0.5
        else:
            tensors[name] = (0.002 if name == "fc.weight" else 0.3) * normal
    return tensors
