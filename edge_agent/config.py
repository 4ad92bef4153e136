"""Settings of the agent, parsed once by `__main__` or given by whoever builds an EdgeAgent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.prices import Objective, Prices
from isthmus.models.vision.manifest import Precision

Mode = Literal["auto", "edge", "split", "offload"]
MODES: tuple[Mode, ...] = ("auto", "edge", "split", "offload")


@dataclass(frozen=True)
class Tls:
    """PEM files: `ca` signs the cloud's certificate; `certificate` and `key` are the device's own, for mutual TLS."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class WholeImage:
    """How a photo is stored when it is sent whole."""

    form: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = 75  # of jpeg and webp; png is lossless


@dataclass(frozen=True)
class EdgeConfig:
    """`cloud` is host:port, None for a device alone. `mode` other than auto pins one arm, for comparison.

    A request that names a tap, a width or a rate is sent so in any mode.
    """

    bundle: Path
    cloud: str | None = None
    mode: Mode = "auto"
    precision: Precision = "fp32"  # of the head
    objective: Objective = "fastest"
    epsilon: float = 0.005  # certified loss of accuracy at the exits: picks the bundle's threshold
    min_agreement: float = 0.96  # of an operating point with the cloud model, on the calibration part
    tasks: tuple[str, ...] = ()  # answered when a request names none; none: the bundle's first
    deadline_s: float = 1.0
    connect_s: float = 2.0  # how long to wait for the first probe before starting without a cloud
    threads: int = 0  # of ONNX Runtime; 0 for every core
    prices: Prices = Prices()
    whole_image: WholeImage = WholeImage()
    breaker: BreakerLimits = BreakerLimits()
    tls: Tls | None = None


@dataclass(frozen=True)
class LanguageConfig:
    """`model` and `device_model`: a GGUF file, a Hugging Face folder, or `smollm2`; the cloud holds `model`."""

    model: str
    clouds: tuple[str, ...] = ()  # host:port, in order of preference
    device_model: str | None = None  # a smaller one with the same tokenizer; None: `model` itself
    device_bits: Literal[4, 8] = 8  # of the device's weights
    draft: Literal["model", "lookup"] = "model"
    handoff: Path | None = None  # a bundle of exits and coded rows that belongs to `model`: for the arm handoff
    quality: float = 0.99  # for auto: share of an answer's tokens that are to be what the cloud's model would choose
    objective: Objective = "fastest"  # of the arms that keep it
    prices: Prices = Prices()
    agreement: float = 0.97  # with the full model, of tokens that exits decide: picks the bundle's thresholds
    state_point: int | None = None  # how rows that cross are coded; None: the cheapest of those that lose little
    fill: bool = False  # whether the cloud may guess keys and values of tokens that it does not decide
    prefill_layers: int = 0  # of the cloud's, that a prompt goes through but for its end, others guessed; 0: all, exact
    context: int = 2048  # tokens that the device's own model holds
    on_loss: Literal["alone", "wait"] = "alone"  # what to do when no cloud is left in mid-answer
    wait_s: float = 30.0  # how long to wait then
    connect_s: float = 2.0
    threads: int = 0  # of ONNX Runtime; 0 for every core
    tls: Tls | None = None
