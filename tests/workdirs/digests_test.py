"""Digests of JSON values in files."""

import json

import pytest

from dit_jax.workdirs import digests


def test_values_with_their_digest_are_read_back_and_nothing_else():
    values = {"b": [1, 2.5], "a": None}
    saved = digests.with_digest(values)
    assert digests.without_digest(json.loads(json.dumps(saved)), "x") == values
    assert digests.without_digest(values, "x") == values  # an older version's
    for other in (saved | {"a": 1}, saved | {"digest": "x"}, saved | {"c": 0}, [saved], None):
        with pytest.raises(ValueError, match=r"^a\\x1bb is not as it was written$"):
            digests.without_digest(other, "a\x1bb")
