"""Batches on disk: what is there continues, what is damaged or of others does not."""

import itertools
import os
import tracemalloc
import zlib

import numpy as np
import pytest

from dit_jax.evaluation import batch_cache, image_sets


def _batch(numbers):
    i = np.array(numbers)
    image = np.broadcast_to(i[:, None, None, None], (len(i), 4, 4, 3)).astype(np.uint8)
    return {"image": image, "label": i % 3, "features": i[:, None] * np.ones(5)}


def _fill(saved, *bounds):
    for first, stop in itertools.pairwise(bounds):
        saved.add(range(first, stop), _batch(range(first, stop)))


@pytest.fixture
def saved(tmp_path):
    """An empty cache."""
    saved = batch_cache.BatchCache(tmp_path / "kept", "abc")
    saved.prepare(0)
    return saved


def _paths(saved):
    return sorted(saved.directory.iterdir())


def test_all_arrays_come_back_in_order_and_the_first_images(saved):
    assert saved.prepare(19) == [range(19)]
    _fill(saved, 0, 8, 16, 19)
    assert batch_cache.BatchCache(saved.directory, "abc").prepare(19) == []
    assert batch_cache.BatchCache(saved.directory, "abc").prepare(30) == [range(19, 30)]
    arrays = saved.read(10)
    assert arrays.keys() == {"image", "label", "features"}
    assert arrays["label"].tolist() == [i % 3 for i in range(19)]
    assert arrays["features"][:, 2].tolist() == list(range(19))
    assert arrays["image"][:, 0, 0, 0].tolist() == list(range(10))


def test_only_what_is_missing_is_made_again(saved):
    _fill(saved, 0, 8, 16, 24)
    _paths(saved)[1].unlink()
    (saved.directory / "00000024-00000032-00000000.npz.tmp").write_bytes(b"PK")  # was killed
    assert saved.prepare(30) == [range(8, 16), range(24, 30)]
    _fill(saved, 8, 11, 16)
    _fill(saved, 24, 30)
    assert saved.read(1)["features"][:, 0].tolist() == list(range(30))


KINDS = ["cut", "empty", "one bit", "another's name", "another's contents", "zeros"]


def test_checksums_are_made_a_part_at_a_time(saved, monkeypatch):
    _fill(saved, 0, 8)
    (path,) = _paths(saved)
    os.truncate(path, 2**28)  # sparse
    tracemalloc.start()
    assert saved.prepare(8) == [range(8)]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_batches_are_made_again(saved, kind, caplog):
    _fill(saved, 0, 8, 16, 24)
    path = _paths(saved)[1]
    contents = bytearray(path.read_bytes())
    if kind == "one bit":
        contents[len(contents) // 3] ^= 4
    damaged = {"cut": contents[:-50], "empty": b"", "zeros": bytes(len(contents))}
    damaged["another's contents"] = _paths(saved)[0].read_bytes()  # whole, of other images
    path.write_bytes(damaged.get(kind, contents))
    if kind == "another's name":  # images that another batch holds too
        path.unlink()
        path = path.with_name(_paths(saved)[0].name.replace("00000008", "00000016"))
        path.write_bytes(_paths(saved)[0].read_bytes())
    assert saved.prepare(24) == [range(8, 16)]
    assert f"{path} is damaged: its images are made again" in caplog.text
    _fill(saved, 8, 16)
    assert saved.prepare(24) == []


def test_images_of_batches_that_overlap_count_once(saved):
    _fill(saved, 0, 8, 16)
    _fill(saved, 4, 12)
    assert saved.prepare(16) == []
    assert len(_paths(saved)) == 2
    assert saved.read(16)["image"][:, 0, 0, 0].tolist() == list(range(16))


def test_files_that_no_cache_wrote_have_no_name(tmp_path):
    assert batch_cache.get_name(tmp_path / "none.npz") is None
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    assert batch_cache.get_name(tmp_path / "other.npz") is None
    (tmp_path / "text.npz").write_text("text")
    assert batch_cache.get_name(tmp_path / "text.npz") is None


def test_samples_of_other_code_are_not_mixed(saved):
    _fill(saved, 0, 8)
    with pytest.raises(
        ValueError, match=r"begun by revision abc of the code, but this is def.*remove the"
    ):
        batch_cache.BatchCache(saved.directory, "def").prepare(8)


def test_npz_is_as_the_evaluator_of_adm_reads_it(saved, tmp_path):
    _fill(saved, 0, 8, 16, 19)
    saved.write_npz(tmp_path / "samples.npz", "40-abc")
    assert batch_cache.get_name(tmp_path / "samples.npz") == "40-abc"
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], _batch(range(19))["image"])
        np.testing.assert_array_equal(file["label"], np.arange(19) % 3)
    images = image_sets.open_npz(tmp_path / "samples.npz")  # and our own
    assert (images.num, images.shape) == (19, (4, 4, 3))


def test_npz_of_captions_has_no_labels(saved, tmp_path):
    saved.add(range(3), {"image": _batch(range(3))["image"]})
    saved.write_npz(tmp_path / "samples.npz", "40-abc")
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file) == {"arr_0", "name"}
    assert image_sets.open_npz(tmp_path / "samples.npz").num == 3


def test_full_disk_leaves_what_was_there(saved, monkeypatch):
    _fill(saved, 0, 8)
    before = _paths(saved)

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch_cache.files.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"No space left.*\n.*it goes on with image 8"):
        _fill(saved, 8, 16)
    assert _paths(saved) == before
    saved.remove()
    assert not saved.directory.exists()


def _save(path, **arrays):
    np.savez_compressed(path, **arrays)


HOSTILE = {
    "no zip": lambda path: path.write_bytes(b"PK"),
    "no revision": lambda path: _save(path, **_batch(range(8, 16))),
    "number": lambda path: _save(path, revision=np.ones(3), **_batch(range(8, 16))),
    "long text": lambda path: _save(path, revision=np.array("a" * 10**7), **_batch(range(8, 16))),
    "pickle": lambda path: _save(path, revision=np.array("abc"), features=np.array([{}])),
    "other count": lambda path: _save(path, revision=np.array("abc"), **_batch(range(8, 15))),
    "other arrays": lambda path: _save(path, revision=np.array("abc"), x=np.ones(8)),
    "other width": lambda path: _save(
        path, revision=np.array("abc"), **_batch(range(8, 16)) | {"features": np.ones((8, 7))}
    ),
    "other type": lambda path: _save(
        path, revision=np.array("abc"), **_batch(range(8, 16)) | {"label": np.ones(8, np.complex64)}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_strange_batches_with_the_right_checksum_are_made_again(saved, kind, caplog):
    _fill(saved, 0, 8)
    HOSTILE[kind](path := saved.directory / "x.npz")
    crc = zlib.crc32(path.read_bytes())
    path.rename(saved.directory / f"00000008-00000016-{crc:08x}.npz")
    beyond = saved.directory / f"00000016-00000099999999999-{crc:08x}.npz"
    beyond.touch()
    again = batch_cache.BatchCache(saved.directory, "abc")
    assert again.prepare(16) == [range(8, 16)]
    assert caplog.text.count("is damaged: its images are made again") == 2
    _fill(again, 8, 16)
    assert again.read(16)["features"].shape == (16, 5)


def test_batches_of_other_arrays_do_not_mix(saved):
    _fill(saved, 0, 8)
    with pytest.raises(ValueError, match=r"holds batches of other arrays .* Remove the directory"):
        saved.add(range(8, 16), _batch(range(8, 16)) | {"features": np.ones((8, 7))})
