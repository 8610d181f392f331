"""Batches on disk: what is there continues, what is damaged or of others does not."""

import itertools

import numpy as np
import pytest

from dit_jax import images, spool


def _batch(numbers):
    i = np.array(numbers)
    image = np.broadcast_to(i[:, None, None, None], (len(i), 4, 4, 3)).astype(np.uint8)
    return {"image": image, "label": i % 3, "features": i[:, None] * np.ones(5)}


def _fill(kept, *bounds):
    for first, stop in itertools.pairwise(bounds):
        kept.add(range(first, stop), _batch(range(first, stop)))


def test_all_arrays_come_back_in_order_and_the_first_images(tmp_path):
    kept = spool.Spool(tmp_path / "kept")
    assert kept.begin("abc") == 0
    _fill(kept, 0, 8, 16, 19)
    assert spool.Spool(tmp_path / "kept").begin("abc") == 19
    arrays = kept.read(10)
    assert arrays["label"].tolist() == [i % 3 for i in range(19)]
    assert arrays["features"][:, 2].tolist() == list(range(19))
    assert arrays["image"][:, 0, 0, 0].tolist() == list(range(10))


def test_what_lies_beyond_a_gap_is_made_again(tmp_path):
    kept = spool.Spool(tmp_path)
    kept.begin("abc")
    _fill(kept, 0, 8, 16, 24)
    (tmp_path / "00000008-00000016.npz").unlink()
    (tmp_path / "00000024-00000032.npz.tmp").write_bytes(b"PK")  # killed while it was written
    assert kept.begin("abc") == 8
    _fill(kept, 8, 20)
    assert kept.read(1)["features"][:, 0].tolist() == list(range(20))


def test_damaged_batches_are_made_again(tmp_path):
    kept = spool.Spool(tmp_path)
    kept.begin("abc")
    _fill(kept, 0, 8, 16, 24)
    path = tmp_path / "00000008-00000016.npz"
    path.write_bytes(path.read_bytes()[:-50])
    assert kept.begin("abc") == 8
    _fill(kept, 8, 16)
    assert kept.begin("abc") == 16  # what lay beyond is gone too


def test_files_that_no_spool_wrote_have_no_name(tmp_path):
    assert spool.name_of(tmp_path / "none.npz") is None
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    assert spool.name_of(tmp_path / "other.npz") is None
    (tmp_path / "text.npz").write_text("text")
    assert spool.name_of(tmp_path / "text.npz") is None


def test_samples_of_other_code_are_not_mixed(tmp_path):
    spool.Spool(tmp_path).begin("abc")
    with pytest.raises(ValueError, match=r"begun by other code, revision abc, now def.*remove the"):
        spool.Spool(tmp_path).begin("def")


def test_npz_is_as_the_evaluator_of_adm_reads_it(tmp_path):
    kept = spool.Spool(tmp_path / "kept")
    kept.begin("abc")
    _fill(kept, 0, 8, 16, 19)
    kept.write_npz(tmp_path / "samples.npz", "40-abc")
    assert spool.name_of(tmp_path / "samples.npz") == "40-abc"
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], _batch(range(19))["image"])
        np.testing.assert_array_equal(file["label"], np.arange(19) % 3)
    found = images.open_npz(tmp_path / "samples.npz")  # and our own
    assert (found.num, found.shape) == (19, (4, 4, 3))


def test_npz_of_captions_has_no_labels(tmp_path):
    kept = spool.Spool(tmp_path / "kept")
    kept.begin("abc")
    kept.add(range(3), {"image": _batch(range(3))["image"]})
    kept.write_npz(tmp_path / "samples.npz", "40-abc")
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file) == {"arr_0", "name"}
    assert images.open_npz(tmp_path / "samples.npz").num == 3


def test_full_disk_leaves_what_was_there(tmp_path):
    kept = spool.Spool(tmp_path / "kept")
    kept.begin("abc")
    _fill(kept, 0, 8)

    def savez(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez", savez)
        with pytest.raises(OSError, match=r"No space left.*\n.*it continues after image 8"):
            _fill(kept, 8, 16)
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [
        "00000000-00000008.npz",
        "revision.json",
    ]
    kept.remove()
    assert not (tmp_path / "kept").exists()
