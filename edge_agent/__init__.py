"""The device half of Isthmus.

from isthmus.edge_agent import EdgeAgent, EdgeConfig
with EdgeAgent(EdgeConfig(bundle="models/zoo/elpv", cloud="cloud:50051")) as agent:
    print(agent.infer("photo.jpg").label)
"""

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.result import Answer, TaskAnswer

__all__ = ["Answer", "EdgeAgent", "EdgeConfig", "TaskAnswer"]
