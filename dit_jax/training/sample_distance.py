"""The Frechet distance of a model's samples to a reference, measured while it trains."""

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
    """Returns `distance(params) -> {'fid5k': value}` by `config.fid`, and its settings.

    Every call of distance draws the same noise.
    Returns: distance; its settings as JSON: values with other settings are not comparable.
    Raises: as `extractors.load`, `references.load_for_run` and `generate.make_sample_fn`.
    """
    config, mesh, to_image = task.config, task.mesh, task.to_image(frozen)
    # Samples are drawn as by config.sample, except for the steps and guidance of config.fid.
    settings, sample_config = config.fid, config.sample.copy_and_resolve_references()
    sample_config.update(steps=settings.steps, cfg_scale=settings.cfg_scale)
    # What the samples are compared with. Only the first process has the reference.
    name = settings.extractor or references.default_extractor(settings.reference)
    weights = settings.weights and files.to_path(settings.weights, "fid.weights")
    extractor = extractors.load(name, weights)
    reference = references.load_for_run(config, settings.reference, extractor)
    logger.info("%s: extractor %s", training_name(config), json.dumps(extractor.identity))
    # The same request for every call, and so for every step of training.
    request = requests.draw(config, "random", settings.num_images, config.seed)
    sample = functools.partial(task.make_sample_fn(sample_config), encoder=frozen.text_encoder)
    extract = extractor.compile(mesh)

    def features(x_0):
        return extract(to_image(x_0))["features"]

    def distance(params):
        moments = metrics.Moments()
        batches = generate.batches(sample, params, request, config.seed, mesh, features)
        for numbers, batch in batches:
            # The last batch may repeat images, which do not count.
            extracted = np.asarray(batch)[: len(numbers)]
            extractors.check_finite({"features": extracted}, numbers)
            moments.add(extracted)

        def measure():
            return metrics.frechet_distance(moments.gaussian(), reference.gaussians["features"])

        return {training_name(config): sharding.broadcast_result(measure)}

    return distance, _describe_settings(sample_config, request, extractor, reference)


def _describe_settings(sample_config, request, extractor, reference):
    """Returns what the distance depends on, as JSON; the same in every process."""
    digest = sharding.broadcast_result(lambda: reference.source.get("digest"))
    sample = sample_config.to_dict()
    settings = {
        "fid": {name: sample.pop(name) for name in ("steps", "cfg_scale")},
        "sample": sample,
        "request": request.digest(),
        "extractor": extractor.identity,
        **({"reference": digest} if digest else {}),  # references of older versions have none
    }
    # As they will be read back: JSON makes lists of tuples.
    return json.loads(json.dumps(settings))


def warn_of_changes(config: ConfigDict, then: dict, now: dict) -> None:
    """Logs the changes of the settings: distances before and after them are not comparable."""
    if changes := describe_changes(then, now):
        name = training_name(config)
        logger.warning(
            "%s is measured with other settings from here on: %s", name, "; ".join(changes)
        )


def describe_changes(then: dict, now: dict, prefix: str = "") -> list[str]:
    """Returns the differences of two settings that `compile_distance` returned, in words.

    Only keys that both have are compared.
    """
    changes = []
    for key, value in now.items():
        name = prefix + key
        if isinstance(value, dict):
            changes += describe_changes(then.get(key) or {}, value, f"{name}.")
        elif key in then and then[key] != value:
            changes.append(f"{name} was {then[key]}, now {value}")
    return changes


def training_name(config: ConfigDict) -> str:
    """Returns the distance's name with its number of images: 'fid5k', 'fid500', 'fd_pixels_5k'."""
    settings = config.fid
    name = settings.extractor or references.default_extractor(settings.reference)
    num = settings.num_images
    count = f"{num // 1000}k" if num % 1000 == 0 else str(num)
    return measures.distance_name(name) + "_" * (name != "inception") + count
