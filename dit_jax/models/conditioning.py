"""Conditions inside a noise predictor, its third input after x_t and time: a class for each kind.

`model.condition` is a key of KINDS. A kind calls the network's `embed_label` or `embed_sequence`,
because every network embeds in its own way.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.errors import UserError, check_choice
from dit_jax.models import text_encoder

# The sequence [B, M, D] that blocks attend to, and the vector [B, D] that is added to the time's
# embedding. Either may be None.
Embedded = tuple[jax.Array | None, jax.Array | None]


class Kind:
    """A kind of condition; `model` is the network, whose fields have the sizes.

    A network calls `join` and `embed` inside its compact method, so they may create submodules.
    """

    is_sequence: ClassVar[bool] = False  # whether `embed` returns a sequence

    def check(self, config) -> None:
        """Checks the sizes in a noise predictor or its `config.model`.   Raises: ValueError."""

    def example(self, model: nn.Module) -> jax.Array:
        """Returns the smallest condition of a model, for initialisation."""
        raise NotImplementedError

    def join(self, model: nn.Module, x_t: jax.Array, cond: jax.Array) -> jax.Array:
        """Returns the network's input [B, h, w, C']: x_t, for some kinds with more channels."""
        return x_t

    def embed(self, model: nn.Module, cond: jax.Array) -> Embedded:
        """Embeds the condition as a sequence, a vector, both, or neither."""
        return None, None


class Label(Kind):
    """A class, [B] int32."""

    def check(self, config):
        if config.null_condition and not config.num_classes:
            raise UserError(
                f"null_condition=True with num_classes={config.num_classes}: there are no labels "
                "to drop. Set null_condition=False, or num_classes to the number of classes."
            )

    def example(self, model):
        return jnp.zeros(1, jnp.int32)

    def embed(self, model, cond):
        if cond.ndim != 1:
            raise UserError(
                f"cond has shape {cond.shape}; a model of condition='label' takes ('B',)."
            )
        return model.embed_label(cond)


class Context(Kind):
    """The output of a frozen text encoder for a caption, [B, M, context_size] f32, of any M."""

    is_sequence = True

    def check(self, config):
        if config.context_size < 1:
            raise UserError(
                f"condition={config.condition!r} needs context_size={config.context_size} above "
                "0: the width of the text encoder, which is 768 for Stable Diffusion 1's."
            )

    def example(self, model):
        return jnp.zeros((1, 1, model.context_size))

    def embed(self, model, cond):
        if cond.ndim != 3 or cond.shape[-1] != model.context_size:
            raise UserError(
                f"the condition has shape {cond.shape}; a model of condition={model.condition!r} "
                f"with context_size={model.context_size} takes ('B', 'M', {model.context_size})."
            )
        return model.embed_sequence(cond)


class Tokens(Context):
    """The hashed words of a caption, [B, M] int32, which the model's own `TextEncoder` reads.

    Samplers call this encoder once, and give the model its output, [B, M, context_size] f32.
    """

    def check(self, config):
        super().check(config)
        if config.context_size % config.text_num_heads:
            raise UserError(
                f"text_num_heads={config.text_num_heads} must divide context_size="
                f"{config.context_size}, the width of the text encoder."
            )

    def example(self, model):
        return jnp.zeros((1, model.text_length), jnp.int32)

    def embed(self, model, cond):
        if cond.ndim == 2:  # a sampler gives what the encoder returned
            cond = make_text_encoder(model)(cond)
        return super().embed(model, cond)


KINDS: dict[str, Kind] = {"label": Label(), "tokens": Tokens(), "context": Context()}


def get_kind(condition: str) -> Kind:
    """Returns the kind of this name.   Raises: ValueError for an unknown name."""
    check_choice("condition", condition, KINDS)
    return KINDS[condition]


def make_text_encoder(model: nn.Module) -> text_encoder.TextEncoder:
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
