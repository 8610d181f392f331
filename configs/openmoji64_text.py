"""Text to 64x64 emoji in latents, with a DiT or a UNet, on one GPU.

  python -m dit_jax.encode --config configs/openmoji64_text.py --vae runs/openmoji64/vae \
      --out runs/openmoji64/captioned
  python -m dit_jax.train --config configs/openmoji64_text.py:DiT-S/2 --workdir runs/openmoji64/text
  python -m dit_jax.train --config configs/openmoji64_text.py:unet --workdir runs/openmoji64/unet

The VAE is configs/vae_openmoji64.py. The captions are stored with the moments. A small text
encoder of words is trained with the model.
Multiply-adds of a forward pass: 1.72 G (DiT-S/2), 1.70 G (UNet).

Cost and result: not measured.
"""

from configs import default, openmoji64


def get_config(name: str = "DiT-S/2"):
    """Returns the config of one network.   Args: name, 'unet' or a DiT of the paper."""
    dit = openmoji64.get_config("DiT-S/2,flow" if name == "unet" else f"{name},flow")
    if name == "unet":
        # All keys but the model are shared, so that the two networks can be compared.
        config = default.get_config("unet", process="flow")
        config.update({key: value for key, value in dit.to_dict().items() if key != "model"})
        config.model.update(input_size=16, dtype="bfloat16", base_channels=128)
        config.model.update(channel_mult=(1, 1.5, 2), attention_levels=(1, 2), transformer_depth=1)
        config.model.head_dim = 32
    else:
        config = dit
    config.model.update(condition="tokens", context_size=384, text_length=12, text_num_heads=6)
    config.data.caption_feature = "caption"
    config.latents.moments = "runs/openmoji64/captioned"
    return config
