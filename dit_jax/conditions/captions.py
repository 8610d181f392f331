"""Conditions on captions: hashed words for a trained encoder, or outputs of a frozen encoder."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from dit_jax import models
from dit_jax.conditions import text_encoder
from dit_jax.conditions.condition import Condition, Flag
from dit_jax.conditions.labels import count_captions
from dit_jax.conditions.request import Request
from dit_jax.data import text
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError
from dit_jax.models import conditioning


class Captions(Condition):
    """A condition on one caption of each image, as token ids [M] int32."""

    flag = "prompt"
    flags: ClassVar = {
        "prompt": Flag("Caption, for a model of captions; may be repeated.", repeated=True),
        "negative_prompt": Flag("Caption that guidance leads away from."),
    }
    feature = "tokens"
    # There is no class embedding, and the empty caption is the null condition.
    unused_keys = ("num_classes", "null_condition")

    def make_tokenizer(self) -> Callable[[Sequence[str]], np.ndarray]:
        """Returns the tokenizer, a function from n captions to ids [n, M] int32."""
        raise NotImplementedError

    def annotations(self):
        tokenize, feature = self.make_tokenizer(), self.config.data.caption_feature
        if not feature:
            raise UserError(
                f"model.condition={self.config.model.condition!r} needs data.caption_feature, the "
                "name of the captions in the dataset: caption, captions/text, or text of an image "
                "folder."
            )
        return Annotations(None, feature, count_captions(self.config), tokenize)

    def stored_annotations(self, features, metadata, directory):
        count = self._count_stored(features, directory)
        return Annotations(None, "captions", count, self.make_tokenizer())

    def _count_stored(self, features, directory):
        """Returns how many captions each record of moments holds.

        Raises: ValueError if the records hold none.
        """
        if "captions" not in features:
            raise UserError(
                f"{directory} holds no captions, which model.condition="
                f"{self.config.model.condition!r} needs: encode the images with "
                "data.caption_feature set."
            )
        return features["captions"].shape[0]

    def load_null(self, encoder):
        return self.request([""]).cond[0]  # the empty caption

    def null(self, stored):
        return stored

    def request(self, captions, negative=""):
        tokenize = self.make_tokenizer()
        cond = tokenize(captions)
        return Request(cond, np.broadcast_to(tokenize([negative]), cond.shape))

    def _from_own_flags(self, num, seed, class_names, prompt=(), negative_prompt=""):
        # Without a prompt the images are drawn for the empty caption.
        prompts = list(prompt) or [""]
        if num < len(prompts):
            raise UserError(f"--num={num} must be at least {len(prompts)}, one of each --prompt.")
        # Each prompt gets an equal block of the images.
        captions = [prompts[i * len(prompts) // num] for i in range(num)]
        return self.request(captions, negative_prompt)

    def split_flags(self, flags):
        return [{**flags, "prompt": [prompt]} for prompt in flags.get("prompt", ())]

    def _from_records(self, source, indices):
        return self.request([source.captions(i)[0] for i in indices])

    def describe(self, request):
        return {"captions": request.digest()}

    def make_example(self, num):
        return self.request([f"image {i}" for i in range(num)])

    def make_batch(self, rows, rng):
        return {"tokens": self.make_example(rows).cond}


class Tokens(Captions):
    """Hashed words, read by a text encoder that is part of the model and is trained with it."""

    description = "captions, by an encoder that is trained along"
    # Both models must hash words to the same ids, and take rows of the same length.
    shared_keys = (*Condition.shared_keys, "text_vocab_size", "text_length")

    def make_tokenizer(self):
        model = self.config.model
        return text.WordTokenizer(model.text_length, model.text_vocab_size)

    @staticmethod
    def encode(model, params, encoder, cond, mesh):
        if cond.ndim == 3:  # [B, M, D]: encoded already
            return cond
        return models.bind(conditioning.make_text_encoder(model), params["text_encoder"], mesh)(
            cond
        )


class Context(Captions):
    """The outputs [M, D] of the frozen text encoder of `config.text` for a caption.

    With `config.text.stored` the records of moments hold the outputs, in f16. Otherwise each step
    computes them from token ids.
    """

    description = "captions, by a frozen encoder"
    needs_encoder = True

    @property
    def stored(self) -> bool:
        return self.config.text.stored

    @property
    def feature(self) -> str:
        return "context" if self.stored else "tokens"

    def make_tokenizer(self):
        return text.load_tokenizer(text_encoder.get_workdir(self.config))

    def stored_annotations(self, features, metadata, directory):
        if not self.stored:
            return super().stored_annotations(features, metadata, directory)
        count = self._count_stored(features, directory)
        if "context" not in features:
            raise UserError(
                f"{directory} holds no outputs of a text encoder. Encode the images with "
                "text.stored, or set text.stored=False."
            )
        # Another encoder's outputs may have the same shape, so digests are compared. An empty
        # digest is not known yet: `resolve` fills it in.
        recorded = metadata.get("text_encoder_digest", "")
        digest, size = self.config.text.encoder_digest, self.config.model.context_size
        if recorded and digest not in ("", recorded):
            raise UserError(
                f"{directory} holds outputs of a text encoder with digest {recorded}, but "
                f"text.encoder_digest={digest} is of another encoder. Encode the images again."
            )
        shape = tuple(features["context"].shape)
        if shape[-1] != size:
            raise UserError(
                f"{directory} holds context {shape} of each image, but the model was built for "
                f"model.context_size={size}."
            )
        # No tokenizer: the stored outputs are read instead of the captions.
        return Annotations(None, "captions", count, reads_context=True)

    def load_encoder(self, mesh, dtype=None):
        return text_encoder.load(self.config, mesh, dtype)

    def resolve(self, recorded, mesh):
        config = self.config.copy_and_resolve_references()
        # With this digest, `load` refuses an encoder whose outputs are not the stored ones.
        if self.stored and "text_encoder_digest" in recorded:
            config.text.encoder_digest = recorded["text_encoder_digest"]
        encoder = text_encoder.load(config, mesh)
        config.text.encoder_digest = encoder.digest
        return config, encoder

    def load_null(self, encoder):
        null = super().load_null(encoder)
        # The null condition replaces stored outputs at random, so it is in f16 too.
        return encoder(null[None]).astype(jnp.float16)[0] if self.stored else null

    def apply_frozen(self, encoder, cond):
        # Stored outputs are f16; the network takes f32.
        return cond.astype(jnp.float32) if self.stored else encoder(cond)

    @staticmethod
    def encode(model, params, encoder, cond, mesh):
        # Stored outputs come as [B, M, D], token ids as [B, M].
        return cond if cond.ndim == 3 else encoder(cond)

    def make_batch(self, rows, rng):
        if not self.stored:
            return super().make_batch(rows, rng)
        shape = rows, self.make_tokenizer().length, self.config.model.context_size
        return {"context": rng.standard_normal(shape).astype(np.float16)}
