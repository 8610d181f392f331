"""Which values of damaged or strange JSON files pass for what."""

import pytest

from dit_jax.system import forms

VALUES = [
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    [],
    [1, "a"],
    [[]],
    {},
    {"a": 1},
    {"a": {}},
    {"a": [[]]},
]


@pytest.mark.parametrize(
    ("holds", "passing"),
    [
        (forms.is_text, ["", "a"]),
        (forms.is_flag, [True]),
        (forms.is_number, [0, -1, 2**63, 0.5]),
        (forms.is_positive, [2**63, 0.5]),
        (forms.is_count, [0]),
        (forms.is_plain, [None, True, 0, -1, 2**63, 0.5, float("nan"), float("inf"), "", "a"]),
        (forms.optional(forms.is_count), [None, 0]),
        (forms.list_of(forms.is_value), [[], [1, "a"], [[]]]),
        (forms.list_of(forms.is_count), [[]]),
        (forms.object_of({}), [{}, {"a": 1}, {"a": {}}]),
        (forms.object_of({"a": forms.is_count}), [{"a": 1}]),
        (forms.object_of({"a": forms.is_count}, optional_keys=["a"]), [{}, {"a": 1}]),
        (forms.object_of({}, others=forms.is_setting), [{}, {"a": 1}]),
    ],
)
def test_only_values_of_the_form_pass(holds, passing):
    found = [value for value in VALUES if holds(value)]
    assert list(map(repr, found)) == list(map(repr, passing))


def test_wrong_keys_are_named():
    form = {"a": forms.is_text, "b": forms.is_text, "c": forms.is_text}
    assert forms.invalid_keys({"a": "x", "b": 3}, form) == ["b", "c"]
    assert forms.invalid_keys({"a": "x", "b": 3}, form, optional_keys=["b", "c"]) == ["b"]


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
    assert sorted(forms.invalid_row_keys(row)) == wrong


def test_types_are_named_with_the_value():
    forms.check_type("optim.ema_decay", 1, float)
    forms.check_type("sample.cfg_interval", (0, 0.5), float, many=True)
    with pytest.raises(ValueError, match=r"^sample\.steps=True must be a whole number\.$"):
        forms.check_type("sample.steps", True, int)
    with pytest.raises(ValueError, match=r"^latents\.scale=1 must be a list of numbers\.$"):
        forms.check_type("latents.scale", 1, float, many=True)
    with pytest.raises(ValueError, match=r"^data\.name=\[0, 0.{95}\.\.\. must be a str\.$"):
        forms.check_type("data.name", [0] * 1000, str)
