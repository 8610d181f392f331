"""Store on disk for the images and features of batches, until all are there."""

import io
import logging
import pathlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from dit_jax.errors import UserError, UserFileError
from dit_jax.system import files, npz_files

logger = logging.getLogger("dit_jax")

# The numbers of the first image and of the one after the last, and the CRC-32 of the file.
NAME = re.compile(r"(\d{8,18})-(\d{8,18})-([0-9a-f]{8})\.npz")
MAX_TEXT_BYTES = 4096


class Spool:
    """A directory of batches. Each is written whole, with its checksum in its name.

    A command that was killed continues with the missing images, also those of damaged batches.
    Args: revision, of the code that makes the batches. Those of different revisions are not mixed.
    Raises: OSError if something cannot be written, in any method that writes.
    """

    def __init__(self, directory: pathlib.Path, revision: str):
        self.directory, self.revision = directory, revision
        self._form = {}  # name -> (shape for one image, dtype) of the arrays on disk

    def _accepts(self, form):
        """Returns whether arrays have the other batches' form, which may lack 'image'."""
        same = all(self._form.get(name, value) == value for name, value in form.items())
        return same and (not self._form or form.keys() ^ self._form.keys() <= {"image"})

    def find_missing(self, num_images: int) -> list[range]:
        """Returns the numbers of the missing images as ranges, in order; checks all batches.

        Raises: ValueError if the batches were made by another revision of the code.
        """
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise UserFileError(f"cannot write to {self.directory}: {error}") from error
        missing, done = [], 0
        for numbers, path in self._files():
            # Batches must neither overlap nor go beyond the last image.
            within = done <= numbers.start and numbers.stop <= num_images
            if not (within and self._is_whole(path, len(numbers))):
                logger.warning("%s is damaged: its images are made again.", path)
                path.unlink()
                continue
            missing.append(range(done, numbers.start))
            done = numbers.stop
        missing = [part for part in [*missing, range(done, num_images)] if part]
        if (num_left := sum(map(len, missing))) < num_images:
            logger.info("continuing after %d images: %s", num_images - num_left, self.directory)
        return missing

    def _is_whole(self, path, count):
        """Returns whether a batch is undamaged, has `count` images, and has the others' arrays."""
        if NAME.fullmatch(path.name)[3] != f"{_crc(path):08x}":
            return False
        try:
            arrays, saved = npz_files.describe_npz(path), _read_text(path, "revision")
        except ValueError:
            return False
        del arrays["revision"]
        form = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        counts = {array.shape[:1] for array in arrays.values()}
        if counts - {(count,)} or not self._accepts(form):
            return False
        self._form |= form
        if saved != self.revision:
            raise UserError(
                f"{self.directory} was begun by other code, revision {saved}, now {self.revision}: "
                "their samples may differ. Go on with that code, or remove the directory to begin "
                "again."
            )
        return True

    def add(self, numbers: range, arrays: dict[str, np.ndarray]) -> None:
        """Keeps the arrays [len(numbers), ...] of the images with these numbers.

        Raises: OSError; ValueError if the batches in the directory hold other arrays.
        """
        form = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        if not self._accepts(form):
            raise UserError(
                f"{self.directory} holds batches of other arrays than this command makes: "
                f"{self._form}, not {form}. Remove the directory, then run the same command."
            )
        self._form |= form
        contents = io.BytesIO()
        np.savez(contents, revision=np.array(self.revision), **arrays)
        # The name holds the checksum of the bytes, so they are made in memory first.
        crc = zlib.crc32(contents.getbuffer())
        path = self.directory / f"{numbers.start:08d}-{numbers.stop:08d}-{crc:08x}.npz"
        try:
            files.replace(path, lambda file: file.write(contents.getbuffer()))
        except OSError as error:
            raise UserFileError(
                f"cannot write {path}: {error}\nFree space there, then run the same command: it "
                f"goes on with image {numbers.start}."
            ) from error

    def read(self, num_images: int) -> dict[str, np.ndarray]:
        """Returns all arrays, but of 'image' only those of the first `num_images` images."""
        batches, whole, images = list(self._files()), {}, []
        total = batches[-1][0].stop
        for numbers, path in batches:
            names = self._form.keys() - ({"image"} if numbers.start >= num_images else set())
            arrays = npz_files.read_npz(path, names)
            if "image" in arrays:
                images.append(arrays.pop("image"))
            for key, array in arrays.items():
                if key not in whole:  # allocated once: joining parts would take twice the memory
                    whole[key] = np.empty((total, *array.shape[1:]), array.dtype)
                whole[key][numbers.start : numbers.stop] = array
        return whole | {"image": np.concatenate(images)[:num_images]}

    def write_npz(self, out: pathlib.Path, name: str) -> None:
        """Writes all images as 'arr_0', and labels, if there are any, as 'label'.

        Only one batch is in memory at a time. The file also holds `name`, which `get_name` returns.
        """
        batches = list(self._files())
        shape = (batches[-1][0].stop, *self._form["image"][0])
        names = self._form.keys() & {"image", "label"}  # a model of captions has no labels

        def write(file):
            labels = []
            # np.savez would need all images in memory.
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as npz:
                with npz.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = dict(descr="|u1", fortran_order=False, shape=shape)
                    np.lib.format.write_array_header_1_0(member, header)
                    for _, path in batches:
                        batch = npz_files.read_npz(path, names)
                        member.write(np.ascontiguousarray(batch["image"]).data)
                        if "label" in batch:
                            labels.append(batch["label"])
                rest = {"label": np.concatenate(labels)} if labels else {}
                for key, array in {**rest, "name": np.array(name)}.items():
                    with npz.open(f"{key}.npy", "w") as member:
                        np.lib.format.write_array(member, array)

        try:
            files.replace(out, write)
        except OSError as error:
            raise UserFileError(
                f"cannot write {out}: {error}\nFree space there, then run the same command."
            ) from error

    def remove(self) -> None:
        """Removes the directory and its contents, if it exists."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _files(self) -> Iterator[tuple[range, pathlib.Path]]:
        """Yields (numbers, path) of the batches, in order."""
        for path in sorted(self.directory.glob("*.npz")):
            if name := NAME.fullmatch(path.name):  # older versions' batches have no checksum
                yield range(int(name[1]), int(name[2])), path


def get_name(path: pathlib.Path) -> str | None:
    """Returns the name in an .npz that `Spool.write_npz` wrote; None for any other file."""
    try:
        return _read_text(path, "name")
    except (OSError, ValueError):
        return None


def _crc(path):
    """Returns the CRC-32 of a file, read in parts."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc


def _read_text(path, name):
    """Returns a short text in an .npz.   Raises: OSError; ValueError for anything else."""
    text = npz_files.describe_npz(path).get(name)
    if not text or text.shape or text.dtype.kind != "U" or text.dtype.itemsize > MAX_TEXT_BYTES:
        raise UserError(f"{files.printable(path)} holds no text {name!r}")
    return str(npz_files.read_npz(path, [name])[name])
