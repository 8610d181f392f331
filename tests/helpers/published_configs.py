"""Configs of tiny models as diffusers and transformers write them, and one of dit_jax."""

from ml_collections import ConfigDict

# transformers' config.json for the recorded model.
CLIP = dict(
    hidden_act="quick_gelu",
    hidden_size=16,
    intermediate_size=48,
    layer_norm_eps=1e-5,
    max_position_embeddings=12,
    num_attention_heads=2,
    num_hidden_layers=3,
    vocab_size=535,
)

# The same in dit_jax.
CLIP_CONFIG = ConfigDict(
    dict(
        name="clip",
        vocab_size=535,
        length=12,
        hidden_size=16,
        depth=3,
        num_heads=2,
        mlp_size=48,
        activation="quick_gelu",
        dtype="float32",
    )
).lock()

VAE = {
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.38.0",
    "attention_head_dim": 2,
    "block_out_channels": [4, 8],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}

DIT = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.38.0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 12,
    "in_channels": 4,
    "num_attention_heads": 4,
    "num_embeds_ada_norm": 7,
    "num_layers": 3,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
}

# Stable Diffusion 1.5's, but with 100 steps.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 100,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
