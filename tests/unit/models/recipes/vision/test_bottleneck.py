from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.models.recipes.vision.bottleneck import (
    BETWEEN_LR,
    TAIL_LR,
    BottleneckModel,
    DistilBatch,
    batch_of,
    new_bottleneck,
    ramp,
)
from isthmus.models.recipes.vision.distil import LossWeights
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.efficientnet_lite import EfficientNetLite
from isthmus.models.vision.split import DenseDecoder, SplitClassifier
from tests.tiny_bundle import TINY


class Half(nn.Module):
    """An encoder: every width has the same weights, a narrower one half the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x_BCHW: Tensor, width: int) -> Tensor:
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW if width else y_BCHW / 2


@pytest.fixture
def tail() -> nn.Sequential:
    torch.manual_seed(0)
    net = EfficientNetLite("efficientnet_lite0", 2).eval()
    return net.blocks[12:]


@pytest.fixture
def module(tail: nn.Sequential) -> BottleneckModel:
    torch.manual_seed(1)
    inputs = next(m for m in tail.modules() if isinstance(m, nn.Conv2d)).in_channels
    return BottleneckModel(Half(), Rates(4, (1.0, 0.1)), DenseDecoder(4, inputs, 8, 2), tail, 1, LossWeights())


@pytest.fixture
def batch(module: BottleneckModel) -> DistilBatch:
    torch.manual_seed(2)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        features = module.between(torch.randn(4, module.decoder.project.out_channels, 8, 8))
        middle = module.tail[0](features)
        last = module.tail[1](middle)
        logits = module.tail[2](last)
    return DistilBatch(images, features, middle, last, logits.softmax(1), torch.eye(2).repeat(2, 1))


def step(module: BottleneckModel, batch: DistilBatch, count: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(count):
        loss, _ = module.train().loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name, t in module.state_dict().items() if not torch.equal(t, before[name])}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_loss_falls_and_the_tail_stays(module: BottleneckModel, batch: DistilBatch) -> None:
    before = snapshot(module)
    losses = step(module, batch, 10)
    assert losses[-1] < losses[0]
    assert changed(module, before) == {"encoder", "rates", "decoder"}


@pytest.mark.parametrize(("part", "lr_scale"), [("between", BETWEEN_LR), ("tail", TAIL_LR)])
def test_what_is_free_after_the_decoder_learns_only_its_pointwise_weights(
    module: BottleneckModel, batch: DistilBatch, part: str, lr_scale: float
) -> None:
    module.free_tail()
    free = getattr(module, part)
    before = snapshot(free)
    step(module, batch, 2)
    for name, conv in free.named_modules():
        if isinstance(conv, nn.Conv2d):
            moved = not torch.equal(conv.weight, before[f"{name}.weight"])
            assert moved == (conv.groups == 1), name
    assert {p.lr_scale for p in free.parameters() if p.requires_grad} == {lr_scale}  # type: ignore[attr-defined]


def test_the_whole_tail_is_its_parts_in_a_row(module: BottleneckModel, batch: DistilBatch) -> None:
    features_BCHW = batch.features_BCHW
    with torch.inference_mode():
        hidden_BCHW = features_BCHW
        for part in module.eval().tail:
            hidden_BCHW = part(hidden_BCHW)
        torch.testing.assert_close(module.whole_tail()(features_BCHW), hidden_BCHW, rtol=0, atol=0)


def test_a_tap_with_a_tail_of_its_own_takes_a_bottlenecks() -> None:
    split = SplitClassifier(TINY)
    tap = split.tap(0)
    assert tap.tail is not None
    assert tap.between is not None
    bottleneck = new_bottleneck(split, TINY.taps[0], tap.slim.bottleneck, (1.0, 0.5, 0.1), split.cuts[-1], settled=True)
    bottleneck.free_tail()
    with torch.no_grad():
        for parameter in (*bottleneck.between.parameters(), *bottleneck.tail.parameters()):
            parameter.add_(1)
    tap.between.load_state_dict(bottleneck.between.state_dict())
    tap.tail.load_state_dict(bottleneck.whole_tail().state_dict())
    for kept, trained in ((tap.between, bottleneck.between), (tap.tail, bottleneck.whole_tail())):
        for ours, theirs in zip(kept.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_frozen_encoder_keeps_what_decides_the_bytes(module: BottleneckModel, batch: DistilBatch) -> None:
    module.freeze_encoder()
    before = snapshot(module)
    step(module, batch, 2)
    assert changed(module, before) == {"decoder"}


def test_the_ramp_scales_the_price_of_bytes(module: BottleneckModel, batch: DistilBatch) -> None:
    def loss_at(share: float) -> float:
        torch.manual_seed(0)  # of the quantiser's noise
        loss, _ = module.eval().loss(DistilBatch(**{**vars(batch), "ramp": share}))
        return float(loss.item())

    free, half, full = loss_at(0.0), loss_at(0.5), loss_at(1.0)
    assert free < half < full
    assert half - free == pytest.approx(full - half, rel=1e-3)


def test_the_width_reaches_the_encoder(module: BottleneckModel, batch: DistilBatch) -> None:
    torch.manual_seed(0)
    narrow = module.eval().loss(DistilBatch(**{**vars(batch), "width": 0}))[1]
    torch.manual_seed(0)
    wide = module.eval().loss(DistilBatch(**{**vars(batch), "width": 1}))[1]
    assert narrow["bytes1"] < wide["bytes1"]


def test_features_alone_need_no_labels(module: BottleneckModel, batch: DistilBatch) -> None:
    module.weights = LossWeights(task=0.0)
    torch.manual_seed(0)
    one, _ = module.eval().loss(batch)
    torch.manual_seed(0)
    other, _ = module.eval().loss(DistilBatch(**{**vars(batch), "target_BK": 1 - batch.target_BK}))
    assert one.item() == other.item()


def test_perfect_features_cost_nothing(module: BottleneckModel, batch: DistilBatch) -> None:
    module.between.forward = lambda _: batch.features_BCHW  # type: ignore[method-assign]
    _, figures = module.eval().loss(batch)
    assert figures["features"] < 1e-3  # of bfloat16
    assert figures["agree"] == 1.0


def test_the_price_rises_to_the_full_one() -> None:
    shares = [ramp(epoch, 4) for epoch in range(6)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / 500)
    assert shares[4:] == [1.0, 1.0]


def test_labels_are_the_annotators_doubt() -> None:
    arrays = {name: torch.zeros(2, 1) for name in ("images", "features", "middle", "last")}
    batch = batch_of({**arrays, "logits": torch.zeros(2, 2)}, "images", torch.tensor([0.0, 1 / 3]))
    torch.testing.assert_close(batch.target_BK, torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))
    torch.testing.assert_close(batch.wanted_BK, torch.full((2, 2), 0.5))


def test_a_settled_encoder_keeps_its_statistics(tail: nn.Sequential) -> None:
    norm = nn.BatchNorm2d(3)
    encoder = nn.Sequential(norm)
    bottleneck = BottleneckModel(encoder, Rates(3, (1.0,)), nn.Identity(), tail, 0, LossWeights(), settled=True).train()
    assert not norm.training
    assert bottleneck.rates.training
    assert BottleneckModel(encoder, Rates(3, (1.0,)), nn.Identity(), tail, 0, LossWeights()).train().encoder.training
