"""Conditions of a noise predictor, its third input after x_t and time, by `model.condition`.

label    [B] int32, a class.
tokens   [B, M] int32, the words of a caption, which the model's own `TextEncoder` reads. Samplers
         call this encoder once, and give the model its output, [B, M, context_size] f32.
context  [B, M, context_size] f32, the output of a frozen encoder for a caption, of any M.
"""

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError, check_choice
from dit_jax.models import text_encoder

CONDITIONS = ("label", "tokens", "context")


def check(config) -> None:
    """Raises unless a noise predictor, or its `config.model`, has the sizes its condition needs.

    Raises: ValueError with the values.
    """
    check_choice("condition", config.condition, CONDITIONS)
    if config.condition == "label":
        if config.null_condition and not config.num_classes:
            raise UserError(
                f"null_condition=True with num_classes={config.num_classes}: there are no labels "
                "to drop; set it to False, or num_classes to their number."
            )
        return
    # The other conditions are sequences, whose width must be known.
    if config.context_size < 1:
        raise UserError(
            f"condition={config.condition!r} needs context_size={config.context_size} above 0: the "
            "width of the text encoder, which is 768 for Stable Diffusion 1's."
        )
    # Only tokens need an encoder inside the model.
    if config.condition != "tokens":
        return
    if config.context_size % config.text_num_heads:
        raise UserError(
            f"text_num_heads={config.text_num_heads} must divide context_size="
            f"{config.context_size}, the width of the text encoder."
        )


def count_label_embeddings(config) -> int:
    """Returns the number of label embeddings: all classes and the null class, and at least 1."""
    return max(config.num_classes + config.null_condition, 1)


def example(model) -> jax.Array:
    """Returns the smallest condition of a model, for initialisation."""
    if model.condition == "label":
        return jnp.zeros(1, jnp.int32)
    if model.condition == "tokens":
        return jnp.zeros((1, model.text_length), jnp.int32)
    return jnp.zeros((1, 1, model.context_size))


def encoder(model) -> text_encoder.TextEncoder:
    """Returns the encoder of a model's captions; its parameters are the model's 'text_encoder'."""
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
    """Returns the sequence [B, M, context_size] f32 of a caption; called inside the model.

    Raises: ValueError for a sequence of another width.
    """
    # A sampler has called the encoder itself, so its cond has three axes.
    if model.condition == "tokens" and cond.ndim == 2:
        cond = encoder(model)(cond)
    if cond.ndim != 3 or cond.shape[-1] != model.context_size:
        raise UserError(
            f"the condition has shape {cond.shape}; a model of condition={model.condition!r} with "
            f"context_size={model.context_size} takes ('B', 'M', {model.context_size})."
        )
    return cond
