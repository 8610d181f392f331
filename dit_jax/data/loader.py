"""Batches from a source: shuffled and endless for training, or one pass in order.

Each process reads only its own rows of the global batch. The order of records depends only on
(seed, position), so the pipeline state is one number, the index of the next batch. It does not
depend on the number of workers, processes or devices.
"""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from dit_jax.data import pixels, sources
from dit_jax.errors import UserError
from dit_jax.system import stopping

Batch = sources.Batch


@dataclasses.dataclass
class _BatchReader:
    """Reader of this process's part of a batch; picklable, because worker processes run it."""

    gather: Callable[[np.ndarray], Batch]  # record indices [rows] -> batch
    num_images: int
    views: int  # records per image: the image, and with 2 also its mirror image
    seed: int
    flip: bool
    batch_size: int  # of the global batch
    rows: np.ndarray  # this process's rows of the global batch
    captions_per_image: int
    image_features: tuple[str, ...]  # the arrays that are mirrored

    def __call__(self, batch_index: int) -> Batch:
        epochs, positions = np.divmod(batch_index * self.batch_size + self.rows, self.num_images)
        images = np.empty_like(positions)  # image indices
        mirrored = np.zeros(len(positions), bool)
        captions = np.zeros(len(positions), int)  # indices of the drawn captions
        # A batch may span epochs; each epoch has its own permutation and random draws.
        for epoch in range(epochs[0], epochs[-1] + 1):
            within = epochs == epoch
            epoch_args, epoch_positions = (self.seed, epoch, self.num_images), positions[within]
            images[within] = _draw_order(*epoch_args)[epoch_positions]
            if self.flip:
                mirrored[within] = _draw_flips(*epoch_args)[epoch_positions]
            if self.captions_per_image > 1:
                drawn = _draw_captions(*epoch_args, self.captions_per_image)
                captions[within] = drawn[epoch_positions]
        if self.views == 2:  # record 2i is image i, record 2i + 1 its mirror image
            return with_caption(self.gather(2 * images + mirrored), captions)
        batch = with_caption(self.gather(images), captions)
        if self.flip:
            for feature in self.image_features:
                batch[feature][mirrored] = pixels.mirror(batch[feature][mirrored])
        return batch


# NumPy never changes the streams of RandomState, so a resumed run draws the same numbers with any
# NumPy version. The caches below hold two epochs because a batch may span two.
@functools.lru_cache(maxsize=2)
def _draw_order(seed, epoch, size):
    """Draws the image index at each position of an epoch, [size]."""
    return np.random.RandomState([seed, 0, epoch]).permutation(size)


@functools.lru_cache(maxsize=2)
def _draw_flips(seed, epoch, size):
    """Draws whether the image at each position of an epoch is mirrored, [size] bool."""
    return np.random.RandomState([seed, 1, epoch]).rand(size) < 0.5


@functools.lru_cache(maxsize=2)
def _draw_captions(seed, epoch, size, count):
    """Draws the caption index in 0..count-1 at each position of an epoch, [size]."""
    return np.random.RandomState([seed, 2, epoch]).randint(count, size=size)


def with_caption(batch: Batch, caption: np.ndarray | int = 0) -> Batch:
    """Replaces the K captions of each image, [rows, K, ...], by the caption with this index."""
    captions = {name: batch[name] for name in ("tokens", "context") if name in batch}
    return {**batch, **{name: a[np.arange(len(a)), caption] for name, a in captions.items()}}


def gather(source: Sequence[Batch], indices: Sequence[int]) -> Batch:
    """Returns the examples at these indices, stacked into one batch of arrays."""
    examples = [source[i] for i in indices]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _make_index_batch(indices):
    """Returns a batch that holds only record indices; the devices hold the examples."""
    return {"record": indices.astype(np.int32)}


class _Cache:
    """Host-memory cache of the examples of a source; each example is decoded once."""

    def __init__(self, source):
        self.source = source
        self.is_decoded = np.zeros(len(source), bool)
        self.arrays = None
        self.lock = threading.Lock()  # Grain's reader threads share the cache

    def gather(self, indices):
        with self.lock:
            new = indices[~self.is_decoded[indices]]
            if len(new):
                self._decode(new)
        return {name: array[indices] for name, array in self.arrays.items()}

    def _decode(self, indices):
        batch = gather(self.source, indices)
        if self.arrays is None:  # shapes and dtypes are only known from the first examples
            shapes = {name: (len(self.source), *a.shape[1:]) for name, a in batch.items()}
            self.arrays = {n: np.empty(shape, batch[n].dtype) for n, shape in shapes.items()}
        for name, array in batch.items():
            self.arrays[name][indices] = array
        self.is_decoded[indices] = True

    def __reduce__(self):  # without the arrays: a worker process starts with an empty cache
        return _Cache, (self.source,)


def _begin_worker(*_):
    stopping.end_with_parent()


class TrainIterator:
    """Endless iterator over batches of this process's rows, reshuffled in every epoch.

    Args:
      rows: this process's rows of the global batch, from `sharding.local_rows`.
      state: the `state()` of an earlier iterator over the same data and seed, which this iterator
        continues.
    Raises: ValueError if `state` has another dataset size, or if `data.flip` is set for moments
      without mirror images.
    """

    def __init__(self, source: sources.Source, config, rows: np.ndarray, state: dict | None = None):
        # The order of the records depends on their number, so a resumed run needs the same number.
        num_images = len(source) // source.views
        self._num_records = len(source)
        self._next_batch = 0
        if state is not None:
            if state["num_records"] != len(source):
                raise UserError(
                    f"{source.origin} has {len(source)} records, but the run began with "
                    f"{state['num_records']}: the data order would differ. Restore the dataset, "
                    "or begin a new workdir."
                )
            self._next_batch = state["next_batch"]
        if config.data.flip and source.kind == "moments" and source.views == 1:
            raise UserError(
                f"data.flip mirrors images before the VAE, but {source.origin} holds no mirrors. "
                "Encode with data.flip, or set data.flip=False."
            )
        if source.on_device:
            gather_records = _make_index_batch
        elif config.data.cache:
            gather_records = _Cache(source).gather
        else:
            gather_records = functools.partial(gather, source)
        read_batch = _BatchReader(
            gather_records,
            num_images,
            source.views,
            config.seed,
            config.data.flip,
            config.batch_size,
            rows,
            source.annotations.captions_per_image,
            ("image", *source.annotations.images),
        )
        # The elements of Grain's dataset are batch indices, so any batch can be the first.
        options = grain.ReadOptions(
            num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch_batches
        )
        batches = grain.MapDataset.range(self._next_batch, sys.maxsize).map(read_batch)
        batches = batches.to_iter_dataset(options)
        if config.data.num_workers:
            # Grain's workers need parsed absl flags, and only a command parses them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # Started now, because its start unblocks the signals that __next__ blocks.
            resource_tracker.ensure_running()
            options = grain.MultiprocessingOptions(config.data.num_workers)
            batches = batches.mp_prefetch(options, _begin_worker)
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # The first call starts the workers, which must get no signals.
        with stopping.block_signals():
            batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def state(self) -> dict[str, int]:
        """Returns the state for a checkpoint, as JSON values; equal in all processes."""
        return {"next_batch": self._next_batch, "num_records": self._num_records}


def eval_batches(
    source: sources.Source, batch_size: int, rows: np.ndarray, num_images: int | None = None
) -> Iterator[Batch]:
    """Yields the batches of one pass in order, with 'weight' [rows] f32.

    Record 0 fills up the last batch; the weight is 0 in these rows and 1 elsewhere.
    Args: num_images, the number of images to read, from the first on; None for all.
    """
    num_images = num_images or len(source) // source.views
    for start in range(0, num_images, batch_size):
        # All batches have the same shape, so that a jitted function is compiled once.
        within = start + rows < num_images
        batch = gather(source, source.views * np.where(within, start + rows, 0))
        yield {**with_caption(batch), "weight": within.astype(np.float32)}
