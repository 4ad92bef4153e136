"""Bottlenecks of others, trained on our data by our loop, so that ours can be compared with them in one run.

    entropic-student  Matsubara et al. (WACV 2022): features alone first, then decoder and tail by distillation
    bq                Matsubara & Levorato (ICPR 2020), BottleFit (WoWMoM 2022): few channels at 8 bits, also two stages
    n0, n4            Duan & Zhu (PCS 2022): patches without and with four residual blocks, joint loss, tail trained
    ours-single       our encoder at full width, one rate a training run: what one bundle for all rates gives away

All decode to the features behind our last cut by one kind of decoder, and every run has a tail of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.trainer import Run, Schedule
from isthmus.models.recipes.vision.bridge import Batch, Bridge, Weights, batch_of, ramp
from isthmus.models.recipes.vision.compressai_entropy import GDN1, EntropyBottleneck, ready
from isthmus.models.recipes.vision.export import macs
from isthmus.models.recipes.vision.light import Teacher
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.recipes.vision.views import BATCH, Views
from isthmus.models.vision.split import DenseDecoder, SplitClassifier

FIRST_EPOCHS, NEXT_EPOCHS = 16, 6  # the first setting starts from nothing, each next from the one before
RAMP_EPOCHS = 6
TWO_STAGES = ("entropic-student", "bq")
TAIL_EPOCHS = 4  # second stage
RATES_LR = 10.0
HIDDEN = 128  # of every decoder
SETTINGS: dict[str, tuple[float, ...]] = {
    "entropic-student": (0.02, 0.06, 0.2, 0.6),  # price of a kilobyte beside the features' distance
    "n0": (0.1, 0.4, 1.6, 6.4),  # ... beside task and features
    "n4": (0.1, 0.4, 1.6, 6.4),
    "bq": (3, 1),  # channels
}


class ResidualBlock(nn.Module):
    """3x3, GELU, 3x3, added to the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, channels, 3, padding=1)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.body(x_BCHW)
        return x_BCHW + y_BCHW


class Plain(nn.Module):
    """An encoder of one width."""

    def __init__(self, *layers: nn.Module, multiple: int = 1) -> None:
        """`multiple`: images are grown by reflection to a multiple of so many pixels."""
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.multiple = multiple

    def forward(self, images_B3HW: Tensor, width: int = 0) -> Tensor:
        bottom, right = (-side % self.multiple for side in images_B3HW.shape[2:])
        latent_BCHW: Tensor = self.layers(F.pad(images_B3HW, (0, right, 0, bottom), mode="reflect"))
        return latent_BCHW


class Strided(nn.Module):
    """Convolutions that bring a latent to the resolution of the features, then our decoder."""

    def __init__(self, downsample: nn.Sequential, decoder: DenseDecoder) -> None:
        super().__init__()
        self.downsample, self.decoder = downsample, decoder

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> Tensor:
        features_BCHW: Tensor = self.decoder(self.downsample(latent_BCHW), rate_B)
        return features_BCHW


class EightBits(Rates):
    """In place of learned rates: every value in a byte between the latent's least and largest (Jacob et al., 2018)."""

    def __init__(self) -> None:
        super().__init__(0, (0.0,))

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> tuple[Tensor, Tensor]:
        low_B111, step_B111 = affine(latent_BCHW.float())
        levels_BCHW = (latent_BCHW - low_B111) / step_B111
        rounded_BCHW = levels_BCHW + (levels_BCHW.round() - levels_BCHW).detach()
        bits_B = torch.full((len(rate_B),), 8.0 * latent_BCHW[0].numel() + 64)
        return bits_B, rounded_BCHW * step_B111 + low_B111

    def price(self, bits_B: Tensor, rate_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        return bits_B.new_zeros(()), {"bytes0": bits_B.mean().item() / 8}


def affine(latent_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Zero and step of 8-bit quantisation, one of each an image."""
    low_B111, high_B111 = latent_BCHW.amin((1, 2, 3), keepdim=True), latent_BCHW.amax((1, 2, 3), keepdim=True)
    return low_B111.detach(), ((high_B111 - low_B111) / 255).clamp_min(1e-6).detach()


def entropic_student_encoder() -> Plain:
    """Matsubara et al.: 24 channels at a quarter of the image's side; 138,672 weights."""
    return Plain(
        nn.Conv2d(3, 96, 5, 2, 2, bias=False),
        GDN1(96),
        nn.Conv2d(96, 48, 5, 2, 2, bias=False),
        GDN1(48),
        nn.Conv2d(48, 24, 2, 1, 0, bias=False),
    )


def patch_encoder(blocks: int) -> Plain:
    """Duan & Zhu: 8x8 patches, residual blocks, 64 channels at an eighth of the image's side."""
    return Plain(
        nn.Conv2d(3, 128, 8, 8), *(ResidualBlock(128, 64) for _ in range(blocks)), nn.Conv2d(128, 64, 1), multiple=8
    )


def few_channels_encoder(channels: int) -> Plain:
    """BottleFit: a ResNet's stem, then 2x2 convolutions down to a few channels at a quarter of the image's side."""
    return Plain(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 256, 2, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 64, 2, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, channels, 2, bias=False),
    )


def by_four(inputs: int, hidden: int) -> nn.Sequential:
    """From a quarter of the image's side to a sixteenth."""
    return nn.Sequential(
        nn.Conv2d(inputs, 96, 5, 2, 2), GDN1(96, inverse=True), nn.Conv2d(96, hidden, 5, 2, 2), nn.GELU()
    )


def new_bridge(method: str, setting: float, split: SplitClassifier) -> Bridge:
    """The untrained bottleneck of a method of SETTINGS before the split's own tail."""
    outputs = split.backbone.channels[split.cuts[-1] - 1]
    tail = split.backbone.section(split.cuts[-1])
    decoder = DenseDecoder(HIDDEN, outputs, HIDDEN, 1)
    if method in ("n0", "n4"):
        downsample = nn.Sequential(nn.Conv2d(64, HIDDEN, 5, 2, 2), nn.GELU())
        return Bridge(
            patch_encoder(int(method[1:])),
            Rates(64, (setting,), RATES_LR),
            Strided(downsample, decoder),
            tail,
            0,
            Weights(),
        )
    features = Weights(task=0.0)
    if method == "entropic-student":
        rates = Rates(24, (setting,), RATES_LR)
        return Bridge(entropic_student_encoder(), rates, Strided(by_four(24, HIDDEN), decoder), tail, 0, features)
    channels = int(setting)
    strided = Strided(by_four(channels, HIDDEN), decoder)
    return Bridge(few_channels_encoder(channels), EightBits(), strided, tail, 0, features)


def train(run: Run, method: str, setting: float, views: Views, teacher: Teacher, start: Bridge | None) -> Bridge:
    """All stages of one method at one setting, from the weights of `start`; returns the averaged module."""
    torch.manual_seed(run.seed)
    module = new_bridge(method, setting, teacher.split)
    if start is not None:
        take_over(module, start)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = ["images", "features", "middle", "last", "logits"]

    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
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
    module.weights = Weights(features=0.0)
    module.free_tail()
    fit("tail", epochs["tail"], 1e-3)
    return module.eval()


def take_over(module: nn.Module, start: nn.Module) -> None:
    """Weights of `start`, but where the two differ in shape: there `module` keeps its own."""
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
    """What `train_all` left in `work`. Raises InvalidInput when a setting of a method is missing."""
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
                    f"{path} is not finished: go on with `python -m isthmus.models.recipes baselines {method}`"
                )
            bridge = new_bridge(method, setting, split)
            bridge.load_state_dict(state["average"])
            found.append(Baseline(method, f"{'channels' if method == 'bq' else 'price'} {setting:g}", bridge))
    return found


def epochs_of(method: str, setting: float) -> dict[str, int]:
    """Stages of a run and their epochs."""
    epochs = FIRST_EPOCHS if setting == SETTINGS[method][0] else NEXT_EPOCHS
    if method not in TWO_STAGES:
        return {"joint": epochs}
    return {"features": epochs - TAIL_EPOCHS, "tail": TAIL_EPOCHS}


class Baseline:
    """One trained method at one setting, as its encoder and decoder would run: real bytes between them."""

    def __init__(self, method: str, setting: str, bridge: Bridge, side: int = 300) -> None:
        """`side`: pixels of an image."""
        self.method, self.setting = method, setting
        self._bridge = bridge.eval()
        self._rates = bridge.rates
        self._encoder = bridge.encoder
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
        """Payloads of normalised images: CompressAI's coder, or 8 bits a value behind least value and step."""
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
        hidden_BCHW = self._bridge.decode(latent_BCHW, rate_B)
        for part in self._bridge.tail:
            hidden_BCHW = part(hidden_BCHW)
        probabilities: NDArray[np.float32] = hidden_BCHW.softmax(1).numpy()
        return probabilities

    def _device_state(self) -> list[Tensor]:
        """What sc2bench counts as the encoder: its weights and buffers, with the prior's and its integer tables."""
        state = [*self._encoder.state_dict().values()]
        if self._prior is not None:
            state += [self._rates.log_gain_RC, *self._prior.state_dict().values()]
        return state


def bits_of(tensor: Tensor) -> int:
    """Size as sc2bench counts it."""
    return 8 * tensor.element_size() * tensor.numel()
