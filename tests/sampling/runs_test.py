"""Loading a trained model: its guide, VAE and text encoder, its requests, and refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dit_jax import conditions
from dit_jax.data import text
from dit_jax.sampling import runs
from dit_jax.training import programs

REQUEST = conditions.from_labels(np.arange(10), 10)


def test_earlier_checkpoint_guides_a_later_one(workdir):
    trained = runs.load(workdir, guide_step=20, settings=dict(cfg_scale=2.0))
    assert (trained.step, trained.guide.step) == (40, 20)
    assert trained.generate(REQUEST, seed=0).shape == (10, 8, 8, 1)


def test_guides_with_another_process_are_refused(trained_workdir, workdir):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"num_steps": 1000', '"num_steps": 500'))
    with pytest.raises(ValueError, match=r"a model of the same inputs.*\n  diffusion: guide"):
        runs.load(trained_workdir, guide_workdir=workdir)


def test_clipped_samples_are_in_the_range_of_pixels(trained_workdir):
    """Guidance leads beyond this range."""

    def compute_largest(**settings):
        settings = dict(sampler="ddim", steps=4, cfg_scale=4.0) | settings
        trained = runs.load(trained_workdir, settings=settings)
        trained = dataclasses.replace(trained, to_image=lambda x_0: x_0)
        return np.abs(trained.generate(REQUEST, seed=0)).max()

    assert compute_largest(clip_x_0=True) <= 1 + 1e-6
    assert compute_largest() > 1.01


def test_clipping_latents_is_refused(workdir, smoke_config):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"pixels"', '"moments"'))
    with pytest.raises(ValueError, match=r"clip_x_0=True clips x_0 to .*='moments' has no bounds"):
        runs.load(workdir, vae_workdir="vae", settings=dict(clip_x_0=True))
    smoke_config.latents.update(source="moments", moments="m", scale=(1.0,), shift=(0.0,))
    smoke_config.update(sample_every_steps=0)
    smoke_config.sample.clip_x_0 = True
    with pytest.raises(ValueError, match=r"clip_x_0=True clips x_0 to"):
        programs.make_program(smoke_config)


def test_text_encoder_is_refused_or_needed(captioned_workdir, trained_workdir, tmp_path):
    with pytest.raises(ValueError, match=r"a model without a frozen text encoder. Leave .*=x"):
        runs.load(captioned_workdir, encoder_workdir="x")
    workdir = tmp_path / "context"
    shutil.copytree(captioned_workdir, workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"tokens"', '"context"'))
    with pytest.raises(
        ValueError, match=r"text encoder with digest not recorded. Set --text_encoder to"
    ):
        runs.load(workdir)


def test_guides_with_other_captions_are_refused(captioned_workdir, tmp_path):
    """Captions differ in their length, or in the digest of their encoder if both are known."""

    def copy(name, text_length=20, digest=""):
        shutil.copytree(captioned_workdir, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["model"]["text_length"] = text_length
        config["text"]["encoder_digest"] = digest
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    with pytest.raises(ValueError, match=r"model.text_length: guide 19, model 20"):
        runs.load(captioned_workdir, guide_workdir=copy("longer", text_length=19))
    guide = copy("guide", digest="0123")
    runs.load(captioned_workdir, guide_workdir=guide)
    with pytest.raises(ValueError, match=r"text.encoder_digest: guide '0123', model '4567'"):
        runs.load(copy("other", digest="4567"), guide_workdir=guide)


def test_settings_without_effect_are_refused(trained_workdir):
    with pytest.raises(ValueError, match=r"cfg_rescale=0\.5 has no effect with cfg_scale=1"):
        runs.load(trained_workdir, settings=dict(cfg_scale=1.0, cfg_rescale=0.5))


def test_converted_networks_that_draw_no_images_are_refused(clip_dir, vae_dir):
    with pytest.raises(ValueError, match="holds a converted 'clip' alone, which draws no images"):
        runs.load(clip_dir)
    with pytest.raises(
        ValueError, match="holds a 'vae', which decodes latents but does not sample"
    ):
        runs.load(vae_dir)


def test_vae_is_refused_for_models_of_pixels(workdir):
    with pytest.raises(ValueError, match=r"a model without a VAE. Leave out --vae=runs/vae"):
        runs.load(workdir, vae_workdir="runs/vae")


def test_models_of_latents_without_a_vae_are_refused(workdir):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(
        config.replace('"source": "pixels"', '"source": "moments"')
    )
    with pytest.raises(
        ValueError, match=r"holds a model that needs a VAE with digest .*Set --vae to its workdir"
    ):
        runs.load(workdir)


def test_negative_prompts_without_effect_are_refused(captioned_workdir, trained_workdir):
    flags = dict(num=2, prompt=["a two"], negative_prompt="a red cat")
    request = runs.load(captioned_workdir).make_request(**flags)  # the run's cfg_scale is 1.5
    assert request.cond.shape == request.null.shape == (2, 20)
    tokenize = text.WordTokenizer(20, 4096)
    np.testing.assert_array_equal(request.null, tokenize(["a red cat"] * 2))
    unguided = runs.load(captioned_workdir, settings=dict(cfg_scale=1.0))
    with pytest.raises(
        ValueError, match=r"--negative_prompt='a red cat' has no effect with cfg_scale=1"
    ):
        unguided.make_request(**flags)
    assert len(unguided.make_request(**flags | dict(negative_prompt=""))) == 2
    guided = runs.load(captioned_workdir, guide_workdir=captioned_workdir)
    with pytest.raises(ValueError, match=r"has no effect with --guide=.*captioned"):
        guided.make_request(**flags)
    with pytest.raises(ValueError, match=r"^--negative_prompt=a red cat: this model takes"):
        runs.load(trained_workdir).make_request(2, negative_prompt="a red cat")
