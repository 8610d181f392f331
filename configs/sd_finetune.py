"""Stable Diffusion, fine-tuned on your own captioned images.

  python -m dit_jax.convert sd SD_DIR runs/sd15
  python -m dit_jax.encode --config configs/sd_finetune.py:sd15 --config.data.name=DIR \
      --vae runs/sd15/vae --out runs/mine/moments
  python -m dit_jax.train --config configs/sd_finetune.py:sd15 --config.data.name=DIR \
      --config.latents.moments=runs/mine/moments --workdir runs/mine/sd15
  python -m dit_jax.sample --workdir runs/mine/sd15 --prompt "..." --num 4 --out x.png

Names: sd15 for versions 1.1 to 1.5, 512 px; sd2-base for 2.0-base and 2.1-base, 512 px; sd2 for
2.0 and 2.1, 768 px, which predict v. The converted workdir is runs/NAME.

DIR has train/metadata.jsonl with a line {"file_name": "a.png", "text": "a caption"} for each image.
"text" may be a list of captions; --config.data.captions_per_image=N uses the first N.
Images and captions are encoded once. For sd15 a record takes 64 KiB of moments and 116 KiB for each
caption. The f32 parameters of sd15, their EMA and Adam's moments take 13.8 GB.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import unet_presets

# (preset of the UNet, pixels of an image's side, prediction)
VERSIONS = {
    "sd15": ("sd15-unet", 512, "eps"),
    "sd2-base": ("sd2-unet", 512, "eps"),
    "sd2": ("sd2-unet", 768, "v"),
}


def get_config(name: str = "sd15"):
    """Returns the config of one version.

    Args: name, one of VERSIONS.
    Raises: ValueError for another name.
    """
    if name not in VERSIONS:
        raise ValueError(f"unknown version {name!r}; choose {', '.join(VERSIONS)}.")
    preset, size, prediction = VERSIONS[name]
    config = default.get_config("unet")
    config.model.update(unet_presets.get(preset) | dict(input_size=size // 8))  # the VAE's factor
    config.model.update(dtype="bfloat16", remat="full", learn_sigma=False)
    config.init_from = f"runs/{name}"
    config.update(total_steps=10_000, batch_size=8, eval_every_steps=0)
    config.update(checkpoint_every_steps=1_000, sample_every_steps=1_000, sample_num_images=4)
    config.optim.update(learning_rate=1e-5, warmup_steps=500, weight_decay=1e-2)
    config.optim.update(grad_clip_norm=1.0, ema_decay=0.999)
    config.data.update(source="folder", name="images", eval_split="", image_size=size, flip=False)
    config.data.caption_feature = "text"
    # `dit_jax.encode` stores the outputs of the text encoder, so that no step computes them.
    config.text.update(encoder=f"runs/{name}/text_encoder", stored=True)
    config.latents.update(moments="runs/mine/moments", vae=f"runs/{name}/vae")
    # The schedule with which the published weights were trained.
    config.diffusion.update(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config.objective.prediction = prediction
    config.sample.update(sampler="dpmpp2m", grid="leading", steps=25, cfg_scale=7.5)
    return config
