"""The Frechet distance between samples of a model in training and a reference."""

import functools
import json
import logging
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.evaluation import extractors, measures, metrics, references
from dit_jax.sampling import generate, requests
from dit_jax.system import files
from dit_jax.training import tasks

logger = logging.getLogger("dit_jax")


def compile_distance(task: tasks.Denoising, frozen: tasks.Frozen) -> tuple[Callable, dict]:
    """Returns `measure(params) -> {'fid5k': distance}` by `config.fid`, and its settings.

    Every call of measure draws the same noise. The settings are a JSON value. Distances with
    different settings are not comparable.
    Raises: as `extractors.load`, `references.load_for_run` and `generate.make_sample_fn`.
    """
    config, mesh, to_image = task.config, task.mesh, task.to_image(frozen)
    # Samples are drawn as by config.sample, except for the steps and guidance of config.fid.
    settings, sample_config = config.fid, config.sample.copy_and_resolve_references()
    sample_config.update(steps=settings.steps, cfg_scale=settings.cfg_scale)
    # Only the first process has the reference.
    name = settings.extractor or references.default_extractor(settings.reference)
    weights = settings.weights and files.to_path(settings.weights, "fid.weights")
    extractor = extractors.load(name, weights)
    reference = references.load_for_run(config, settings.reference, extractor)
    logger.info("%s: extractor %s", training_name(config), json.dumps(extractor.identity))
    # All calls, and so all steps of training, have the same request.
    request = requests.draw(config, "random", settings.num_images, config.seed)
    sample = functools.partial(task.make_sample_fn(sample_config), encoder=frozen.text_encoder)
    extract = extractor.compile(mesh)

    def extract_features(x_0):
        return extract(to_image(x_0))["features"]

    def measure(params):
        moments = metrics.Moments()
        batches = generate.batches(sample, params, request, config.seed, mesh, extract_features)
        for image_indices, batch in batches:
            # The last batch may repeat images, which do not count.
            features = np.asarray(batch)[: len(image_indices)]
            extractors.check_finite({"features": features}, image_indices)
            moments.add(features)

        def compare():
            return metrics.frechet_distance(moments.gaussian(), reference.gaussians["features"])

        return {training_name(config): sharding.broadcast_result(compare)}

    return measure, _describe_settings(sample_config, request, extractor, reference)


def _describe_settings(sample_config, request, extractor, reference):
    """Returns all that the distance depends on, as JSON; every process returns the same."""
    digest = sharding.broadcast_result(lambda: reference.source.get("digest"))
    sample = sample_config.to_dict()
    settings = {
        "fid": {name: sample.pop(name) for name in ("steps", "cfg_scale")},
        "sample": sample,
        "request": request.digest(),
        "extractor": extractor.identity,
        **({"reference": digest} if digest else {}),  # references of older versions have none
    }
    # JSON turns tuples into lists, so the settings equal those that are read back.
    return json.loads(json.dumps(settings))


def warn_of_changes(config: ConfigDict, earlier: dict, current: dict) -> None:
    """Warns of changed settings: distances before and after the change are not comparable."""
    if changes := describe_changes(earlier, current):
        name = training_name(config)
        logger.warning(
            "%s is measured with other settings from here on: %s", name, "; ".join(changes)
        )


def describe_changes(earlier: dict, current: dict, prefix: str = "") -> list[str]:
    """Describes the differences between two settings of `compile_distance`.

    Keys that only one of them has are not compared.
    """
    changes = []
    for key, value in current.items():
        name = prefix + key
        if isinstance(value, dict):
            changes += describe_changes(earlier.get(key) or {}, value, f"{name}.")
        elif key in earlier and earlier[key] != value:
            changes.append(f"{name} was {earlier[key]}, now {value}")
    return changes


def training_name(config: ConfigDict) -> str:
    """Returns the distance's name with its number of images: 'fid5k', 'fid500', 'fd_pixels_5k'."""
    settings, num = config.fid, config.fid.num_images
    extractor = settings.extractor or references.default_extractor(settings.reference)
    separator = "" if extractor == "inception" else "_"
    count = f"{num // 1000}k" if num % 1000 == 0 else str(num)
    return measures.distance_name(extractor) + separator + count
