"""JSON schemas before a grammar is made of them: what they leave open, and a small model would not end, is narrowed.

    properties without additionalProperties -> no others, as in OpenAI's strict schemas
    an integer without bounds               -> at most 18 digits, which fit 64 bits

Whatever is valid afterwards was valid before. A schema whose parts hold together (allOf, $ref beside other keywords) is
left as it is: what is no contradiction in either part would be one in both. Strings, fractions and lists have no length
that would suit everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from isthmus.models.errors import InvalidGrammar

MAX_DIGITS = 18
MAX_SHOWN = 40  # characters of what is no schema
JOINING = {"allOf", "not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef", "extends"}
CHOOSING = {"$ref", "anyOf", "oneOf"}  # beside constraints they join
HARMLESS = {
    *("$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "type", "discriminator", "nullable", "x-guidance"),
}
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by a name
LISTED = ("anyOf", "oneOf", "prefixItems", "items")
SINGLE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames")
OPEN = {"additionalProperties", "patternProperties", "minProperties"}  # says what else there may be, or must
EXACT = {"enum", "const"}
LOWER, UPPER = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}


def read_schema(text: str) -> dict[str, object]:
    """A JSON schema that is an object; true is {}. Raises InvalidGrammar."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidGrammar(f"the schema is not JSON: {error}") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidGrammar(f"the schema is {json.dumps(schema)[:MAX_SHOWN]}, expected a JSON object")
    return schema


def narrowed(schema: Any) -> Any:
    """A schema that ends, of one that is read as it was given; what is no schema stays."""
    return schema if any(map(joins, schemas_in(schema))) else narrow(schema)


def narrow(schema: Any) -> Any:
    """Itself and those within it, which hold each by themselves."""
    if isinstance(schema, list):
        return [narrow(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in NAMED:
        if isinstance(parts := schema.get(key), dict):
            found[key] = {name: narrow(part) for name, part in parts.items()}
    for key in {*LISTED, *SINGLE} & schema.keys():
        found[key] = narrow(schema[key])
    return {**found, **missing(schema)}


def missing(schema: dict[str, Any]) -> dict[str, Any]:
    """Keywords that narrow this one schema."""
    if schema.keys() & EXACT:
        return {}
    added: dict[str, Any] = {"additionalProperties": False} if names_all(schema) else {}
    kinds = schema.get("type")
    if kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds):
        most = 10**MAX_DIGITS - 1
        given = [schema[key] for key in LOWER | UPPER if key in schema]
        if all(isinstance(value, int | float) and abs(value) < most for value in given):
            added |= {} if schema.keys() & LOWER else {"minimum": -most}
            added |= {} if schema.keys() & UPPER else {"maximum": most}
    return added


def names_all(schema: dict[str, Any]) -> bool:
    """Whether an object may have its properties alone, and then has all that it must have."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not (isinstance(properties, dict) and properties and isinstance(required, list)) or schema.keys() & OPEN:
        return False
    return all(isinstance(name, str) and name in properties for name in required)


def joins(schema: dict[str, Any]) -> bool:
    """Whether other schemas have to hold where it does."""
    return bool(schema.keys() & JOINING or (schema.keys() & CHOOSING and len(schema.keys() - HARMLESS) > 1))


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """It and all within it that `narrow` would reach; those of JOINING are not reached."""
    if isinstance(schema, list):
        for each in schema:
            yield from schemas_in(each)
    if not isinstance(schema, dict):
        return
    yield schema
    for key in NAMED:
        if isinstance(parts := schema.get(key), dict):
            yield from schemas_in(list(parts.values()))
    for key in {*LISTED, *SINGLE} & schema.keys():
        yield from schemas_in(schema[key])
