"""ADM's UNets from their published files, against a forward pass in NumPy."""

import jax
import numpy as np
import pytest
from helpers import published_files
from helpers.adm_reference import CLASSES, GROUPS, HEAD_DIM, Published
from ml_collections import ConfigDict

from configs import adm as adm_config
from configs import default
from dit_jax import conditions, convert, models
from dit_jax.convert import adm, parameters
from dit_jax.models import unet_presets
from dit_jax.sampling import generate, runs

ADM = dict(
    name="unet",
    input_size=8,
    in_channels=3,
    base_channels=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_levels=(1,),
    transformer_depth=0,
    num_heads=0,
    head_dim=HEAD_DIM,
    context_size=0,
    time_scale_shift=True,
    resample="resnet",
    norm_groups=GROUPS,
    norm_epsilon=1e-5,
    dropout=0.0,
    condition="label",
    num_classes=CLASSES,
    null_condition=False,
    **unet_presets.UNUSED_TEXT_FIELDS,
    learn_sigma=True,
)
RUNTIME = dict(dtype="float32", attention="auto", remat="none")


def _inputs():
    rng = np.random.default_rng(1)
    x_t = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    return x_t, np.array([0.0, 250.0, 999.0], np.float32), np.array([0, 4, 2], np.int32)


def _make_reference(new_attention_order, **changes):
    """Returns (published model with its arrays in model.weights, its output [B, h, w, C])."""
    model = Published(ADM | changes, new_attention_order)
    x_t, t, y = _inputs()
    return model, np.moveaxis(model(np.moveaxis(x_t, -1, 1).astype(np.float64), t, y), 1, -1)


@pytest.mark.parametrize(
    ("new_attention_order", "changes"),
    [
        pytest.param(False, {}, id="published"),
        pytest.param(
            *(True, dict(resample="conv", time_scale_shift=False)),
            marks=pytest.mark.slow,
            id="other-options",
        ),
    ],
)
def test_output_is_the_published_model_s(new_attention_order, changes, tmp_path):
    reference, expected = _make_reference(new_attention_order, **changes)
    np.savez(tmp_path / "adm.npz", **reference.weights)
    config = default.get_config()
    with config.unlocked():
        config.model = ConfigDict(ADM | RUNTIME | changes)
    options = dict(config=config, new_attention_order=new_attention_order)
    convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours", **options)
    model, params = published_files.restore(tmp_path / "ours", "unet")
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    out = apply(params, *_inputs())
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    wrong_order = adm.to_params(reference.weights, config.model, not new_attention_order)
    assert np.abs(apply(wrong_order, *_inputs()) - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.fixture
def tiny_presets(monkeypatch):
    """Presets of two published models, which differ in the order of q, k, v and in size."""
    monkeypatch.setattr(
        unet_presets, "PRESETS", {"old": dict(ADM, num_classes=9), "new": ADM, "other": dict(ADM)}
    )
    for fields in unet_presets.PRESETS.values():
        fields.pop("name", None)
    orders = {
        "old": dict(schedule="linear", new_attention_order=False),
        "new": dict(schedule="cosine", new_attention_order=True),
    }
    monkeypatch.setattr(adm, "CHECKPOINTS", orders)


def test_published_adm_needs_no_config(tiny_presets, tmp_path):
    reference, _ = _make_reference(True)
    np.savez(tmp_path / "adm.npz", **reference.weights)
    config = convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours")
    assert config.diffusion.schedule == "cosine"
    assert (config.latents.source, config.data.image_size) == ("pixels", 8)
    _, params = published_files.restore(tmp_path / "ours", "unet")
    jax.tree.map(
        np.testing.assert_array_equal, params, adm.to_params(reference.weights, config.model, True)
    )
    reference.weights["middle_block.3.bias"] = reference.weights.pop("out.2.bias")
    with pytest.raises(ValueError, match=r"match none of old, new\. Give a --config"):
        adm.match_preset(reference.weights)
    with pytest.raises(ValueError, match=r"missing \(1\): out.2.bias") as error:
        adm.to_params(reference.weights, config.model)
    assert "unexpected (1): middle_block.3.bias (6,)" in str(error.value)


@pytest.mark.slow
def test_converted_adm_draws_images(tiny_presets, tmp_path):
    np.savez(tmp_path / "adm.npz", **_make_reference(True)[0].weights)
    convert.to_workdir("adm", tmp_path / "adm.npz", tmp_path / "ours")
    trained = runs.load(tmp_path / "ours", settings=dict(steps=2))
    sample = trained.make_sample_fn()
    images, other_images = (
        generate.generate(sample, trained.params, request, 0, trained.mesh, trained.to_image)
        for request in (conditions.from_labels(labels, CLASSES) for labels in ([0, 4], [2, 4]))
    )
    assert images.shape == (2, 8, 8, 3)
    assert np.any(images[0] != other_images[0])
    np.testing.assert_array_equal(images[1], other_images[1])


def test_configs_of_other_models_are_refused(tmp_path):
    fields = ADM | RUNTIME | dict(transformer_depth=1, context_size=8)
    with pytest.raises(ValueError, match=r"transformer_depth=1: .* `convert unet`"):
        adm.make_table(ConfigDict(fields))
    np.savez(tmp_path / "adm.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"--config has model\.name='dit', but ADM is a 'unet'"):
        convert.to_workdir(
            "adm", tmp_path / "adm.npz", tmp_path / "ours", config=default.get_config()
        )


@pytest.mark.slow
def test_orders_and_schedules_of_the_published_models():
    """The values are those of guided-diffusion's commands; the larger model has the older order."""
    assert adm.CHECKPOINTS.keys() == {
        name for name in unet_presets.PRESETS if name.startswith("adm-")
    }
    orders = {name: entry["new_attention_order"] for name, entry in adm.CHECKPOINTS.items()}
    assert orders == {"adm-imagenet64": True, "adm-imagenet256": False}
    schedules = {name: entry["schedule"] for name, entry in adm.CHECKPOINTS.items()}
    assert schedules == {"adm-imagenet64": "cosine", "adm-imagenet256": "linear"}
    for name, schedule in schedules.items():
        config = adm_config.get_config(name.removeprefix("adm-"))
        assert config.diffusion.schedule == schedule
        assert config.sample.clip_x_0
    for name in adm.CHECKPOINTS:
        shapes = parameters.list_published(adm.make_table(adm.get_model_config(name)))
        tensors = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
        assert adm.match_preset(tensors) == name
    assert models.build(adm.get_model_config("adm-imagenet64")).input_size == 64


def test_new_attention_order_needs_a_config(run_command):
    error = run_command("convert", "adm", "a.pt", "b", "--new_attention_order", fails=True)
    assert "--new_attention_order needs --config" in error
