"""Measures of samples: what is known of each, and their values from features and a reference.

A measure of Inception's features has its published name. For other features the extractor's name is
appended: `fid` and `fd_pixels`, `precision` and `precision_pixels`.

To add one, write its function in `metrics`, call it in `measure_features`, and give it a row in
MEASURES.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.data import folders, listing
from dit_jax.errors import UserError
from dit_jax.evaluation import metrics, precision_recall, references
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3  # for precision and recall, and for label_accuracy
KID_SUBSET_SIZE = 1_000


class Measure(NamedTuple):
    """A measure: its label in plots, and its possible values."""

    label: str
    larger_is_better: bool = False
    is_distance: bool = False  # positive, and compared by ratios: large ranges are drawn as logs
    may_be_negative: bool = False


# Names in a row may add an extractor and more: 'fd_pixels', 'kid_dinov2_std'.
MEASURES = {
    "fid": Measure("FID", is_distance=True),
    "sfid": Measure("sFID", is_distance=True),
    "fd": Measure("FD", is_distance=True),
    "inception_score": Measure("Inception score", larger_is_better=True),
    "precision": Measure("precision", larger_is_better=True),
    "recall": Measure("recall", larger_is_better=True),
    "kid": Measure("KID", may_be_negative=True),  # an unbiased estimate
    "label_accuracy": Measure("label accuracy", larger_is_better=True),
    "bits_per_dim": Measure("bits per dimension"),
    # The logarithm of a density.
    "bits_per_latent_dim": Measure("bits per latent dimension", may_be_negative=True),
}


def find(name: str) -> Measure | None:
    """Returns the measure that a name in a row belongs to, or None."""
    return next((m for base, m in MEASURES.items() if f"{name}_".startswith(f"{base}_")), None)


def distance_name(extractor: str, kind: str = "features") -> str:
    """Returns the name of a Frechet distance: 'fid', 'sfid', 'fd_dinov2' or 'fd_pixels'."""
    if extractor == "inception":
        return {"features": "fid", "spatial": "sfid"}[kind]
    return f"fd_{extractor}"


def measure_features(
    extracted: dict[str, np.ndarray],
    reference: references.Reference,
    labels: np.ndarray | None = None,
    progress: bool = False,
    class_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Returns all measures of N samples.

    Args:
      extracted: the samples' features by the reference's extractor, [N, ...] in the samples' order.
      labels: [N], of the samples, for label_accuracy in pixels.
      class_names: the names of these labels.
    Raises: ValueError for too few samples or reference features, with the numbers.
    """
    name, features = reference.extractor["name"], extracted["features"]
    suffix = "" if name == "inception" else f"_{name}"
    row = {
        distance_name(name, kind): metrics.frechet_distance(
            metrics.fit_gaussian(extracted[kind]), gaussian
        )
        for kind, gaussian in reference.gaussians.items()
        if kind in extracted
    }
    if "probabilities" in extracted:
        row["inception_score"], row["inception_score_std"] = metrics.inception_score(
            extracted["probabilities"]
        )
    # Published precision and recall come from the float16 distances of the ADM evaluator.
    row["precision" + suffix], row["recall" + suffix] = precision_recall.compute(
        features, reference.features, NEIGHBOURS, half=name == "inception", progress=progress
    )
    if name == "pixels":
        row |= _compare_halves(reference)
        if labels is not None and reference.labels is not None:
            labels = _translate_labels(labels, class_names, reference)
            row["label_accuracy"] = label_accuracy(features, labels, reference)
        return row
    size = min(KID_SUBSET_SIZE, len(features), len(reference.features))
    if size < KID_SUBSET_SIZE:
        logger.warning("KID is of subsets of %d, fewer than the usual %d.", size, KID_SUBSET_SIZE)
    row["kid" + suffix], row[f"kid{suffix}_std"] = metrics.kernel_distance(
        features, reference.features, subset_size=size
    )
    return row


def check_counts(num: int, reference: references.Reference) -> None:
    """Raises ValueError if there are too few samples or features; called before any is drawn."""
    least = NEIGHBOURS + 1  # the point itself and its neighbours
    if min(num, len(reference.features)) < least:
        raise UserError(
            f"{num} samples and {len(reference.features)} images of the reference "
            f"{files.printable(reference.source['name'])}: precision and recall, by the "
            f"{NEIGHBOURS}rd neighbour, need at least {least} of each."
        )


def _translate_labels(labels, class_names, reference):
    """Returns the samples' labels [N] in the numbering of the reference, by the classes' names.

    Without names they stay as they are. A class that the reference lacks becomes -1.
    """
    if not class_names or not reference.class_names:
        return labels
    normalize = folders.normalize_class_name
    numbers = {normalize(name): i for i, name in enumerate(reference.class_names)}
    translated = np.array([numbers.get(normalize(name), -1) for name in class_names])
    if missing := [n for n, i in zip(class_names, translated, strict=True) if i < 0]:
        logger.warning(
            "%s has no classes %s: label_accuracy counts samples of them as wrong.",
            files.printable(reference.source["name"]),
            files.list_some(missing, listing.SHOWN),
        )
    return translated[labels]


def label_accuracy(
    features: np.ndarray, labels: np.ndarray, reference: references.Reference
) -> float:
    """Returns the share of samples [N, D] that the 3 nearest images of the reference label right.

    Distances are Euclidean.
    """
    # Imported here, since only this function needs it, and the import takes a second.
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(NEIGHBOURS)
    classifier.fit(reference.features, reference.labels)
    return float(classifier.score(features, labels))


def _compare_halves(reference):
    """Returns the distance between two random halves of the real images, a baseline for fd_pixels.

    {} if some images are missing.
    """
    # A large reference has the features of some of its images only.
    if reference.source["num_images"] != len(reference.features):
        return {}
    # Shuffled, since the images may be sorted by class.
    shuffled = np.random.RandomState(0).permutation(len(reference.features))
    halves = (
        metrics.fit_gaussian(reference.features[half]) for half in np.array_split(shuffled, 2)
    )
    return {"fd_pixels_real_halves": metrics.frechet_distance(*halves)}
