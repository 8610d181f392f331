"""Rows of evaluations.jsonl that are damaged, or that a stranger wrote."""

import pytest

from dit_jax.evaluation import row_schema


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({}, []),
        ({"step": 3, "sample": {"steps": 250, "sampler": "ddpm"}, "picture": "a.png"}, []),
        ({"step": -3, "sample": {"steps": "250"}}, ["sample", "step"]),
        ({"picture": "a.png", "fid": 2.27, "is": None, "precision": "high"}, ["precision"]),
        ({"fid_scale": "free", "picture": "a.png"}, []),  # no measure, since before the picture
        ({"likelihood": {"num": 8}}, ["bits_per_dim"]),
        ({"likelihood": {"num": 8}, "bits_per_token": 3.2}, []),
        ({"bits_per_dim": "3.2"}, ["bits_per_dim"]),
        ({"sample": {"seed": [[1]]}, "anything": [[[]]]}, ["anything", "sample"]),
    ],
)
def test_rows_hold_numbers_where_measures_are(row, wrong):
    assert sorted(row_schema.list_invalid_keys(row)) == wrong
