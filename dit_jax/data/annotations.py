"""What a record holds beside its image, a label and captions, and what of it is read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What is read of the records of a dataset beside the image; by default only that."""

    num_classes: int | None = None  # None: labels mean nothing to the model
    caption_feature: str = ""  # 'captions/text' is record['captions']['text']; '' is none
    captions_per_image: int = 1
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None  # captions to ids [K, M]
    context: bool = False  # the records hold what a text encoder has made of the captions

    def read(self, record: Mapping, name: Callable[[], str]) -> dict[str, np.ndarray]:
        """Reads 'label' [] int32 and, of K captions, 'tokens' [K, M] int32 or 'context' [K, M, D].

        Args: name() is the record's, for errors.
        Raises: ValueError for a label that is no class, or a record without captions.
        """
        label = int(record.get("label", 0))  # datasets of captions may have none
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
        """Reads `captions_per_image` captions; an image with fewer repeats its own.

        Raises: ValueError for a record without captions.
        """
        value = record
        for part in self.caption_feature.split("/"):
            value = value[part]
        texts = [value] if isinstance(value, str | bytes) else list(value)
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in texts]
        if not texts:
            raise UserError(f"{name()} has no caption; leave it out.")
        return [texts[i % len(texts)] for i in range(self.captions_per_image)]

    def check_features(self, features: Mapping, name: str) -> None:
        """Demands of a TFDS dataset the labels and the captions that are read.

        Raises: ValueError with the features that it has.
        """
        if self.num_classes is not None and "label" not in features:
            raise UserError(
                f"dataset {name!r} has no labels, only {', '.join(sorted(features))}: set "
                "model.condition for captions."
            )
        value = features
        for part in self.caption_feature.split("/") if self.caption_feature else ():
            value = getattr(value, "feature", value)  # of a sequence
            if part not in value:
                raise UserError(
                    f"dataset {name!r} has no feature data.caption_feature="
                    f"{self.caption_feature!r}; it has {', '.join(sorted(features))}."
                )
            value = value[part]
