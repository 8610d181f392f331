"""References for samples: statistics and features of real images."""

import dataclasses
import hashlib
import json
import logging
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from dit_jax import conditions, sharding, workdirs
from dit_jax.config import sizes
from dit_jax.errors import MissingFileError, UserError, UserFileError
from dit_jax.evaluation import extractors, image_progress, image_sets, metrics
from dit_jax.evaluation.extractors import Extractor
from dit_jax.system import files, json_files, npz_files, schemas
from dit_jax.workdirs import identity

logger = logging.getLogger("dit_jax")

FORMS = f"{image_sets.FORMS}; or an .npz that the ADM evaluator or --make_reference wrote"
MAX_FEATURES = 10_000  # kept for precision, recall and KID, as many as in the ADM evaluator
BATCH_PER_DEVICE = 64
# Features with a Frechet distance -> names of mean and covariance in files, also in ADM's.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# The form of the metadata that `Reference.save` writes.
METADATA = {
    "extractor": schemas.object_of({"name": schemas.is_string, "dtype": schemas.is_string}),
    "source": schemas.object_of(
        {
            "name": schemas.is_string,
            "num_images": schemas.optional(schemas.is_count),
            "image_size": sizes.is_size,
            "image_channels": schemas.is_count,
        }
    ),
}
METADATA_EXPECTED = "what --make_reference writes: make the reference again"
ADM_KEYS = {"arr_0", *(key for keys in MOMENTS.values() for key in keys)}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics and features of real images, computed by one extractor."""

    extractor: dict[str, str]  # the extractor's identity
    source: dict  # name, num_images (None: unknown), image_size, image_channels, digest
    gaussians: dict[str, metrics.Gaussian]  # 'features'; with inception also 'spatial'
    features: np.ndarray  # [M, D] f32 of at most MAX_FEATURES of the images, spread evenly
    labels: np.ndarray | None  # [M]
    class_names: tuple[str, ...] | None = None  # of the labels, in order; None without names

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless samples of this shape can be compared with the reference."""
        expected = *sizes.sides(self.source["image_size"]), self.source["image_channels"]
        if shape != expected:
            raise UserError(
                f"the samples are {sizes.show(shape)}, but the reference "
                f"{files.printable(self.source['name'])} was made of images "
                f"{sizes.show(expected)}. Make it again with the --image_size and "
                "--image_channels of the samples."
            )

    def save(self, path: pathlib.Path) -> None:
        """Writes the reference to an .npz that `load` reads.   Raises: OSError."""
        arrays = {"features": self.features}
        for kind, gaussian in self.gaussians.items():
            mean, covariance = MOMENTS[kind]
            arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
        if self.labels is not None:
            arrays["labels"] = self.labels
        metadata = {"extractor": self.extractor, "source": self.source}
        if self.class_names:
            metadata["class_names"] = self.class_names
        arrays["metadata"] = json.dumps(metadata)
        try:
            files.replace(path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise UserFileError(f"cannot write {files.printable(path)}: {error}") from error


def default_extractor(spec: str | None) -> str:
    """Returns the name of a reference's extractor: inception for images, pixels without `spec`.

    Raises: FileNotFoundError or ValueError as `load`, in all processes.
    """

    def read():
        path = files.to_path(spec, "reference")
        if path.suffix == ".npz":
            _, metadata = _open(path)
            return metadata["extractor"]["name"] if metadata else "inception"
        if not path.is_dir() and ":" not in spec:
            raise MissingFileError(f"no reference {files.printable(spec)!r}: it must be {FORMS}.")
        return "inception"

    return sharding.in_every_process(read) if spec else "pixels"


def load_for_run(
    config: ConfigDict,
    spec: str | None,
    extractor: Extractor,
    progress: bool = False,
    workdir: pathlib.Path | None = None,
) -> Reference | None:
    """Loads the reference for a run's samples; without `spec`, of the training images.

    Only the first process loads the reference. The others return None.
    Args: workdir, of the run; without `spec`, the images are compared with those it records.
    Raises: as `load` and `Reference.check`, in all processes.
    """

    def read():
        if jax.process_index() != 0:
            return None
        data = config.data
        if spec:
            arguments = data.image_size, data.image_channels, data.data_dir, progress
            reference = load(spec, extractor, *arguments)
        else:
            source = conditions.open_images(config, data.train_split)
            if workdir:
                recorded = identity.get_training_images(workdirs.load_data(workdir))
                identity.check(source, recorded, f"the run in {workdir}")
            images = image_sets.from_source(source, f"{data.name}:{data.train_split}")
            reference = from_images(images, extractor, progress)
        reference.check(sizes.image_shape(data))
        return reference

    return sharding.in_every_process(read)


def load(
    spec: str,
    extractor: Extractor,
    image_size: sizes.Size | None = None,
    channels: int = 3,
    data_dir: str = "",
    progress: bool = False,
) -> Reference:
    """Loads a reference that `save` or the ADM evaluator wrote, or makes one of images.

    Uses only this process's devices.
    Args: spec, in one of the FORMS; the others as for `image_sets.open_images`.
    Raises: FileNotFoundError; ValueError for a file of another extractor or with other arrays.
    """
    path = files.to_path(spec, "reference")
    if path.suffix != ".npz":
        images = image_sets.open_images(spec, image_size, channels, data_dir)
        if images.num > 2 * MAX_FEATURES:
            logger.info("%s: --make_reference saves the features of %d images", spec, images.num)
        return from_images(images, extractor, progress)
    members, metadata = _open(path)
    if metadata:
        return _read(path, members, metadata, extractor)
    # A file of images has none of the moments in an ADM reference.
    if "arr_0" in members and not members.keys() & (ADM_KEYS - {"arr_0"}):
        return from_images(image_sets.open_npz(path), extractor, progress)
    return _read_adm(path, members, extractor, progress)


def _open(path):
    """Returns the descriptions of the arrays in an .npz, and its metadata or None."""
    if not path.is_file():
        raise MissingFileError(f"no reference {files.printable(path)}.")
    members = npz_files.describe_npz(path)
    if "metadata" not in members:
        return members, None
    name = f"the metadata in {files.printable(path)}"
    text = str(npz_files.read_npz(path, ["metadata"])["metadata"])
    metadata = json_files.parse_json(text, name, METADATA_EXPECTED)
    if not schemas.object_of(METADATA)(metadata):
        raise UserError(f"{name} lack values or have others. It must be {METADATA_EXPECTED}.")
    return members, metadata


def _read(path, members, metadata, extractor):
    """Reads the reference in a file that `Reference.save` wrote."""
    name = files.printable(path)
    if metadata["extractor"] != extractor.identity:
        raise UserError(
            f"{name} is of another extractor than the samples': {metadata['extractor']}, not "
            f"{extractor.identity}. Make the reference again with --make_reference."
        )
    if missing := [key for key in ("features", *MOMENTS["features"]) if key not in members]:
        raise UserError(
            f"{name} has lost its {', '.join(missing)}: make it again with --make_reference."
        )
    # The file may be damaged or made by hand, so the moments are compared with the features.
    arrays = npz_files.read_npz(path, members.keys() & {"features", "labels"})
    features, labels, source = arrays["features"], arrays.get("labels"), metadata["source"]
    if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise UserError(
            f"features in {name} are {features.dtype} {list(features.shape)}, but must be finite "
            "numbers [M, D]. Make the reference again with --make_reference."
        )
    if labels is not None:
        image_sets.check_labels(labels, len(features), f"labels in {name}")
    dims = {"features": features.shape[1]}
    gaussians = _read_gaussians(path, members, dims, extractor, source["num_images"])
    means = {"features": features.mean(axis=0, dtype=np.float64)}
    _check_sample(path, gaussians, means, len(features))
    class_names = metadata.get("class_names")
    class_names = tuple(map(str, class_names)) if isinstance(class_names, list) else None
    return Reference(metadata["extractor"], source, gaussians, features, labels, class_names)


def _read_adm(path, members, extractor, progress):
    """Reads the ADM evaluator's reference: moments of all images, and a sample of the images."""
    name = files.printable(path)
    if not members.keys() >= ADM_KEYS:
        raise UserError(
            f"{name} holds {files.list_some(sorted(members))}. A reference of the ADM evaluator "
            f"holds {', '.join(sorted(ADM_KEYS))}. Other moments do not tell how their images were "
            "resized. Make a reference of the images with --make_reference."
        )
    if extractor.name != "inception" or extractor.dtype != "float32":
        raise UserError(
            f"{name} has the ADM evaluator's moments, of inception in float32. Features of "
            f"{extractor.name} in {extractor.dtype} cannot be compared with them."
        )
    # The features of the images in the file must have means near the means in the file.
    images = image_sets.open_npz(path)
    shape = jax.ShapeDtypeStruct((1, *images.shape), np.uint8)
    features = jax.eval_shape(extractor.apply, extractor.params, shape)
    dims = {kind: features[kind].shape[1] for kind in MOMENTS}
    gaussians = _read_gaussians(path, members, dims, extractor, None)
    sample = from_images(images, extractor, progress)
    means = {kind: gaussian.mean for kind, gaussian in sample.gaussians.items()}
    _check_sample(path, gaussians, means, images.num)
    # The moments cover all images; arr_0 is only a sample of them.
    source = sample.source | {"num_images": None, "digest": images.digest}
    return dataclasses.replace(sample, source=source, gaussians=gaussians)


def _read_gaussians(path, members, dims, extractor, num_images):
    """Reads and checks {kind: moments} in a file; dims is {kind: number of features}."""
    gaussians = {}
    for kind, keys in MOMENTS.items():
        if not members.keys() >= set(keys):
            continue
        mean, covariance = npz_files.read_npz(path, keys).values()
        try:
            metrics.check_gaussian(mean, covariance, dims.get(kind, mean.size))
        except ValueError as error:
            raise UserError(
                f"{' and '.join(keys)} in {files.printable(path)} are no moments of {kind} of "
                f"{extractor.name}: {error}. Get or make the file again."
            ) from error
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        gaussians[kind] = metrics.Gaussian(mean, covariance, num_images)
    return gaussians


def _check_sample(path, gaussians, means, num):
    """Raises ValueError unless the means of `num` images are near the means of all images."""
    for kind, mean in means.items():
        deviation = np.sqrt(np.diag(gaussians[kind].covariance))
        varies = deviation > 0
        shifts = np.abs(mean - gaussians[kind].mean)[varies] / deviation[varies]
        # On average, a sample's mean is 0.8 / sqrt(num) deviations from the mean of all images.
        if varies.any() and (shift := shifts.mean()) > 0.25 + 2 / np.sqrt(num):
            raise UserError(
                f"{MOMENTS[kind][0]} in {files.printable(path)} is {shift:.2f} deviations "
                f"from the mean of {num:,} of its images, on average over the {kind}. The moments "
                "are of other images or of another extractor. Get or make the file again."
            )


def from_images(
    images: image_sets.ImageSet, extractor: Extractor, progress: bool = False
) -> Reference:
    """Computes the reference of all images of a set, with this process's devices.

    Raises: FloatingPointError for features that are not finite.
    """
    # The moments are of all images. Features are kept of MAX_FEATURES images, spread evenly.
    num_kept = min(MAX_FEATURES, images.num)
    keep = np.zeros(images.num, bool)
    keep[np.arange(num_kept) * images.num // num_kept] = True
    moments = {kind: metrics.Moments() for kind in MOMENTS}
    features, labels, digest = [], [], hashlib.sha256()
    batch_size = BATCH_PER_DEVICE * jax.local_device_count()
    with image_progress.ImageProgress(images.num, 0, progress, "reference") as bar:
        for indices, block, extracted in extractors.extract(extractor, images, batch_size):
            extractors.check_finite(extracted, indices)
            for kind in moments.keys() & extracted.keys():
                moments[kind].add(extracted[kind])
            keep_in_block = keep[indices.start : indices.stop]
            features.append(extracted["features"][keep_in_block])
            if "label" in block:
                labels.append(block["label"][keep_in_block])
            digest.update(block["image"])
            bar.update(len(indices))
    *size, channels = images.shape
    source = {
        "name": images.name,
        "num_images": images.num,
        "image_size": sizes.to_json(size),
        "image_channels": channels,
        "crop": "adm",  # of images that do not have this size
        "digest": digest.hexdigest()[:16],
    }
    gaussians = {kind: moments[kind].gaussian() for kind in MOMENTS if kind in extracted}
    features, labels = np.concatenate(features), np.concatenate(labels) if labels else None
    return Reference(extractor.identity, source, gaussians, features, labels, images.class_names)
