"""The autoencoder against a recording from diffusers, its import from files, and its sizes."""

import functools
import json
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS, VAE
from helpers import published_configs
from helpers.close import assert_close
from jax import flatten_util
from ml_collections import ConfigDict

from dit_jax import convert, models, workdirs
from dit_jax.models import vae
from dit_jax.workdirs import checkpoint


@pytest.fixture(scope="module")
def golden():
    """A recorded AutoencoderKL of diffusers: (parameters, inputs and outputs as NHWC), by name."""
    with np.load(GOLDENS / "vae_tiny_reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    published = {n.removeprefix("w/"): a for n, a in arrays.items() if n.startswith("w/")}
    images = {n: np.moveaxis(a, 1, -1) for n, a in arrays.items() if not n.startswith("w/")}
    return published, images


@pytest.fixture
def diffusers_dir(golden, tmp_path):
    """A directory with the files that diffusers writes."""
    safetensors.numpy.save_file(golden[0], tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published_configs.VAE))
    return tmp_path


@pytest.fixture
def config(diffusers_dir):
    return convert.vae.read_config(diffusers_dir)


def _apply(config, params, method, x):
    apply = functools.partial(models.build(config).apply, method=method)
    return jax.jit(apply)({"params": params}, x)


def test_moments_and_decoded_pixels_equal_the_recording(golden, config):
    published, images = golden
    params = convert.load("vae", published, config)
    moments = _apply(config, params, "encode", images["image"])
    decoded = _apply(config, params, "decode", images["z"])
    for actual, name in ((moments, "moments"), (decoded, "decoded")):
        expected = images[name]
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_dtype_and_remat_change_only_rounding(golden, config):
    published, images = golden
    params = convert.load("vae", published, config)

    def loss_and_grads(config):
        def loss(params):
            return jnp.mean(_apply(config, params, None, images["image"]) ** 2)

        jaxpr = str(jax.make_jaxpr(loss)(params))
        # Residual blocks: 2 levels of 1 in the encoder, 2 levels of 2 in the decoder, and 2 in the
        # middle of each.
        recomputed = 2 + 4 + 2 * 2 if config.remat else 0
        assert len(re.findall(r"(remat2?|checkpoint)\[", jaxpr)) == recomputed
        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = loss_and_grads(config)
    config.remat = True
    value_remat, grads_remat = loss_and_grads(config)
    assert_close(value_remat, value, 1e-6)
    # As one array, because the gradients of the keys' biases are 0 but for rounding.
    ravel = flatten_util.ravel_pytree
    assert_close(ravel(grads_remat)[0], ravel(grads)[0], 5e-6)
    config.dtype = "bfloat16"
    moments = _apply(config, params, "encode", images["image"])
    assert moments.dtype == jnp.float32
    assert np.abs(moments - images["moments"]).max() < 0.05 * np.abs(images["moments"]).max()


def test_old_names_of_attention_arrays_are_read_too(golden, config):
    published, _ = golden
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, old in old_names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    renamed = {rename(name): a for name, a in published.items()}
    assert len(renamed.keys() - published.keys()) == 16
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.load("vae", renamed, config),
        convert.load("vae", published, config),
    )


def test_missing_and_unexpected_tensors_are_listed(golden, config):
    published = dict(golden[0])
    published["encoder.mid_block.resnets.7.norm1.weight"] = published.pop("quant_conv.bias")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("vae", published, config)
    assert "missing (1): quant_conv.bias (4,)" in str(error.value)
    assert "unexpected (1): encoder.mid_block.resnets.7.norm1.weight (4,)" in str(error.value)


def test_config_defaults_equal_stable_diffusion_s(config):
    assert (config.scale, config.shift, config.use_quant_conv) == (0.18215, 0.0, True)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"use_post_quant_conv": False},
        {"out_channels": 4},
    ],
)
def test_unsupported_vaes_are_refused(diffusers_dir, change):
    path = diffusers_dir / "config.json"
    path.write_text(json.dumps(published_configs.VAE | change))
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match="of another kind") as error:
        convert.vae.read_config(diffusers_dir)
    assert f"{name}={value!r}; supported: " in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            json.dumps(published_configs.VAE)[:50],
            r"cannot read .*config\.json: it ends too early: .* It must be the config",
        ),
        ("[1]", r"cannot read .*config\.json: "),
        ('{"_class_name": "AutoencoderTiny"}', "the class AutoencoderTiny, but only AutoencoderKL"),
        (
            json.dumps(
                {n: v for n, v in published_configs.VAE.items() if not n.endswith("_types")}
            ),
            "(?s)down_block_types=None; supported: .*up_block_types=None; supported: a list",
        ),
        (
            json.dumps(published_configs.VAE | dict(block_out_channels=128, norm_num_groups=0)),
            "(?s)norm_num_groups=0; supp.*block_out_channels=128; supported: a list",
        ),
        (
            json.dumps(published_configs.VAE | dict(latents_mean=[[0.0]])),
            "(?s)another kind.*latents_mean",
        ),
    ],
)
def test_damaged_or_foreign_configs_are_refused(diffusers_dir, contents, message):
    path = diffusers_dir / "config.json"
    path.write_text(contents)
    with pytest.raises(ValueError, match=message):
        convert.vae.read_config(diffusers_dir)


def test_tensor_with_both_an_old_and_a_new_name_is_refused(golden, config):
    new = "encoder.mid_block.attentions.0.to_q.weight"
    published = dict(golden[0])
    published[new.replace("to_q", "query")] = -published[new]
    with pytest.raises(ValueError, match=f"holds {new} under an old name too"):
        convert.load("vae", published, config)


def test_convert_command_reports_a_damaged_file_without_traceback(
    diffusers_dir, tmp_path, run_command
):
    path = diffusers_dir / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    error = run_command("convert", "vae", diffusers_dir, tmp_path / "vae", fails=True)
    assert error.startswith(f"error: cannot read {path}: SafetensorError: ")
    assert "Traceback" not in error
    assert not (tmp_path / "vae").exists()


def test_converted_workdir_holds_the_parameters_and_the_config(
    diffusers_dir, golden, config, tmp_path, run_command
):
    workdir = tmp_path / "vae"
    out = run_command("convert", "vae", diffusers_dir, workdir)
    assert f"{workdir}: " in out
    loaded = workdirs.load_config(workdir)
    assert loaded.model.to_dict() == config.to_dict() | {"block_channels": [8, 16]}
    shapes = convert.parameters.get_shapes(loaded.model)
    shapes = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
    shapes = flax.traverse_util.unflatten_dict(shapes, sep="/")
    params, step = checkpoint.restore_params(workdir, shapes)
    assert step == 0
    expected = convert.load("vae", golden[0], config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(ValueError, match=r"vae is not empty: choose a new directory"):
        convert.to_workdir("vae", diffusers_dir, workdir)


def test_weights_without_their_config_are_refused(diffusers_dir, tmp_path):
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: it must be .* that diffusers"):
        convert.to_workdir("vae", diffusers_dir, tmp_path / "vae")


def _sizes(**changes):
    return ConfigDict(VAE | dict(image_channels=3, norm_groups=32) | changes)


def test_stable_diffusion_s_sizes_have_its_parameter_count():
    channels = (128, 256, 512, 512)
    config = _sizes(latent_channels=4, block_channels=channels, layers_per_block=2)
    shapes = convert.parameters.get_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863


@pytest.mark.parametrize("levels", [2, 3, 6])
@pytest.mark.parametrize("latent_channels", [4, 32])
def test_shapes_follow_the_number_of_levels_and_latent_channels(levels, latent_channels):
    model = models.build(
        _sizes(
            block_channels=(32,) * levels,
            latent_channels=latent_channels,
            use_quant_conv=False,
            mid_attention=False,
        )
    )
    assert model.factor == 2 ** (levels - 1)
    image = jax.ShapeDtypeStruct((1, 64, 128, 3), jnp.float32)
    params = models.param_shapes(model)
    assert "quant_conv" not in params
    assert "attentions_0" not in params["encoder"]["mid_block"]
    moments = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, method="encode"), params, image
    )
    assert moments.shape == (1, 64 // model.factor, 128 // model.factor, 2 * latent_channels)
    decoded = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, image)
    assert decoded.shape == image.shape


def test_invalid_configs_and_image_shapes_are_refused():
    with pytest.raises(ValueError, match=r"norm_groups=32 must divide .* not \[48\]"):
        models.build(_sizes(block_channels=(32, 48)))
    model = models.build(_sizes(block_channels=(32, 32, 32)))
    params = models.param_shapes(model)
    for shape in ((1, 30, 32, 3), (1, 32, 32, 1)):
        with pytest.raises(ValueError, match=r"multiples of the VAE's factor 4, with 3 channels"):
            jax.eval_shape(
                lambda p, x: model.apply({"params": p}, x, method=vae.AutoencoderKL.encode),
                params,
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
