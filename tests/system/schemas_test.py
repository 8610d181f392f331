"""Which JSON values pass the checks of a schema."""

import pytest

from dit_jax.system import schemas

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
    ("check", "passing"),
    [
        (schemas.is_string, ["", "a"]),
        (schemas.is_bool, [True]),
        (schemas.is_number, [0, -1, 2**63, 0.5]),
        (schemas.is_positive, [2**63, 0.5]),
        (schemas.is_count, [0]),
        (schemas.is_scalar, [None, True, 0, -1, 2**63, 0.5, float("nan"), float("inf"), "", "a"]),
        (schemas.optional(schemas.is_count), [None, 0]),
        (schemas.list_of(schemas.is_value), [[], [1, "a"], [[]]]),
        (schemas.list_of(schemas.is_count), [[]]),
        (schemas.object_of({}), [{}, {"a": 1}, {"a": {}}]),
        (schemas.object_of({"a": schemas.is_count}), [{"a": 1}]),
        (schemas.object_of({"a": schemas.is_count}, optional_keys=["a"]), [{}, {"a": 1}]),
        (schemas.object_of({}, check_unknown=schemas.is_setting), [{}, {"a": 1}]),
    ],
)
def test_only_values_of_the_schema_pass(check, passing):
    passed = [value for value in VALUES if check(value)]
    assert list(map(repr, passed)) == list(map(repr, passing))


def test_keys_with_wrong_values_and_missing_keys_are_listed():
    schema = {"a": schemas.is_string, "b": schemas.is_string, "c": schemas.is_string}
    assert schemas.list_invalid_keys({"a": "x", "b": 3}, schema) == ["b", "c"]
    assert schemas.list_invalid_keys({"a": "x", "b": 3}, schema, optional_keys=["b", "c"]) == ["b"]
