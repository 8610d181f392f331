"""Inception-2015 against torch-fidelity's, with random weights in a file that torch writes."""

from unittest import mock

import fidelity
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from ml_collections import ConfigDict

from dit_jax import convert, sharding
from dit_jax.models import inception
from dit_jax.workdirs import checkpoint

Extractor = fidelity.import_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
tensorflow1 = fidelity.import_module("interpolate_compat_tensorflow")
FILE = "weights-inception-2015-12-05-6726825d.pth"
CONFIG = ConfigDict(dict(name="inception", dtype="float32"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights' file, with values for which activations neither fade nor grow."""
    path = tmp_path_factory.mktemp("inception") / FILE
    torch.save({}, path)
    with mock.patch.object(Extractor, "load_state_dict"):
        shapes = {name: t.shape for name, t in Extractor("", ["2048"], path).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        normal, uniform = (f(shape, generator=generator) for f in (torch.randn, torch.rand))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.startswith("fc."):
            state[name] = 0.05 * normal / shape[-1] ** 0.5
        elif name.endswith("conv.weight"):
            state[name] = normal * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.5 + uniform
        else:
            state[name] = 0.3 * normal
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extract_with_torch(weights):
    """extract(image [B, H, W, 3] uint8) -> torch-fidelity's outputs, by dit_jax's names."""
    extractor = Extractor("inception", ["2048", "logits_unbiased"], str(weights))
    spatial = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[-1]))

    def extract(image):
        spatial.clear()
        with torch.inference_mode():
            features, logits = extractor(torch.from_numpy(image).movedim(-1, 1))
        return {
            "features": features.numpy(),
            "spatial": spatial[0][:, :7].movedim(1, -1).flatten(1).numpy(),
            "probabilities": logits.softmax(-1).numpy(),
        }

    return extract


@pytest.fixture(scope="module")
def extract(weights, tmp_path_factory):
    """extract(image) -> the outputs of dit_jax's model, imported from the same file."""
    workdir = tmp_path_factory.mktemp("runs") / "inception"
    convert.to_workdir("inception", weights, workdir)
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    model, params = checkpoint.load_model(workdir, mesh, "float32", "inception")
    return jax.jit(lambda image: model.apply({"params": params}, image))


def _draw_images(size, num=2):
    """Draws uint8 images of smooth coloured waves with a little noise."""
    rng = np.random.default_rng(size)
    position = np.arange(size) / size
    image = 128 + 20 * rng.standard_normal((num, size, size, 3))
    for _ in range(6):
        amplitude, phase = 20 * rng.standard_normal((2, num, 1, 1, 3))
        across, down = rng.uniform(-8, 8, (2, num, 1, 1, 1))
        wave = across * position.reshape(1, 1, -1, 1) + down * position.reshape(1, -1, 1, 1)
        image += amplitude * np.cos(2 * np.pi * wave + phase)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 256, 299])
def test_outputs_agree_with_torch_fidelity(extract, extract_with_torch, size):
    image = _draw_images(size)
    expected, actual = extract_with_torch(image), extract(image)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        error = np.abs(actual[name] - array).max() / np.abs(array).max()
        contrast = np.abs(array[0] - array[1]).max() / np.abs(array).max()
        print(
            f"{name} at {size} px: error {error:.2g}, between images {contrast:.2g} of the largest"
        )
        assert actual[name].shape == array.shape
        assert error < 2e-5
        assert contrast > 0.01  # so the outputs depend on the image
    assert 2 / 1008 < expected["probabilities"].max() < 0.5  # neither uniform nor one class


@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (299, 299), (512, 512), (201, 333)])
def test_resize_agrees_with_tensorflow_s(shape):
    x = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.float32)
    expected = tensorflow1.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(x).movedim(-1, 1), size=(299, 299), align_corners=False
    )
    actual = jax.jit(lambda x: inception.resize_bilinear_tf1(x, 299))(x)
    error = np.abs(actual - expected.movedim(1, -1).numpy()).max() / 255
    print(f"{shape}: {error:.2g} of the range")
    assert error < 1e-5


def test_safetensors_give_the_same_parameters(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    arrays = {name: tensor.numpy() for name, tensor in state.items() if "num_batches" not in name}
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    params = convert.load("inception", tmp_path / "weights.safetensors", CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, convert.load("inception", weights, CONFIG))
