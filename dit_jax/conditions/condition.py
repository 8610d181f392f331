"""The interface of a condition, from a record of the data to the network's argument."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dit_jax.conditions.request import Request
from dit_jax.conditions.text_encoder import TextEncoder
from dit_jax.data import sources
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the commands that sample; its value is a text, or a list if it is repeated."""

    help: str
    repeated: bool = False


class Condition(abc.ABC):
    """A kind of condition of a noise predictor, chosen by `config.model.condition`.

    To add a kind, write a subclass, a row of `conditions.KINDS`, and the network's part in
    `models.conditioning`.
    """

    flag: ClassVar[str]  # name of the commands' flag for the conditions, without the dashes
    flags: ClassVar[Mapping[str, Flag]]  # all its flags by name
    description: ClassVar[str]  # for the summary in a run's log
    needs_encoder: ClassVar[bool] = False  # whether it uses the frozen text encoder of config.text
    has_classes: bool = False  # whether images have class labels, which are saved with samples
    # Keys of config.model in which two models must agree to take the same arrays.
    shared_keys: ClassVar[tuple[str, ...]] = ("condition", "num_classes", "context_size")

    # Keys of config.model that do not change what the network computes.
    unused_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ConfigDict):
        self.config = config

    @property
    @abc.abstractmethod
    def feature(self) -> str:
        """Name of the condition's array in a batch."""

    @abc.abstractmethod
    def annotations(self) -> Annotations:
        """Returns the annotations to read from the records of images.

        Raises: ValueError if the config does not name the feature that holds them, or
          `data.captions_per_image` is below 1.
        """

    @abc.abstractmethod
    def stored_annotations(self, features: Mapping, metadata: dict, place: object) -> Annotations:
        """Returns the annotations to read from the records of moments.

        Args:
          features: the features of the TFDS dataset.
          metadata: what `dit_jax.encode` recorded.
          place: the dataset's directory, for errors.
        Raises: ValueError if the records lack the annotations, or hold ones that do not fit the
          config.
        """

    def from_batch(self, batch: dict, records: dict | None = None) -> jax.Array:
        """Returns the conditions [B, ...] of a batch.

        Args: records, all arrays by name, for a batch that holds only numbers of records.
        """
        # With latents.source=device a batch holds numbers of records that are on the devices.
        if "record" in batch:
            return records[self.feature][batch["record"]]
        return batch[self.feature]

    def load_null(self, encoder: TextEncoder | None) -> np.ndarray | jax.Array | None:
        """Returns the null condition [...] if it is an array to keep on the devices, else None."""
        return None

    def load_encoder(self, mesh: jax.sharding.Mesh, dtype: str | None = None) -> TextEncoder | None:
        """Loads the frozen text encoder; returns None if the condition needs none.

        Args: dtype, of its activations; None is the model's.
        Raises: as `text_encoder.load`.
        """
        return None

    def resolve(
        self, recorded: dict, mesh: jax.sharding.Mesh
    ) -> tuple[ConfigDict, TextEncoder | None]:
        """Returns the config completed by the frozen encoder's digest, and the encoder or None.

        Args: recorded, the moments' metadata, with the digest of the encoder of stored captions.
        Raises: as `text_encoder.load`, also for an encoder with another digest.
        """
        return self.config, None

    @abc.abstractmethod
    def null(self, stored: jax.Array | None) -> jax.Array | int:
        """Returns the null condition, a class or an array like one row of a batch.

        Args: stored, the result of `load_null`, on the devices.
        """

    def apply_frozen(self, encoder: TextEncoder | None, cond: jax.Array) -> jax.Array:
        """Applies the frozen encoder to a batch's conditions; without one returns them as is."""
        return cond

    @staticmethod
    @abc.abstractmethod
    def encode(
        model: nn.Module,
        params: dict,
        encoder: TextEncoder | None,
        cond: jax.Array,
        mesh: jax.sharding.Mesh,
    ) -> jax.Array:
        """Returns the conditions of a request [B, ...] encoded for the model.

        A sampler encodes them once and uses the result in all its calls of the network.
        """

    @abc.abstractmethod
    def request(self, captions: Sequence[str], negative: str = "") -> Request:
        """Returns the request for images of these captions; guidance leads away from `negative`.

        Raises: ValueError if the model takes no captions; FileNotFoundError if the tokenizer's
          file is missing.
        """

    def from_flags(
        self, num: int, seed: int = 0, names: Sequence[str] | None = None, **flags: str | list
    ) -> Request:
        """Returns the request for `num` images that a command's flags describe.

        Args:
          seed: draws random labels.
          names: of the classes, if they are known.
          flags: by name; those of other kinds of conditions must be empty.
        Raises: ValueError for flags of another condition, or for unknown values.
        """
        for name, value in flags.items():
            if value and name not in self.flags:
                shown = value if isinstance(value, str) else ", ".join(value)
                raise UserError(f"--{name}={shown}: this model takes --{self.flag}.")
        own = {name: value for name, value in flags.items() if name in self.flags}
        return self._from_flags(num, seed, names, **own)

    @abc.abstractmethod
    def _from_flags(self, num, seed, names, **flags) -> Request:
        """Returns the request that this condition's own flags describe; as `from_flags`."""

    @abc.abstractmethod
    def split_flags(self, flags: Mapping[str, str | list]) -> list[dict[str, str | list]]:
        """Returns the flags for each condition that `flag` names."""

    @abc.abstractmethod
    def draw(
        self, kind: str, num: int, seed: int, open_source: Callable[[], sources.Source]
    ) -> Request:
        """Returns a request with `num` drawn conditions, 'random' by the seed or 'balanced'.

        Args: open_source, which opens the data whose captions are drawn.
        """

    @abc.abstractmethod
    def draw_for_picture(self, num: int, open_source: Callable[[], sources.Source]) -> Request:
        """Returns the request for the picture that is drawn while training."""

    def describe(self, request: Request) -> dict:
        """Returns the keys that describe the request in the row of an evaluation."""
        return {}

    @abc.abstractmethod
    def make_example(self, num: int) -> Request:
        """Returns a request for `num` images with arbitrary conditions."""

    @abc.abstractmethod
    def make_batch(self, rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the condition's array in a batch with arbitrary conditions."""


def drop(key: jax.Array, cond: jax.Array, prob: float, null: jax.Array | int) -> jax.Array:
    """Replaces each row of cond [B, ...] by null [...], with probability `prob`."""
    dropped = jax.random.bernoulli(key, prob, cond.shape[:1])
    dropped = dropped.reshape(-1, *(1,) * (cond.ndim - 1))  # [B, 1, ...]: whole rows are replaced
    return jnp.where(dropped, jnp.asarray(null, cond.dtype)[None], cond)
