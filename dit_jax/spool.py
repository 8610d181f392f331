"""The images and features of batches, kept on disk until all are there."""

import json
import logging
import pathlib
import shutil
import zipfile
from collections.abc import Iterator

import numpy as np

from dit_jax import files

logger = logging.getLogger("dit_jax")


class Spool:
    """A directory of batches, each written whole: what is killed continues after the last one.

    Raises: OSError, at whatever is written, if it cannot be.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory

    def begin(self, revision: str) -> int:
        """How many images are there already, from the first on without a gap.

        Raises: ValueError if they were made by another revision of the code.
        """
        path = self.directory / "revision.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            begun = json.loads(path.read_text()) if path.is_file() else None
            if begun is None:
                files.replace_text(path, json.dumps(revision))
        except OSError as error:
            raise OSError(f"cannot write to {self.directory}: {error}") from error
        if begun not in (None, revision):
            raise ValueError(
                f"{self.directory} was begun by other code, revision {begun}, now {revision}: "
                "their samples may differ. Go on with that code, or remove the directory to begin "
                "again."
            )
        done = 0
        for numbers, path in self._files():
            if numbers.start == done and zipfile.is_zipfile(path):
                done = numbers.stop
            else:
                path.unlink()  # cut short by a power failure, or beyond such a gap
        if done:
            logger.info("continuing after %d images: %s", done, self.directory)
        return done

    def add(self, numbers: range, arrays: dict[str, np.ndarray]) -> None:
        """Keeps the arrays [len(numbers), ...] of the images of these numbers."""
        path = self.directory / f"{numbers.start:08d}-{numbers.stop:08d}.npz"
        try:
            files.replace(path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error}\nFree space there, then run the same command: it "
                f"continues after image {numbers.start}."
            ) from error

    def read(self, num_images: int) -> dict[str, np.ndarray]:
        """All arrays, but of 'image' only those of the first images."""
        spooled, kept, shown = list(self._files()), {}, []
        total = spooled[-1][0].stop
        for numbers, path in spooled:
            with np.load(path) as file:
                for key in set(file.files) - {"image"}:
                    array = file[key]
                    if key not in kept:  # whole at once: parts and the whole would be twice as much
                        kept[key] = np.empty((total, *array.shape[1:]), array.dtype)
                    kept[key][numbers.start : numbers.stop] = array
                if numbers.start < num_images:
                    shown.append(file["image"])
        return kept | {"image": np.concatenate(shown)[:num_images]}

    def write_npz(self, out: pathlib.Path, name: str) -> None:
        """All images as 'arr_0', and labels, if there are, as 'label', a batch at a time in memory.

        For `name_of` it also holds a name.
        """
        spooled = list(self._files())
        with np.load(spooled[0][1]) as batch:
            shape = (spooled[-1][0].stop, *batch["image"].shape[1:])

        def write(file):
            labels = []
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as npz:
                with npz.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = dict(descr="|u1", fortran_order=False, shape=shape)
                    np.lib.format.write_array_header_1_0(member, header)
                    for _, path in spooled:
                        with np.load(path) as batch:
                            member.write(np.ascontiguousarray(batch["image"]).data)
                            if "label" in batch:  # a model of captions has none
                                labels.append(batch["label"])
                rest = {"label": np.concatenate(labels)} if labels else {}
                for key, array in {**rest, "name": np.array(name)}.items():
                    with npz.open(f"{key}.npy", "w") as member:
                        np.lib.format.write_array(member, array)

        try:
            files.replace(out, write)
        except OSError as error:
            raise OSError(
                f"cannot write {out}: {error}\nFree space there, then run the same command."
            ) from error

    def remove(self) -> None:
        """Removes the directory and what is in it, if it is there."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _files(self) -> Iterator[tuple[range, pathlib.Path]]:
        """(numbers, path) of the batches, in order."""
        for path in sorted(self.directory.glob("*-*.npz")):
            first, _, stop = path.stem.partition("-")
            yield range(int(first), int(stop)), path


def name_of(path: pathlib.Path) -> str | None:
    """The name in an .npz that `Spool.write_npz` wrote; None if it is no such file."""
    try:
        with np.load(path) as file:
            return str(file["name"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
