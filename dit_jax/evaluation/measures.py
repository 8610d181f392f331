"""Measures of samples: the properties of each, and their values from features and a reference.

A measure of Inception's features has its published name. For other features the extractor's name is
appended: `fid` and `fd_pixels`, `precision` and `precision_pixels`.

A new measure needs a function here that computes it, and a row of MEASURES. Plots, checks, the
benchmark and the scaling experiments follow from that row.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.data import folders, listing
from dit_jax.errors import UserError
from dit_jax.evaluation import metrics, precision_recall, references
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

NUM_NEIGHBOURS = 3  # for precision and recall, and for label_accuracy
KID_SUBSET_SIZE = 1_000


class Inputs(NamedTuple):
    """The features of N samples and of a reference, from which measures are computed."""

    extracted: dict[str, np.ndarray]  # by the reference's extractor, [N, ...] in the samples' order
    reference: references.Reference
    labels: np.ndarray | None = None  # [N], of the samples, for label_accuracy in pixels
    class_names: Sequence[str] | None = None  # of these labels
    progress: bool = False  # whether to show a bar

    @property
    def extractor(self) -> str:
        """The extractor's name."""
        return self.reference.extractor["name"]

    def get_name(self, measure: str) -> str:
        """Returns a measure's name for this extractor: 'recall' or 'recall_pixels'."""
        return measure if self.extractor == "inception" else f"{measure}_{self.extractor}"


def distance_name(extractor: str, kind: str = "features") -> str:
    """Returns the name of a Frechet distance: 'fid', 'sfid', 'fd_dinov2' or 'fd_pixels'."""
    if extractor == "inception":
        return {"features": "fid", "spatial": "sfid"}[kind]
    return f"fd_{extractor}"


def _compute_distance(inputs, kind="features"):
    if kind not in inputs.extracted or kind not in inputs.reference.gaussians:
        return {}
    gaussian = metrics.fit_gaussian(inputs.extracted[kind])
    distance = metrics.frechet_distance(gaussian, inputs.reference.gaussians[kind])
    return {distance_name(inputs.extractor, kind): distance}


def _compute_inception_score(inputs):
    if "probabilities" not in inputs.extracted:
        return {}
    mean, deviation = metrics.inception_score(inputs.extracted["probabilities"])
    return {"inception_score": mean, "inception_score_std": deviation}


def _compute_precision_recall(inputs):
    # Published precision and recall come from the float16 distances of the ADM evaluator.
    precision, recall = precision_recall.compute(
        inputs.extracted["features"],
        inputs.reference.features,
        NUM_NEIGHBOURS,
        half=inputs.extractor == "inception",
        progress=inputs.progress,
    )
    return {inputs.get_name("precision"): precision, inputs.get_name("recall"): recall}


def _compare_halves(inputs):
    """Returns the distance between two random halves of the real images, a baseline for fd_pixels.

    A large reference has the features of only some images, and no baseline.
    """
    reference = inputs.reference
    if inputs.extractor != "pixels" or reference.source["num_images"] != len(reference.features):
        return {}
    # Shuffled, because the images may be sorted by class.
    shuffled = np.random.RandomState(0).permutation(len(reference.features))
    halves = (
        metrics.fit_gaussian(reference.features[half]) for half in np.array_split(shuffled, 2)
    )
    return {"fd_pixels_real_halves": metrics.frechet_distance(*halves)}


def _compute_kid(inputs):
    if inputs.extractor == "pixels":
        return {}
    samples, reference = inputs.extracted["features"], inputs.reference.features
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    if size < KID_SUBSET_SIZE:
        logger.warning("KID takes subsets of %d, not of the usual %d.", size, KID_SUBSET_SIZE)
    mean, deviation = metrics.kernel_distance(samples, reference, subset_size=size)
    name = inputs.get_name("kid")
    return {name: mean, f"{name}_std": deviation}


def _compute_label_accuracy(inputs):
    """Returns the share of samples that the nearest images of the reference label right.

    Distances are Euclidean, in pixels.
    """
    reference = inputs.reference
    if inputs.extractor != "pixels" or inputs.labels is None or reference.labels is None:
        return {}
    # Imported here, because only this function needs it, and the import takes a second.
    from sklearn.neighbors import KNeighborsClassifier

    labels = _translate_labels(inputs.labels, inputs.class_names, reference)
    classifier = KNeighborsClassifier(NUM_NEIGHBOURS)
    classifier.fit(reference.features, reference.labels)
    return {"label_accuracy": float(classifier.score(inputs.extracted["features"], labels))}


def _translate_labels(labels, class_names, reference):
    """Returns the samples' labels [N] as the reference numbers its classes, matched by name.

    Labels without names stay as they are. A class that the reference lacks becomes -1.
    """
    if not class_names or not reference.class_names:
        return labels
    normalize = folders.normalize_class_name
    indices = {normalize(name): i for i, name in enumerate(reference.class_names)}
    translated = np.array([indices.get(normalize(name), -1) for name in class_names])
    if missing := [name for name, i in zip(class_names, translated, strict=True) if i < 0]:
        logger.warning(
            "%s has no classes %s: label_accuracy counts samples of them as wrong.",
            files.printable(reference.source["name"]),
            files.list_some(missing, listing.SHOWN),
        )
    return translated[labels]


class Measure(NamedTuple):
    """A measure: its label in plots, its possible values, and the function that computes it."""

    label: str
    # Maps `Inputs` to {name in a row: value}, or to {} if it needs features that are missing.
    compute: Callable[[Inputs], dict[str, float]] | None = None
    larger_is_better: bool = False
    is_distance: bool = False  # positive, and compared by ratios: large ranges are drawn as logs
    may_be_negative: bool = False


# Names in a row may add an extractor and more: 'fd_pixels', 'kid_dinov2_std'. The measures of a row
# are in this order.
MEASURES = {
    "fid": Measure("FID", _compute_distance, is_distance=True),  # for other extractors, fd
    "sfid": Measure("sFID", functools.partial(_compute_distance, kind="spatial"), is_distance=True),
    "inception_score": Measure("Inception score", _compute_inception_score, larger_is_better=True),
    "precision": Measure("precision", _compute_precision_recall, larger_is_better=True),
    "recall": Measure("recall", larger_is_better=True),  # computed with precision
    "fd": Measure("FD", _compare_halves, is_distance=True),  # only the baseline of fd_pixels
    "label_accuracy": Measure("label accuracy", _compute_label_accuracy, larger_is_better=True),
    "kid": Measure("KID", _compute_kid, may_be_negative=True),  # an unbiased estimate
    # `evaluation.bits_per_dim` computes these two.
    "bits_per_dim": Measure("bits per dimension"),
    # The logarithm of a density may be negative.
    "bits_per_latent_dim": Measure("bits per latent dimension", may_be_negative=True),
}


def find(name: str) -> Measure | None:
    """Returns the measure that a name in a row belongs to, or None."""
    return next((m for base, m in MEASURES.items() if f"{name}_".startswith(f"{base}_")), None)


def measure_features(inputs: Inputs) -> dict[str, float]:
    """Returns all measures that the features allow.

    Raises: ValueError for too few samples or reference features, with their numbers.
    """
    row = {}
    for measure in MEASURES.values():
        if measure.compute:
            row |= measure.compute(inputs)
    return row


def check_counts(num: int, reference: references.Reference) -> None:
    """Raises ValueError for too few samples or features; called before samples are drawn."""
    least = NUM_NEIGHBOURS + 1  # the point itself and its neighbours
    if min(num, len(reference.features)) < least:
        raise UserError(
            f"{num} samples and {len(reference.features)} images of the reference "
            f"{files.printable(reference.source['name'])} are too few: precision and recall, by "
            f"the {NUM_NEIGHBOURS}rd neighbour, need at least {least} of each."
        )
