"""Annotations of an image: the label, captions and further images that are read from its record."""

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
    reads_context: bool = False  # whether records hold a text encoder's output for the captions
    # Further images of a record, such as a depth map: feature -> number of channels, 1 or 3. They
    # have the size of the image, and are cropped and mirrored with it.
    images: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def read(self, record: Mapping, describe_record: Callable[[], str]) -> dict[str, np.ndarray]:
        """Reads 'label' [] int32, and 'tokens' [K, M] int32 or 'context' [K, M, D] f16 of captions.

        The further images are not read here: `Source` decodes them with the image.
        Args: describe_record, which returns the record's name for errors.
        Raises: ValueError for a label outside 0..num_classes-1, or a record without captions.
        """
        label = int(record.get("label", 0))  # datasets with captions may have no labels
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise UserError(
                f"label {label} of {describe_record()} lies outside 0..{self.num_classes - 1}; "
                "set model.num_classes to the number of classes in the data."
            )
        arrays = {"label": np.int32(label)}
        if self.tokenize:
            arrays["tokens"] = self.tokenize(self.read_captions(record, describe_record))
        if self.reads_context:
            arrays["context"] = np.asarray(record["context"], np.float16)
        return arrays

    def read_captions(self, record: Mapping, describe_record: Callable[[], str]) -> list[str]:
        """Reads `captions_per_image` captions; if the image has fewer, they are repeated.

        Raises: ValueError for a record without captions, with its name.
        """
        value = record
        for part in self.caption_feature.split("/"):
            value = value[part]
        captions = [value] if isinstance(value, str | bytes) else list(value)
        captions = [c.decode() if isinstance(c, bytes) else str(c) for c in captions]
        if not captions:
            raise UserError(f"{describe_record()} has no caption; leave it out.")
        # Batches need the same number of captions from every image.
        return [captions[i % len(captions)] for i in range(self.captions_per_image)]

    def check_features(self, features: Mapping, dataset_name: str) -> None:
        """Checks that a TFDS dataset with these features has all annotations.

        Raises: ValueError that lists the features.
        """
        known = ", ".join(sorted(features))
        if self.num_classes is not None and "label" not in features:
            raise UserError(
                f"dataset {dataset_name!r} has no labels, only {known}: set model.condition for "
                "captions."
            )
        if missing := sorted(self.images.keys() - set(features)):
            raise UserError(
                f"dataset {dataset_name!r} has no {', '.join(missing)}, only {known}. Name "
                "features that hold images."
            )
        value = features
        for part in self.caption_feature.split("/") if self.caption_feature else ():
            value = getattr(value, "feature", value)  # a Sequence wraps the feature of its elements
            if part not in value:
                raise UserError(
                    f"dataset {dataset_name!r} has no feature data.caption_feature="
                    f"{self.caption_feature!r}; it has {known}."
                )
            value = value[part]
