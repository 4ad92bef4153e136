"""JSON schemas of the shapes that public suites have, made anew from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

KEYS = (
    "name",
    "id",
    "größe",
    "价格",
    "is open",
    "a.b",
    "x-y",
    "ключ",
    'quo"te',
    "emoji 🌉",
    "snake_case",
    "$dollar",
    "0",
)
VALUES = ("red", "green", "light blue", "ÄÖ", "日本", "a\nb", 'say "hi"', "\\", "", "true", "🙂")
PATTERNS = (
    r"^[A-Z]{2}[0-9]{3}$",
    r"^(foo|bar)+$",
    r"^\d{4}-\d{2}$",
    "^a.c$",
    "^[^x]{1,4}$",
    r"^\w{2,6}$",
    "^[äöü]{2}$",
    "x{3}",
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri", "duration")
DEPTH = 3


class Schemas:
    """A stream of schemas: the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self) -> Schema:
        """Of an object, an array or a choice; a third have definitions that are referred to."""
        rng = self._random
        schema = rng.choice([self._object, self._object, self._array, self._any_of])(DEPTH)
        if rng.random() < 0.15:
            return self._tree()
        if rng.random() < 0.25:
            schema = {"$defs": {"part": self._leaf()}, **self._object(1)}
            schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
            schema["required"] = sorted({*schema.get("required", []), "ref"})
        return schema

    def _any(self, depth: int) -> Schema:
        inner: list[Callable[[int], Schema]] = [self._object, self._array, self._any_of, self._all_of]
        return self._leaf() if not depth or self._random.random() < 0.6 else self._random.choice(inner)(depth)

    def _leaf(self) -> Schema:
        kinds = [self._string, self._integer, self._number, self._enum, self._const, self._plain, self._pattern]
        return self._random.choice(kinds)()

    def _object(self, depth: int) -> Schema:
        rng = self._random
        keys = rng.sample(KEYS, rng.randint(1, 4))
        schema: Schema = {"type": "object", "properties": {key: self._any(depth - 1) for key in keys}}
        schema["required"] = keys if rng.random() < 0.6 else rng.sample(keys, rng.randint(0, len(keys)))
        more = rng.choice([False, False, False, {"type": "integer", "minimum": 0, "maximum": 9}])
        schema["additionalProperties"] = more
        return schema

    def _array(self, depth: int) -> Schema:
        rng, least = self._random, self._random.randint(0, 2)
        schema: Schema = {"type": "array", "items": self._any(depth - 1), "minItems": least}
        schema["maxItems"] = least + rng.randint(0 if least else 1, 2)
        if rng.random() < 0.2:
            return {"type": "array", "prefixItems": [self._leaf(), self._leaf()], "items": False, "minItems": 2}
        return schema

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1), self._object(1), {"type": "null"}][: self._random.randint(2, 3)]}

    def _all_of(self, depth: int) -> Schema:
        low, high = sorted(self._random.sample(range(-50, 500), 2))
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]}

    def _tree(self) -> Schema:
        """A reference to itself, which may be left out."""
        node: Schema = {
            "type": "object",
            "properties": {"value": self._leaf(), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}

    def _string(self) -> Schema:
        rng, least = self._random, self._random.randint(0, 4)
        if rng.random() < 0.4:
            return {"type": "string", "format": rng.choice(FORMATS)}
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._random.choice(PATTERNS), "maxLength": 12}

    def _integer(self) -> Schema:
        rng, low = self._random, self._random.randint(-2000, 2000)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        if rng.random() < 0.3:
            return {"type": "integer", "multipleOf": rng.choice([2, 5, 10]), "minimum": 0, "maximum": 1000}
        if rng.random() < 0.3:
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 400)}
        return schema

    def _number(self) -> Schema:
        low = round(self._random.uniform(-100, 100), 2)
        return {"type": "number", "minimum": low, "maximum": round(low + self._random.uniform(0.5, 200), 2)}

    def _enum(self) -> Schema:
        rng = self._random
        others = [None, True, 7, -1.5, ["a", 1], {"k": "v"}]
        return {"enum": rng.sample(VALUES, rng.randint(1, 4)) + rng.sample(others, rng.randint(0, 2))}

    def _const(self) -> Schema:
        return {"const": self._random.choice([*VALUES, 3, None, {"a": [1, "é"]}])}

    def _plain(self) -> Schema:
        rng = self._random
        return {"type": rng.choice(["boolean", "null", ["boolean", "null"], ["integer", "boolean"]])}
