"""The measures of samples: their features against a reference's.

A measure of Inception's features has its published name; of another extractor's, that one's too:
`fid` and `fd_pixels`, `precision` and `precision_pixels`.
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dit_jax import conditions, extractors, fid, references, sharding
from dit_jax.data import folders
from dit_jax.sampling import generate
from dit_jax.system import files

logger = logging.getLogger("dit_jax")

NEIGHBOURS = 3  # of precision and recall, and of label_accuracy
KID_SUBSET_SIZE = 1_000


def distance_name(extractor: str, kind: str = "features") -> str:
    """'fid', 'sfid', 'fd_dinov2' or 'fd_pixels'."""
    if extractor == "inception":
        return {"features": "fid", "spatial": "sfid"}[kind]
    return f"fd_{extractor}"


def of_features(
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
        distance_name(name, kind): fid.frechet_distance(gaussian, reference.gaussians[kind])
        for kind, gaussian in moments.gaussians().items()
    }
    if "probabilities" in extracted:
        row["inception_score"], row["inception_score_std"] = fid.inception_score(
            extracted["probabilities"]
        )
    # The published ones are by the ADM evaluator's float16 distances.
    row["precision" + suffix], row["recall" + suffix] = fid.precision_recall(
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
    row["kid" + suffix], row[f"kid{suffix}_std"] = fid.kernel_distance(
        features, reference.features, subset_size=size
    )
    return row


def check_counts(num: int, reference: references.Reference) -> None:
    """Demands, before any is drawn, samples and reference features enough for all measures.

    Raises: ValueError with the numbers.
    """
    least = NEIGHBOURS + 1
    if min(num, len(reference.features)) < least:
        raise ValueError(
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
            files.some_of(lacking, folders.SHOWN),
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


def compile_distance(task, vae=None, encoder=None) -> tuple[Callable, dict]:
    """`distance(params) -> {'fid5k': value}` by `config.fid`, of the same noise at every call.

    Args: task, a `tasks.Denoising`.   vae: as of its `to_image`.   encoder: of captions, if frozen.
    Returns: distance; what it is measured by, JSON: values by others do not compare.
    Raises: as `extractors.load`, `references.of_run` and `generate.make_sample_fn`.
    """
    config, model, mesh, to_image = task.config, task.model, task.mesh, task.to_image(vae)
    settings, sample_config = config.fid, config.sample.copy_and_resolve_references()
    sample_config.update(steps=settings.steps, cfg_scale=settings.cfg_scale)
    name = settings.extractor or references.default_extractor(settings.reference)
    weights = settings.weights and files.to_path(settings.weights, "fid.weights")
    extractor = extractors.load(name, weights)
    reference = references.of_run(config, settings.reference, extractor)
    logger.info("%s: extractor %s", training_name(config), json.dumps(extractor.identity))
    prediction = config.objective.prediction
    sample = generate.make_sample_fn(model, sample_config, task.process, prediction, mesh)
    told = conditions.draw(config, "random", settings.num_images, config.seed)
    sample = functools.partial(sample, encoder=encoder)
    extract = extractor.compile(mesh)

    def features(x_0):
        return extract(to_image(x_0))["features"]

    def distance(params):
        moments = references.Moments()
        batches = generate.batches(sample, params, told, config.seed, mesh, features)
        for numbers, batch in batches:
            extracted = {"features": np.asarray(batch)[: len(numbers)]}
            references.check_finite(extracted, numbers)
            moments.add(extracted)

        def measure():
            if jax.process_index() != 0:
                return None
            gaussians = moments.gaussians()["features"], reference.gaussians["features"]
            return fid.frechet_distance(*gaussians)

        value = sharding.from_first_process(json.dumps(sharding.together(measure)))
        return {training_name(config): json.loads(value)}

    digest = reference.source.get("digest") if reference else None
    digest = json.loads(sharding.from_first_process(json.dumps(digest)))
    drawn = sample_config.to_dict()
    del drawn["steps"], drawn["cfg_scale"]  # those of `fid` count
    measured_by = {
        "fid": {"steps": settings.steps, "cfg_scale": settings.cfg_scale},
        "sample": drawn,
        "told": told.digest(),
        "extractor": extractor.identity,
        **({"reference": digest} if digest else {}),  # older files hold none
    }
    return distance, json.loads(json.dumps(measured_by))


def describe_changes(then: dict, now: dict, prefix: str = "") -> list[str]:
    """What differs of two that `compile_distance` returned, in words; of what both know."""
    changes = []
    for key, value in now.items():
        name = prefix + key
        if isinstance(value, dict):
            changes += describe_changes(then.get(key) or {}, value, f"{name}.")
        elif key in then and then[key] != value:
            changes.append(f"{name} was {then[key]}, now {value}")
    return changes


def training_name(config: ConfigDict) -> str:
    """The distance of `config.fid` with its number of images: 'fid5k', 'fid500', 'fd_pixels_5k'."""
    settings = config.fid
    name = settings.extractor or references.default_extractor(settings.reference)
    num = settings.num_images
    count = f"{num // 1000}k" if num % 1000 == 0 else str(num)
    return distance_name(name) + "_" * (name != "inception") + count


def _halves(reference):
    """What two sets of real images come to, where all of them are at hand."""
    if reference.source["num_images"] != len(reference.features):
        return {}
    shuffled = np.random.RandomState(0).permutation(len(reference.features))
    halves = [fid.Statistics.of(reference.features[half]) for half in np.array_split(shuffled, 2)]
    return {"fd_pixels_real_halves": fid.frechet_distance(*(half.gaussian for half in halves))}
