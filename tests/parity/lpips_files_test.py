"""Import of LPIPS's weights from files that torch writes."""

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from dit_jax import convert, sharding
from dit_jax.convert import lpips, parameters
from dit_jax.workdirs import checkpoint


def test_vgg_and_lin_files_become_a_workdir(tmp_path):
    config = ConfigDict(dict(name="lpips", dtype="float32"))
    shapes = parameters.list_published(lpips.make_table(config))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    vgg = {name: tensor for name, tensor in tensors.items() if name.startswith("features")}
    vgg["classifier.0.weight"] = torch.zeros(10, 10)
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*/vgg\.pth"):
        convert.to_workdir("lpips", tmp_path, tmp_path / "workdir")
    lins = {name: tensor for name, tensor in tensors.items() if name.startswith("lin")}
    torch.save(lins, tmp_path / "vgg.pth")
    convert.to_workdir("lpips", tmp_path, tmp_path / "workdir")
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    _, params = checkpoint.load_model(tmp_path / "workdir", mesh, "float32", "lpips")
    kernel = np.asarray(params["features_5"]["kernel"])
    np.testing.assert_array_equal(kernel, tensors["features.5.weight"].permute(2, 3, 1, 0))
    assert params["lin4"]["kernel"].shape == (512, 1)
