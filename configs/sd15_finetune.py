"""Stable Diffusion 1.5, further trained on your own captioned images of 512x512 pixels.

  python -m dit_jax.convert sd SD_DIR runs/sd15
  python -m dit_jax.encode --config configs/sd15_finetune.py --config.data.name=DIR \
      --vae runs/sd15/vae --out runs/mine/moments
  python -m dit_jax.train --config configs/sd15_finetune.py --config.data.name=DIR \
      --config.latents.moments=runs/mine/moments --workdir runs/mine/sd15
  python -m dit_jax.sample --workdir runs/mine/sd15 --prompt "..." --num 4 --out x.png

DIR has train/metadata.jsonl, a line {"file_name": "a.png", "text": "a caption"} for each image, or
several captions in a list, of which --config.data.captions_per_image=N takes N. Images and captions
are encoded once; a record is 64 KiB of moments and 116 KiB for each caption. f32 parameters, their
EMA and Adam's moments are 13.8 GB.

Cost and result: not measured.
"""

from configs import default
from dit_jax.models import unet


def get_config():
    config = default.get_config("unet")
    config.model.update(unet.named("sd15-unet"))
    config.model.update(dtype="bfloat16", remat="full", learn_sigma=False)
    config.init_from = "runs/sd15"
    config.update(total_steps=10_000, batch_size=8, eval_every_steps=0)
    config.update(checkpoint_every_steps=1_000, sample_every_steps=1_000, sample_num_images=4)
    config.optim.update(learning_rate=1e-5, warmup_steps=500, weight_decay=1e-2)
    config.optim.update(grad_clip_norm=1.0, ema_decay=0.999)
    config.data.update(source="folder", name="images", eval_split="", image_size=512, flip=False)
    config.data.caption_feature = "text"
    config.text.update(encoder="runs/sd15/text_encoder", stored=True)
    config.latents.update(moments="runs/mine/moments", vae="runs/sd15/vae")
    config.diffusion.update(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config.sample.update(sampler="dpmpp2m", grid="leading", steps=25, cfg_scale=7.5)
    return config
