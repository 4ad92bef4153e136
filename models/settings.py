"""A program's settings from one source: the fields of frozen pydantic dataclasses.

A field that has a description can be set from outside; fields of a nested dataclass are settings of the same flat list.
`models.options` makes command lines, environment names and files of them. Knows no setting by its name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import ConfigDict, ModelWrapValidatorHandler, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from isthmus.models.errors import InvalidInput

MAX_SHOWN = 50  # characters of a wrong value
USER = re.compile("//.*@")  # of a URL, with its password


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Settings:
    """Base of the models. Values are checked and converted when one is made; raises InvalidInput, one line."""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, given: Any, make: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return make(given)
        except ValidationError as error:
            raise InvalidInput(problem(cls, error)) from error


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field is written outside of Python, where that is not by its own name and in its own unit."""

    key: str = ""
    scale: float = 1.0  # a value outside is the field's times this
    separator: str = ""  # of several values in one text
    metavar: str | None = None
    is_file: bool = False  # a path that must be a file


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that can be set from outside, under `key`. `path`: names of the fields that lead to it."""

    key: str
    path: tuple[str, ...]
    type: Any  # of one value
    default: Any  # in the unit of the key; None where there is none
    help: str
    bounds: dict[str, Any]  # `ge`, `gt`, `le`, in the unit of the key
    required: bool
    optional: bool  # None is a value of the field, and outside an empty text
    multiple: bool
    flag: Flag

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.key.replace("_", "-")

    @property
    def secret(self) -> bool:
        return self.type is SecretStr

    def inward(self, value: Any) -> Any:
        """A value of the key -> one of the field."""
        if self.flag.separator:
            return tuple(part.strip() for part in value.split(self.flag.separator) if part.strip())
        if self.optional and value == "":
            return None
        return value / self.flag.scale if self.flag.scale != 1 else value


def settings_of(model: type[Any], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting of a dataclass, those of nested ones included, in the order of the fields."""
    hints = get_type_hints(model, include_extras=True)
    for field in fields(model):
        info, here = FieldInfo.from_annotation(hints[field.name]), (*path, field.name)
        nested = next((kind for kind in members(info.annotation) if is_dataclass(kind)), None)
        if nested is not None:
            yield from settings_of(nested, here)  # type: ignore[arg-type]
        elif info.description:
            yield from_field(info, here, field.default)


def from_field(info: FieldInfo, path: tuple[str, ...], default: Any) -> Setting:
    """`default` MISSING: the field is required."""
    flag = next((item for item in info.metadata if isinstance(item, Flag)), Flag())
    multiple = get_origin(info.annotation) is tuple
    kinds = members(get_args(info.annotation)[0] if multiple else info.annotation)
    bounds = {name: getattr(item, name) for item in info.metadata for name in ("ge", "gt", "le") if hasattr(item, name)}
    known = None if default is MISSING else default
    if flag.separator and known is not None:
        known = flag.separator.join(known) or None
    return Setting(
        key=flag.key or path[-1],
        path=path,
        type=kinds[0],
        default=scaled(known, flag.scale),
        help=info.description or "",
        bounds={name: scaled(bound, flag.scale) for name, bound in bounds.items()},
        required=default is MISSING,
        optional=type(None) in get_args(info.annotation),
        multiple=multiple and not flag.separator,
        flag=flag,
    )


def members(annotation: Any) -> list[Any]:
    """The types of a union without None; of any other annotation itself."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in types if kind is not type(None)]


def scaled(value: Any, scale: float) -> Any:
    """`value * scale` without what binary fractions add: 0.50 and not 0.5000000000000001."""
    return value if scale == 1 or value is None else type(value)(float(f"{value * scale:.12g}"))


def problem(model: type[Any], error: ValidationError) -> str:
    """The first thing wrong, in one line: the field, its value, what is expected."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"{model.__name__} has no field {where!r}{nearest(where, [field.name for field in fields(model)])}"
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")  # of a validator of ours
    secret = first["loc"] and SecretStr in members(get_type_hints(model).get(str(first["loc"][0])))
    shown = "secret" if secret else USER.sub("//…@", ascii(first["input"]))[:MAX_SHOWN]
    return f"{where} is {shown}: {message[0].lower()}{message[1:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` where something known is like `name`."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
