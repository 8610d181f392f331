"""What a noise predictor is told beside x_t and its time, by the model's `condition`.

label    [B] int32, a class.
tokens   [B, M] int32, a caption's words, which a `TextEncoder` of the model's own reads; or what
         that has made of them, [B, M, context_size] f32, so that samplers call it once.
context  [B, M, context_size] f32, what a frozen encoder has made of a caption, of any M.
"""

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError
from dit_jax.models import text_encoder

CONDITIONS = ("label", "tokens", "context")


def check(config) -> None:
    """Demands of a noise predictor, or of its `config.model`, what its condition needs.

    Raises: ValueError with the values.
    """
    check_kind(config.condition)
    if config.condition == "label":
        if config.null_condition and not config.num_classes:
            raise UserError(
                f"null_condition=True with num_classes={config.num_classes}: there are no labels "
                "to drop; set it to False, or num_classes to their number."
            )
        return
    if config.context_size < 1:
        raise UserError(
            f"condition={config.condition!r} needs context_size={config.context_size} above 0: the "
            "width of the text encoder, which is 768 for Stable Diffusion 1's."
        )
    if config.condition != "tokens":
        return
    if config.context_size % config.text_num_heads:
        raise UserError(
            f"text_num_heads={config.text_num_heads} must divide context_size="
            f"{config.context_size}, the width of the text encoder."
        )


def check_kind(name: str) -> None:
    """Raises: ValueError for an unknown condition, with the known ones."""
    if name not in CONDITIONS:
        raise UserError(f"condition={name!r} is unknown; choose one of {', '.join(CONDITIONS)}.")


def label_rows(config) -> int:
    """Embeddings of labels: one for each class, the null class among them, and 1 without any."""
    return max(config.num_classes + config.null_condition, 1)


def example(model) -> jax.Array:
    """The smallest condition of a model, for initialisation."""
    if model.condition == "label":
        return jnp.zeros(1, jnp.int32)
    if model.condition == "tokens":
        return jnp.zeros((1, model.text_length), jnp.int32)
    return jnp.zeros((1, 1, model.context_size))


def encoder(model) -> text_encoder.TextEncoder:
    """The encoder of a model's captions; its parameters are the model's 'text_encoder'."""
    return text_encoder.TextEncoder(
        model.text_vocab_size,
        model.text_length,
        model.context_size,
        model.text_depth,
        model.text_num_heads,
        model.dtype,
        name="text_encoder",
    )


def read(model, cond: jax.Array) -> jax.Array:
    """The sequence [B, M, context_size] f32 of a caption, inside the model.

    Raises: ValueError for one of another width.
    """
    if model.condition == "tokens" and cond.ndim == 2:
        cond = encoder(model)(cond)
    if cond.ndim != 3 or cond.shape[-1] != model.context_size:
        raise UserError(
            f"the condition has shape {cond.shape}; a model of condition={model.condition!r} with "
            f"context_size={model.context_size} takes ('B', 'M', {model.context_size})."
        )
    return cond
