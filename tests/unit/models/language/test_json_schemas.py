from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from isthmus.models.language.json_schemas import narrowed
from tests.bench.schemas import Schemas

MOST = 10**18 - 1
NAMED = {"type": "object", "properties": {"a": {"type": "string"}}}
CLOSED = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (NAMED, CLOSED),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [NAMED, {"type": "null"}], "title": "A"}, {"anyOf": [CLOSED, {"type": "null"}], "title": "A"}),
        ({"$ref": "#/$defs/a", "$defs": {"a": NAMED}}, {"$ref": "#/$defs/a", "$defs": {"a": CLOSED}}),
        ({"type": "integer"}, {"type": "integer", "minimum": -MOST, "maximum": MOST}),
        ({"type": ["integer", "null"], "minimum": 3}, {"type": ["integer", "null"], "minimum": 3, "maximum": MOST}),
        (
            {"type": "object", "properties": {"enum": {"type": "integer", "exclusiveMaximum": 5}}},
            {
                "type": "object",
                "properties": {"enum": {"type": "integer", "exclusiveMaximum": 5, "minimum": -MOST}},
                "additionalProperties": False,
            },
        ),
    ],
)
def test_what_a_schema_leaves_open_is_narrowed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    given = json.dumps(schema)
    assert narrowed(schema) == expected
    assert json.dumps(schema) == given


@pytest.mark.parametrize(
    "schema",
    [
        {**NAMED, "additionalProperties": {"type": "string"}},
        {**NAMED, "additionalProperties": True},
        {**NAMED, "required": ["b"]},  # a property that is not named
        {**NAMED, "minProperties": 3},
        {"type": "object"},
        {"allOf": [NAMED, {"properties": {"b": {"type": "integer"}}}]},
        {"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": NAMED}},
        {**NAMED, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"items": {"if": NAMED, "then": {"properties": {"b": {}}}}},
        {"type": "integer", "minimum": 10**30},
        {"type": ["number", "integer"]},
        {"const": {"properties": {"a": {}}}},
        {"enum": [{"type": "integer"}]},
        {"type": "number"},
        {"properties": 3, "items": "no schema", "required": "a"},
        {},
        True,
    ],
)
def test_what_joins_others_or_says_so_itself_stays(schema: Any) -> None:
    assert narrowed(schema) == schema


def test_what_is_valid_afterwards_was_valid_before() -> None:
    schemas = Schemas(5)
    for _ in range(50):
        schema = schemas.next()
        jsonschema.Draft202012Validator.check_schema(narrowed(schema))
