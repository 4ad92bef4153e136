"""Which arms an agent has, by what the device and the cloud's model can do. Each refusal is one line.

    edge      a model on the device
    cloud     a cloud
    verify    drafts in the cloud's vocabulary: of a model on the device, or looked up in the text
    handoff   a bundle of exits, and the same weights on both sides
    cascade   a model on the device, and a bundle that says when its whole answers will do
    auto      any of them

What the cloud's model declares counts once it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.cloud_model import label
from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.policy.arms import ARMS, Arm
from isthmus.models.errors import InvalidInput
from isthmus.models.messages import ModelInfo, Sampling

if TYPE_CHECKING:
    from isthmus.edge_agent.language.device_model import DeviceModel

NO_CLOUD = "no cloud answers"


@dataclass(frozen=True)
class Sides:
    """What takes part in answers: the device's model, and what the cloud declares of its own; None: there is none."""

    config: LanguageConfig
    device: DeviceModel | None
    cloud: ModelInfo | None

    @property
    def one_vocabulary(self) -> bool:
        """Whether ids mean the same on both sides, as far as is known."""
        if self.device is None or self.cloud is None:
            return True
        return self.device.tokenizer.vocabulary == self.cloud.tokenizer.vocabulary

    @property
    def same_weights(self) -> bool:
        """Whether both sides are known to hold the same model."""
        return self.device is not None and self.cloud is not None and self.device.fingerprint == self.cloud.fingerprint

    def resolve(self, request: GenerationRequest) -> tuple[Arm, str | None]:
        """The arm that answers a request, and why; None: it is the requested one.

        `auto` changes arms in mid-answer only where both sides read the same ids; else one side gives the whole answer.
        """
        if request.arm != "auto":
            return request.arm, None
        if not self.config.clouds:
            return "edge", "no cloud is configured"
        if self.device is None:
            return "cloud", "the device has no model"
        if not self.one_vocabulary:
            if request.vocabulary == self.device.tokenizer.vocabulary:
                return ("cascade", self._another()) if self.routes_answers else ("edge", NO_CLOUD)
            return "cloud", self._another()
        if refusal := self.sampling_refusal("cloud", request.sampling):
            return "edge", refusal
        if self.sampling_refusal("verify", request.sampling):
            return "cloud", "the engine in the cloud chooses by itself alone"
        return "auto", None

    @property
    def routes_answers(self) -> bool:
        """Whether `auto` routes whole answers: tokens cannot be, and it is known which of them will do."""
        return not self.one_vocabulary and self.refusal("cascade") is None

    def _another(self) -> str:
        assert self.device is not None  # else there is one vocabulary
        return f"{self.device.name} on the device has another vocabulary"

    def vocab(self, arm: Arm, vocabulary: bytes) -> int:
        """Token ids that those who take part have in common. Raises InvalidInput for the ids of another vocabulary."""
        sizes = [side.vocab for side in self._taking_part(arm) if vocabulary_of(side) == vocabulary]
        if not sizes:
            raise InvalidInput(f"the prompt was encoded by another tokenizer than arm {arm} has now: encode it again")
        return min(sizes)

    def end_ids(self, request: GenerationRequest) -> frozenset[int]:
        """Tokens that end an answer: the cloud's, where its model reads the ids."""
        if request.arm != "edge" and self.cloud and vocabulary_of(self.cloud) == request.vocabulary:
            return frozenset(self.cloud.end_ids)
        return self.device.tokenizer.eos_ids if self.device else frozenset()

    def _taking_part(self, arm: Arm) -> list[DeviceModel | ModelInfo]:
        """Sides whose ids an arm's prompt has to be of: one, where they differ."""
        if self.one_vocabulary or arm == "auto":
            sides = [self.device, self.cloud]
        else:
            sides = [self.device if arm in ("edge", "cascade") else self.cloud]
        return [side for side in sides if side is not None]

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be requested."""
        return tuple(arm for arm in ARMS if self.refusal(arm) is None)

    def refusal(self, arm: Arm) -> str | None:
        """Why an arm cannot be requested; None where it can."""
        if arm == "auto":
            return None
        if arm == "edge":
            return None if self.device else "arm edge needs a model on the device, and none is configured"
        if not self.config.clouds:
            return f"arm {arm} needs a cloud, and none is configured"
        missing = {
            "cloud": lambda: None,
            "verify": self._drafts_missing,
            "handoff": self._handoff_missing,
            "cascade": self._verifier_missing,
        }[arm]()
        alone = arm in ("handoff", "cascade")  # they go on without the cloud
        declared = self.cloud is None or arm in self.cloud.arms or alone
        if missing is None and self.cloud is not None and not declared:
            return f"arm {arm} is not served for {label(self.cloud)} in the cloud"
        return missing

    def sampling_refusal(self, arm: Arm, sampling: Sampling) -> str | None:
        """Why an arm cannot choose tokens so; None where it can, and for auto, which takes another arm then."""
        if arm in ("edge", "auto") or self.cloud is None:
            return None
        unknown = [name for name in sampling.processors if name not in self.cloud.processors]
        if unknown:
            return f"{label(self.cloud)} in the cloud cannot apply {', '.join(unknown)}"
        if arm in ("cloud", "cascade") or self.cloud.numerics == "bitwise":
            return None
        if sampling.temperature > 0:
            return (
                f"arm {arm} of {label(self.cloud)} in the cloud is greedy, temperature is {sampling.temperature}:"
                " arm cloud samples"
            )
        if sampling.processors:
            names = ", ".join(sampling.processors)
            return f"arm {arm} of {label(self.cloud)} in the cloud cannot apply {names} exactly: arm cloud can"
        return None

    def _drafts_missing(self) -> str | None:
        if self.config.draft == "lookup":
            return None
        if self.device is None:
            return "arm verify needs drafts: a model on the device, or --draft lookup"
        if self.one_vocabulary:
            return None
        assert self.cloud is not None  # else there is one vocabulary
        return (
            f"arm verify needs drafts in the vocabulary of {label(self.cloud)} in the cloud, {self.device.name} on the"
            " device has another: --draft lookup needs no model"
        )

    def _handoff_missing(self) -> str | None:
        if self.device is None or self.device.handoff is None:
            return "arm handoff needs a bundle of exits, and none is configured"
        if self.cloud is None or self.same_weights:
            return None
        return (
            f"arm handoff shares one model by layers: the device holds {self.device.name}"
            f" {self.device.fingerprint.hex()[:12]}, the cloud {label(self.cloud)} {self.cloud.fingerprint.hex()[:12]}"
        )

    def _verifier_missing(self) -> str | None:
        if self.device is None:
            return "arm cascade needs a model on the device, and none is configured"
        if self.device.routers.for_answers(self.cloud) is not None:
            return None
        if self.cloud is None or self.device.routers.for_answers(None) is None:
            return "arm cascade needs a router bundle that scores whole answers, and there is none"
        return f"arm cascade: {self.device.routers.missing(self.cloud)}"


def vocabulary_of(side: DeviceModel | ModelInfo) -> bytes:
    return side.tokenizer.vocabulary
