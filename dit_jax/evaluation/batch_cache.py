"""Cache of computed batches on disk, with which an interrupted evaluation resumes."""

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

# The index of the first image, the index after the last image, and the CRC-32 of the file.
NAME = re.compile(r"(\d{8,18})-(\d{8,18})-([0-9a-f]{8})\.npz")
MAX_TEXT_BYTES = 4096


class BatchCache:
    """Directory with a file for each computed batch of arrays.

    A file is written in one piece, and its name holds its checksum. Damaged files are deleted, and
    their images are computed again.
    Args:
      revision: of the code that computes the batches. Batches of two revisions are not mixed.
    """

    def __init__(self, directory: pathlib.Path, revision: str):
        self.directory, self.revision = directory, revision
        self._specs = {}  # array name -> (shape for one image, dtype), from all batches so far

    def _accepts(self, specs):
        """Returns whether arrays fit the batches so far. Only 'image' may be missing in some."""
        agree = all(self._specs.get(name, spec) == spec for name, spec in specs.items())
        return agree and (not self._specs or specs.keys() ^ self._specs.keys() <= {"image"})

    def prepare(self, num_images: int) -> list[range]:
        """Creates the directory, deletes damaged batches and lists the missing images.

        Returns: ranges of indices, in order.
        Raises: OSError if the directory cannot be written; ValueError if another revision of the
          code made the batches.
        """
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise UserFileError(f"cannot write to {self.directory}: {error}") from error
        gaps, next_index = [], 0
        for indices, path in self._files():
            # Batches must neither overlap nor go beyond the last image.
            fits = next_index <= indices.start and indices.stop <= num_images
            if not (fits and self._validate(path, len(indices))):
                logger.warning("%s is damaged: its images are made again.", path)
                path.unlink()
                continue
            gaps.append(range(next_index, indices.start))
            next_index = indices.stop
        missing = [gap for gap in [*gaps, range(next_index, num_images)] if gap]
        if (num_left := sum(map(len, missing))) < num_images:
            logger.info("continuing after %d images: %s", num_images - num_left, self.directory)
        return missing

    def _validate(self, path, num_images):
        """Returns whether a batch is undamaged and fits the other batches; records its arrays.

        Raises: ValueError if another revision of the code made the batch.
        """
        if NAME.fullmatch(path.name)[3] != f"{_crc(path):08x}":
            return False
        try:
            arrays, revision = npz_files.describe_npz(path), _read_text(path, "revision")
        except ValueError:
            return False
        del arrays["revision"]
        specs = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        lengths = {array.shape[:1] for array in arrays.values()}
        if lengths - {(num_images,)} or not self._accepts(specs):
            return False
        self._specs |= specs
        if revision != self.revision:
            raise UserError(
                f"{self.directory} was begun by revision {files.printable(revision)} of the code, "
                f"but this is {self.revision}. Their samples may differ. Go on with the old "
                "revision, or remove the directory to begin again."
            )
        return True

    def add(self, indices: range, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays [len(indices), ...] of the images with these indices.

        Raises: OSError if the batch cannot be written; ValueError if the batches in the directory
          hold other arrays.
        """
        specs = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        if not self._accepts(specs):
            raise UserError(
                f"{self.directory} holds batches of other arrays than this command makes: "
                f"{self._specs}, not {specs}. Remove the directory, then run the same command."
            )
        self._specs |= specs
        contents = io.BytesIO()
        np.savez(contents, revision=np.array(self.revision), **arrays)
        # The file is built in memory first, because its name holds its checksum.
        crc = zlib.crc32(contents.getbuffer())
        path = self.directory / f"{indices.start:08d}-{indices.stop:08d}-{crc:08x}.npz"
        try:
            files.replace(path, lambda file: file.write(contents.getbuffer()))
        except OSError as error:
            raise UserFileError(
                f"cannot write {path}: {error}\nFree space there, then run the same command: it "
                f"goes on with image {indices.start}."
            ) from error

    def read(self, num_images: int) -> dict[str, np.ndarray]:
        """Returns the arrays of all images, except for 'image': of the first `num_images`."""
        batches, merged, images = list(self._files()), {}, []
        total = batches[-1][0].stop
        for indices, path in batches:
            names = self._specs.keys() - ({"image"} if indices.start >= num_images else set())
            arrays = npz_files.read_npz(path, names)
            if "image" in arrays:
                images.append(arrays.pop("image"))
            for name, array in arrays.items():
                if name not in merged:  # not np.concatenate, which would take twice the memory
                    merged[name] = np.empty((total, *array.shape[1:]), array.dtype)
                merged[name][indices.start : indices.stop] = array
        return merged | {"image": np.concatenate(images)[:num_images]}

    def write_npz(self, out: pathlib.Path, name: str) -> None:
        """Writes an .npz of all images: 'arr_0', 'label' if they have labels, and the name.

        Only one batch of images is in memory at a time. `get_name` reads the name.
        Raises: OSError if the file cannot be written.
        """
        batches = list(self._files())
        shape = (batches[-1][0].stop, *self._specs["image"][0])
        names = self._specs.keys() & {"image", "label"}  # models with captions have no labels

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
                other_arrays = {"label": np.concatenate(labels)} if labels else {}
                other_arrays["name"] = np.array(name)
                for key, array in other_arrays.items():
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
        """Yields (indices of the images, path) for each batch, in order."""
        for path in sorted(self.directory.glob("*.npz")):
            # Older versions wrote batches without a checksum, which are ignored.
            if match := NAME.fullmatch(path.name):
                yield range(int(match[1]), int(match[2])), path


def get_name(path: pathlib.Path) -> str | None:
    """Returns the name in an .npz that `BatchCache.write_npz` wrote; None for any other file."""
    try:
        return _read_text(path, "name")
    except (OSError, ValueError):
        return None


def _crc(path):
    """Returns the CRC-32 of a file, which is read in chunks."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _read_text(path, name):
    """Reads a short text in an .npz.   Raises: OSError; ValueError if there is no such text."""
    text = npz_files.describe_npz(path).get(name)
    if not text or text.shape or text.dtype.kind != "U" or text.dtype.itemsize > MAX_TEXT_BYTES:
        raise UserError(f"{files.printable(path)} holds no text {name!r}")
    return str(npz_files.read_npz(path, [name])[name])
