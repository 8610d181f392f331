"""What every kind of condition can do, from a record of the data to a network's argument."""

import abc
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


class Condition(abc.ABC):
    """What a noise predictor is conditioned on, by `config.model.condition`.

    A new kind is a subclass, a row of `conditions.KINDS`, and what the networks make of it in
    `models.conditioning`.
    """

    flag: ClassVar[str]  # of commands, that requests it
    description: ClassVar[str]  # in the summary of a run
    needs_encoder: ClassVar[bool] = False  # the frozen text encoder of config.text
    has_classes: bool = False  # images have labels, to be kept with samples
    # Keys of config.model that two models must share to take the same arrays.
    shared_keys: ClassVar[tuple[str, ...]] = ("condition", "num_classes", "context_size")

    # Keys of config.model that have no part in what the network computes.
    unused_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ConfigDict):
        self.config = config

    @property
    @abc.abstractmethod
    def feature(self) -> str:
        """The name of its array in a batch."""

    @abc.abstractmethod
    def annotations(self) -> Annotations:
        """Returns what is read of the records of images.

        Raises: ValueError for a config that does not say where it is in the data.
        """

    @abc.abstractmethod
    def stored_annotations(self, features: Mapping, metadata: dict, place: object) -> Annotations:
        """Returns what is read of the records of moments.

        Args: features, of the TFDS dataset.   metadata: that `dit_jax.encode` recorded.
          place: of the dataset, for errors.
        Raises: ValueError if they do not hold it.
        """

    def of_batch(self, batch: dict, records: dict | None = None) -> jax.Array:
        """Returns a batch's conditions [B, ...]; looked up in records by the batch's numbers."""
        if "record" in batch:
            return records[self.feature][batch["record"]]
        return batch[self.feature]

    def load_null(self, encoder: TextEncoder | None) -> np.ndarray | jax.Array | None:
        """Returns the null condition of a batch, where it is an array that is to be kept."""
        return None

    def load_encoder(self, mesh: jax.sharding.Mesh, dtype: str | None = None) -> TextEncoder | None:
        """Loads the frozen text encoder, if it needs one.   Raises: as `text_encoder.load`."""
        return None

    def resolve(
        self, recorded: dict, mesh: jax.sharding.Mesh
    ) -> tuple[ConfigDict, TextEncoder | None]:
        """Returns the config with the frozen encoder's digest, and the encoder, if it needs one.

        Args: recorded, the moments' metadata, which names the encoder of stored captions.
        Raises: as `text_encoder.load`, if it is not that one.
        """
        return self.config, None

    @abc.abstractmethod
    def null(self, kept: jax.Array | None) -> jax.Array | int:
        """Returns the null condition of a batch.   Args: kept, what `load_null` returned."""

    def apply_frozen(self, encoder: TextEncoder | None, cond: jax.Array) -> jax.Array:
        """Returns what a frozen encoder makes of a batch's conditions; without one, themselves."""
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
        """Returns a request's conditions as the model takes them, to be computed once for all its
        calls."""

    @abc.abstractmethod
    def request(self, captions: Sequence[str], negative: str = "") -> Request:
        """Returns the request of captions, which guidance leads away from `negative`.

        Raises: ValueError for a model that takes none; FileNotFoundError without the tokeniser's
          file.
        """

    @abc.abstractmethod
    def from_flags(
        self,
        num: int,
        labels: str = "",
        prompts: Sequence[str] = (),
        negative: str = "",
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> Request:
        """Returns the request of a command's flags, of `num` images.

        Args: names, of the classes, where they are known.
        Raises: ValueError for flags of another condition, or values that it does not know.
        """

    @abc.abstractmethod
    def split_flags(self, labels: str, prompts: Sequence[str]) -> list[tuple[str, list[str]]]:
        """Returns the (labels, prompts) of each condition that the flags name."""

    @abc.abstractmethod
    def draw(
        self, kind: str, num: int, seed: int, open_source: Callable[[], sources.Source]
    ) -> Request:
        """Returns a request of `num` conditions, 'random' by the seed or 'balanced'.

        Args: open_source() opens the data that captions are of.
        """

    @abc.abstractmethod
    def draw_for_picture(self, num: int, open_source: Callable[[], sources.Source]) -> Request:
        """Returns the request of the picture that is drawn while training."""

    def describe(self, request: Request) -> dict:
        """Returns what the row of an evaluation says of its request."""
        return {}

    @abc.abstractmethod
    def make_example(self, num: int) -> Request:
        """Returns a request of any `num` conditions."""

    @abc.abstractmethod
    def make_batch(self, rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns its array in a batch of any conditions."""


def drop(key: jax.Array, cond: jax.Array, prob: float, null: jax.Array | int) -> jax.Array:
    """Replaces rows of cond [B, ...] by null [...], each with the probability."""
    dropped = jax.random.bernoulli(key, prob, cond.shape[:1])
    dropped = dropped.reshape(-1, *(1,) * (cond.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, cond.dtype)[None], cond)
