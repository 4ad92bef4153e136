"""Settings of the agent's commands. A file may hold those of all of them, whichever command reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isthmus.edge_agent.config import PREFIX, ChatConfig, EdgeConfig, HttpConfig, LanguageConfig
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.models.options import Function, Section, known_settings, options

KNOWN = known_settings(EdgeConfig, LanguageConfig, HttpConfig, ChatConfig, StreamConfig)
SECTIONS: dict[str, Section] = {
    "Server": HttpConfig,
    "Chat": ChatConfig,
    "Streams": StreamConfig,
    "Cloud and device": (EdgeConfig, LanguageConfig),
    "Photos": EdgeConfig,
    "Language model": LanguageConfig,
}


def settings(*sections: str, **defaults: Any) -> Callable[[Function], Function]:
    """Options of a command for these sections; `defaults` of settings that the models require."""
    return options(PREFIX, KNOWN, {name: SECTIONS[name] for name in sections}, **defaults)
