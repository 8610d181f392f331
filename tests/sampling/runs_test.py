"""What a workdir holds, ready to draw: what goes with it, its requests, what is refused."""

import json
import shutil

import numpy as np
import pytest

from dit_jax import conditions
from dit_jax.data import text
from dit_jax.sampling import generate, runs
from dit_jax.training import programs

REQUEST = conditions.from_labels(np.arange(10), 10)


def test_checkpoints_guide_each_other(workdir):
    """The model of the last step, guided by itself of an earlier one."""
    trained = runs.load(workdir, guide_step=20, settings=dict(cfg_scale=2.0))
    assert (trained.step, trained.guide.step) == (40, 20)
    images = generate.generate(
        trained.make_sample_fn(), trained.params, REQUEST, 0, trained.mesh, trained.to_image
    )
    assert images.shape == (10, 8, 8, 1)


def test_guides_of_another_kind_are_refused(trained_workdir, workdir):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"num_steps": 1000', '"num_steps": 500'))
    with pytest.raises(ValueError, match=r"a model of the same inputs.*\n  diffusion: guide"):
        runs.load(trained_workdir, guide_workdir=workdir)


def test_clipped_samples_lie_where_pixels_do(trained_workdir):
    """With guidance, which leads beyond."""

    def largest(**settings):
        settings = dict(sampler="ddim", steps=4, cfg_scale=4.0) | settings
        trained = runs.load(trained_workdir, settings=settings)
        arguments = trained.params, REQUEST, 0, trained.mesh, lambda x_0: x_0
        return np.abs(generate.generate(trained.make_sample_fn(), *arguments)).max()

    assert largest(clip_x_0=True) <= 1 + 1e-6
    assert largest() > 1.01


def test_latents_are_not_clipped(workdir, smoke_config):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"pixels"', '"moments"'))
    with pytest.raises(ValueError, match=r"clip_x_0=True is of pixels, .*='moments' has no bounds"):
        runs.load(workdir, vae_workdir="vae", settings=dict(clip_x_0=True))
    smoke_config.latents.update(source="moments", moments="m", scale=(1.0,), shift=(0.0,))
    smoke_config.update(sample_every_steps=0)
    smoke_config.sample.clip_x_0 = True
    with pytest.raises(ValueError, match=r"clip_x_0=True is of pixels"):
        programs.make_program(smoke_config)


def test_text_encoders_are_of_models_that_need_one(captioned_workdir, trained_workdir, tmp_path):
    with pytest.raises(ValueError, match=r"a model without a frozen text encoder: leave .*=x"):
        runs.load(captioned_workdir, encoder_workdir="x")
    workdir = tmp_path / "context"
    shutil.copytree(captioned_workdir, workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"tokens"', '"context"'))
    with pytest.raises(
        ValueError, match=r"text encoder: give .* as --text_encoder, with digest not rec"
    ):
        runs.load(workdir)


def test_guides_that_read_other_captions_are_refused(captioned_workdir, tmp_path):
    """By other words, or by another encoder where both are known."""

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


def test_settings_that_do_nothing_are_refused(trained_workdir):
    with pytest.raises(ValueError, match=r"cfg_rescale=0\.5 has no effect with cfg_scale=1"):
        runs.load(trained_workdir, settings=dict(cfg_scale=1.0, cfg_rescale=0.5))


def test_converted_networks_draw_nothing(clip_dir, vae_dir):
    with pytest.raises(ValueError, match="holds a converted 'clip' alone, which draws no images"):
        runs.load(clip_dir)
    with pytest.raises(
        ValueError, match="holds a 'vae', which decodes latents but does not sample"
    ):
        runs.load(vae_dir)


def test_models_of_pixels_take_no_vae(workdir):
    with pytest.raises(ValueError, match="a model without a VAE: leave out --vae=runs/vae"):
        runs.load(workdir, vae_workdir="runs/vae")


def test_models_of_latents_are_refused_without_their_vae(workdir):
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(
        config.replace('"source": "pixels"', '"source": "moments"')
    )
    with pytest.raises(ValueError, match="holds a model with a VAE: give its workdir as --vae, "):
        runs.load(workdir)


def test_negative_prompts_that_nothing_heeds_are_refused(captioned_workdir, trained_workdir):
    flags = dict(num=2, prompt=["a two"], negative_prompt="a red cat")
    request = runs.load(captioned_workdir).request(**flags)  # the run's cfg_scale is 1.5
    assert request.cond.shape == request.null.shape == (2, 20)
    tokenize = text.WordTokenizer(20, 4096)
    np.testing.assert_array_equal(request.null, tokenize(["a red cat"] * 2))
    unguided = runs.load(captioned_workdir, settings=dict(cfg_scale=1.0))
    with pytest.raises(ValueError, match=r"--negative_prompt='a red cat' is what .* cfg_scale=1"):
        unguided.request(**flags)
    assert len(unguided.request(**flags | dict(negative_prompt=""))) == 2
    by_other = runs.load(captioned_workdir, guide_workdir=captioned_workdir)
    with pytest.raises(ValueError, match=r"without a guide; here is --guide=.*captioned"):
        by_other.request(**flags)
    with pytest.raises(ValueError, match=r"^--negative_prompt=a red cat: this model takes"):
        runs.load(trained_workdir).request(2, negative_prompt="a red cat")
