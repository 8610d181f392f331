"""Images or latent moments from a TFDS dataset or an image folder to batches on the mesh.

The order of records is a function of (seed, position) alone, so the state of the pipeline is one
number, the next batch; it does not depend on worker, process or device counts.
"""

import dataclasses
import functools
import io
import logging
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags
from PIL import Image

DATASETS = ("digits", "openmoji")  # modules of dit_jax.datasets
logger = logging.getLogger("dit_jax")

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
Batch = dict[str, np.ndarray]


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The published centre crop: halve with BOX, resize the shorter side with BICUBIC, cut.

    Source: Dhariwal & Nichol 2021 (ADM); every published DiT number was made with it.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to decoded examples: 'image' [S, S, C] uint8 or 'moments' f16; 'label' int32.

    `records[i]` holds encoded image bytes, or moments, and a label; `describe(i)` names it in
    errors.
    """

    records: Sequence
    kind: str  # 'image' or 'moments'
    image_size: int
    image_channels: int
    num_classes: int | None  # None: labels mean nothing to the model
    origin: str
    views: int = 1  # records of an image in a row: itself, and with 2 its mirror
    metadata: dict = dataclasses.field(default_factory=dict)  # of moments: what `encode` recorded

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        record = self._record(index)
        label = int(record["label"])
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ValueError(
                f"label {label} of {self.describe(index)} lies outside 0..{self.num_classes - 1}; "
                "set model.num_classes to the number of classes in the data."
            )
        example = {"label": np.int32(label)}
        if self.kind == "moments":
            return {"moments": np.asarray(record["moments"], np.float16), **example}
        file = io.BytesIO(record["image"])
        try:
            image = Image.open(file)
            if min(image.size) < self.image_size:
                _warn_of_small_images(self.origin, self.image_size)
            image = _to_8_bits(image).convert({1: "L", 3: "RGB"}[self.image_channels])
            image = adm_crop(image, self.image_size)
        # Pillow's decoders raise whatever they meet in a damaged file.
        except Exception as error:
            reason = str(error).replace(f" {file!r}", "")
            raise ValueError(
                f"cannot read the image of {self.describe(index)}: {reason}. Remove or repair it."
            ) from error
        shape = (self.image_size, self.image_size, self.image_channels)
        return {"image": np.asarray(image, np.uint8).reshape(shape), **example}

    def _record(self, index):
        try:
            return self.records[index]
        # array_record and Protocol Buffers have exceptions of their own.
        except Exception as error:
            way_out = "If a shard was cut, remove it and build the dataset again."
            if isinstance(self.records, Folder):
                way_out = "Put the file back: the data order depends on every one of them."
            raise ValueError(f"cannot read {self.describe(index)}: {error}. {way_out}") from error

    def describe(self, index: int) -> str:
        """The file of an image folder, or 'record 3 of <dataset>'."""
        if isinstance(self.records, Folder):
            return str(self.records.files[index])
        return f"record {index} of {self.origin}"


def _to_8_bits(image):
    """16-bit grey as 8-bit grey: Pillow's own conversion makes all but the darkest white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode!r} has no range of values; save it with 8 bits")
    return image


@functools.cache  # once for each dataset
def _warn_of_small_images(origin, image_size):
    logger.warning(
        "%s: some images are smaller than data.image_size=%d; they are enlarged.",
        origin,
        image_size,
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """One class per sub-folder, classes in the order of their sorted names."""

    files: Sequence[pathlib.Path]
    labels: Sequence[int]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": self.files[index].read_bytes(), "label": self.labels[index]}


def open_split(config, split: str) -> Source:
    """What a run with `config.latents.source` trains on or, with split 'eval', is evaluated on.

    Raises: as `open_images` and `open_moments`.
    """
    if config.latents.source in ("pixels", "images"):
        return open_images(config, config.data[f"{split}_split"])
    return open_moments(config, split)


def open_images(config, split: str) -> Source:
    """The images of one split of `config.data`.

    Raises: FileNotFoundError if there is no such dataset, with the way to build it; ValueError
      for an empty or unknown split, or an unknown config value.
    """
    data = config.data
    if data.image_channels not in (1, 3):
        raise ValueError(f"{data.image_channels=} must be 1 (grey) or 3 (RGB).")
    if data.source == "tfds":
        build = _build_command(data.name, data.data_dir)
        builder = _open_tfds(data.name, data.data_dir, "image", build)
        records, origin = _read_split(builder, split, "image", build)
    elif data.source == "folder":
        records, origin = _open_folder(pathlib.Path(data.name) / split)
    else:
        raise ValueError(f"data.source={data.source!r} is unknown; choose tfds or folder.")
    if not len(records):
        raise ValueError(f"{origin} is empty.")
    size, channels = data.image_size, data.image_channels
    return Source(records, "image", size, channels, config.model.get("num_classes"), origin)


def open_moments(config, split: str) -> Source:
    """The moments of one split, 'train' or 'eval', that `dit_jax.encode` wrote.

    Raises: FileNotFoundError if there is no such dataset; ValueError for an empty split, moments
      of another shape than the model takes, or moments that something has scaled.
    """
    name = config.latents.moments
    build = "python -m dit_jax.encode --config ... --vae ... --out ..."
    builder = _open_tfds(name, config.data.data_dir, "moments", build)
    records, origin = _read_split(builder, split, "moments", build)
    if not len(records):
        raise ValueError(f"{origin} is empty.")
    model, shape = config.model, tuple(builder.info.features["moments"].shape)
    wanted = (model.input_size, model.input_size, 2 * model.in_channels)
    if shape != wanted:
        raise ValueError(
            f"{origin} holds moments {shape}, but the model takes {wanted}: [h, w, 2C] by "
            f"model.input_size={model.input_size}, model.in_channels={model.in_channels}."
        )
    metadata = dict(builder.info.metadata or {})
    size, channels = config.data.image_size, config.data.image_channels
    views = 2 if metadata.get("mirrored") else 1
    source = Source(records, "moments", size, channels, model.num_classes, origin, views, metadata)
    if metadata:
        numbers = np.linspace(0, len(source) - 1, min(len(source), 256)).astype(int)
        means = gather(source, numbers)["moments"][..., : model.in_channels]
        found, recorded = float(np.abs(means).mean(dtype=np.float64)), metadata["mean_absolute"]
        if not recorded / 1.25 < found < recorded * 1.25:
            raise ValueError(
                f"the means in {origin} are {found:.3g} large on average, but were written as "
                f"{recorded:.3g}: they may have been scaled already. Encode the images again."
            )
    return source


def _build_command(name, data_dir):
    dataset, _, size = name.partition("/")
    if dataset in DATASETS:
        options = f" --size {size}" * bool(size) + f" --data_dir {data_dir}" * bool(data_dir)
        return f"python -m dit_jax.datasets.{dataset}{options}"
    return f"tfds build {name} --file_format=array_record" + f" --data_dir={data_dir}" * bool(
        data_dir
    )


def _open_tfds(name, data_dir, feature, build):
    """The builder of a prepared dataset, by name or directory."""
    # Importing it takes most of a second, and image folders do without.
    import tensorflow_datasets as tfds

    directory = pathlib.Path(name).expanduser()
    known = True
    try:
        if (directory / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(directory)
        else:
            builder = tfds.builder(name, data_dir=data_dir or None)
        prepared = pathlib.Path(builder.data_dir).is_dir()
    except (tfds.core.DatasetNotFoundError, ModuleNotFoundError, ValueError):
        known = name.partition("/")[0] in DATASETS or feature == "moments"
        prepared = False
    if not prepared:
        way_out = f"Build it with `{build}`, or set" if known else "Set"
        raise FileNotFoundError(
            f"no prepared TFDS dataset {name!r} in {data_dir or tfds.core.constants.DATA_DIR}"
            f". {way_out} data.data_dir, or the name to the directory of a prepared dataset."
        )
    if feature not in builder.info.features:
        found = ", ".join(builder.info.features)
        raise ValueError(
            f"dataset {name!r} has no feature {feature!r}, only {found}; check latents.source."
        )
    return builder


def _read_split(builder, split, feature, build):
    """(records, origin) of a split or a slice of one."""
    import tensorflow_datasets as tfds

    name = builder.info.name
    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError):  # no such split, or no such slice
        splits = ", ".join(builder.info.splits)
        raise ValueError(
            f"dataset {name!r} has no split {split!r}; it has {splits}, and slices of them "
            "such as 'train[:90%]'."
        ) from None
    origin = f"split {split!r} of {builder.data_dir}"
    if not num_examples:
        return (), origin
    # The bytes are decoded by us: TFDS would hide the image's mode.
    decoders = {"image": tfds.decode.SkipDecoding()} if feature == "image" else None
    try:
        return builder.as_data_source(split=split, decoders=decoders), origin
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_dir} is in the format {builder.info.file_format.value}, which cannot "
            f"be read at random; build the dataset again, with `{build}`."
        ) from error


def _open_folder(root):
    if not root.is_dir():
        raise FileNotFoundError(
            f"no image folder {root}: data.name is the root, with one folder per split (data."
            "train_split, data.eval_split) that holds one folder of images per class."
        )
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        files += found
        labels += [label] * len(found)
    return Folder(files, labels), f"image folder {root}"


@dataclasses.dataclass
class _BatchReader:
    """Batch i of this process, a function of i alone; picklable, for worker processes."""

    gather: Callable[[np.ndarray], Batch]  # of record numbers [rows]
    num_images: int
    views: int
    seed: int
    flip: bool
    batch_size: int
    rows: np.ndarray

    def __call__(self, i: int) -> Batch:
        positions = i * self.batch_size + self.rows
        epochs, places = np.divmod(positions, self.num_images)
        indices = np.empty_like(places)
        mirrored = np.zeros(len(places), bool)
        for epoch in range(epochs[0], epochs[-1] + 1):
            within = epochs == epoch
            indices[within] = _permutation(self.seed, epoch, self.num_images)[places[within]]
            if self.flip:
                mirrored[within] = _flips(self.seed, epoch, self.num_images)[places[within]]
        if self.views == 2:
            return self.gather(2 * indices + mirrored)
        batch = self.gather(indices)
        if self.flip:
            batch["image"][mirrored] = batch["image"][mirrored][:, :, ::-1]
        return batch


# RandomState's streams are frozen: a resumed run sees these with any NumPy. Batches span epochs.
@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, size):
    """The image at every place of an epoch."""
    return np.random.RandomState([seed, 0, epoch]).permutation(size)


@functools.lru_cache(maxsize=2)
def _flips(seed, epoch, size):
    """Whether the image at every place of an epoch is mirrored."""
    return np.random.RandomState([seed, 1, epoch]).rand(size) < 0.5


def gather(source: Sequence[Batch], indices: Sequence[int]) -> Batch:
    """The examples of these numbers as one batch of arrays."""
    examples = [source[i] for i in indices]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _records(indices):
    """The places of examples that lie on the devices already."""
    return {"record": indices.astype(np.int32)}


class _Cache:
    """The examples of a source as arrays in host memory, each decoded once."""

    def __init__(self, source):
        self.source = source
        self.known = np.zeros(len(source), bool)
        self.arrays = None
        self.lock = threading.Lock()  # several threads read

    def gather(self, indices):
        with self.lock:
            new = indices[~self.known[indices]]
            if len(new):
                self._decode(new)
        return {name: array[indices] for name, array in self.arrays.items()}

    def _decode(self, indices):
        batch = gather(self.source, indices)
        if self.arrays is None:
            shapes = {name: (len(self.known), *a.shape[1:]) for name, a in batch.items()}
            self.arrays = {n: np.empty(shape, batch[n].dtype) for n, shape in shapes.items()}
        for name, array in batch.items():
            self.arrays[name][indices] = array
        self.known[indices] = True

    def __reduce__(self):  # a worker process begins with an empty one
        return _Cache, (self.source,)


class TrainIterator:
    """Endless batches of this process's rows, reshuffled every epoch by the seed.

    Args:
      rows: this process's rows of the global batch, as `sharding.local_rows` gives them.
      state: continues after a `state()` of an earlier iterator over the same data and seed.
    Raises: ValueError if the dataset's size differs from the one in `state`.
    """

    def __init__(self, source: Source, config, rows: np.ndarray, state: dict | None = None):
        num_images = len(source) // source.views
        self._num_records = len(source)
        self._next_batch = 0
        if state is not None:
            if state["num_records"] != len(source):
                raise ValueError(
                    f"{source.origin} has {len(source)} records, but the run began with "
                    f"{state['num_records']}: the data order would differ. Restore the dataset, "
                    "or begin a new workdir."
                )
            self._next_batch = state["next_batch"]
        if config.data.flip and source.kind == "moments" and source.views == 1:
            raise ValueError(
                f"data.flip mirrors images before the VAE, but {source.origin} holds no mirrors: "
                "encode with data.flip, or set it to False."
            )
        examples = functools.partial(gather, source)
        if config.latents.source == "device":
            examples = _records
        elif config.data.cache:
            examples = _Cache(source).gather
        read = _BatchReader(
            examples,
            num_images,
            source.views,
            config.seed,
            config.data.flip,
            config.batch_size,
            rows,
        )
        options = grain.ReadOptions(
            num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch_batches
        )
        batches = grain.MapDataset.range(self._next_batch, sys.maxsize).map(read)
        batches = batches.to_iter_dataset(options)
        if config.data.num_workers:
            if not flags.FLAGS.is_parsed():  # outside a command Grain's workers need them marked
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(config.data.num_workers))
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: JSON, the same in every process."""
        return {"next_batch": self._next_batch, "num_records": self._num_records}


def eval_batches(
    source: Source, batch_size: int, rows: np.ndarray, num_images: int | None = None
) -> Iterator[Batch]:
    """One pass in order; the last batch repeats record 0 where 'weight' [rows] f32 is 0.

    Args: num_images, the first so many; None is all.
    """
    num_images = num_images or len(source) // source.views
    for start in range(0, num_images, batch_size):
        within = start + rows < num_images
        batch = gather(source, source.views * np.where(within, start + rows, 0))
        yield {**batch, "weight": within.astype(np.float32)}
