"""Examples of a source to batches of this process's rows, for training or one pass in order.

The order of records is a function of (seed, position) alone, so the state of the pipeline is one
number, the next batch; it does not depend on worker, process or device counts.
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

from dit_jax.data import sources
from dit_jax.errors import UserError
from dit_jax.system import stopping

Batch = sources.Batch


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
    captions_per_image: int

    def __call__(self, i: int) -> Batch:
        positions = i * self.batch_size + self.rows
        epochs, places = np.divmod(positions, self.num_images)
        indices = np.empty_like(places)
        mirrored = np.zeros(len(places), bool)
        caption = np.zeros(len(places), int)
        for epoch in range(epochs[0], epochs[-1] + 1):
            within = epochs == epoch
            indices[within] = _permutation(self.seed, epoch, self.num_images)[places[within]]
            if self.flip:
                mirrored[within] = _flips(self.seed, epoch, self.num_images)[places[within]]
            if self.captions_per_image > 1:
                drawn = _captions(self.seed, epoch, self.num_images, self.captions_per_image)
                caption[within] = drawn[places[within]]
        if self.views == 2:
            return with_caption(self.gather(2 * indices + mirrored), caption)
        batch = with_caption(self.gather(indices), caption)
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


@functools.lru_cache(maxsize=2)
def _captions(seed, epoch, size, count):
    """Which of its captions the image at every place of an epoch has."""
    return np.random.RandomState([seed, 2, epoch]).randint(count, size=size)


def with_caption(batch: Batch, caption: np.ndarray | int = 0) -> Batch:
    """The batch with one of the captions [rows, K, ...] of each image, by their numbers [rows]."""
    told = {name: batch[name] for name in ("tokens", "context") if name in batch}
    return {**batch, **{name: a[np.arange(len(a)), caption] for name, a in told.items()}}


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


def _begin_worker(*_):
    stopping.end_with_parent()


class TrainIterator:
    """Endless batches of this process's rows, reshuffled every epoch by the seed.

    Args:
      rows: this process's rows of the global batch, as `sharding.local_rows` gives them.
      state: continues after a `state()` of an earlier iterator over the same data and seed.
    Raises: ValueError if the dataset's size differs from the one in `state`.
    """

    def __init__(self, source: sources.Source, config, rows: np.ndarray, state: dict | None = None):
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
                f"data.flip mirrors images before the VAE, but {source.origin} holds no mirrors: "
                "encode with data.flip, or set it to False."
            )
        examples = functools.partial(gather, source)
        if source.on_device:
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
            source.annotations.captions_per_image,
        )
        options = grain.ReadOptions(
            num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch_batches
        )
        batches = grain.MapDataset.range(self._next_batch, sys.maxsize).map(read)
        batches = batches.to_iter_dataset(options)
        if config.data.num_workers:
            if not flags.FLAGS.is_parsed():  # outside a command Grain's workers need them marked
                flags.FLAGS.mark_as_parsed()
            resource_tracker.ensure_running()  # while it starts it unblocks signals
            options = grain.MultiprocessingOptions(config.data.num_workers)
            batches = batches.mp_prefetch(options, _begin_worker)
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with stopping.Blocked():  # the first one starts the worker processes
            batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: JSON, the same in every process."""
        return {"next_batch": self._next_batch, "num_records": self._num_records}


def eval_batches(
    source: sources.Source, batch_size: int, rows: np.ndarray, num_images: int | None = None
) -> Iterator[Batch]:
    """One pass in order; the last batch repeats record 0 where 'weight' [rows] f32 is 0.

    Args: num_images, the first so many; None is all.
    """
    num_images = num_images or len(source) // source.views
    for start in range(0, num_images, batch_size):
        within = start + rows < num_images
        batch = gather(source, source.views * np.where(within, start + rows, 0))
        yield {**with_caption(batch), "weight": within.astype(np.float32)}
