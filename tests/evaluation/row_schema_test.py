"""The schema of a row finds the keys of a damaged row that have wrong values."""

import pytest

from dit_jax.evaluation import row_schema


@pytest.mark.parametrize(
    ("row", "invalid_keys"),
    [
        ({}, []),
        ({"step": 3, "sample": {"steps": 250, "sampler": "ddpm"}, "picture": "a.png"}, []),
        ({"step": -3, "sample": {"steps": "250"}}, ["sample", "step"]),
        ({"picture": "a.png", "fid": 2.27, "is": None, "precision": "high"}, ["precision"]),
        (
            {"fid_scale": "free", "picture": "a.png"},
            [],
        ),  # not a measure, because it precedes the picture
        ({"likelihood": {"num": 8}}, ["bits_per_dim"]),
        ({"likelihood": {"num": 8}, "bits_per_token": 3.2}, []),
        ({"bits_per_dim": "3.2"}, ["bits_per_dim"]),
        ({"sample": {"seed": [[1]]}, "anything": [[[]]]}, ["anything", "sample"]),
    ],
)
def test_keys_with_wrong_values_are_listed(row, invalid_keys):
    assert sorted(row_schema.list_invalid_keys(row)) == invalid_keys
