"""What a directory or a file from elsewhere can do: be refused, and no more.

Every command meets hostile inputs of the kinds that it reads. None may make a marker appear, take
memory without a bound, show a traceback, or write control characters.
"""

import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
from helpers import sweep
from PIL import Image

from dit_jax.system import files
from experiments.scaling.fits import table

MAX_BYTES = 2 * 2**30  # of a command; training the smallest model takes a third


def each(kinds, quick):
    """Parameters of one path through a command; those beside `quick` are slow tests."""
    return [pytest.param(k, marks=[] if k in quick else pytest.mark.slow) for k in kinds]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that a hostile input would write."""
    return tmp_path / "marker"


class _Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.fixture
def meet(zygote, marker):
    """meet(module, *flags): (status, standard error) of a command, which must stay harmless.

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
    """refuse(module, *flags): the message of a command that must refuse its input."""

    def refuse(module, *flags, **variables):
        status, stderr = meet(module, *flags, **variables)
        assert status == 1, stderr
        assert "error: " in stderr
        return stderr

    return refuse


# TFDS directories -------------------------------------------------------------------------------


@pytest.fixture
def tfds_directory(digits_dir, tmp_path, marker):
    """A copy of the digits with a module beside them that would write the marker."""
    directory = shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "digits")
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    (directory / "evil.py").write_text(code)
    return directory


def _add_feature(directory, **feature):
    path = directory / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["x"] = feature
    path.write_text(json.dumps(features))


def test_dataset_that_names_code(refuse, tfds_directory, vae_dir, tmp_path):
    _add_feature(tfds_directory, pythonClassName="evil.Evil", text={})
    data = f"--config.data.name={tfds_directory}"
    config = ["--config", "configs/smoke.py", data]
    for command in (
        ["train", *config, "--workdir", tmp_path / "run"],
        ["encode", *config, "--vae", vae_dir, "--out", tmp_path / "out"],
        ["reconstruct", *config, "--vae", vae_dir],
    ):
        assert "names the class evil.Evil" in refuse(*command)
    latents = ["--config.latents.source=moments", f"--config.latents.moments={tfds_directory}"]
    message = refuse("train", "--config", "configs/smoke.py", *latents, "--workdir", tmp_path / "r")
    assert "names the class evil.Evil" in message


# Images -----------------------------------------------------------------------------------------


def _png_of(width, height):
    """A PNG of few bytes that declares so many pixels, all black."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compressobj(9)
    line = bytes(1 + width)
    body = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n%%EOF\n"


def _tiff():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF")
    return file.getvalue()


IMAGES = {
    "eps": lambda: EPS,
    "tiff": _tiff,
    "empty": lambda: b"",
    "large": lambda: _png_of(20_000, 20_000),
    "text": lambda: b"\x89PNG\r\n\x1a\n" + b"\x00" * 100,
}


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of one image each."""
    for name in ("ant", "bee"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / "train" / name / "0.png")
    return tmp_path / "images"


@pytest.fixture
def folder_flags(image_folder, tmp_path):
    """Of a run on the folder."""
    flags = ["--config", "configs/smoke.py", "--config.data.source=folder"]
    flags += [f"--config.data.name={image_folder}", "--config.data.train_split=train"]
    flags += ["--config.data.eval_split=", "--config.model.num_classes=2"]
    return [*flags, "--config.sample_every_steps=0", "--config.eval_every_steps=0"]


@pytest.mark.parametrize("kind", each(IMAGES, ["eps"]))
def test_images_that_are_others_than_they_say(
    refuse, image_folder, folder_flags, vae_dir, trained_workdir, tmp_path, kind
):
    path = image_folder / "train" / "ant" / "0.png"
    path.write_bytes(IMAGES[kind]())
    encode = ["encode", *folder_flags, "--vae", vae_dir, "--out", tmp_path / "out"]
    assert f"{path}" in refuse(*encode)
    edit = ["edit", "image-to-image", "--workdir", trained_workdir, "--image", path]
    assert f"{path}" in refuse(*edit, "--out", tmp_path / "edited.png")
    evaluate = ["evaluate", "--samples", image_folder / "train", "--reference", image_folder]
    assert f"{path}" in refuse(*evaluate, "--extractor=pixels", "--image_size=8")


def test_folders_that_lead_elsewhere(refuse, image_folder, folder_flags, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8)).save(secret)
    train = ["train", *folder_flags, "--workdir", tmp_path / "run"]
    link = image_folder / "train" / "ant" / "link.png"
    link.symlink_to(secret)
    assert "link.png" in refuse(*train)
    link.unlink()
    train = [flag for flag in train if "num_classes" not in str(flag)]
    captions = ["--config.data.caption_feature=text", "--config.model.num_classes=0"]
    captions += ["--config.model.null_condition=false", "--config.sample.cfg_scale=1"]
    for name in ("../../secret.png", str(secret), "..\\..\\secret.png"):
        line = json.dumps({"file_name": name, "text": "a"})
        (image_folder / "train" / "metadata.jsonl").write_text(line + "\n")
        assert "metadata.jsonl" in refuse(*train, *captions)


def test_names_with_control_characters_are_escaped(refuse, image_folder, folder_flags, tmp_path):
    strange = image_folder / "train" / "cow\x1b[31m\nerror: all is well"
    strange.mkdir()
    (strange / "\x1b]0;title\x07.png").write_bytes(b"")
    train = ["train", *folder_flags, "--workdir", tmp_path / "run"]
    message = refuse(*train)
    assert "\\x1b[31m\\n" in message
    assert "\nerror: all is well" not in message


# Workdirs ---------------------------------------------------------------------------------------


def _set(*keys, value):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


CONFIGS = {
    "depth": _set("model", "depth", value=10**12),
    "width": _set("model", "hidden_size", value=10**12),
    "size": _set("model", "input_size", value=10**6),
    "classes": _set("model", "num_classes", value=2**40),
    "name": _set("model", "name", value="\x1b[31mdit"),
    "text": _set("model", "depth", value="2\x1b[31m"),
    "steps": _set("diffusion", "num_steps", value=10**12),
    "vae": lambda config: config["latents"].update(source="images", vae="\x1b[31m/etc"),
    "prediction": _set("objective", "prediction", value={"a": 1}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_of_strange_workdirs(refuse, workdir, tmp_path, kind):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    CONFIGS[kind](config)
    for copy in (path, *workdir.glob("checkpoints/*/config/metadata")):
        copy.write_text(json.dumps(config))
    refuse("sample", "--workdir", workdir, "--num", 1, "--steps", 2, "--out", tmp_path / "x.png")


def test_config_of_another_model_than_the_checkpoint_s(workdir, run_command, tmp_path):
    """Orbax reads the arrays at once; those behind the first that fails say nothing more."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["model"]["depth"] = 1000
    for copy in (path, *workdir.glob("checkpoints/*/config/metadata")):
        copy.write_text(json.dumps(config))
    flags = ["--workdir", workdir, "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    # A process of its own, to its very end: that is when Python speaks of what is left.
    error = run_command("sample", *flags, fails=True, as_users=True)
    assert re.search(r"error: no checkpoint in .* can be read:\n  step 40: .*1000", error)
    assert error.splitlines()[-1].startswith("To go on, ")
    assert "Traceback" not in error
    assert "Exception ignored" not in error


DATA = {
    "names": lambda one: one.update(classes=["\x1b[31m\nerror: all is well"] * 10),
    "numbers": lambda one: one.update(num_examples=10**400, bytes_read=-1),
}


@pytest.mark.parametrize("kind", each(DATA, ["names"]))
def test_data_of_strange_workdirs(meet, workdir, tmp_path, kind):
    """What the file says is not used, but what the newest checkpoint holds, with a digest."""
    path = workdir / "data.json"
    data = json.loads(path.read_text())
    del data["digest"]
    DATA[kind](data["train"])
    path.write_text(json.dumps(data))
    flags = ["--workdir", workdir, "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    status, stderr = meet("sample", *flags)
    assert status == 0, stderr
    assert "data.json is not used" in stderr


METADATA = {
    "scale": _set("std", value=[0.0] * 4),
    "mean": _set("mean", value="\x1b[31m"),
    "channels": _set("mean", value=[0.0] * 5),
    "digest": _set("vae_digest", value={"\x1b[31m": 1}),
    "classes": _set("dataset", "train", "classes", value=[["\x1b[31m"]] * 10),
    "published": _set("published", value="\x1b[31m"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_moments_from_elsewhere(refuse, moments_dir, tmp_path, kind):
    directory = shutil.copytree(moments_dir, tmp_path / "moments")
    metadata = json.loads((directory / "metadata.json").read_text())
    METADATA[kind](metadata)
    (directory / "metadata.json").write_text(json.dumps(metadata))
    config = ["--config=configs/digits_latents.py", "--config.model.in_channels=2"]
    config += [f"--config.latents.moments={directory}"]
    assert f"{directory}" in refuse("train", *config, "--workdir", tmp_path / "run")


@pytest.mark.parametrize("contents", [b"", b"[" * 10**6, b"9" * 10**5, b"\xff", b'{"model": {}}'])
def test_damaged_configs_without_another(refuse, workdir, tmp_path, contents):
    for path in [workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")]:
        path.write_bytes(contents)
    refuse("sample", "--workdir", workdir, "--num", 1, "--out", tmp_path / "x.png")


def test_rows_of_a_strange_workdir(refuse, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    rows = [b'{"a\\u001b[31m": 1}', b"[" * 10**5, b"\xff", b'{"fid": "\\u001b"}', b"9" * 10**5]
    path.write_bytes(b"\n".join(rows) + b"\n")
    refuse("plot", "--rows", path, "--x", "cfg_scale", "--y", "fid", "--out", tmp_path / "x.png")


def _make_sparse(path):
    path.touch()
    os.truncate(path, 5 * 2**29)


@pytest.mark.slow
def test_lines_without_an_end(refuse, image_folder, folder_flags, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    _make_sparse(path)
    refuse("plot", "--rows", path, "--x", "cfg_scale", "--y", "fid", "--out", tmp_path / "x.png")
    _make_sparse(image_folder / "train" / "metadata.jsonl")
    train = [flag for flag in folder_flags if "num_classes" not in str(flag)]
    train += ["--config.data.caption_feature=text", "--config.model.num_classes=0"]
    train += ["--config.model.null_condition=false", "--config.sample.cfg_scale=1"]
    assert "metadata.jsonl" in refuse("train", *train, "--workdir", tmp_path / "run")


# Studies ----------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path, marker):
    """PATH with a Ghostscript, which Pillow starts for an EPS, that writes the marker."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


PICTURES = {
    "eps": lambda path: path.write_bytes(EPS),
    "pipe": lambda path: _replace_by_pipe(path),
    "zeros": lambda path: _replace_by_zeros(path),
    "large": lambda path: path.write_bytes(_png_of(20_000, 20_000)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_strange_sweeps(refuse, swept, tmp_path, programs, kind):
    cells = shutil.copytree(swept, tmp_path / "sweep")
    path = next((cells / "XS-patch_size=2" / "evaluations").glob("20-*.png"))
    PICTURES[kind](path)
    flags = ["--workdir", cells, "--out", tmp_path / "x.csv", "--samples", tmp_path / "x.npz"]
    message = refuse("experiments.scaling.collect", *flags, PATH=programs)
    assert f"evaluations/{path.name} of XS-patch_size=2 row" in message


def test_rows_of_strange_sweeps(refuse, swept, tmp_path):
    cells = shutil.copytree(swept, tmp_path / "sweep")
    directory = cells / "XS-patch_size=2"
    path = directory / "evaluations.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    for picture in ("../../secret.png", "/etc/passwd", "evaluations/\x1b[31m.png", "a\0"):
        path.write_text(json.dumps(row | {"picture": picture}) + "\n")
        flags = ["--workdir", cells, "--out", tmp_path / "x.csv", "--where", "num=100"]
        message = refuse("experiments.scaling.collect", *flags, "--samples", tmp_path / "x.npz")
        assert "cannot read the picture" in message


@pytest.fixture
def study_table(tmp_path):
    table.write(tmp_path / "study.csv", sweep.study())
    return tmp_path / "study.csv"


TABLES = {
    "pipe": lambda path: _replace_by_pipe(path),
    "zeros": lambda path: _replace_by_zeros(path),
    "text": lambda path: path.write_bytes(b"\x89PNG\x1b[31m"),
    "columns": lambda path: path.write_text("cell,\x1b[31m\n1,2\n"),
    "number": lambda path: path.write_text(path.read_text().replace(",adaLN-Zero,", ",x,\x1b", 1)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_from_elsewhere(refuse, study_table, tmp_path, kind):
    page = tmp_path / "page.md"
    page.write_text("{eval_mse_summary}")
    TABLES[kind](study_table)
    given = ["--table", study_table]
    refuse("experiments.scaling.fit", *given)
    refuse("experiments.scaling.plot", *given)
    refuse("experiments.scaling.report", *given, "--page", page, "--out", tmp_path / "x.md")


@pytest.mark.parametrize("value", ["1.7e308", "-1.7e308", "5e-324", "inf", "9" * 4000])
def test_numbers_of_tables_that_cannot_be_drawn(refuse, study_table, value):
    lines = [line.split(",") for line in study_table.read_text().splitlines()]
    lines[1][lines[0].index("eval_mse")] = value
    study_table.write_text("\n".join(map(",".join, lines)) + "\n")
    assert "study.csv:2 has eval_mse=" in refuse("experiments.scaling.plot", "--table", study_table)


@pytest.mark.parametrize("kind", each(["pickle", "huge", "bomb", "names", "text"], ["pickle"]))
def test_samples_of_studies_from_elsewhere(refuse, study_table, marker, tmp_path, kind):
    ARRAYS[kind](tmp_path / "x.npz", marker)
    given = ["--table", study_table, "--qualities=", "--samples", tmp_path / "x.npz"]
    refuse("experiments.scaling.plot", *given)


PAGES = {
    "wide": b"{table:>3000000000}",
    "attribute": b"{rows.__class__.__init__}",
    "code": b"{rows.__class__.__subclasses__()}",
    "bytes": b"\xff\xfe{\0",
    "open": b"{\x1b[31m",
    "name": b"{\x1b[31m}",
}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_from_elsewhere(refuse, study_table, tmp_path, kind):
    page, out = tmp_path / "page.md", tmp_path / "x.md"
    page.write_bytes(PAGES[kind])
    given = ["--table", study_table, "--page", page, "--out", out]
    assert "page.md" in refuse("experiments.scaling.report", *given)
    assert not out.exists()


# Links, pipes and devices ------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    """A directory that no command is told of; at the end it is as it was."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "file").write_text("precious")
    (directory / "30").mkdir()
    yield directory
    assert sorted(path.name for path in directory.rglob("*")) == ["30", "file"]
    assert (directory / "file").read_text() == "precious"


def _replace_by_link(path, target, link=os.symlink):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    link(target, path)


@pytest.mark.parametrize(
    "name",
    ["train.lock", "metrics.jsonl", "config.json.tmp", "samples", "tensorboard", "checkpoints"],
)
def test_links_in_a_workdir_are_not_written_to(refuse, workdir, digits_dir, outside, name):
    target = outside / "file" if "." in name else outside
    _replace_by_link(workdir / name, target)
    flags = ["--config=configs/smoke.py", f"--config.data.data_dir={digits_dir}"]
    message = refuse("train", *flags, "--config.total_steps=41", "--workdir", workdir)
    assert f"{workdir / name} is a link" in message


@pytest.mark.parametrize(
    "name", each(["evaluations.jsonl", "evaluations", "evaluations/x"], ["evaluations"])
)
def test_links_where_rows_are_written_to(refuse, workdir, outside, name):
    (workdir / "evaluations").mkdir(exist_ok=True)
    _replace_by_link(workdir / name, outside / "file" if "." in name else outside)
    flags = ["--workdir", workdir, "--num", 4, "--steps", 2, "--extractor=pixels"]
    assert f"{workdir / name} is a link" in refuse("evaluate", *flags)


@pytest.mark.parametrize("command", ["sweep", "cell"])
def test_links_where_cells_are_written_to(refuse, digits_dir, tmp_path, outside, command):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "XS-patch_size=2").symlink_to(outside)
    flags = ["--config", "experiments/scaling/configs/smoke.py", "--workdir", tmp_path / "sweep"]
    flags += [f"--config.base.data.data_dir={digits_dir}"]
    flags += ["--name=XS-patch_size=2"] * (command == "cell")
    assert "XS-patch_size=2 is a link" in refuse(f"experiments.scaling.{command}", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
def test_links_where_moments_are_written_to(refuse, folder_flags, vae_dir, tmp_path, outside, link):
    (tmp_path / "out").mkdir()
    _replace_by_link(tmp_path / "out" / "encode.lock", outside / "file", link)
    encode = ["encode", *folder_flags, "--vae", vae_dir, "--out", tmp_path / "out"]
    assert "encode.lock is a link" in refuse(*encode)


def _replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def _replace_by_zeros(path):
    _replace_by_link(path, "/dev/zero")


@pytest.mark.parametrize("replace", [_replace_by_pipe, _replace_by_zeros], ids=["pipe", "zeros"])
@pytest.mark.parametrize(
    "name", each(["config.json", "checkpoints/40/digest/metadata", "data.json"], ["config.json"])
)
def test_files_without_an_end_in_a_workdir(meet, workdir, tmp_path, name, replace):
    """What they should hold is read elsewhere, or an older checkpoint."""
    replace(workdir / name)
    flags = ["--workdir", workdir, "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    meet("sample", *flags)


@pytest.mark.parametrize("replace", [_replace_by_pipe, _replace_by_zeros], ids=["pipe", "zeros"])
def test_files_without_an_end_elsewhere(
    refuse, workdir, tfds_directory, digits_dir, tmp_path, replace
):
    train = ["train", "--config=configs/smoke.py", "--config.total_steps=41", "--workdir"]
    replace(workdir / "metrics.jsonl")
    refuse(*train, workdir, f"--config.data.data_dir={digits_dir}")
    replace(tfds_directory / "features.json")
    assert "features.json is a pipe, socket or device" in refuse(
        *train, tmp_path / "run", f"--config.data.name={tfds_directory}"
    )


# Arrays -----------------------------------------------------------------------------------------


def _npy(shape, dtype="|u1", data=b""):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(118)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)


def _pickled(path, marker):
    array = np.empty(1, object)
    array[0] = _Touch(marker)
    np.savez(path, arr_0=array, mu=array, metadata=array, label=array)


ARRAYS = {
    "pickle": _pickled,
    "huge": lambda path, _: _zip(path, {"arr_0.npy": _npy((10**6, 10**6, 10**3, 3))}),
    "negative": lambda path, _: _zip(path, {"arr_0.npy": _npy((-1, 8, 8, 3))}),
    "bomb": lambda path, _: _zip(
        path, {"arr_0.npy": _npy((10_000, 256, 256, 3), data=bytes(3 * 2**30 // 2))}
    ),
    "names": lambda path, _: _zip(path, {"\x1b[31m\n.npy": _npy((1,), data=b"1")}),
    "text": lambda path, _: path.write_text("PK\x1b[31m"),
    "metadata": lambda path, _: np.savez(path, metadata="[" * 10**6, features=np.ones((9, 3))),
}


@pytest.mark.parametrize("kind", each(ARRAYS, ["pickle", "huge"]))
def test_arrays_of_samples_and_references(refuse, marker, tmp_path, kind):
    path = tmp_path / "x.npz"
    ARRAYS[kind](path, marker)
    good = tmp_path / "good.npz"
    np.savez(good, arr_0=np.zeros((10, 8, 8, 3), np.uint8))
    for samples, reference in ((path, good), (good, path)):
        flags = ["--samples", samples, "--reference", reference, "--extractor=pixels"]
        refuse("evaluate", *flags)


def _safetensors_header(header):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text


WEIGHTS = {
    "pickle.npz": lambda path, marker: np.savez(
        path, **{"x_embedder.proj.weight": np.array(_Touch(marker), object)}
    ),
    "huge.npz": lambda path, _: _zip(path, {"x.npy": _npy((10**6, 10**6, 10**3), "<f4")}),
    "length.safetensors": lambda path, _: path.write_bytes(struct.pack("<Q", 2**62)),
    "deep.safetensors": lambda path, _: path.write_bytes(_safetensors_header(b"[" * 10**6)),
    "shape.safetensors": lambda path, _: path.write_bytes(
        _safetensors_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}})
    ),
    "names.safetensors": lambda path, _: safetensors.numpy.save_file(
        {"\x1b[31m\nerror: well": np.ones(1, np.float32)}, path
    ),
    "config.safetensors": lambda path, _: safetensors.numpy.save_file(
        {"a": np.ones(1, np.float32)}, path, {"dit_jax.config": "[" * 10**6}
    ),
    "text.npz": lambda path, _: path.write_text("\x1b[31m"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_from_elsewhere(refuse, marker, tmp_path, name):
    path = tmp_path / name
    WEIGHTS[name](path, marker)
    refuse("convert", "dit", path, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()


@pytest.mark.skipif("not __import__('importlib').util.find_spec('torch')", reason="needs torch")
@pytest.mark.parametrize("kind", ["dit", "inception"])
def test_pickles_from_elsewhere(refuse, marker, tmp_path, kind):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"model": _Touch(marker)}))
    refuse("convert", kind, path, tmp_path / "run")
