"""Tensors in torch's files, read as data: every layout, and harmful files.

Most files are written here by hand, since torch is optional. torch.save writes the others.
"""

import argparse
import collections
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from helpers import torch_format
from helpers.torch_format import Call, Global, storage, tensor

from dit_jax.convert import tensor_files, torch_files
from dit_jax.system import npz_files

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.array([0.5, -2], np.float16),
    "count": np.array(7, np.int64),
}


@pytest.fixture
def contents():
    return torch_format.tensors(ARRAYS)


def _check(path):
    assert torch_files.describe(path).keys() == ARRAYS.keys()
    actual = tensor_files.read(path)
    assert actual.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_tensors_are_read_from_every_suffix(contents, tmp_path, suffix):
    torch_format.save(tmp_path / f"x{suffix}", *contents)
    _check(tmp_path / f"x{suffix}")


def test_weights_in_training_checkpoints_are_read(contents, tmp_path):
    """Objects of any class may be beside the weights: they are not built."""
    by_name, records = contents
    other = Call(Global("os", "system"), ("false",))
    for name, saved in (
        ("ema", {"ema": by_name, "model": {}, "args": other, "opt": {0: [other, (1, 2.0)]}}),
        ("state_dict", {"epoch": 3, "state_dict": by_name, "callbacks": {other: None}}),
        ("ema", {"state_dict": {"b": other}, "ema": by_name}),
    ):
        path = tmp_path / f"{name}.ckpt"
        torch_format.save(path, saved, records)
        _check(path)


def test_views_of_one_storage(tmp_path):
    saved = storage("0", np.float32, 6)
    by_name = {
        "all": tensor(saved, (2, 3)),
        "transposed": tensor(saved, (3, 2), (1, 3)),
        "column": tensor(saved, (2,), (3,), offset=1),
        "same": tensor(saved, (4, 2), (0, 0), offset=5),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"), (tensor(saved, (1,)), True, None)
        ),
    }
    torch_format.save(tmp_path / "x.pt", by_name, {"0": np.arange(6, dtype="<f4").tobytes()})
    actual = tensor_files.read(tmp_path / "x.pt")
    np.testing.assert_array_equal(actual["all"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(actual["transposed"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(actual["column"], [1, 4])
    np.testing.assert_array_equal(actual["same"], np.full((4, 2), 5))
    np.testing.assert_array_equal(actual["parameter"], [0])


def test_legacy_files(contents, tmp_path):
    by_name = {"all": tensor(storage("k", np.float32, 6, None), (2, 3))}
    # In torch 0.1, a storage itself may be a view, here of numbers 2 to 4.
    by_name["part"] = tensor(storage("k", np.float32, 6, ("v", 2, 3)), (3,))
    by_name["other"] = tensor(storage("j", np.float32, 1, None), (), function="_rebuild_tensor")
    records = {"j": np.float32(9).tobytes(), "k": np.arange(6, dtype="<f4").tobytes()}
    path = tmp_path / "x.pth"
    torch_format.save_legacy(path, by_name, records)
    actual = tensor_files.read(path)
    np.testing.assert_array_equal(actual["all"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(actual["part"], [2, 3, 4])
    assert actual["other"] == 9
    torch_format.save_legacy(path, by_name, records, little_endian=False)
    with pytest.raises(ValueError, match="not in little-endian order"):
        tensor_files.read(path)
    torch_format.save_legacy(path, by_name, {"j": records["j"]})
    with pytest.raises(ValueError, match="KeyError: 'k'"):
        tensor_files.read(path)
    torch_format.save_legacy(path, by_name, records | {"k": records["j"]})
    with pytest.raises(ValueError, match="its record 'k' has 1 numbers, not 6"):
        tensor_files.read(path)


def test_ordered_dicts_of_python_2(contents, tmp_path):
    by_name, records = contents
    pairs = [[name, value] for name, value in by_name.items()]
    ordered = Call(Global("collections", "OrderedDict"), (pairs,))
    torch_format.save(tmp_path / "x.pt", ordered, records)
    _check(tmp_path / "x.pt")


class Printing:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_nothing_in_a_file_is_run_or_imported(tmp_path, capsys):
    for contents, message in (
        (pickle.dumps({"weight": Printing()}, 2), r"weight \(__builtin__.print\)"),
        (torch_format.pickle(Call(Global("os", "system"), ("echo run",))), "a os.system instead"),
        (b"\x80\x02cno_such_module\nname\n.", "a no_such_module.name instead of tensors"),
    ):
        torch_format.save(tmp_path / "x.pt", contents, {})
        with pytest.raises(ValueError, match=message):
            tensor_files.read(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Printing()))
    with pytest.raises(ValueError, match=r"torch\.save did not write it"):
        tensor_files.read(tmp_path / "x.pt")
    assert not capsys.readouterr().out


def _make_huge(count):
    """Returns a tensor of one number with an enormous shape."""
    return tensor(storage("0", np.float32, 1), (count, count), (0, 0))


HUGE = 2**62
OTHER = "it holds more than tensors"


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({"a": _make_huge(10**6)}, r"would take 4,000,000,000,000 bytes, but the file has \d+"),
        ({"a": _make_huge(10**300)}, "would take more than 10.30 bytes"),
        ({"a": tensor(storage("0", np.float32, 1), (0, HUGE))}, r"empty arrays: a \(0, 46"),
        ({"a": tensor(storage("0", np.float32, 1), (2,))}, "has more numbers than its record"),
        (
            {"a": tensor(storage("0", np.float32, 1), (1,), offset=1)},
            "has more numbers than its record",
        ),
        ({"a": tensor(storage("0", np.float32, 1), (1,), offset=-1)}, "an invalid shape, offset"),
        ({"a": tensor(storage("0", np.float32, 1), (-1,), (-1,))}, "an invalid shape, offset"),
        ({"a": tensor(storage("0", np.float32, 1), (True,), (1,))}, "an invalid shape, offset"),
        ({"a": tensor(storage("0", np.float32, 1), ("1",), (1,))}, "an invalid shape, offset"),
        ({"a": tensor(storage("0", np.float32, 1), (1,), ())}, "an invalid shape, offset"),
        ({"a": tensor(storage("0", np.float32, HUGE), (1,))}, r"its tensors are \d"),
        ({"a": tensor(storage("0", np.float32, 2), (1,))}, "'data/0' has 4 bytes, not 8"),
        ({"a": tensor(storage("none", np.float32, 1), (1,))}, "'data/none' is not there"),
        ({"a": tensor(storage("../data.pkl", np.float32, 1), (1,))}, "data.pkl' is not there"),
        ({"a": tensor(storage("0", np.float32, -1), (1,))}, "has an invalid storage"),
        ({"a": Call(Global("builtins", "bytearray"), (10**12,))}, f"{OTHER}.*builtins.bytearray"),
        ({"a": Call(Global("torch", "Tensor"), (10**6, 10**6))}, rf"{OTHER}: a \(torch.Tensor\)"),
        (
            {"a": Call(Global("torch._utils", "_rebuild_sparse_tensor"), (1, 2))},
            f"{OTHER}.*_rebuild_sparse_tensor",
        ),
        ({"epoch": 3, "a": _make_huge(1)}, rf"{OTHER}: epoch \(int\)$"),
        ({"a\x1b[2J\n": {}}, rf"{OTHER}: a\\x1b\[2J\\n \(dict\)$"),
        ({3: _make_huge(1)}, rf"{OTHER}: int \(torch._utils._rebuild_tensor_v2\)$"),
        (
            {str(i): i for i in range(99)},
            rf"{OTHER}: 0 \(int\), 1 \(int\), .*4 \(int\) and 94 more$",
        ),
        ([1, 2], "it holds a list instead of tensors by their names"),
        ("x" * 10**6, "it holds a str instead of tensors"),
    ],
)
def test_harmful_tensors_are_refused_in_little_memory(tmp_path, by_name, message):
    path = tmp_path / "x.pt"
    torch_format.save(path, by_name, {"0": b"1234"})
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"(?m){message}"):
        tensor_files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def _make_deep(count):
    """Returns a pickle of a tuple in a tuple in a tuple."""
    return b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * count + b"s."


def _make_doubled(count):
    """Returns a short pickle whose value is endless in print: tuples with the same tuple twice."""
    return b"\x80\x02}X\x01\x00\x00\x00a)" + b"".join(
        b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(count)
    )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (_make_deep(10**5), r"more than tensors: a \(tuple\)"),
        (_make_doubled(200) + b"s.", r"more than tensors: a \(tuple\)"),
        (_make_doubled(200) + b"Qs.", "invalid storage|unpack"),
        (_make_doubled(200) + b"cos\nsystem\n\x86\x81s.", "IndexError|more than tensors"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "^cannot|would take|none"),  # a memo of 2^32 entries
        (b"\x80\x02]q\x00h\x00a.", "holds a list"),  # a list in itself
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", r"more than tensors: a \(dict\)"),
        (b"\x80\x02h\x05.", "KeyError: 5"),
        (b"\x80\x02(lp0\n.", "its pickle has the opcode LIST, which torch.save does not"),
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02}", "pickle exhausted before seeing STOP|has no end"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected 2147483647 bytes in a unicodestring4"),
        (b"\x80\x02}(K\x01u.", "zip"),
    ],
)
def test_harmful_pickles_are_refused_in_little_memory(tmp_path, contents, message):
    path = tmp_path / "x.pt"
    torch_format.save(path, contents, {})
    tracemalloc.start()
    if b"r\xff" in contents:
        assert tensor_files.read(path) == {}
    else:
        with pytest.raises(ValueError, match=f"(?m){message}"):
            tensor_files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


def test_other_archives_are_refused(contents, tmp_path, monkeypatch):
    path, (by_name, records) = tmp_path / "x.pt", contents
    torch_format.save(path, by_name, records, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"is compressed, which torch\.save does not"):
        tensor_files.read(path)
    for name, message in (
        ("archive/constants.pkl", "is a program of TorchScript, not tensors"),
        ("other/data.pkl", "a zip archive, but torch.save did not write it"),
    ):
        torch_format.save(path, by_name, records)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        with pytest.raises(ValueError, match=message):
            tensor_files.read(path)
    torch_format.save(path, by_name, records)
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(ValueError, match=r"its pickle has \d+ bytes, more than 100"):
        tensor_files.read(path)
    torch_format.save_legacy(path, by_name, records)
    with pytest.raises(ValueError, match="its pickle has more than 100 bytes"):
        tensor_files.read(path)
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    (tmp_path / "x.npz").rename(path)
    with pytest.raises(ValueError, match=r"a zip archive, but torch\.save did not write it"):
        tensor_files.read(path)


def test_overlapping_records_are_limited_by_the_size_of_the_file(tmp_path):
    """A thousand members of an archive may be the same bytes of the file."""
    size = 10**6
    by_name = {str(i): tensor(storage(str(i), np.float32, size // 4), (1,)) for i in range(1000)}
    records = {str(i): b"" for i in range(1, 1000)}
    path = tmp_path / "x.pt"
    torch_format.save(path, by_name, {"0": bytes(size)} | records)
    with pytest.raises(
        ValueError, match=r"its tensors are 1,000,000,000 bytes, more than the file"
    ):
        tensor_files.read(path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("sizes", [(20, 1), (1, 20)])
def test_storages_of_one_record_with_different_sizes_are_refused(tmp_path, sizes, is_zip):
    """A view of the larger one would read memory beyond the record."""
    view = () if is_zip else (None,)
    by_name = {str(n): tensor(storage("0", np.float32, n, *view), (n,)) for n in sizes}
    save = torch_format.save if is_zip else torch_format.save_legacy
    save(tmp_path / "x.pt", by_name, {"0": b"1234"})
    with pytest.raises(
        ValueError, match=r"record '(data/)?0' has (4 bytes, not 80|1 numbers, not)"
    ):
        tensor_files.read(tmp_path / "x.pt")


def test_flipped_bit_is_noticed(contents, tmp_path):
    path = tmp_path / "x.pt"
    torch_format.save(path, *contents)
    whole = path.read_bytes()
    position = whole.index(ARRAYS["a.weight"].tobytes())
    path.write_bytes(whole[:position] + b"\x01" + whole[position + 1 :])
    with pytest.raises(ValueError, match="Bad CRC-32"):
        tensor_files.read(path)


def _make_objects(torch):
    """Yields (name, object for torch.save): {name: tensor}, or a checkpoint with it."""
    torch.manual_seed(0)
    plain = {
        "f32": torch.randn(3, 4),
        "f64": torch.randn(2, dtype=torch.float64),
        "f16": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False]),
        **{str(t): torch.tensor([1, 2], dtype=t) for t in (torch.int32, torch.int16, torch.int8)},
        "uint8": torch.tensor([255], dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(3, 4).t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "slice": torch.randn(10, 10)[2:5, ::3],
    }
    plain["shared"] = plain["f32"][1:]
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    yield "plain", plain
    yield "module", module.state_dict()  # with _metadata
    yield "parameters", dict(module.named_parameters())
    yield (
        "training",
        {
            "model": {},
            "ema": collections.OrderedDict(plain),
            "opt": optimizer.state_dict(),
            "args": argparse.Namespace(lr=1e-4, classes=[1, 2], big=2**100, none=None, neg=-7),
        },
    )


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_file_of_torch_is_read_as_torch_reads_it(tmp_path, is_zip):
    torch = pytest.importorskip("torch", reason="torch is optional")
    for name, contents in _make_objects(torch):
        path = tmp_path / f"{name}.pt"
        torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
        with torch.serialization.safe_globals([argparse.Namespace]):
            expected = torch.load(path, weights_only=True)
        expected, actual = expected.get("ema", expected), tensor_files.read(path)
        assert actual.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(actual[key], array.detach().float().numpy())


def test_bfloat16_is_read(tmp_path):
    values = np.array([1, -2.5], ml_dtypes.bfloat16)
    saved = storage("0", np.float32, 2)
    saved.identity = ("storage", Global("torch", "BFloat16Storage"), *saved.identity[2:])
    torch_format.save(tmp_path / "x.pt", {"a": tensor(saved, (2,))}, {"0": values.tobytes()})
    np.testing.assert_array_equal(tensor_files.read(tmp_path / "x.pt")["a"], [1, -2.5])


def test_arrays_may_be_larger_than_the_file(contents, tmp_path, monkeypatch):
    """They may take 16 times its bytes, so that float16 and shared numbers fit."""
    path = tmp_path / "x.pt"
    torch_format.save(path, *contents)
    monkeypatch.setattr(npz_files, "FREE_BYTES", 0)
    _check(path)
