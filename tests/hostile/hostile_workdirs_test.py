"""Hostile workdirs are refused, and no command writes through a link; see helpers/hostile.py."""

import json
import os
import re

import pytest
from helpers import hostile

CONFIGS = {
    "depth": hostile.make_setter("model", "depth", value=10**12),
    "width": hostile.make_setter("model", "hidden_size", value=10**12),
    "size": hostile.make_setter("model", "input_size", value=10**6),
    "classes": hostile.make_setter("model", "num_classes", value=2**40),
    "name": hostile.make_setter("model", "name", value="\x1b[31mdit"),
    "text": hostile.make_setter("model", "depth", value="2\x1b[31m"),
    "steps": hostile.make_setter("diffusion", "num_steps", value=10**12),
    "vae": lambda config: config["latents"].update(source="images", vae="\x1b[31m/etc"),
    "prediction": hostile.make_setter("objective", "prediction", value={"a": 1}),
}


def _list_sample_flags(workdir, out):
    return ["--workdir", workdir, "--num", 1, "--steps", 2, "--out", out / "x.png"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_config_is_refused(refuse, workdir, tmp_path, kind):
    hostile.change_config(workdir, CONFIGS[kind])
    refuse("sample", *_list_sample_flags(workdir, tmp_path))


def test_config_of_another_model_than_the_checkpoint_is_refused_once(
    workdir, run_command, tmp_path
):
    """Orbax reads all arrays at the same time. Only the first one that fails may be reported."""
    hostile.change_config(workdir, hostile.make_setter("model", "depth", value=1000))
    # In its own process, because Python reports the other arrays when the process ends.
    flags = _list_sample_flags(workdir, tmp_path)
    error = run_command("sample", *flags, fails=True, as_users=True)
    assert re.search(r"error: no checkpoint in .* can be read:\n  step 40: .*1000", error)
    assert error.splitlines()[-1].startswith("To go on, ")
    assert "Traceback" not in error
    assert "Exception ignored" not in error


DATA = {
    "names": lambda split: split.update(classes=["\x1b[31m\nerror: all is well"] * 10),
    "numbers": lambda split: split.update(num_examples=10**400, bytes_read=-1),
}


@pytest.mark.parametrize("kind", hostile.mark_slow(DATA, quick=["names"]))
def test_wrong_data_file_is_not_used(meet, workdir, tmp_path, kind):
    """The newest checkpoint has the same contents, with a digest."""
    path = workdir / "data.json"
    data = json.loads(path.read_text())
    del data["digest"]
    DATA[kind](data["train"])
    path.write_text(json.dumps(data))
    status, stderr = meet("sample", *_list_sample_flags(workdir, tmp_path))
    assert status == 0, stderr
    assert "data.json is not used" in stderr


@pytest.mark.parametrize("contents", [b"", b"[" * 10**6, b"9" * 10**5, b"\xff", b'{"model": {}}'])
def test_damaged_configs_are_refused_if_all_copies_are_damaged(refuse, workdir, tmp_path, contents):
    for path in [workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")]:
        path.write_bytes(contents)
    refuse("sample", "--workdir", workdir, "--num", 1, "--out", tmp_path / "x.png")


def _list_plot_flags(rows, out):
    return ["--rows", rows, "--x", "cfg_scale", "--y", "fid", "--out", out / "x.png"]


def test_wrong_rows_are_refused(refuse, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    rows = [b'{"a\\u001b[31m": 1}', b"[" * 10**5, b"\xff", b'{"fid": "\\u001b"}', b"9" * 10**5]
    path.write_bytes(b"\n".join(rows) + b"\n")
    refuse("plot", *_list_plot_flags(path, tmp_path))


@pytest.mark.slow
def test_rows_without_a_line_end_are_refused(refuse, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    hostile.make_sparse_file(path)
    refuse("plot", *_list_plot_flags(path, tmp_path))


@pytest.mark.parametrize(
    "name",
    ["train.lock", "metrics.jsonl", "config.json.tmp", "samples", "tensorboard", "checkpoints"],
)
def test_training_does_not_write_through_links(refuse, workdir, digits_dir, outside, name):
    target = outside / "file" if "." in name else outside
    hostile.replace_by_link(workdir / name, target)
    flags = ["--config=configs/smoke.py", f"--config.data.data_dir={digits_dir}"]
    message = refuse("train", *flags, "--config.total_steps=41", "--workdir", workdir)
    assert f"{workdir / name} is a link" in message


@pytest.mark.parametrize(
    "name",
    hostile.mark_slow(["evaluations.jsonl", "evaluations", "evaluations/x"], quick=["evaluations"]),
)
def test_evaluation_does_not_write_through_links(refuse, workdir, outside, name):
    (workdir / "evaluations").mkdir(exist_ok=True)
    hostile.replace_by_link(workdir / name, outside / "file" if "." in name else outside)
    flags = ["--workdir", workdir, "--num", 4, "--steps", 2, "--extractor=pixels"]
    assert f"{workdir / name} is a link" in refuse("evaluate", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
def test_encoding_does_not_write_through_links(
    refuse, folder_flags, vae_dir, tmp_path, outside, link
):
    (tmp_path / "out").mkdir()
    hostile.replace_by_link(tmp_path / "out" / "encode.lock", outside / "file", link)
    encode = ["encode", *folder_flags, "--vae", vae_dir, "--out", tmp_path / "out"]
    assert "encode.lock is a link" in refuse(*encode)


ENDLESS = pytest.mark.parametrize(
    "replace", [hostile.replace_by_pipe, hostile.replace_by_zeros], ids=["pipe", "zeros"]
)


@ENDLESS
@pytest.mark.parametrize(
    "name",
    hostile.mark_slow(
        ["config.json", "checkpoints/40/digest/metadata", "data.json"], quick=["config.json"]
    ),
)
def test_endless_files_in_a_workdir_are_not_read(meet, workdir, tmp_path, name, replace):
    """The command reads another copy, or an older checkpoint."""
    replace(workdir / name)
    meet("sample", *_list_sample_flags(workdir, tmp_path))


@ENDLESS
def test_endless_files_of_training_are_refused(
    refuse, workdir, tfds_directory, digits_dir, tmp_path, replace
):
    train = ["train", "--config=configs/smoke.py", "--config.total_steps=41", "--workdir"]
    replace(workdir / "metrics.jsonl")
    refuse(*train, workdir, f"--config.data.data_dir={digits_dir}")
    replace(tfds_directory / "features.json")
    assert "features.json is a pipe, socket or device" in refuse(
        *train, tmp_path / "run", f"--config.data.name={tfds_directory}"
    )
