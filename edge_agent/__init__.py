"""The device half of Isthmus.

from isthmus.edge_agent import EdgeAgent, EdgeConfig
with EdgeAgent(EdgeConfig(bundle="photos", cloud="cloud:50051")) as agent:
    print(agent.infer("photo.jpg").label)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.edge_agent.config import EdgeConfig
    from isthmus.edge_agent.vision.agent import EdgeAgent
    from isthmus.edge_agent.vision.result import Answer, TaskAnswer

__all__ = ["Answer", "EdgeAgent", "EdgeConfig", "TaskAnswer"]

MODULES = {
    "Answer": "vision.result",
    "EdgeAgent": "vision.agent",
    "EdgeConfig": "config",
    "TaskAnswer": "vision.result",
}


def __getattr__(name: str) -> object:
    """Public names on first use: `edge-agent --help` and `isthmus pull` do without ONNX Runtime."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
