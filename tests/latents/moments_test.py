"""The metadata of moments: another form than `encode` writes is refused in one line."""

import pytest

from dit_jax.latents import moments

STRANGE = [None, 5, "x", [], {}, [1], True, {"a": 1}, 10**30, float("nan"), ["a", "a"]]
MOMENTS = {
    "mean": [0.0, 1],
    "std": [1.0, 2.0],
    "mean_absolute": 0.5,
    "vae_digest": "ab",
    "mirrored": True,
    "published": None,
    "dataset": {},
}


@pytest.mark.parametrize("key", MOMENTS)
def test_strange_moments_are_refused(key):
    moments.check_metadata(MOMENTS, 2, "x")
    allowed = {"mean_absolute": [5, 10**30], "vae_digest": ["x"], "mirrored": [True]}
    allowed |= {"published": [None, [], [1], ["a", "a"]], "dataset": [{}]}
    for value in STRANGE:
        if repr(value) not in map(repr, allowed.get(key, [])):
            with pytest.raises(ValueError, match=r"^x"):
                moments.check_metadata(MOMENTS | {key: value}, 2, "x")
    with pytest.raises(ValueError, match="mean has 2 numbers, not 3"):
        moments.check_metadata(MOMENTS, 3, "x")
    with pytest.raises(ValueError, match=": std"):
        moments.check_metadata(MOMENTS | {"std": [1.0, 0.0]}, 2, "x")
