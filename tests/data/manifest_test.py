"""The form of what is kept about data: anything else is refused in one line."""

import json

import pytest

from dit_jax import workdirs
from dit_jax.data import manifest

STRANGE = [None, 5, "x", [], {}, [1], True, {"a": 1}, 10**30, float("nan"), ["a", "a"]]
IDENTITY = {
    "num_examples": 4,
    "version": None,
    "classes": ["ant", "bee"],
    "labels": "ab",
    "captions": None,
    "files": "cd",
    "times": "ef",
    "contents": "gh",
    "bytes_read": 100,
}
MOMENTS = {
    "mean": [0.0, 1],
    "std": [1.0, 2.0],
    "mean_absolute": 0.5,
    "vae_digest": "ab",
    "mirrored": True,
    "published": None,
    "dataset": {"train": IDENTITY},
}


def test_values_with_their_digest_are_read_back_and_nothing_else():
    values = {"b": [1, 2.5], "a": None}
    kept = manifest.with_digest(values)
    assert manifest.without_digest(json.loads(json.dumps(kept)), "x") == values
    assert manifest.without_digest(values, "x") == values  # an older version's
    for other in (kept | {"a": 1}, kept | {"digest": "x"}, kept | {"c": 0}, [kept], None):
        with pytest.raises(ValueError, match=r"^a\\x1bb is not as it was written$"):
            manifest.without_digest(other, "a\x1bb")


def test_identities_are_those_of_splits():
    manifest.check_identities({}, "x")
    whole = {"train": IDENTITY, "images": {"train": IDENTITY, "eval": IDENTITY}}
    manifest.check_identities(whole, "x")
    without = {key: value for key, value in IDENTITY.items() if key != "times"}
    manifest.check_identity(without, "x")  # of what was encoded
    for value in (None, [], {"train": []}, {"images": {"train": {}}}, {"images": IDENTITY}):
        with pytest.raises(ValueError, match="holds no identit"):
            manifest.check_identities(value, "x")


@pytest.mark.parametrize("key", IDENTITY)
def test_strange_identities_are_refused(key):
    allowed = {"num_examples": [5], "bytes_read": [5], "classes": [None]}.get(key, [None, "x"])
    for value in STRANGE:
        if value in allowed and not isinstance(value, bool):
            manifest.check_identity(IDENTITY | {key: value}, "x")
            continue
        with pytest.raises(ValueError, match=f"^x holds no identity of a dataset: {key}.$"):
            manifest.check_identity(IDENTITY | {key: value}, "x")
    if key != "times":
        del (less := dict(IDENTITY))[key]
        with pytest.raises(ValueError, match=f": {key}.$"):
            manifest.check_identity(less, "x")


@pytest.mark.parametrize("key", MOMENTS)
def test_strange_moments_are_refused(key):
    manifest.check_moments(MOMENTS, 2, "x")
    allowed = {"mean_absolute": [5, 10**30], "vae_digest": ["x"], "mirrored": [True]}
    allowed |= {"published": [None, [], [1], ["a", "a"]], "dataset": [{}]}
    for value in STRANGE:
        if repr(value) not in map(repr, allowed.get(key, [])):
            with pytest.raises(ValueError, match=r"^x"):
                manifest.check_moments(MOMENTS | {key: value}, 2, "x")
    with pytest.raises(ValueError, match="mean has 2 numbers, not 3"):
        manifest.check_moments(MOMENTS, 3, "x")
    with pytest.raises(ValueError, match=": std"):
        manifest.check_moments(MOMENTS | {"std": [1.0, 0.0]}, 2, "x")


@pytest.mark.parametrize("damage", ["names in another order", "another type", "no contents"])
def test_data_json_that_is_damaged_is_the_checkpoint_s(workdir, damage, caplog):
    path = workdir / "data.json"
    whole = workdirs.load_data(workdir)
    assert "WARNING" not in caplog.text
    data = json.loads(path.read_text())
    if damage == "names in another order":
        data["train"]["classes"] = ["b", "a"]
    else:
        data["train"]["classes"] = [1, 2] if damage == "another type" else None
        data["train"].pop("contents")
        data = manifest.with_digest({key: value for key, value in data.items() if key != "digest"})
    path.write_text(json.dumps(data))
    assert workdirs.load_data(workdir) == whole
