"""The interface of a condition, from a record of the data to the network's argument."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dit_jax.conditions.request import Request
from dit_jax.conditions.text_encoder import TextEncoder
from dit_jax.data import sources
from dit_jax.data.annotations import Annotations
from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the commands that sample. Its value is a string, or a list if it is repeated."""

    help: str
    repeated: bool = False
    parser: flags.ArgumentParser = dataclasses.field(default_factory=flags.ArgumentParser)


class Condition(abc.ABC):
    """A kind of condition of a noise predictor, chosen by `config.model.condition`.

    To add a kind, write a subclass, a row of `conditions.KINDS`, and its `Kind` in
    `models.conditioning`.
    """

    flag: ClassVar[str]  # name of the commands' flag for the conditions, without the dashes
    flags: ClassVar[Mapping[str, Flag]]  # all flags of this kind by name
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

        Raises: ValueError if the config does not name the feature of the annotations, or if
          `data.captions_per_image` is below 1.
        """

    @abc.abstractmethod
    def stored_annotations(
        self, features: Mapping, metadata: dict, directory: object
    ) -> Annotations:
        """Returns the annotations to read from the records of moments.

        Args:
          features: the features of the TFDS dataset.
          metadata: the values that `dit_jax.encode` recorded.
          directory: of the dataset, for errors.
        Raises: ValueError if the records lack the annotations, if the annotations do not fit the
          config, or as `check_storable`.
        """

    def check_storable(self) -> None:
        """Checks that `dit_jax.encode` can store the annotations with moments.

        Raises: ValueError if they include further images, which records of moments lack.
        """
        if images := self.annotations().images:
            raise UserError(
                f"model.condition={self.config.model.condition!r} reads {', '.join(images)} beside "
                "each image, but moments are stored without further images. Set latents.source to "
                "'images' or 'pixels'."
            )

    def from_batch(self, batch: dict, records: dict | None = None) -> jax.Array:
        """Returns the conditions [B, ...] of a batch.

        Args: records, all arrays by name, for a batch that holds only record indices.
        """
        # With latents.source=device a batch holds indices of records that are on the devices.
        if "record" in batch:
            return records[self.feature][batch["record"]]
        return batch[self.feature]

    def load_null(self, encoder: TextEncoder | None) -> np.ndarray | jax.Array | None:
        """Returns the null condition [...] if the devices keep it as an array, else None."""
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
        """Returns the config with the frozen encoder's digest, and the encoder or None.

        Args: recorded, the moments' metadata, with the digest of the encoder of stored captions.
        Raises: as `text_encoder.load`, also for an encoder with another digest.
        """
        return self.config, None

    @abc.abstractmethod
    def null(self, stored: jax.Array | None) -> jax.Array | int:
        """Returns the null condition: a class, or an array like one row of a batch.

        Args: stored, the result of `load_null`, on the devices.
        """

    def apply_frozen(self, encoder: TextEncoder | None, cond: jax.Array) -> jax.Array:
        """Applies the frozen encoder to a batch's conditions, if the condition uses one."""
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

    def request(self, captions: Sequence[str], negative: str = "") -> Request:
        """Returns the request for images of these captions; guidance leads away from `negative`.

        Raises: ValueError if the model takes no captions; FileNotFoundError if the tokenizer's
          file is missing.
        """
        name = self.config.model.condition
        raise UserError(f"model.condition={name!r}: this model takes {self.flag}, not captions.")

    def from_flags(
        self, num: int, seed: int = 0, class_names: Sequence[str] | None = None, **flags: str | list
    ) -> Request:
        """Returns the request for `num` images that a command's flags describe.

        Args:
          seed: draws random labels.
          class_names: None if they are not known.
          flags: by name; the flags of other kinds of conditions must be empty.
        Raises: ValueError for flags of another condition, or for unknown values.
        """
        for name, value in flags.items():
            if value and name not in self.flags:
                shown = value if isinstance(value, str) else ", ".join(value)
                raise UserError(f"--{name}={shown}: this model takes --{self.flag}.")
        own_flags = {name: value for name, value in flags.items() if name in self.flags}
        return self._from_own_flags(num, seed, class_names, **own_flags)

    @abc.abstractmethod
    def _from_own_flags(self, num, seed, class_names, **flags) -> Request:
        """Returns the request that the flags in `flags` describe; as `from_flags`."""

    @abc.abstractmethod
    def split_flags(self, flags: Mapping[str, str | list]) -> list[dict[str, str | list]]:
        """Splits the flags into one mapping for each condition that `flag` lists."""

    def draw(
        self, kind: str, num: int, seed: int, open_source: Callable[[], sources.Source]
    ) -> Request:
        """Returns a request for the conditions of `num` images, 'random' or 'balanced'.

        'random' draws the images by the seed; 'balanced' takes the first ones. An image repeats
        only after all the others were used.
        Args: open_source, which opens the data whose conditions are drawn.
        """
        source = open_source()
        # An image has `views` records in a row: itself first, then perhaps its mirror.
        count = len(source) // source.views
        index = np.arange(num) % count
        if kind == "random":
            rng = np.random.default_rng(seed)
            # Whole permutations: every image is used once before any is used again.
            index = np.concatenate([rng.permutation(count) for _ in range(-(-num // count))])[:num]
        return self._from_records(source, source.views * index)

    def _from_records(self, source, indices) -> Request:
        """Returns the request for the conditions of these records, for `draw`."""
        raise NotImplementedError

    def draw_for_picture(self, num: int, open_source: Callable[[], sources.Source]) -> Request:
        """Returns the request for the picture that is drawn while training."""
        return self.draw("balanced", num, 0, open_source)

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
