from __future__ import annotations

import torch

from isthmus.models.recipes.vision import nanodet
from isthmus.models.recipes.vision.answer_distil import (
    AnswerDistillation,
    FromLatent,
    MapBatch,
    MapEncoder,
    information,
)
from isthmus.models.recipes.vision.answer_loss import detection_loss, paired_iou
from isthmus.models.recipes.vision.components import components_of, start_decoder
from isthmus.models.recipes.vision.crossing import Pack
from isthmus.models.recipes.vision.cutting import blocks, capture
from isthmus.models.recipes.vision.detector_tap import LAYOUTS, PackedHeads, Trunk
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.split import DenseDecoder

PRICES = (1.0, 0.1)
PACKED = Pack(LAYOUTS).shape[0]
GRID = nanodet.SIDE // nanodet.STRIDES[1]


def packed(batch: int) -> torch.Tensor:
    return torch.randn(batch, PACKED, GRID, GRID, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_the_cut_after_the_neck_is_one_of_those_found_in_the_graph() -> None:
    torch.manual_seed(0)
    net = nanodet.NanoDet().eval()
    captured = capture(net, (3, nanodet.SIDE, nanodet.SIDE))
    (cut,) = (cut for cut in captured.cuts if cut.name == "neck")
    assert captured.kind == "detect" and captured.channels == nanodet.CLASSES
    assert cut.shape == (PACKED, GRID, GRID) and cut.values == 128 * (52**2 + 26**2 + 13**2)
    trunk, rest = blocks(captured, ("neck",))
    images_1B3HW = torch.randn(1, 3, nanodet.SIDE, nanodet.SIDE)
    found_BCHW = trunk(images_1B3HW)
    torch.testing.assert_close(found_BCHW, Trunk(net)(images_1B3HW))
    for own, wanted in zip(PackedHeads(net.heads)(found_BCHW), net(images_1B3HW), strict=True):
        torch.testing.assert_close(own, wanted)
    assert all(torch.equal(a, b) for a, b in zip(rest(found_BCHW), net(images_1B3HW), strict=True))


def test_components_carry_the_maps_before_training() -> None:
    torch.manual_seed(0)
    heads = PackedHeads(nanodet.Heads())
    low_BCHW = torch.randn(4, 5, GRID, GRID)
    packed_BCHW = torch.einsum("cl,blhw->bchw", torch.randn(PACKED, 5), low_BCHW) + 1  # five directions and a mean
    found = components_of(packed_BCHW, information("detect", packed_BCHW, heads), 5)
    encoder, decoder = MapEncoder(PACKED, 5), DenseDecoder(5, PACKED, 8, len(PRICES))
    encoder.start(found)
    start_decoder(decoder, found)
    with torch.no_grad():
        back_BCHW = decoder(encoder(packed_BCHW), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(back_BCHW, packed_BCHW, atol=2e-2, rtol=1e-2)


def test_the_detector_s_own_answer_loses_nothing_and_another_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 50, 2, generator=generator)
    boxes, scores = torch.cat([corners, corners + 1], 2), torch.rand(1, 50, 80, generator=generator)
    same, _ = detection_loss((boxes, scores), (boxes, scores))
    assert abs(float(same)) < 1e-5
    for changed in ((boxes + 0.3, scores), (boxes, scores.flip(2))):
        assert float(detection_loss((boxes, scores), changed)[0]) > 0.01


def test_overlap_of_paired_boxes() -> None:
    a = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 1, 1]]])
    b = torch.tensor([[[1.0, 0, 3, 2], [5, 5, 6, 6]]])
    torch.testing.assert_close(paired_iou(a, b), torch.tensor([[1 / 3, 0.0]]))


def test_training_reaches_encoder_rates_and_decoder_and_leaves_the_heads() -> None:
    torch.manual_seed(0)
    heads = PackedHeads(nanodet.Heads())
    rates = Rates(4, PRICES, hard=True)
    encoder, decoder = MapEncoder(PACKED, 4), DenseDecoder(4, PACKED, 8, len(PRICES))
    module = AnswerDistillation("detect", encoder, rates, decoder, heads)
    module.train()
    loss, figures = module.loss(MapBatch(packed(2)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert {"task", "scores", "boxes", "features", "bytes0", "bytes1"} <= figures.keys()
    assert module.encoder.linear.weight.grad is not None
    assert module.decoder.linear.weight.grad is not None
    assert rates.log_gain_RC.grad is not None
    assert all(parameter.grad is None for parameter in heads.parameters())


def test_the_cloud_s_part_gives_a_box_and_scores_for_each_cell() -> None:
    part = FromLatent(DenseDecoder(4, PACKED, 8, 2), PackedHeads(nanodet.Heads()))
    with torch.no_grad():
        boxes_BN4, scores_BNC = part(torch.zeros(2, 4, GRID, GRID), torch.tensor([0, 1]))
    assert boxes_BN4.shape == (2, 3549, 4)
    assert scores_BNC.shape == (2, 3549, 80)
