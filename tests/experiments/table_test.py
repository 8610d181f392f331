"""The CSV file of a study: what is read as it was written, and what is refused."""

import numpy as np
import pytest

from experiments.scaling.cells import collect
from experiments.scaling.fits import table


def test_number_that_is_none_is_refused_with_its_line(tmp_path):
    columns = ",".join([*table.REQUIRED, "fid"])
    numbers = ",".join("1" for _ in table.REQUIRED)
    path = tmp_path / "table.csv"
    path.write_text(f"{columns}\n{numbers},1.5\n{numbers},abc\n")
    with pytest.raises(ValueError, match=r"table\.csv:3: fid='abc' is no number"):
        table.read(path)
    path.write_text(f"{columns}\n{numbers},1.5,7\n")
    with pytest.raises(ValueError, match=r"table\.csv:2: more or fewer cells than columns"):
        table.read(path)
    path.write_text(f"{columns},fid\n{numbers},1.5,1.7\n")
    with pytest.raises(ValueError, match=r"table\.csv has two columns of one name: fid\.$"):
        table.read(path)
    path.write_text("cell,fid\na,1.5\n")
    with pytest.raises(ValueError, match="has no column model, patch_size, block"):
        table.read(path)


@pytest.mark.parametrize("encode", [lambda t: b"\xef\xbb\xbf" + t, lambda t: t], ids=["BOM", ""])
@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_table_as_spreadsheets_save_it(swept, tmp_path, encode, end):
    path = tmp_path / "table.csv"
    table.write(path, collect.collect(swept))
    rows = table.to_rows(table.read(path))
    path.write_bytes(encode(path.read_bytes().replace(b"\n", end)))
    assert table.to_rows(table.read(path)) == rows


@pytest.mark.parametrize("at", [0, 100_000])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(b"\x89PNG\r\n\x1a\n", "'utf-8' codec"), (b"1" * 200_000, "field larger than field limit")],
)
def test_file_that_is_no_text_is_no_table(tmp_path, at, damage, message):
    line = ",".join(table.REQUIRED).encode() + b"\n"
    text = line * (at // len(line))
    (tmp_path / "table.csv").write_bytes(text + damage + b"\n" + line)
    with pytest.raises(ValueError, match=rf"table\.csv is no table: {message}"):
        table.read(tmp_path / "table.csv")


@pytest.mark.parametrize("value", ["0", "-1", "1e31", "inf", "nan", "1" + "0" * 400])
@pytest.mark.parametrize("name", table.POSITIVE)
def test_sizes_and_costs_of_a_table_are_numbers_above_0(tmp_path, name, value):
    row = dict.fromkeys([*table.REQUIRED, "num_heads", "images_seen"], 1)
    path = tmp_path / "table.csv"
    table.write(path, [row, {**row, name: value}])
    with pytest.raises(ValueError, match=rf"table\.csv:3: {name}=.* must be above 0 and at most"):
        table.read(path)
    table.write(path, [row, {**row, name: None}])
    if name not in (*table.NEEDED, "tokens"):  # tokens only a DiT's row needs
        assert table.read(path)[name].isna().tolist() == [False, True]
        return
    with pytest.raises(ValueError, match=rf"table\.csv:3: {name} must not be empty"):
        table.read(path)


def test_loss_of_nan_is_not_an_empty_cell(tmp_path):
    row = dict.fromkeys([*table.REQUIRED, "eval_mse"], 1)
    path = tmp_path / "table.csv"
    table.write(path, [row, {**row, "eval_mse": float("nan")}, {**row, "eval_mse": None}])
    assert table.read(path)["eval_mse"].isna().tolist() == [False, False, True]
    assert np.isnan(table.to_rows(table.read(path))[1]["eval_mse"])


def test_table_is_read_as_it_was_written(swept, tmp_path):
    rows = collect.collect(swept)
    table.write(tmp_path / "table.csv", rows)
    assert table.to_rows(table.read(tmp_path / "table.csv")) == rows
