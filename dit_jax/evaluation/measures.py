"""The measures of samples: their features against a reference's.

A measure of Inception's features has its published name; of another extractor's, that one's too:
`fid` and `fd_pixels`, `precision` and `precision_pixels`.
"""

import logging
from collections.abc import Sequence

import numpy as np

from dit_jax.data import folders
from dit_jax.errors import UserError
from dit_jax.evaluation import metrics, precision_recall, references
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3  # of precision and recall, and of label_accuracy
KID_SUBSET_SIZE = 1_000


def distance_name(extractor: str, kind: str = "features") -> str:
    """'fid', 'sfid', 'fd_dinov2' or 'fd_pixels'."""
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
    """All measures of N samples.

    Args: extracted, what the reference's extractor made of them, [N, ...] in their order.
      labels: [N], of the samples, for label_accuracy in pixels.   class_names: of these labels.
    Raises: ValueError for too few samples or reference features, with the numbers.
    """
    name, features = reference.extractor["name"], extracted["features"]
    suffix = "" if name == "inception" else f"_{name}"
    moments = references.Moments()
    moments.add(extracted)
    row = {
        distance_name(name, kind): metrics.frechet_distance(gaussian, reference.gaussians[kind])
        for kind, gaussian in moments.gaussians().items()
    }
    if "probabilities" in extracted:
        row["inception_score"], row["inception_score_std"] = metrics.inception_score(
            extracted["probabilities"]
        )
    # The published ones are by the ADM evaluator's float16 distances.
    row["precision" + suffix], row["recall" + suffix] = precision_recall.compute(
        features, reference.features, NEIGHBOURS, half=name == "inception", progress=progress
    )
    if name == "pixels":
        row |= _halves(reference)
        if labels is not None and reference.labels is not None:
            labels = translate_labels(labels, class_names, reference)
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
    """Demands, before any is drawn, samples and reference features enough for all measures.

    Raises: ValueError with the numbers.
    """
    least = NEIGHBOURS + 1
    if min(num, len(reference.features)) < least:
        raise UserError(
            f"{num} samples and {len(reference.features)} images of the reference "
            f"{files.printable(reference.source['name'])}: precision and recall, by the "
            f"{NEIGHBOURS}rd neighbour, need at least {least} of each."
        )


def translate_labels(
    labels: np.ndarray, class_names: Sequence[str] | None, reference: references.Reference
) -> np.ndarray:
    """The samples' labels [N] as the reference numbers its classes, which it may name otherwise.

    By name where both have names, else as they are. -1 for a class that the reference lacks.
    """
    if not class_names or not reference.class_names:
        return labels
    numbers = {folders.same_name(name): i for i, name in enumerate(reference.class_names)}
    translated = np.array([numbers.get(folders.same_name(name), -1) for name in class_names])
    if lacking := [n for n, i in zip(class_names, translated, strict=True) if i < 0]:
        logger.warning(
            "%s has no classes %s: label_accuracy counts samples of them as wrong.",
            files.printable(reference.source["name"]),
            files.list_some(lacking, folders.SHOWN),
        )
    return translated[labels]


def label_accuracy(
    features: np.ndarray, labels: np.ndarray, reference: references.Reference
) -> float:
    """Share of samples to which 3 nearest neighbours of the reference give their own label.

    Args: features [N, D], labels [N]; the distances are Euclidean.
    """
    # Imported here: only this needs it, and it takes a second.
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(NEIGHBOURS)
    classifier.fit(reference.features, reference.labels)
    return float(classifier.score(features, labels))


def _halves(reference):
    """What two sets of real images come to, where all of them are at hand."""
    if reference.source["num_images"] != len(reference.features):
        return {}
    shuffled = np.random.RandomState(0).permutation(len(reference.features))
    halves = [
        metrics.Statistics.of(reference.features[half]) for half in np.array_split(shuffled, 2)
    ]
    return {"fd_pixels_real_halves": metrics.frechet_distance(*(half.gaussian for half in halves))}
