"""A whole Stable Diffusion from diffusers' directory: one workdir that draws images."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from helpers import bpe, published_configs, published_files
from helpers.published_files import WEIGHTS

from configs import default, sd_finetune
from dit_jax import conditions, convert, workdirs
from dit_jax.convert import stable_diffusion
from dit_jax.sampling import generate, requests, runs
from dit_jax.workdirs import checkpoint

ZERO_SNR = dict(rescale_betas_zero_snr=True)
UNET = published_configs.UNET | dict(in_channels=2, out_channels=2, cross_attention_dim=16)
VAE = published_configs.VAE | dict(scaling_factor=0.5, shift_factor=0.1)
CLIP = published_configs.CLIP | {"architectures": ["CLIPTextModel"]}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
JSON_FILES = {
    "model_index.json": INDEX,
    "unet/config.json": UNET,
    "vae/config.json": VAE,
    "text_encoder/config.json": CLIP,
    "scheduler/scheduler_config.json": published_configs.SCHEDULER,
    "tokenizer/tokenizer_config.json": {"pad_token": "!"},
}
SCHEDULER_FILE, INDEX_FILE = "scheduler/scheduler_config.json", "model_index.json"
ABSENT = "absent"


def _make_unet(context_size=16):
    """Returns the recorded UNet with the channels of the VAE's latents and the width of CLIP."""
    tensors = published_files.read_golden("unet")
    for name, array in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensors[name] = np.resize(array, (len(array), 16))[:, :context_size].copy()
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = tensors[name][:2]
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].copy()
    return tensors


@pytest.fixture(scope="module")
def diffusers_dir(tmp_path_factory):
    """A tiny Stable Diffusion as diffusers writes it; shared, so no test may change it."""
    root = tmp_path_factory.mktemp("diffusers") / "sd"
    bpe.write(root / "tokenizer")
    for name, contents in JSON_FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(contents))
    safetensors.numpy.save_file(_make_unet(), root / "unet" / WEIGHTS)
    safetensors.numpy.save_file(published_files.read_golden("vae"), root / "vae" / WEIGHTS)
    safetensors.numpy.save_file(
        published_files.read_golden("clip"), root / "text_encoder" / "model.safetensors"
    )
    return root


@pytest.fixture(scope="module")
def converted(diffusers_dir, tmp_path_factory):
    """The converted workdir; shared, so no test may change it."""
    workdir = tmp_path_factory.mktemp("runs") / "sd"
    convert.to_workdir("sd", diffusers_dir, workdir)
    return workdir


@pytest.fixture
def source(diffusers_dir, tmp_path):
    """A copy of the directory, which a test may change."""
    return shutil.copytree(diffusers_dir, tmp_path / "source")


def _change_fields(source, name, **changes):
    """Writes a JSON file with changed fields; a field that is ABSENT is left out."""
    contents = {
        key: value for key, value in (JSON_FILES[name] | changes).items() if value is not ABSENT
    }
    (source / name).write_text(json.dumps(contents))


def test_config_matches_the_files(converted):
    config = workdirs.load_config(converted)
    assert config.to_dict().keys() == default.get_config().to_dict().keys()
    assert config.diffusion.to_dict() == default.get_config().diffusion.to_dict() | dict(
        schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_steps=100
    )
    assert config.objective.prediction == "eps"
    assert (config.latents.vae, config.text.encoder) == ("vae", "text_encoder")
    assert (config.latents.scale, config.latents.shift) == ([0.5], [0.1])
    assert (config.data.image_size, config.data.image_channels) == (16, 3)  # this VAE halves once
    assert (config.model.condition, config.model.null_condition) == ("context", True)
    sample = {key: config.sample[key] for key in ("sampler", "grid", "steps", "cfg_scale")}
    assert sample == dict(sampler="ddim_level1", grid="leading", steps=50, cfg_scale=7.5)


@pytest.mark.slow
def test_parts_have_the_arrays_of_the_files(converted):
    trained = runs.load(converted)
    for params, name, tensors, config in (
        (trained.params, "unet", _make_unet(), trained.config.model),
        (
            trained.vae.params,
            "vae",
            published_files.read_golden("vae"),
            workdirs.load_config(converted / "vae").model,
        ),
        (
            trained.encoder.params,
            "clip",
            published_files.read_golden("clip"),
            published_configs.CLIP_CONFIG,
        ),
    ):
        jax.tree.map(np.testing.assert_array_equal, params, convert.load(name, tensors, config))
    request = conditions.build(trained.config).request(["the cat's on"])
    np.testing.assert_array_equal(request.null[0], [533, 534] + [0] * 10)  # "!" pads


@pytest.mark.slow
def test_moved_workdir_draws_the_same_images(converted, run_command, tmp_path):
    settings = dict(sampler="dpmpp2m", steps=3, cfg_scale=7.5)
    trained = runs.load(converted, settings=settings)
    sample = trained.make_sample_fn()

    def draw(negative):
        request = conditions.build(trained.config).request(["the cat"], negative)
        arguments = sample, trained.params, request, 0, trained.mesh, trained.to_image
        return generate.generate(*arguments).astype(int)

    expected = draw("a photo")
    assert expected.shape == (1, 16, 16, 3)
    assert np.abs(draw("") - expected).max() > 10
    moved = shutil.copytree(converted, tmp_path / "elsewhere" / "sd")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    request = ["--prompt=the cat", "--negative_prompt=a photo", "--num=1"]
    out = tmp_path / "samples.npz"
    run_command("sample", "--workdir", moved, *flags, *request, "--out", out)
    with np.load(out) as file:  # by a process of its own, compiled as for users
        assert np.abs(file["arr_0"] - expected).max() <= 1


@pytest.mark.parametrize(
    ("version", "reference"),
    [("sd15", "epsilon"), ("sd2-base", "epsilon"), ("sd2", "v_prediction")],
)
def test_finetuning_config_has_the_process_of_the_files(source, version, reference):
    """Otherwise training refuses to start from them. convert_unet_test compares the sizes."""
    _change_fields(source, SCHEDULER_FILE, num_train_timesteps=1000, prediction_type=reference)
    process, prediction, _ = stable_diffusion.read_process(source / SCHEDULER_FILE)
    config = sd_finetune.get_config(version)
    assert config.diffusion.to_dict() == config.diffusion.to_dict() | process
    assert config.objective.prediction == prediction


def test_another_text_encoder_is_refused(converted, tmp_path):
    """Its sizes are the same, so only the digest shows it."""
    assert runs.load(converted).encoder.digest == (
        workdirs.load_config(converted).text.encoder_digest
    )
    workdir = shutil.copytree(converted, tmp_path / "run")
    config = workdirs.load_config(workdir / "text_encoder")
    shutil.rmtree(workdir / "text_encoder" / "checkpoints")
    params = convert.load("clip", published_files.read_golden("clip"), config.model)
    params["final_layer_norm"]["bias"] = params["final_layer_norm"]["bias"] + 1e-3
    checkpoint.save_params(workdir / "text_encoder", config, params)
    with pytest.raises(
        ValueError, match=r"has digest \w{16}, but text.encoder_digest=\w{16} is of"
    ):
        runs.load(workdir)


def test_paths_outside_a_workdir_are_kept(converted, tmp_path):
    workdir = shutil.copytree(converted, tmp_path / "run")
    for part in ("vae", "text_encoder"):
        (workdir / part).rename(tmp_path / part)
    with pytest.raises(FileNotFoundError, match=r"no vae/config.json: vae must be"):
        runs.load(workdir)
    path = workdir / "config.json"
    contents = json.loads(path.read_text())
    contents["latents"]["vae"] = str(tmp_path / "vae")
    contents["text"]["encoder"] = "../text_encoder"
    path.write_text(json.dumps(contents))
    config = runs.load(workdir).config
    assert config.latents.vae == str(tmp_path / "vae")
    assert config.text.encoder == str(workdir / "../text_encoder")


def test_workdir_without_data_refuses_to_draw_captions(converted):
    config = runs.load(converted).config
    with pytest.raises(ValueError, match=r"data.name is empty: this config names no images"):
        requests.draw(config, "random", 2)
    with pytest.raises(ValueError, match=r"data.name is empty"):
        conditions.open_images(config, config.data.train_split)


@pytest.mark.parametrize(
    ("changes", "prediction", "sampler", "grid"),
    [
        ({}, "eps", "ddim_level1", "leading"),
        (dict(prediction_type="v_prediction", **ZERO_SNR), "v", "ddim", "uniform"),
        (
            dict(prediction_type="v_prediction", timestep_spacing="trailing", **ZERO_SNR),
            "v",
            "ddim_level1",
            "trailing",
        ),
        (dict(prediction_type="sample", beta_schedule="linear"), "x_0", "ddim_level1", "leading"),
        (dict(set_alpha_to_one=True), "eps", "ddim", "leading"),
        # PNDM's default is False, DDIM's True.
        (dict(set_alpha_to_one=ABSENT), "eps", "ddim_level1", "leading"),
        (dict(set_alpha_to_one=ABSENT, _class_name="DDIMScheduler"), "eps", "ddim", "leading"),
        (dict(timestep_spacing="trailing"), "eps", "ddim_level1", "trailing"),
        (dict(timestep_spacing="linspace"), "eps", "ddim_level1", "leading"),
    ],
    ids=str,
)
def test_process_and_sampler_of_a_scheduler(source, changes, prediction, sampler, grid):
    _change_fields(source, "scheduler/scheduler_config.json", **changes)
    path = source / "scheduler" / "scheduler_config.json"
    process, predicted, sample = stable_diffusion.read_process(path)
    assert predicted == prediction
    assert process["schedule"] == changes.get("beta_schedule", "scaled_linear")
    assert process["zero_terminal_snr"] == (changes.keys() >= ZERO_SNR.keys())
    assert sample == dict(sampler=sampler, grid=grid)


def test_config_has_the_process_of_the_scheduler(source, tmp_path):
    changes = dict(prediction_type="v_prediction", timestep_spacing="trailing", **ZERO_SNR)
    _change_fields(source, "scheduler/scheduler_config.json", **changes)
    config = convert.to_workdir("sd", source, tmp_path / "ours")
    assert config.objective.prediction == "v"
    assert config.diffusion.zero_terminal_snr
    assert (config.sample.sampler, config.sample.grid) == ("ddim_level1", "trailing")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            INDEX_FILE,
            dict(_class_name="StableDiffusionXLPipeline"),
            "the class StableDiffusionXLPipeline, but only StableDiffusionPipeline, .*Legacy can",
        ),
        (
            INDEX_FILE,
            dict(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
            r"text_encoder_2=.*CLIPTextModelWithProjection'\]; supported: no such part",
        ),
        (
            INDEX_FILE,
            dict(vae=ABSENT, scheduler=[None, None]),
            r"(?s)vae=None; supp.*scheduler=\[None, None\]; supported: a part",
        ),
        (
            SCHEDULER_FILE,
            dict(_class_name="FlowMatchEulerDiscreteScheduler"),
            "_class_name='FlowMatchEulerDiscreteScheduler'; supported: DDIMScheduler, DDPM",
        ),
        (
            SCHEDULER_FILE,
            dict(beta_schedule="laplace"),
            "beta_schedule='laplace'; supported: linear, scaled_linear, squaredcos_cap_v2",
        ),
        (SCHEDULER_FILE, dict(beta_schedule=ABSENT), "beta_schedule=None; supported: linear"),
        (
            SCHEDULER_FILE,
            dict(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction'; supported: epsilon, v_prediction, sample",
        ),
        (
            SCHEDULER_FILE,
            dict(num_train_timesteps=1),
            "num_train_timesteps=1; supported: a whole number above 1",
        ),
        (SCHEDULER_FILE, dict(beta_start=0), "beta_start=0; supported: a number between 0 and 1"),
        (SCHEDULER_FILE, dict(beta_end=1e-4), "beta_end=0.0001; supported: .* beta_start=0.00085"),
        (SCHEDULER_FILE, dict(trained_betas=[0.1]), r"trained_betas=\[0.1\]; supported: None"),
        (SCHEDULER_FILE, dict(set_alpha_to_one="no"), "set_alpha_to_one='no'; supported: True, Fa"),
        (SCHEDULER_FILE, dict(timestep_spacing="even"), "'even'; supported: leading, linspace, tr"),
        (SCHEDULER_FILE, dict(use_flow_sigmas=True), "use_flow_sigmas=True; supported: False"),
        (
            SCHEDULER_FILE,
            dict(rescale_betas_zero_snr=True),
            "rescale_betas_zero_snr=True; supported: False, with prediction_type='epsilon'",
        ),
        (
            SCHEDULER_FILE,
            dict(rescale_betas_zero_snr="no"),
            "rescale_betas_zero_snr='no'; supported: True, False",
        ),
        (
            "unet/config.json",
            dict(cross_attention_dim=12),
            "unet has cross_attention_dim=12 .*, but text_encoder has hidden_size=16",
        ),
        (
            "vae/config.json",
            dict(latent_channels=4),
            "unet has .* in_channels=2, but .* vae has latent_channels=4",
        ),
        ("unet/config.json", dict(in_channels=9), "in_channels=9; supported: out_channels, witho"),
        ("vae/config.json", dict(layers_per_block=2), "does not fit the model"),
        ("text_encoder/config.json", dict(num_hidden_layers=2), r"unexpected \(16\): encoder.lay"),
        ("tokenizer/tokenizer_config.json", dict(pad_token="none"), "not CLIP's: it has no none"),
    ],
    ids=str,
)
def test_unsupported_fields_are_refused_before_anything_is_written(
    source, tmp_path, name, changes, message
):
    if name == "unet/config.json" and "cross_attention_dim" in changes:
        safetensors.numpy.save_file(
            _make_unet(context_size=12),
            source / "unet" / WEIGHTS,
        )
    _change_fields(source, name, **changes)
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("sd", source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            INDEX_FILE,
            "no .*model_index.json: it must be the list of parts .* diffusers wrote, with unet",
        ),
        (SCHEDULER_FILE, "no .*scheduler_config.json: it must be the scheduler's config that diff"),
        (f"unet/{WEIGHTS}", f"no {WEIGHTS} or diffusion_pytorch_model.bin in .*unet, where"),
        (f"vae/{WEIGHTS}", f"no {WEIGHTS} or diffusion_pytorch_model.bin in .*vae, where"),
        ("text_encoder/model.safetensors", "no model.safetensors or pytorch_model.bin in"),
        ("tokenizer/merges.txt", "no vocab.json with merges.txt"),
    ],
)
def test_missing_files_are_named_before_anything_is_written(source, tmp_path, name, message):
    (source / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert.to_workdir("sd", source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("num_written", [0, 1, 2])
def test_interrupted_conversion_leaves_nothing(diffusers_dir, tmp_path, monkeypatch, num_written):
    """The conversion is interrupted after one, two or none of its three workdirs."""
    save, saved = checkpoint.save_params, []

    def stop(workdir, *arguments):
        if len(saved) == num_written:
            raise KeyboardInterrupt
        saved.append(workdir)
        save(workdir, *arguments)

    monkeypatch.setattr(checkpoint, "save_params", stop)
    with pytest.raises(KeyboardInterrupt):
        convert.to_workdir("sd", diffusers_dir, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("num_written", [1, 2, 3])
def test_killed_conversion_can_be_repeated(
    diffusers_dir, converted, tmp_path, run_command, num_written
):
    """The conversion gets SIGKILL after one, two or three of its workdirs."""
    target = tmp_path / "ours"
    code = f"""
import os, pathlib, signal
from dit_jax import convert
from dit_jax.workdirs import checkpoint
save, saved = checkpoint.save_params, []
def stop(workdir, *arguments):
    save(workdir, *arguments)
    saved.append(workdir)
    if len(saved) == {num_written}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_params = stop
convert.to_workdir("sd", pathlib.Path({str(diffusers_dir)!r}), pathlib.Path({str(target)!r}))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".ours.partial"]
    run_command("convert", "sd", diffusers_dir, target)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    for part in ("", "vae", "text_encoder"):
        names = [
            {path.name for path in (workdir / part).iterdir()} for workdir in (target, converted)
        ]
        assert names[0] == names[1]
    jax.tree.map(
        np.testing.assert_array_equal, runs.load(target).params, runs.load(converted).params
    )


@pytest.mark.slow
def test_command(diffusers_dir, tmp_path, run_command):
    out = run_command("convert", "sd", diffusers_dir, tmp_path / "ours")
    assert out.startswith(f"{tmp_path / 'ours'}: " + '{"attention": "auto"')
    error = run_command("convert", "sd", diffusers_dir, tmp_path / "ours", fails=True)
    assert "ours is not empty" in error
