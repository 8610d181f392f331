"""Annotations of an image: its label and captions, and which of them are read from a record."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Choice of what is read from a record besides the image; by default only an unchecked label.

    K is captions_per_image, M the number of tokens, D the size of a text encoder's output.
    """

    num_classes: int | None = None  # None: the model ignores labels
    caption_feature: str = ""  # 'captions/text' is record['captions']['text']; '' for none
    captions_per_image: int = 1
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None  # K captions -> ids [K, M]
    context: bool = False  # whether records hold a text encoder's output for the captions

    def read(self, record: Mapping, name: Callable[[], str]) -> dict[str, np.ndarray]:
        """Reads 'label' [] int32, and 'tokens' [K, M] int32 or 'context' [K, M, D] f16 of captions.

        `name` returns the name of the record, for errors.
        Raises: ValueError for a label outside 0..num_classes-1, or a record without captions.
        """
        label = int(record.get("label", 0))  # datasets with captions may have no labels
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise UserError(
                f"label {label} of {name()} lies outside 0..{self.num_classes - 1}; "
                "set model.num_classes to the number of classes in the data."
            )
        values = {"label": np.int32(label)}
        if self.tokenize:
            values["tokens"] = self.tokenize(self.read_captions(record, name))
        if self.context:
            values["context"] = np.asarray(record["context"], np.float16)
        return values

    def read_captions(self, record: Mapping, name: Callable[[], str]) -> list[str]:
        """Reads `captions_per_image` captions; if the image has fewer, they are repeated.

        Raises: ValueError for a record without captions, with its name.
        """
        value = record
        for part in self.caption_feature.split("/"):
            value = value[part]
        texts = [value] if isinstance(value, str | bytes) else list(value)
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in texts]
        if not texts:
            raise UserError(f"{name()} has no caption; leave it out.")
        # Batches need the same number of captions from every image.
        return [texts[i % len(texts)] for i in range(self.captions_per_image)]

    def check_features(self, features: Mapping, name: str) -> None:
        """Raises unless a TFDS dataset with these features has the labels and captions to be read.

        Raises: ValueError that lists the features.
        """
        if self.num_classes is not None and "label" not in features:
            raise UserError(
                f"dataset {name!r} has no labels, only {', '.join(sorted(features))}: set "
                "model.condition for captions."
            )
        value = features
        for part in self.caption_feature.split("/") if self.caption_feature else ():
            value = getattr(value, "feature", value)  # a Sequence wraps the feature of its elements
            if part not in value:
                raise UserError(
                    f"dataset {name!r} has no feature data.caption_feature="
                    f"{self.caption_feature!r}; it has {', '.join(sorted(features))}."
                )
            value = value[part]
