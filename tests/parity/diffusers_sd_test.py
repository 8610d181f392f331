"""A converted Stable Diffusion against diffusers' pipeline, from the same x_T.

Every timestep_spacing of diffusers has a grid of its own in dit_jax, one for DDIM and another for
DPM-Solver. DDIM with set_alpha_to_one=False, as in the files, is ddim_level1; with True it is ddim.
"""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import bpe

from dit_jax import conditions, convert
from dit_jax.diffusion import edits
from dit_jax.sampling import editing, generate, runs

STEPS = 5
PROMPTS = ["the cat's on", "a photo of the cat in the"]
NEGATIVE = "re ing"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


def _text_encoder():
    config = transformers.CLIPTextConfig(
        vocab_size=len(bpe.VOCAB),
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=len(bpe.VOCAB) - 2,
        eos_token_id=len(bpe.VOCAB) - 1,
        pad_token_id=len(bpe.VOCAB) - 1,
    )
    return transformers.CLIPTextModel(config)


def _unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=24,
    )


def _vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
    )


def _perturb(model):
    """Adds noise to the weights, so that every part of the model has a visible effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = 0.5 if "embedding" in name and parameter.ndim == 2 else 0.1
            parameter.add_(deviation * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=PREDICTIONS)
def pipeline(request):
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=request.param,
    )
    reference = diffusers.StableDiffusionPipeline(
        vae=_perturb(_vae()),
        text_encoder=_perturb(_text_encoder()),
        tokenizer=transformers.CLIPTokenizer(bpe.VOCAB, bpe.MERGES, model_max_length=12),
        unet=_perturb(_unet()),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def workdir(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    pipeline.save_pretrained(root / "diffusers")
    config = convert.to_workdir("sd", root / "diffusers", root / "workdir")
    assert config.objective.prediction == PREDICTIONS[pipeline.scheduler.config.prediction_type]
    assert (config.sample.sampler, config.sample.grid) == ("ddim_level1", "leading")
    return root / "workdir"


def _draw_latents():
    return np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)


def _generate(trained, negative):
    request = conditions.build(trained.config).request(PROMPTS, negative)
    edited = editing.EditRequest(request, edits.FromNoise(_draw_latents()))
    sample = trained.make_sample_fn(edits.FromNoise)
    return generate.generate(sample, trained.params, edited, 0, trained.mesh, lambda x_0: x_0)


def _generate_with_diffusers(pipeline):
    latents = pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        latents=torch.from_numpy(np.moveaxis(_draw_latents(), -1, 1).copy()),
        guidance_scale=7.5,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    return np.moveaxis(latents.numpy(), 1, -1)


@pytest.mark.parametrize(
    ("sampler", "grid", "spacing"),
    [
        ("ddim", "leading", "leading"),
        ("ddim_level1", "leading", "leading"),
        ("ddim_level1", "trailing", "trailing"),
        ("ddim", "trailing", "trailing"),
        ("dpmpp2m", "dpm_leading", "leading"),
        ("dpmpp2m", "dpm_linspace", "linspace"),
        ("dpmpp2m", "trailing", "trailing"),
    ],
)
def test_latents_agree_with_diffusers(sampler, grid, spacing, pipeline, workdir):
    settings = dict(sampler=sampler, grid=grid, steps=STEPS, cfg_scale=7.5)
    trained = runs.load(workdir, settings=settings)
    original_scheduler = pipeline.scheduler
    scheduler_class = diffusers.DPMSolverMultistepScheduler
    options = dict(timestep_spacing=spacing)
    if sampler != "dpmpp2m":
        scheduler_class = diffusers.DDIMScheduler
        options["set_alpha_to_one"] = sampler == "ddim"
    pipeline.scheduler = scheduler_class.from_config(original_scheduler.config, **options)
    try:
        expected = _generate_with_diffusers(pipeline)
    finally:
        pipeline.scheduler = original_scheduler
    actual, without_negative = _generate(trained, NEGATIVE), _generate(trained, "")
    largest = np.abs(expected).max()
    error = np.abs(actual - expected).max() / largest
    effect = np.abs(without_negative - expected).max() / largest
    print(f"{sampler}, {grid}: {error:.1e} of the largest value, {largest:.3g}")
    print(f"without the negative prompt: {effect:.1e}")
    assert actual.shape == expected.shape
    assert error < 2e-5
    assert effect > 3e-2  # so the negative prompt is used


def test_images_agree_with_diffusers(pipeline, workdir):
    latents = 0.3 * _draw_latents()
    with torch.no_grad():
        scaled = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()) / 0.3
        decoded = pipeline.vae.decode(scaled).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="pil")
    image = runs.load(workdir).to_image(jnp.asarray(np.resize(latents, (8, 8, 8, 4))))
    actual = np.asarray(image)[:2].astype(int)
    assert actual.shape == (2, 16, 16, 3)
    assert np.std(actual) > 5
    assert np.abs(actual - np.stack([np.asarray(image) for image in expected])).max() <= 1
