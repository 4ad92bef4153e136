"""Settings from the command line, the environment and a file; the first of these that gives a value counts.

    --deadline-ms               an option, with its help, bounds and default
    ISTHMUS_EDGE_DEADLINE_MS    a name in the environment: the program's prefix and the key in capitals
    deadline_ms                 a key of the TOML file that --config or ISTHMUS_EDGE_CONFIG names
    default                     of the field

All three are made from the models of `models.settings`. Other names in the environment are not looked at: Kubernetes
puts ISTHMUS_CLOUD_PORT and the like there by itself.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from click.core import ParameterSource

from isthmus.models.errors import InvalidInput
from isthmus.models.settings import Setting, nearest, settings_of

MAX_FILE_BYTES = 1 << 20  # of a configuration: more is another file, given by mistake
DEFAULT = "default"  # source of a value that was not given
GIVEN, FILE = "isthmus.given", "isthmus.file"  # what a command's context holds
HIDDEN = "********"
WIDE = {"max_content_width": 110}  # of `--help`, where the terminal has the room

Function = TypeVar("Function", bound=Callable[..., Any])
Model = TypeVar("Model")
Section = type[Any] | tuple[type[Any], ...]  # settings of a model, or those that several models share


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was read. `source`: the option, the name in the environment, the file, or DEFAULT."""

    setting: Setting
    value: Any
    source: str

    @property
    def shown(self) -> Any:
        """For a person or JSON; secrets are hidden."""
        if self.setting.secret and self.value:
            return HIDDEN
        if self.setting.multiple:
            return [str(value) for value in self.value]
        return str(self.value) if isinstance(self.value, Path) else self.value

    @property
    def text(self) -> str:
        """`shown` in one line; a dash where there is nothing."""
        if self.value in (None, "", ()):
            return "-"
        return " ".join(self.shown) if self.setting.multiple else str(self.shown)


class SettingOption(click.Option):
    """The option of a setting. Its errors name the source of the value that is wrong."""

    def __init__(self, declarations: Sequence[str], setting: Setting, prefix: str, section: str) -> None:
        is_flag = setting.type is bool
        super().__init__(
            [setting.key, f"{setting.option}/--no-{setting.option[2:]}" if is_flag else setting.option],
            type=None if is_flag else click_type(setting),
            default=setting.default,
            multiple=setting.multiple,
            help=setting.help,
            metavar=setting.flag.metavar,
            envvar=f"{prefix}_{setting.key.upper()}",
            expose_value=False,
            show_default=True,
        )
        self.setting, self.section = setting, section

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        value, rest = super().handle_parse_result(ctx, opts, args)
        ctx.meta.setdefault(GIVEN, {})[self.setting.key] = Given(self.setting, value, self.source(ctx))
        return value, rest

    def source(self, ctx: click.Context) -> str:
        """Where the value comes from."""
        match ctx.get_parameter_source(self.setting.key):
            case ParameterSource.COMMANDLINE:
                return self.setting.option
            case ParameterSource.ENVIRONMENT:
                return str(self.envvar)
            case ParameterSource.DEFAULT_MAP:
                return str(ctx.meta[FILE])
        return DEFAULT

    def get_error_hint(self, ctx: click.Context | None) -> str:
        source = DEFAULT if ctx is None else self.source(ctx)
        if source in (DEFAULT, self.setting.option, self.envvar):
            return f"'{self.setting.option if source == DEFAULT else source}'"
        return f"'{self.setting.key}' in {source}"


class FileOption(click.Option):
    """--config: a TOML file, whose keys are any of `known`."""

    def __init__(self, declarations: Sequence[str], prefix: str, known: Mapping[str, Setting]) -> None:
        super().__init__(
            ["--config"],
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            envvar=f"{prefix}_CONFIG",
            is_eager=True,  # before the options that it gives values
            expose_value=False,
            callback=self.load,
            help=f"TOML file of settings. What is not on the command line comes from the environment ({prefix}_THREADS"
            " for --threads), then from this file (threads = …), then from the defaults.",
        )
        self.prefix, self.known = prefix, known

    def load(self, ctx: click.Context, option: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        ctx.meta[FILE] = path
        try:
            ctx.default_map = read_file(path, self.known)
        except InvalidInput as error:
            raise click.UsageError(str(error), ctx) from error


class Command(click.Command):
    """A command whose help lists its settings by section, after its own options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                section = param.section if isinstance(param, SettingOption) else "Options"
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def click_type(setting: Setting) -> click.ParamType[Any] | type:
    """What an option accepts, so that `--help` says it."""
    low, high = setting.bounds.get("ge", setting.bounds.get("gt")), setting.bounds.get("le")
    if get_origin(setting.type) is Literal:
        return click.Choice(get_args(setting.type))
    if setting.bounds and setting.type in (int, float):
        ranged = click.IntRange if setting.type is int else click.FloatRange
        return ranged(low, high, min_open="gt" in setting.bounds)
    if setting.type is Path:
        return click.Path(path_type=Path, exists=setting.flag.is_file, dir_okay=not setting.flag.is_file)
    return setting.type if setting.type in (int, float) else str


def read_file(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """A TOML file's values as the command line would have them. Raises InvalidInput naming the file and the key."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not TOML: {error}") from error
    for key in content:
        if key not in known:
            raise InvalidInput(f"{path}: unknown key {key!r}{nearest(key, known)}")
    return {key: file_value(f"{path}: {key}", known[key], value) for key, value in content.items()}


def file_value(where: str, setting: Setting, value: Any) -> str | list[str]:
    """Raises InvalidInput unless `value` is one value, or a list of them where the setting takes several."""
    several = setting.multiple or bool(setting.flag.separator)
    values = value if several and isinstance(value, list) else [value]
    if any(isinstance(item, (list, dict)) for item in values):
        expected = "values" if several else "one value"
        raise InvalidInput(f"{where} is a {'table' if isinstance(value, dict) else 'list'}, expected {expected}")
    texts = [str(item) for item in values]
    return texts if setting.multiple else setting.flag.separator.join(texts)


def known_settings(*models: type[Any]) -> dict[str, Setting]:
    """Settings of several models by key; one that two models share is described by the first."""
    found: dict[str, Setting] = {}
    for model in models:
        for setting in settings_of(model):
            found.setdefault(setting.key, setting)
    return found


def options(
    prefix: str,
    known: Mapping[str, Setting],
    sections: Mapping[str, type[Any] | tuple[type[Any], ...]],
    **defaults: Any,
) -> Callable[[Function], Function]:
    """Options of a command for the models of `sections`, and --config for a file of any of `known`.

    A setting is listed by the first section that has it. `defaults` by key: of settings that the models require.
    """
    placed: dict[str, str] = {}
    for section, models in sections.items():
        keys = [list(known_settings(model)) for model in (models if isinstance(models, tuple) else (models,))]
        for key in keys[0]:
            if all(key in other for other in keys):
                placed.setdefault(key, section)
    made = [click.option(cls=FileOption, prefix=prefix, known=known)]
    for key, section in placed.items():
        setting = replace(known[key], default=defaults.get(key, known[key].default))
        made.append(click.option(cls=SettingOption, setting=setting, prefix=prefix, section=section))

    def decorate(function: Function) -> Function:
        for add in reversed(made):
            function = add(function)
        return function

    return decorate


def given() -> dict[str, Given]:
    """What the running command read, by key, in the order of its options."""
    context = click.get_current_context()
    found: dict[str, Given] = context.meta.get(GIVEN, {})
    return {param.name: found[param.name] for param in context.command.params if param.name in found}


def read(model: type[Model], **changed: Any) -> Model:
    """The running command's settings as `model`; what was not given is the model's own default.

    `changed` replaces values by key, in the unit of the key. Raises click.UsageError.
    """
    values = {key: item.value for key, item in given().items() if item.source != DEFAULT or item.setting.required}
    try:
        return build(model, {key: value for key, value in {**values, **changed}.items() if value is not None})
    except InvalidInput as error:
        raise click.UsageError(str(error)) from error


def build(model: type[Model], values: Mapping[str, Any]) -> Model:
    """A model from values by key. Raises InvalidInput."""
    nested: dict[str, Any] = {}
    missing: list[Setting] = []
    for setting in settings_of(model):
        if setting.key not in values:
            missing += [setting] if setting.required else []
            continue
        place = nested
        for step in setting.path[:-1]:
            place = place.setdefault(step, {})
        place[setting.path[-1]] = setting.inward(values[setting.key])
    for setting in missing:
        if len(setting.path) == 1 or setting.path[0] in nested:
            raise InvalidInput(f"{setting.option} is missing: {setting.help}")
    return model(**nested)


def describe(as_json: bool) -> str:
    """The running command's settings, each with its value and where that comes from."""
    items = given()
    if as_json:
        return json.dumps({key: {"value": item.shown, "source": item.source} for key, item in items.items()}, indent=1)
    width = max(map(len, items))
    return "\n".join(f"{key:<{width}}  {item.text:<24}  {item.source}" for key, item in items.items())
