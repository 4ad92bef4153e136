"""Bottlenecks of other papers, trained on our data with our training loop, for comparison.

    entropic-student  Matsubara et al. (WACV 2022): features alone first, then decoder and tail by distillation
    bq                Matsubara & Levorato (ICPR 2020), BottleFit (WoWMoM 2022): few channels at 8 bits, also two stages
    n0, n4            Duan & Zhu (PCS 2022): patches without and with four residual blocks, joint loss, tail trained
    ours-single       our encoder at full width, one rate per training run (`recipes.vision.single`)

All decode to the features after our last cut with the same kind of decoder, and every run trains its own tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.baseline_encoders import (
    EightBits,
    Strided,
    affine,
    by_four,
    entropic_student_encoder,
    few_channels_encoder,
    patch_encoder,
)
from isthmus.models.recipes.vision.bottleneck import BottleneckModel, DistilBatch, batch_of, ramp
from isthmus.models.recipes.vision.compressai_entropy import EntropyBottleneck, ready
from isthmus.models.recipes.vision.distil import LossWeights
from isthmus.models.recipes.vision.light import Teacher
from isthmus.models.recipes.vision.parts import macs
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import BATCH, Views
from isthmus.models.vision.split import DenseDecoder, SplitClassifier

FIRST_EPOCHS, NEXT_EPOCHS = 16, 6  # the first setting trains from scratch, each next one from the one before
RAMP_EPOCHS = 6
TWO_STAGES = ("entropic-student", "bq")
TAIL_EPOCHS = 4  # second stage
RATES_LR = 10.0
HIDDEN = 128  # of every decoder
SETTINGS: dict[str, tuple[float, ...]] = {
    "entropic-student": (0.02, 0.06, 0.2, 0.6),  # price of a kilobyte relative to the features' distance
    "n0": (0.1, 0.4, 1.6, 6.4),  # ... relative to task and features
    "n4": (0.1, 0.4, 1.6, 6.4),
    "bq": (3, 1),  # channels
}


def new_bottleneck(method: str, setting: float, split: SplitClassifier) -> BottleneckModel:
    """The untrained bottleneck of a method of SETTINGS, followed by the split's tail."""
    outputs = split.backbone.channels[split.cuts[-1] - 1]
    tail = split.backbone.section(split.cuts[-1])
    decoder = DenseDecoder(HIDDEN, outputs, HIDDEN, 1)
    if method in ("n0", "n4"):
        downsample = nn.Sequential(nn.Conv2d(64, HIDDEN, 5, 2, 2), nn.GELU())
        return BottleneckModel(
            patch_encoder(int(method[1:])),
            Rates(64, (setting,), RATES_LR),
            Strided(downsample, decoder),
            tail,
            0,
            LossWeights(),
        )
    features = LossWeights(task=0.0)
    if method == "entropic-student":
        rates = Rates(24, (setting,), RATES_LR)
        return BottleneckModel(
            entropic_student_encoder(), rates, Strided(by_four(24, HIDDEN), decoder), tail, 0, features
        )
    channels = int(setting)
    strided = Strided(by_four(channels, HIDDEN), decoder)
    return BottleneckModel(few_channels_encoder(channels), EightBits(), strided, tail, 0, features)


def train(
    run: Run, method: str, setting: float, views: Views, teacher: Teacher, start: BottleneckModel | None
) -> BottleneckModel:
    """All stages of one method at one setting, from the weights of `start`; returns the averaged module."""
    torch.manual_seed(run.seed)
    module = new_bottleneck(method, setting, teacher.split)
    if start is not None:
        copy_matching(module, start)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = ["images", "features", "middle", "last", "logits"]

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[DistilBatch]:
        share = 1.0 if start is not None else ramp(epoch, RAMP_EPOCHS)
        for indices, arrays in views.batches(generator, names):
            arrays["images"] = teacher.normalise(arrays["images"])
            yield replace(batch_of(arrays, "images", torch.from_numpy(teacher.defect_N[indices])), ramp=share)

    def fit(stage: str, epochs: int, peak_lr: float) -> None:
        schedule = Schedule(epochs, len(views) // BATCH, peak_lr)
        average = run.fit(f"{method}-{setting:g}-{stage}", module, epoch_batches, module.loss, schedule)
        module.load_state_dict(average.state_dict())

    epochs, peak_lr = epochs_of(method, setting), 2e-3 if start is None else 1e-3
    if "joint" in epochs:
        module.free_tail()
        fit("joint", epochs["joint"], peak_lr)
        return module.eval()
    fit("features", epochs["features"], peak_lr)
    module.freeze_encoder()
    module.weights = LossWeights(features=0.0)
    module.free_tail()
    fit("tail", epochs["tail"], 1e-3)
    return module.eval()


def copy_matching(module: nn.Module, start: nn.Module) -> None:
    """Copy the weights of `start` into `module`, except where their shapes differ."""
    own = module.state_dict()
    given = start.state_dict().items()
    module.load_state_dict({name: new if new.shape == own[name].shape else own[name] for name, new in given})


def train_all(run: Run, method: str, views: Views, teacher: Teacher) -> None:
    """Every setting of a method, each from the weights of the one before."""
    start = None
    for setting in settings_of(method):
        start = train(run, method, setting, views, teacher, start)


def settings_of(method: str) -> tuple[float, ...]:
    """Raises InvalidInput for a method that does not exist."""
    if method not in SETTINGS:
        raise InvalidInput(f"method {method!r} is unknown, expected one of {', '.join(SETTINGS)}")
    return SETTINGS[method]


def trained(work: Path, methods: Sequence[str], split: SplitClassifier) -> list[Baseline]:
    """The results of `train_all` in `work`. Raises InvalidInput when a setting is missing or not finished."""
    found = []
    for method in methods:
        for setting in settings_of(method):
            stage = "tail" if method in TWO_STAGES else "joint"
            path = work / f"{method}-{setting:g}-{stage}.ckpt"
            if not path.exists():
                raise InvalidInput(
                    f"{path} is missing: train it with `python -m isthmus.models.recipes baselines {method}`"
                )
            state = torch.load(path, weights_only=True)
            if state["epoch"] + 1 < epochs_of(method, setting)[stage]:
                raise InvalidInput(
                    f"{path} is not finished: resume with `python -m isthmus.models.recipes baselines {method}`"
                )
            bottleneck = new_bottleneck(method, setting, split)
            bottleneck.load_state_dict(state["average"])
            found.append(Baseline(method, f"{'channels' if method == 'bq' else 'price'} {setting:g}", bottleneck))
    return found


def epochs_of(method: str, setting: float) -> dict[str, int]:
    """Stages of a run and their epochs."""
    epochs = FIRST_EPOCHS if setting == SETTINGS[method][0] else NEXT_EPOCHS
    if method not in TWO_STAGES:
        return {"joint": epochs}
    return {"features": epochs - TAIL_EPOCHS, "tail": TAIL_EPOCHS}


class Baseline:
    """One trained method at one setting with its encoder and decoder in use, and real bytes between them."""

    def __init__(self, method: str, setting: str, bottleneck: BottleneckModel, side: int = 300) -> None:
        """`side`: pixels of an image's side."""
        self.method, self.setting = method, setting
        self._bottleneck = bottleneck.eval()
        self._rates = bottleneck.rates
        self._encoder = bottleneck.encoder
        images_1CHW = torch.zeros(1, 3, side, side)
        with torch.inference_mode():
            self._latent_CHW = tuple(self._encoder(images_1CHW).shape[1:])
        self.encoder_macs = macs(self._encoder, images_1CHW)
        self._prior = None
        if not isinstance(self._rates, EightBits):
            prior = self._rates.priors[0]
            assert isinstance(prior, EntropyBottleneck)
            self._prior = prior
            ready(prior)
        self.encoder_bits = sum(bits_of(tensor) for tensor in self._device_state())

    @torch.inference_mode()
    def encode(self, images_B3HW: Tensor) -> list[bytes]:
        """Payloads of normalised images: CompressAI's coder, or least value and step followed by 8 bits a value."""
        latent_BCHW = self._encoder(images_B3HW)
        if self._prior is not None:
            scaled_BCHW = latent_BCHW * self._rates.log_gain_RC.exp()[0][:, None, None]
            compressed: list[bytes] = self._prior.compress(scaled_BCHW)
            return compressed
        low_B111, step_B111 = affine(latent_BCHW)
        levels_BCHW = ((latent_BCHW - low_B111) / step_B111).round().clamp(0, 255).to(torch.uint8)
        heads = torch.cat([low_B111, step_B111], 1).flatten(1).numpy().astype("<f4")
        return [head.tobytes() + rows.numpy().tobytes() for head, rows in zip(heads, levels_BCHW, strict=True)]

    @torch.inference_mode()
    def answer(self, payloads: Sequence[bytes]) -> NDArray[np.float32]:
        """Probabilities of the first task, (B, K)."""
        if self._prior is not None:
            scaled_BCHW = self._prior.decompress(list(payloads), self._latent_CHW[1:])
            latent_BCHW = scaled_BCHW / self._rates.log_gain_RC.exp()[0][:, None, None]
        else:
            heads = np.stack([np.frombuffer(data[:8], "<f4") for data in payloads])
            rows = np.stack([np.frombuffer(data[8:], np.uint8).reshape(self._latent_CHW) for data in payloads])
            low_B2 = torch.from_numpy(heads)[:, :, None, None]
            latent_BCHW = torch.from_numpy(rows).float() * low_B2[:, 1:2] + low_B2[:, :1]
        rate_B = torch.zeros(len(payloads), dtype=torch.long)
        hidden_BCHW = self._bottleneck.decode(latent_BCHW, rate_B)
        for part in self._bottleneck.tail:
            hidden_BCHW = part(hidden_BCHW)
        probabilities: NDArray[np.float32] = hidden_BCHW.softmax(1).numpy()
        return probabilities

    def _device_state(self) -> list[Tensor]:
        """The tensors that sc2bench counts as the encoder: weights and buffers, also of the prior, and its tables."""
        state = [*self._encoder.state_dict().values()]
        if self._prior is not None:
            state += [self._rates.log_gain_RC, *self._prior.state_dict().values()]
        return state


def bits_of(tensor: Tensor) -> int:
    """Size as sc2bench counts it."""
    return 8 * tensor.element_size() * tensor.numel()
