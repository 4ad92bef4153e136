"""One device's day: the edge half of Isthmus.

from edge_agent import EdgeAgent, EdgeConfig
with EdgeAgent(EdgeConfig(bundle="models/zoo/elpv", cloud="cloud:50051")) as agent:
    print(agent.infer("photo.jpg").label)
"""

from edge_agent.answer import Answer, TaskAnswer
from edge_agent.config import EdgeConfig
from edge_agent.vision import EdgeAgent

__all__ = ["Answer", "EdgeAgent", "EdgeConfig", "TaskAnswer"]
