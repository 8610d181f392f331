"""What samples are compared with: the statistics and features of real images, or a file of them."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import zipfile
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from dit_jax import data, fid, files, images, metrics, sharding, sources
from dit_jax.extractors import Extractor

logger = logging.getLogger("dit_jax")

FORMS = f"{images.FORMS}; or an .npz that the ADM evaluator or --make_reference wrote"
MAX_FEATURES = 10_000  # that are kept, for precision, recall and KID; the evaluator of ADM's number
BATCH_PER_DEVICE = 64
# What the distances are between, and the names of its moments in files, ADM's and ours.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ADM_KEYS = {"arr_0", *(key for keys in MOMENTS.values() for key in keys)}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Real images as an extractor sees them."""

    extractor: dict[str, str]  # its identity
    source: dict  # name, num_images (None: not known), image_size, image_channels, digest
    gaussians: dict[str, fid.Gaussian]  # 'features', and of inception 'spatial'
    features: np.ndarray  # [M, D] f32 of at most MAX_FEATURES of the images, spread evenly
    labels: np.ndarray | None  # [M]

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises: ValueError if samples [height, width, channels] are of another shape."""
        size, channels = self.source["image_size"], self.source["image_channels"]
        if shape != (size, size, channels):
            raise ValueError(
                f"the samples are {'x'.join(map(str, shape))}, but the reference "
                f"{self.source['name']} was made of images {size}x{size}x{channels}: make one of "
                "the samples' size, with --image_size and --image_channels."
            )

    def save(self, path: pathlib.Path) -> None:
        """Writes an .npz that `load` reads.   Raises: OSError."""
        arrays = {"features": self.features}
        for kind, gaussian in self.gaussians.items():
            mean, covariance = MOMENTS[kind]
            arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
        if self.labels is not None:
            arrays["labels"] = self.labels
        arrays["metadata"] = json.dumps({"extractor": self.extractor, "source": self.source})
        try:
            files.replace(path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def default_extractor(spec: str | None) -> str:
    """The extractor of the file `spec`; of other images inception; without any, pixels.

    Raises: FileNotFoundError or ValueError as `load`, in all processes.
    """

    def read():
        path = files.to_path(spec, "reference")
        if path.suffix == ".npz":
            _, metadata = _open(path)
            return metadata["extractor"]["name"] if metadata else "inception"
        if not path.is_dir() and ":" not in spec:
            raise FileNotFoundError(f"no reference {spec!r}: it must be {FORMS}.")
        return "inception"

    return sharding.together(read) if spec else "pixels"


def of_run(
    config: ConfigDict, spec: str | None, extractor: Extractor, progress: bool = False
) -> Reference | None:
    """The reference of a run's samples: `spec`'s, by default its training images.

    In the first process; None in the others.
    Raises: as `load` and `Reference.check`, in all processes.
    """

    def read():
        if jax.process_index() != 0:
            return None
        keys = config.data
        if spec:
            given = keys.image_size, keys.image_channels, keys.data_dir
            reference = load(spec, extractor, *given, progress)
        else:
            source = sources.open_images(config, keys.train_split)
            found = images.of_source(source, f"{keys.name}:{keys.train_split}")
            reference = of_images(found, extractor, progress)
        reference.check((keys.image_size, keys.image_size, keys.image_channels))
        return reference

    return sharding.together(read)


def load(
    spec: str,
    extractor: Extractor,
    image_size: int | None = None,
    channels: int = 3,
    data_dir: str = "",
    progress: bool = False,
) -> Reference:
    """The reference in an .npz that `save` or ADM wrote, or of the images that `spec` names.

    On this process's devices alone. Arguments as `images.open_images`, for a folder or a split.
    Raises: FileNotFoundError; ValueError for a file of another extractor or other keys, or as
      `images.open_images`.
    """
    path = files.to_path(spec, "reference")
    if path.suffix != ".npz":
        found = images.open_images(spec, image_size, channels, data_dir)
        if found.num > 2 * MAX_FEATURES:
            logger.info("%s: --make_reference extracts these %d images once", spec, found.num)
        return of_images(found, extractor, progress)
    keys, metadata = _open(path)
    if metadata:
        return _read(path, metadata, extractor)
    if "arr_0" in keys and not keys & (ADM_KEYS - {"arr_0"}):  # images, with labels or not
        return of_images(images.open_npz(path), extractor, progress)
    if not keys >= ADM_KEYS:
        raise ValueError(
            f"{path} holds {', '.join(sorted(keys))}. A reference is the ADM evaluator's, with "
            f"{', '.join(sorted(ADM_KEYS))}, or one that --make_reference wrote of the images: "
            "moments alone do not tell how images were resized for them."
        )
    if extractor.name != "inception" or extractor.dtype != "float32":
        raise ValueError(
            f"{path} has the ADM evaluator's moments, of inception in float32, which cannot be "
            f"compared with features of {extractor.name} in {extractor.dtype}."
        )
    found = images.open_npz(path)
    sample = of_images(found, extractor, progress)
    gaussians = {}
    with np.load(path) as file:
        for kind, keys in MOMENTS.items():
            mean, covariance = (np.asarray(file[key], np.float64) for key in keys)
            gaussians[kind] = fid.Gaussian(mean, covariance, None)
    # The moments are those of all the images; arr_0 is a sample of them.
    source = sample.source | {"num_images": None, "digest": found.digest}
    reference = dataclasses.replace(sample, source=source, gaussians=gaussians)
    return _checked(reference, path, sample.gaussians)


def _open(path):
    """(keys, our metadata or None) of an .npz."""
    if not path.is_file():
        raise FileNotFoundError(f"no reference {path}.")
    try:
        with np.load(path) as file:
            metadata = json.loads(str(file["metadata"])) if "metadata" in file.files else None
            return set(file.files), metadata
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no .npz: {error}.") from error


def _read(path, metadata, extractor):
    if metadata["extractor"] != extractor.identity:
        raise ValueError(
            f"{path} is of another extractor than the samples': it has {metadata['extractor']}, "
            f"the samples' is {extractor.identity}. Make the reference again with --make_reference."
        )
    with np.load(path) as file:
        gaussians = {
            kind: fid.Gaussian(file[mean], file[covariance], metadata["source"]["num_images"])
            for kind, (mean, covariance) in MOMENTS.items()
            if mean in file.files
        }
        if "features" not in file.files:
            raise ValueError(f"{path} has lost its features: make it again with --make_reference.")
        labels = file["labels"] if "labels" in file.files else None
        features = file["features"]
    reference = Reference(metadata["extractor"], metadata["source"], gaussians, features, labels)
    return _checked(reference, path)


def _checked(reference, path, expected=None):
    """The reference, if its moments are numbers and fit the features, or the `expected` ones."""
    dims = {kind: len(gaussian.mean) for kind, gaussian in (expected or {}).items()}
    dims["features"] = reference.features.shape[1]
    for kind, gaussian in reference.gaussians.items():
        dim = dims.get(kind, len(gaussian.mean))
        shapes = gaussian.mean.shape, gaussian.covariance.shape
        finite = np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()
        if shapes != ((dim,), (dim, dim)) or not finite:
            raise ValueError(
                f"{' and '.join(MOMENTS[kind])} in {path} are {shapes[0]} and {shapes[1]}, "
                f"{'' if finite else 'with values that are NaN or infinite, '}but {kind} of "
                f"{reference.extractor['name']} have {dim} dimensions. Get or make it again."
            )
    return reference


def of_images(found: images.ImageSet, extractor: Extractor, progress: bool = False) -> Reference:
    """The reference of all images of a set, by this process's devices.

    Raises: FloatingPointError for features that are not finite.
    """
    batch_size = BATCH_PER_DEVICE * jax.local_device_count()
    kept = min(MAX_FEATURES, found.num)
    keep = np.zeros(found.num, bool)
    keep[np.arange(kept) * found.num // kept] = True
    moments, features, labels, digest = Moments(), [], [], hashlib.sha256()
    blocks, start = found.blocks(batch_size), 0
    with metrics.ImageProgress(found.num, 0, progress, "reference") as bar:
        for block, extracted in extract_blocks(extractor, blocks, batch_size):
            numbers = range(start, start + len(block["image"]))
            start = numbers.stop
            check_finite(extracted, numbers)
            moments.add(extracted)
            chosen = keep[numbers.start : numbers.stop]
            features.append(extracted["features"][chosen])
            labels.append(block["label"][chosen] if "label" in block else None)
            digest.update(block["image"])
            bar.update(len(numbers))
    height, _, channels = found.shape
    source = {
        "name": found.name,
        "num_images": found.num,
        "image_size": height,
        "image_channels": channels,
        "crop": "adm",  # of what is not of this size
        "digest": digest.hexdigest()[:16],
    }
    labels = None if labels[0] is None else np.concatenate(labels)
    return Reference(
        extractor.identity, source, moments.gaussians(), np.concatenate(features), labels
    )


class Moments:
    """The moments of a stream of features, of each kind that distances are taken of.

    Some thousand rows are added at once: a merge takes as long as hundreds of rows.
    """

    def __init__(self):
        self._waiting = {kind: [] for kind in MOMENTS}
        self._statistics = {}

    def add(self, extracted: dict[str, np.ndarray]) -> None:
        """Adds the features [B, D] of some images."""
        for kind, waiting in self._waiting.items():
            if kind in extracted:
                waiting.append(extracted[kind])
                if sum(map(len, waiting)) >= fid.ROWS:
                    self._flush(kind)

    def _flush(self, kind):
        block = fid.Statistics.of_blocks(self._waiting[kind])
        before = self._statistics.get(kind)
        self._statistics[kind] = before.merge(block) if before else block
        self._waiting[kind].clear()

    def gaussians(self) -> dict[str, fid.Gaussian]:
        """Kind -> mean and covariance of all that was added."""
        for kind, waiting in self._waiting.items():
            if waiting:
                self._flush(kind)
        return {kind: statistics.gaussian for kind, statistics in self._statistics.items()}


def extract_blocks(
    extractor: Extractor, blocks: Iterable[data.Batch], batch_size: int
) -> Iterator[tuple[data.Batch, dict[str, np.ndarray]]]:
    """(block, features) of blocks of at most batch_size images, by this process's devices.

    They compute the next block while one is dealt with.
    """
    mesh = sharding.local_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    extract, previous = extractor.compile(mesh), None

    def finished(block, extracted):
        count = len(block["image"])
        return block, {name: np.asarray(array)[:count] for name, array in extracted.items()}

    for block in blocks:
        image = np.resize(block["image"], (batch_size, *block["image"].shape[1:]))
        current = block, extract(sharding.put_batch(mesh, {"image": image})["image"])
        if previous:
            yield finished(*previous)
        previous = current
    if previous:
        yield finished(*previous)


def check_finite(extracted: dict[str, np.ndarray], numbers: range) -> None:
    """Raises: FloatingPointError that says of which images the features are not finite."""
    for name, array in extracted.items():
        finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if not finite.all():
            raise FloatingPointError(
                f"{np.sum(~finite)} of the images {numbers[0]} to {numbers[-1]} have {name} that "
                f"are NaN or infinite, first image {numbers[int(finite.argmin())]}. Are the "
                "extractor's weights whole? Convert them again, and compare their digest."
            )
