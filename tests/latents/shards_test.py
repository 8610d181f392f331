"""Shards of moments: damage is seen and made again, and what differs is not mixed."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tqdm

from configs import smoke
from dit_jax.latents import shards, store
from dit_jax.system import files


def _make_config(digits_dir):
    config = smoke.get_config()
    config.data.update(data_dir=str(digits_dir), flip=True)
    config.data.update(train_split="train[:70]", eval_split="test[:5]")
    return config


@pytest.fixture
def config(digits_dir):
    """The first 70 digits and a few of the held-out ones."""
    return _make_config(digits_dir)


@pytest.fixture(scope="module")
def encoded(digits_dir, vae_dir, tmp_path_factory):
    """What that config becomes, in shards of 32 images. Do not change."""
    out = tmp_path_factory.mktemp("encoded") / "moments"
    store.encode(_make_config(digits_dir), vae_dir, out, shard_images=32)
    return out


def _cut(data):
    return data[: len(data) // 2]


def _flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [_cut, _flip_a_bit, lambda _: b"", lambda _: b"\xff\xfe", lambda _: b"[1]", None]
)
@pytest.mark.parametrize("name", ["{}", "sums/{}.json", "encode.json", "features.json"])
def test_damaged_files_are_written_again(
    encoded, config, vae_dir, tmp_path, monkeypatch, name, damage, caplog
):
    """A damaged or lost part is made again, said in a line, and nothing else is encoded."""
    out = shutil.copytree(encoded, tmp_path / "out")
    path = out / name.format("moments-train.array_record-00001-of-00003")
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    written, plain = [], shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *rest: (written.append(path.name), plain(path, *rest))
    )
    caplog.clear()
    store.encode(config, vae_dir, out, shard_images=32)
    assert _files(out) == _files(encoded)
    of_shard = name not in ("encode.json", "features.json")
    assert written == ["moments-train.array_record-00001-of-00003"] * of_shard
    if damage and name != "features.json":
        assert [path.name in record.getMessage() for record in caplog.records].count(True) == 1


@pytest.fixture
def write(tmp_path):
    """write(): the path of a shard of three moments."""
    moments = tfds.features.Tensor(shape=(4, 4, 4), dtype=np.float16, encoding="bytes")
    features = tfds.features.FeaturesDict({"moments": moments})
    path = tmp_path / "moments-train.array_record-00000-of-00001"

    def write():
        batch = np.zeros((3, 4, 4, 4), np.float16), 3, {}
        shards.write_shard(path, [batch], 1, features, {}, tqdm.tqdm(disable=True))
        return path

    return write


def test_shard_has_its_name_last_when_all_of_it_is_on_the_disk(write, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record(call, path, *arguments):
        calls.append((call.__name__, pathlib.Path(path).name))
        call(*arguments)

    monkeypatch.setattr(os, "fsync", lambda n: record(fsync, os.readlink(f"/proc/self/fd/{n}"), n))
    monkeypatch.setattr(os, "replace", lambda *paths: record(replace, paths[1], *paths))
    name = write().name
    assert calls == [
        ("fsync", f"{name}.tmp"),
        ("fsync", f"{name}.json.tmp"),
        ("replace", f"{name}.json"),
        ("replace", name),
    ]


def test_shard_whose_sums_cannot_be_written_is_not_there(write, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.files, "replace_text", fail)
    with pytest.raises(OSError, match=r"No space left on device\nOther shards are complete"):
        write()
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_shards_are_written_while_the_lock_is_held_and_no_longer(
    config, vae_dir, tmp_path, monkeypatch
):
    """Another command may write there by then."""
    plain = shards.write_shard

    def lose(*arguments):
        plain(*arguments)
        (tmp_path / store.LOCK).unlink()

    monkeypatch.setattr(shards, "write_shard", lose)
    with pytest.raises(files.LostError, match=r"encode\.lock was removed or replaced"):
        store.encode(config, vae_dir, tmp_path, shard_images=32)
    assert len(list(tmp_path.glob("moments-*"))) == 1
    assert not (tmp_path / "features.json").exists()


def test_a_claim_without_checksums_is_accepted_with_a_sentence(
    encoded, config, vae_dir, tmp_path, caplog
):
    """As an older version wrote it."""
    out = shutil.copytree(encoded, tmp_path / "out")
    for path in (out / "sums").iterdir():
        sums = json.loads(path.read_text())
        for key in ("crc32", "identity", "digest"):
            del sums[key]
        path.write_text(json.dumps(sums))
    before = _files(out)
    store.encode(config, vae_dir, out, shard_images=32)
    assert _files(out) == before
    assert "3 shards, such as" in caplog.text
    assert "only their sizes were compared" in caplog.text


def test_shards_of_other_images_are_refused_when_the_claim_is_lost(
    encoded, config, vae_dir, tmp_path
):
    out = shutil.copytree(encoded, tmp_path / "out")
    (out / "encode.json").unlink()
    before = _files(out)
    config.data.flip = False
    with pytest.raises(ValueError, match=r"00000-of-00003 was made of other images"):
        store.encode(config, vae_dir, out, shard_images=32)
    assert _files(out) == before


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_sizes_that_differ_are_shown():
    before, now = {"image_size": [8, 12]}, {"image_size": 8}
    assert "image_size: then [8, 12], now 8" in shards._describe_difference(
        pathlib.Path("out"), before, now
    )


def test_workdir_of_a_run_takes_no_shards(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is the workdir of a run: choose another directory"):
        shards.claim(tmp_path, {}, {})
