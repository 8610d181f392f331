"""Hostile inputs for commands, and the fixtures that run a command on them; a pytest plugin.

No command may write the marker, take more than MAX_BYTES of memory, show a traceback, or print
control characters, whatever its input contains.
"""

import io
import json
import os
import pathlib
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_jax.system import files

MAX_BYTES = 2 * 2**30  # of a command; training the smallest model takes a third
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n%%EOF\n"


@pytest.fixture
def marker(tmp_path):
    """Returns the path of a file that only hostile code would write."""
    return tmp_path / "marker"


@pytest.fixture
def meet(zygote, marker):
    """meet(module, *flags) checks that a command stays harmless; returns (status, standard error).

    Keywords are environment variables.
    """

    def meet(module, *flags, **variables):
        answer, stdout, stderr = zygote(module, *flags, **variables)
        assert answer["status"] in (0, 1), (answer, stdout, stderr)
        assert "Traceback" not in stderr
        assert answer["max_rss"] < MAX_BYTES
        assert not marker.exists()
        shown = (stdout + stderr).replace("\n", "").replace("\t", "")
        assert files.printable(shown) == shown
        return answer["status"], stderr

    return meet


@pytest.fixture
def refuse(meet):
    """refuse(module, *flags) checks that a command refuses its input; returns its message."""

    def refuse(module, *flags, **variables):
        status, stderr = meet(module, *flags, **variables)
        assert status == 1, stderr
        assert "error: " in stderr
        return stderr

    return refuse


@pytest.fixture
def tfds_directory(digits_dir, tmp_path, marker):
    """Copies the digits, and puts a module beside them that would write the marker."""
    directory = shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "digits")
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    (directory / "evil.py").write_text(code)
    return directory


@pytest.fixture
def image_folder(tmp_path):
    """Writes an image folder of two classes with one image each."""
    for name in ("ant", "bee"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / "train" / name / "0.png")
    return tmp_path / "images"


@pytest.fixture
def folder_flags(image_folder):
    """Returns the flags of a run on `image_folder`."""
    flags = ["--config", "configs/smoke.py", "--config.data.source=folder"]
    flags += [f"--config.data.name={image_folder}", "--config.data.train_split=train"]
    flags += ["--config.data.eval_split=", "--config.model.num_classes=2"]
    return [*flags, "--config.sample_every_steps=0", "--config.eval_every_steps=0"]


@pytest.fixture
def outside(tmp_path):
    """Makes a directory that no command knows; after the test it must be unchanged."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "file").write_text("precious")
    (directory / "30").mkdir()
    yield directory
    assert sorted(path.name for path in directory.rglob("*")) == ["30", "file"]
    assert (directory / "file").read_text() == "precious"


def mark_slow(values, quick):
    """Returns parameters of a test; all values that are not in `quick` are slow tests."""
    return [pytest.param(v, marks=[] if v in quick else pytest.mark.slow) for v in values]


def make_setter(*keys, value):
    """Returns a function that sets a nested key of a JSON object."""

    def set_value(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return set_value


def change_config(workdir, change):
    """Changes the config of a workdir: config.json and the copies in its checkpoints."""
    config = json.loads((workdir / "config.json").read_text())
    change(config)
    for path in (workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")):
        path.write_text(json.dumps(config))


def replace_by_link(path, target, link=os.symlink):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    link(target, path)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_zeros(path):
    replace_by_link(path, "/dev/zero")


def make_sparse_file(path):
    """Makes a file whose only line is longer than the memory that a command may take."""
    path.touch()
    os.truncate(path, 5 * 2**29)


def make_png(width, height):
    """Returns a PNG file of few bytes with any number of pixels, all black."""

    def make_chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    compressor, row = zlib.compressobj(9), bytes(1 + width)
    body = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*chunk) for chunk in chunks)


def make_tiff():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF")
    return file.getvalue()


def make_npy(shape, dtype="|u1", data=b""):
    """Returns an .npy file whose header and data need not match."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(118)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)


class Touch:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def _write_pickle(path, marker):
    array = np.empty(1, object)
    array[0] = Touch(marker)
    np.savez(path, arr_0=array, mu=array, metadata=array, label=array)


# {kind: function that writes a hostile .npz, given its path and the marker}
ARRAYS = {
    "pickle": _write_pickle,
    "huge": lambda path, _: write_zip(path, {"arr_0.npy": make_npy((10**6, 10**6, 10**3, 3))}),
    "negative": lambda path, _: write_zip(path, {"arr_0.npy": make_npy((-1, 8, 8, 3))}),
    "bomb": lambda path, _: write_zip(
        path, {"arr_0.npy": make_npy((10_000, 256, 256, 3), data=bytes(3 * 2**30 // 2))}
    ),
    "names": lambda path, _: write_zip(path, {"\x1b[31m\n.npy": make_npy((1,), data=b"1")}),
    "text": lambda path, _: path.write_text("PK\x1b[31m"),
    "metadata": lambda path, _: np.savez(path, metadata="[" * 10**6, features=np.ones((9, 3))),
}
