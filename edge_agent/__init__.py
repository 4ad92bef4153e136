"""The device half of Isthmus.

from isthmus.edge_agent import EdgeAgent, EdgeConfig
with EdgeAgent(EdgeConfig(bundle="photos", clouds=("cloud:50051",))) as agent:
    print(agent.infer("photo.jpg").label)

from isthmus.edge_agent import LanguageAgent, LanguageConfig
with LanguageAgent(LanguageConfig(model="smollm2", clouds=("cloud:50051",))) as agent:
    print(agent.answer("What is a suspension bridge?").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.edge_agent.config import EdgeConfig, LanguageConfig
    from isthmus.edge_agent.language.agent import LanguageAgent
    from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
    from isthmus.edge_agent.language.text import TextAnswer
    from isthmus.edge_agent.vision.agent import EdgeAgent
    from isthmus.edge_agent.vision.result import Answer
    from isthmus.edge_agent.vision.task_answers import Classification, Detections, Embedding, Segmentation, TaskAnswer
    from isthmus.models.messages import Sampling

    __version__: str

__all__ = [
    "Answer",
    "Classification",
    "Detections",
    "Dropped",
    "EdgeAgent",
    "EdgeConfig",
    "Embedding",
    "GenerationRequest",
    "LanguageAgent",
    "LanguageConfig",
    "Sampling",
    "Segmentation",
    "Summary",
    "TaskAnswer",
    "TextAnswer",
    "Token",
    "__version__",
]

MODULES = {
    "Answer": "edge_agent.vision.result",
    "Classification": "edge_agent.vision.task_answers",
    "Detections": "edge_agent.vision.task_answers",
    "Dropped": "edge_agent.vision.live",
    "EdgeAgent": "edge_agent.vision.agent",
    "EdgeConfig": "edge_agent.config",
    "Embedding": "edge_agent.vision.task_answers",
    "GenerationRequest": "edge_agent.language.request",
    "LanguageAgent": "edge_agent.language.agent",
    "LanguageConfig": "edge_agent.config",
    "Sampling": "models.messages",
    "Segmentation": "edge_agent.vision.task_answers",
    "Summary": "edge_agent.language.request",
    "TaskAnswer": "edge_agent.vision.task_answers",
    "TextAnswer": "edge_agent.language.text",
    "Token": "edge_agent.language.request",
}


def __getattr__(name: str) -> object:
    """Public names on first use: `edge-agent --help` and `isthmus pull` do without ONNX Runtime."""
    if name == "__version__":
        from importlib.metadata import version

        return version("isthmus")
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"isthmus.{MODULES[name]}"), name)
