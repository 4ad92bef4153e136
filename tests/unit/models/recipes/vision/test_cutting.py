from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.vision.cutting import blocks, capture
from isthmus.models.recipes.vision.graphs import onnx_bytes
from isthmus.models.vision.efficientnet_lite import EfficientNetLite

IMAGE = (3, 32, 32)


class Residual(nn.Module):
    """Two convolutions in place, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.around = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x_BCHW)))))
        y_BCHW += self.around(x_BCHW)
        z_BCHW: Tensor = self.relu(y_BCHW)
        return z_BCHW


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.early = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
        self.late = Residual(16, 16, 2)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.late(self.early(self.stem(x_BCHW)))
        logits_BK: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(y_BCHW, 1), 1))
        return logits_BK


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    net = Small()
    net.train()(torch.randn(16, *IMAGE))  # statistics that are not the first ones
    return net.eval()


def test_cuts_are_where_modules_end_and_one_map_crosses(small: nn.Module) -> None:
    captured = capture(small, IMAGE)
    found = [(cut.name, cut.shape) for cut in captured.cuts]
    assert found == [
        ("stem", (8, 16, 16)),
        ("early.0", (8, 16, 16)),
        ("early", (16, 8, 8)),
        ("late", (16, 4, 4)),
        ("adaptive_avg_pool2d", (16, 1, 1)),
    ]
    assert captured.channels == 5


def test_costs_add_up(small: nn.Module) -> None:
    captured = capture(small, IMAGE)
    assert captured.cuts[0].macs == 3 * 8 * 9 * 16 * 16
    macs, seconds = ([getattr(cut, field) for cut in captured.cuts] for field in ("macs", "seconds"))
    assert macs == sorted(macs) and seconds == sorted(seconds) and seconds[0] > 0
    assert macs[-1] + 16 * 5 == captured.macs


@torch.inference_mode()
@pytest.mark.parametrize(
    "cuts", [(), ("stem",), ("early.0", "early"), ("stem", "early", "late", "adaptive_avg_pool2d")]
)
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_in_a_row_are_the_model(small: nn.Module, cuts: tuple[str, ...], count: int) -> None:
    images_B3HW = torch.randn(count, *IMAGE)
    split = blocks(capture(small, IMAGE), cuts)
    assert len(split) == len(cuts) + 1
    torch.testing.assert_close(split(images_B3HW), small(images_B3HW), rtol=0, atol=0)


@torch.inference_mode()
def test_a_block_leaves_its_input_as_it_is(small: nn.Module) -> None:
    x_BCHW = torch.randn(2, *IMAGE)
    for block in blocks(capture(small, IMAGE), ("stem", "early")):
        before_BCHW = x_BCHW.clone()
        after = block(x_BCHW)
        assert torch.equal(x_BCHW, before_BCHW)
        x_BCHW = after


def test_blocks_share_all_weights_and_can_be_trained(small: nn.Module) -> None:
    split = blocks(capture(small, IMAGE), ("early",))
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in small.parameters())
    split(torch.randn(2, *IMAGE)).sum().backward()
    assert all(p.grad is not None for p in split.parameters())


@torch.inference_mode()
def test_a_network_of_ours_can_be_cut_at_every_block() -> None:
    net = EfficientNetLite("efficientnet_lite0", 3).eval()
    captured = capture(net, IMAGE)
    names = [cut.name for cut in captured.cuts]
    assert [f"blocks.{index}" for index in range(len(net.blocks) - 1)] == [n for n in names if n.count(".") == 1]
    images_B3HW = torch.randn(2, *IMAGE)
    split = blocks(captured, ("blocks.3", "blocks.9"))
    torch.testing.assert_close(split(images_B3HW), net(images_B3HW), rtol=1e-5, atol=1e-5)


class WithSizes(nn.Module):
    """Reshapes by the batch's size, which is not known when the graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.classifier = nn.LazyLinear(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        count = x_BCHW.size(0)
        logits_BK: Tensor = self.classifier(self.second(self.first(x_BCHW)).view(count, -1))
        return logits_BK


@torch.inference_mode()
def test_the_batchs_size_crosses_a_cut_too() -> None:
    net = WithSizes().eval()
    net(torch.randn(1, *IMAGE))
    split = blocks(capture(net, IMAGE), ("first",))
    images_B3HW = torch.randn(3, *IMAGE)
    torch.testing.assert_close(split(images_B3HW), net(images_B3HW))


class Branching(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(1)[:, :2] if x_BCHW.sum() > 0 else x_BCHW.flatten(1)[:, 2:4]


class Broken(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        raise ValueError("first line\nsecond line")


class Dense(nn.Module):
    """The last layer sees the image again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW).mean((2, 3)) + x_BCHW.mean((2, 3))


class Again(nn.Module):
    """One pooling module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.pool(self.second(self.pool(self.first(x_BCHW)))).mean((2, 3))
        return logits_BK


def test_a_module_that_is_called_again_has_its_number_in_the_name() -> None:
    assert [cut.name for cut in capture(Again(), IMAGE).cuts] == ["first", "pool", "second", "pool:2"]


class Ending(nn.Module):
    """Something behind the logits."""

    def __init__(self, ending: Callable[[Tensor], Tensor], classes: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.ending = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, classes, 3), ending
        self.drop = nn.Dropout(0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.ending(self.drop(self.second(self.first(x_BCHW))).mean((2, 3)))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("ending", "removed"),
    [
        (nn.Softmax(1), "softmax"),
        (lambda x_BK: F.softmax(x_BK, dim=-1), "softmax"),
        (lambda x_BK: F.dropout(x_BK.softmax(1), training=False).clone(), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LogSoftmax(1), None),  # its softmax is that of the logits
        (nn.Identity(), None),
    ],
    ids=["softmax", "function", "then nothing", "sigmoid", "log-softmax", "logits"],
)
def test_a_softmax_behind_the_logits_is_left_out(ending: Callable[[Tensor], Tensor], removed: str | None) -> None:
    torch.manual_seed(0)
    model = Ending(ending).eval()
    captured = capture(model, IMAGE)
    assert captured.removed == removed
    images_B3HW = torch.randn(3, *IMAGE)
    logits_BK = blocks(captured, ("first",))(images_B3HW)
    wanted_BK = model(images_B3HW)
    torch.testing.assert_close(ending(logits_BK) if removed else logits_BK, wanted_BK)


class Tokens(nn.Module):
    """A transformer whose class token fixes the batch's size when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patch = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 32, 4, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 32))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BTC = self.patch(self.stem(x_BCHW)).flatten(2).transpose(1, 2)
        x_BTC = self.encoder(torch.cat([self.start.expand(len(x_BTC), -1, -1), x_BTC], 1))
        logits_BK: Tensor = self.head(x_BTC[:, 0])
        return logits_BK


@torch.inference_mode()
@pytest.mark.parametrize("frozen", [False, True])
def test_a_transformer_encoder_is_captured_without_pytorchs_fused_layer(frozen: bool) -> None:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = Tokens().eval().requires_grad_(not frozen)
        captured = capture(model, IMAGE)
    assert [(cut.name, cut.shape) for cut in captured.cuts if "cat" not in cut.name] == [
        ("stem", (8, 16, 16)),
        ("patch", (32, 4, 4)),
        ("encoder.layers.0.norm1", (32, 5, 4)),  # a row for the class token
        ("encoder", (32, 5, 4)),
    ]
    assert not [node for node in captured.graph.graph.nodes if "_transformer" in str(node.target)]
    assert torch.backends.mha.get_fastpath_enabled()
    images_B3HW = torch.randn(3, *IMAGE)
    wanted_BK = model(images_B3HW)
    for cut in ("encoder.layers.0.norm1", "stem"):
        split = blocks(captured, (cut,))
        torch.testing.assert_close(split(images_B3HW), wanted_BK, rtol=1e-4, atol=1e-5)
    with torch.inference_mode(False):
        onnx_bytes(split[1], {"x": torch.zeros(2, 8, 16, 16)}, 1)


class Last(nn.Module):
    """As ConvNeXt: a linear layer over channels that are last, reshaped in windows as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(3, 6, 3, 2, 1), nn.LayerNorm(6), nn.Linear(6, 10)
        self.windows, self.act, self.head = nn.Linear(10, 10), nn.GELU(), nn.Conv2d(10, 4, 3, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.mix(self.norm(self.stem(x_BCHW).permute(0, 2, 3, 1)))
        count, height, width, channels = x_BHWC.shape
        x_NTC = x_BHWC.reshape(count, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        x_NTC = self.windows(x_NTC).unflatten(3, (4, 4)).permute(0, 1, 3, 2, 4, 5)
        y_BHWC = self.act(x_NTC.reshape(count, height, width, channels))
        return self.head(y_BHWC.permute(0, 3, 1, 2)).mean((2, 3))


@torch.inference_mode()
def test_maps_whose_channels_are_last_cross_a_cut_with_channels_first() -> None:
    torch.manual_seed(0)
    model = Last().eval()
    captured = capture(model, (3, 32, 48))
    assert [(cut.name, cut.shape) for cut in captured.cuts if cut.name in ("stem", "mix", "act", "head")] == [
        ("stem", (6, 16, 24)),
        ("mix", (10, 16, 24)),
        ("act", (10, 16, 24)),
        ("head", (4, 7, 11)),
    ]
    images_B3HW = torch.randn(3, 3, 32, 48)
    for cuts in (("mix",), ("mix", "act")):
        first, *_ = split = blocks(captured, cuts)
        assert first(images_B3HW).shape == (3, 10, 16, 24)
        torch.testing.assert_close(split(images_B3HW), model(images_B3HW))


class Random(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.dropout(x_BCHW, training=True).mean((2, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(3600, 2)
    )


def not_finite() -> nn.Module:
    model = Ending(nn.Identity())
    nn.init.constant_(model.second.weight, torch.nan)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Branching, "the model's graph cannot be captured: its control flow or a size depends on the values"),
        (lambda: Ending(nn.Identity(), 1), r"answers with one logit, .* torch.cat\(\[torch.zeros_like\(x\), x\], 1\)"),
        (lambda: Ending(lambda x_BK: x_BK.exp() / x_BK.exp().sum(1, keepdim=True)), "probabilities, which add up to 1"),
        (batch_norm, "depends on the others of its batch, .* batch norms without running statistics"),
        (Random, "the model's answers to one image differ: they are random"),
        (not_finite, "the model's answers to noise are not finite"),
        (Broken, "the model's graph cannot be captured: first line"),
        (Dense, "the model cannot be cut: no point of it is passed by a single feature map"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)),
            r"the model's output for two images is \(2, 4, 900\), expected logits",
        ),
        (lambda: nn.Conv2d(5, 4, 3), "the model's graph cannot be captured"),
    ],
    ids=[
        "control flow",
        "one logit",
        "probabilities",
        "batch norm",
        "random",
        "not finite",
        "its own error",
        "no single map",
        "no logits",
        "five channels",
    ],
)
def test_what_cannot_be_cut_is_one_clear_line(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        capture(make(), IMAGE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        (("middle",), "there is no cut 'middle', there are stem, early.0, early, late, adaptive_avg_pool2d"),
        (("late", "stem"), "cuts late, stem are not in the order of the model: stem, early.0"),
        (("stem", "stem"), "are not in the order"),
    ],
)
def test_cuts_that_are_none_are_refused(small: nn.Module, cuts: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        blocks(capture(small, IMAGE), cuts)
