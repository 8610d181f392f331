"""Options of several networks: heads, recomputation, and the kernel of attention."""

import logging

import jax

from dit_jax.errors import UserError, check_choice

logger = logging.getLogger("dit_jax")

# By remat: the values saved for the backward pass: all, the outputs of all Linears, or none.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_heads(num_heads: int, hidden_size: int) -> None:
    """Raises ValueError unless the number of heads divides the width."""
    if not num_heads or hidden_size % num_heads:
        raise UserError(f"{num_heads=} must divide {hidden_size=}; ViT-L has 16 heads for 1024.")


def resolve_attention(choice: str, dtype: str, head_dim: int) -> str:
    """Turns the config's attention choice into 'xla' or 'cudnn', once, at set-up.

    'auto' takes cuDNN on an NVIDIA GPU if a small forward and backward pass compiles with it.
    Otherwise it takes XLA.

    Raises: ValueError if 'cudnn' is chosen where it cannot run, or the name is unknown.
    """
    check_choice("attention", choice, ("auto", "xla", "cudnn"))
    if choice == "xla":
        return "xla"
    if jax.default_backend() != "gpu":
        reason = f"the backend is {jax.default_backend()!r}, not an NVIDIA GPU"
    elif dtype != "bfloat16":
        reason = f"cuDNN attention takes bfloat16, not {dtype}"
    elif head_dim % 8:
        reason = f"cuDNN attention needs a head size divisible by 8, not {head_dim}"
    else:
        reason = _cudnn_attention_error(dtype, head_dim)
    if reason is None:
        return "cudnn"
    if choice == "cudnn":
        raise UserError(f"attention='cudnn' cannot run: {reason}. Use attention='auto' or 'xla'.")
    if jax.default_backend() == "gpu":
        logger.info("attention: xla (%s)", reason)
    return "xla"


def _cudnn_attention_error(dtype, head_dim):
    """Returns None if cuDNN attention compiles here, else the reason why it does not."""

    def total(q):
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn").sum()

    try:
        probe = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
        jax.jit(jax.grad(total)).lower(probe).compile()
    # The type of the exception depends on the cuDNN, the driver and the card.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}"
    return None
