"""A table of the mesh axes that shard the axes of each parameter."""

import jax

# The end of a parameter's path -> a mesh axis, several or None for each of its axes. L is depth,
# D hidden size, H heads, M = mlp_ratio D, P = p * p * channels for patches of p * p pixels.
# The DiT's rows cover all four blocks; none of them has all of these parameters. First the kernels
# whose number of inputs grows with D: with muP, wider models have lower learning rates for them.
DIT_GROWING_KERNELS = {
    "t_embedder/mlp_2/kernel": (None, "fsdp"),  # [D, D]
    "blocks/adaLN_modulation/kernel": (None, "fsdp", None, "tensor"),  # [L, D, 6 or 4, D]
    "blocks/attn/qkv/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 3, H, D/H]
    "blocks/attn/proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "blocks/cross_attn/q/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 1, H, D/H]
    "blocks/cross_attn/kv/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 2, H, D/H]
    "blocks/cross_attn/proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "blocks/mlp/fc1/kernel": (None, "fsdp", "tensor"),  # [L, D, M]
    "blocks/mlp/fc2/kernel": (None, "tensor", "fsdp"),  # [L, M, D]
    "final_layer/adaLN_modulation/kernel": ("fsdp", None, "tensor"),  # [D, 2, D]
    "final_layer/linear/kernel": ("fsdp", None),  # [D, P or 2P]
}
# A trained text encoder has in-context blocks of width C, so the inputs of its kernels do not grow.
TEXT_ENCODER_KERNELS = {
    f"text_encoder/{name}": axes
    for name, axes in DIT_GROWING_KERNELS.items()
    if name.startswith(("blocks/attn/", "blocks/mlp/"))
}
# The inputs of these kernels are the pixels of a patch, the sinusoids of the time, or of width C.
DIT_OTHERS = {
    "x_embedder/kernel": (None, "fsdp"),  # [P, D]
    "x_embedder/bias": ("fsdp",),  # [D]
    "t_embedder/mlp_0/kernel": (None, "fsdp"),  # [256, D]
    "t_embedder/mlp_0/bias": ("fsdp",),  # [D]
    "t_embedder/mlp_2/bias": ("fsdp",),  # [D]
    "y_embedder/embedding": (None, "fsdp"),  # [classes + 1, D]
    "context_embedder/kernel": (None, "fsdp"),  # [C, D], C context_size
    "context_embedder/bias": ("fsdp",),  # [D]
    "pooled_embedder/kernel": (None, "fsdp"),  # [C, D]
    "pooled_embedder/bias": ("fsdp",),  # [D]
    "text_encoder/token_embedding/embedding": (None, "fsdp"),  # [vocabulary, C]
    "text_encoder/position_embedding": (None, "fsdp"),  # [tokens, C]
    "text_encoder/final_norm/scale": ("fsdp",),  # [C]
    "text_encoder/final_norm/bias": ("fsdp",),  # [C]
    "blocks/adaLN_modulation/bias": (None, None, ("tensor", "fsdp")),  # [L, 6 or 4, D]
    "blocks/norm1/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm1/bias": (None, "fsdp"),  # [L, D]
    "blocks/attn/qkv/bias": (None, None, "tensor", "fsdp"),  # [L, 3, H, D/H]
    "blocks/attn/proj/bias": (None, "fsdp"),  # [L, D]
    "blocks/norm_cross/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm_cross/bias": (None, "fsdp"),  # [L, D]
    "blocks/cross_attn/q/bias": (None, None, "tensor", "fsdp"),  # [L, 1, H, D/H]
    "blocks/cross_attn/kv/bias": (None, None, "tensor", "fsdp"),  # [L, 2, H, D/H]
    "blocks/cross_attn/proj/bias": (None, "fsdp"),  # [L, D]
    "blocks/norm2/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm2/bias": (None, "fsdp"),  # [L, D]
    "blocks/mlp/fc1/bias": (None, ("tensor", "fsdp")),  # [L, M]
    "blocks/mlp/fc2/bias": (None, "fsdp"),  # [L, D]
    "final_layer/adaLN_modulation/bias": (None, ("tensor", "fsdp")),  # [2, D]
    "final_layer/norm/scale": ("fsdp",),  # [D]
    "final_layer/norm/bias": ("fsdp",),  # [D]
    "final_layer/linear/bias": (None,),  # [P or 2P]
}
DIT_AXES = TEXT_ENCODER_KERNELS | DIT_GROWING_KERNELS | DIT_OTHERS


def _spread(table: dict) -> dict:
    """Returns {'name/leaf': axes} of a table {'name name ...': {leaf: axes}}."""
    return {
        f"{name}/{leaf}": axes
        for names, leaves in table.items()
        for name in names.split()
        for leaf, axes in leaves.items()
    }


# Kernels are convolutions [h, w, in, out] or Linears [in, out]; scales are of norms.
VAE_AXES = _spread(
    {
        "conv_in conv_out conv conv1 conv2 conv_shortcut quant_conv post_quant_conv": {
            "kernel": (None, None, None, "fsdp"),
            "bias": ("fsdp",),
        },
        "to_q to_k to_v to_out_0": {"kernel": (None, "fsdp"), "bias": ("fsdp",)},
        "norm1 norm2 conv_norm_out group_norm": {"scale": ("fsdp",), "bias": ("fsdp",)},
    }
)
# V is the number of tokens in the vocabulary, M = mlp_size. The columns of q_proj, k_proj and
# v_proj are whole heads in order, so the tensor axis may shard them.
CLIP_AXES = {
    "embeddings_token_embedding/embedding": (None, "fsdp"),  # [V, D]
    "embeddings_position_embedding/embedding": (None, "fsdp"),  # [length, D]
    "encoder_layers/layer_norm1/scale": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm1/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/self_attn/q_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/q_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/k_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/k_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/v_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/v_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/out_proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "encoder_layers/self_attn/out_proj/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm2/scale": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm2/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/mlp/fc1/kernel": (None, "fsdp", "tensor"),  # [L, D, M]
    "encoder_layers/mlp/fc1/bias": (None, ("tensor", "fsdp")),  # [L, M]
    "encoder_layers/mlp/fc2/kernel": (None, "tensor", "fsdp"),  # [L, M, D]
    "encoder_layers/mlp/fc2/bias": (None, "fsdp"),  # [L, D]
    "final_layer_norm/scale": ("fsdp",),  # [D]
    "final_layer_norm/bias": ("fsdp",),  # [D]
}
# Parameters of the UNet that the VAE lacks or shards in another way; M = 4D. Attention without a
# transformer is sharded as in the VAE: it may have one head, which the tensor axis would cut.
UNET_AXES = _spread(
    {
        # [D or context_size, H, D/H]
        "attn1/to_q attn1/to_k attn1/to_v": {"kernel": ("fsdp", "tensor", None)},
        "attn2/to_q attn2/to_k attn2/to_v": {"kernel": ("fsdp", "tensor", None)},
        # [D or M, D]
        "attn1/to_out_0 attn2/to_out_0 ff/net_2": {"kernel": ("tensor", "fsdp"), "bias": ("fsdp",)},
        # [D, 2, M]
        "ff/net_0_proj": {"kernel": ("fsdp", None, "tensor"), "bias": (None, ("tensor", "fsdp"))},
        "linear_1 linear_2 time_emb_proj": {"kernel": (None, "fsdp"), "bias": ("fsdp",)},
        "proj_in proj_out": {"kernel": (None, "fsdp"), "bias": ("fsdp",)},
        "norm norm3": {"scale": ("fsdp",), "bias": ("fsdp",)},
        "class_embedding": {"embedding": (None, "fsdp")},  # [classes + 1, 4D or context_size]
    }
)
# `find_name` takes the first name that ends a path, so longer names must precede their ends: those
# of the text encoder precede the DiT's, and the UNet's precede the VAE's.
PARAMETER_AXES = DIT_AXES | UNET_AXES | VAE_AXES | CLIP_AXES


def find_name(key_path) -> str | None:
    """Returns the name in PARAMETER_AXES of a leaf with a JAX key path; None if it has no row.

    Only the end of the path counts: so the tree may hold parameters, EMA or optimizer moments.
    """
    path = "/" + jax.tree_util.keystr(key_path, simple=True, separator="/")
    return next((name for name in PARAMETER_AXES if path.endswith(f"/{name}")), None)
