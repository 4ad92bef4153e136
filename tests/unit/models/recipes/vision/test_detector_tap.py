from __future__ import annotations

import torch

from isthmus.models.recipes.vision import nanodet
from isthmus.models.recipes.vision.components import components_of, start_decoder
from isthmus.models.recipes.vision.detector_distil import (
    DetectorDistillation,
    MapBatch,
    detection_loss,
    information,
    paired_iou,
)
from isthmus.models.recipes.vision.detector_tap import PACKED, FromLatent, MapEncoder, pack, unpack
from isthmus.models.recipes.vision.rates import Rates
from isthmus.models.vision.split import DenseDecoder

PRICES = (1.0, 0.1)


def maps(batch: int, side: int = 8, width: int = nanodet.WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, width, each, each, generator=generator) for each in (2 * side, side, side // 2)]


def test_unpacking_gives_the_packed_maps() -> None:
    given = maps(2, width=3)
    packed_BCHW = pack(given)
    assert packed_BCHW.shape == (2, 18, 8, 8)
    for wanted, found in zip(given, unpack(packed_BCHW), strict=True):
        torch.testing.assert_close(found, wanted)


def test_components_carry_the_maps_before_training() -> None:
    torch.manual_seed(0)
    heads = nanodet.Heads()
    low_BCHW = torch.randn(4, 5, 8, 8)
    packed_BCHW = torch.einsum("cl,blhw->bchw", torch.randn(PACKED, 5), low_BCHW) + 1  # five directions and a mean
    found = components_of(packed_BCHW, information(packed_BCHW, heads), 5)
    encoder, decoder = MapEncoder(5), DenseDecoder(5, PACKED, 8, len(PRICES))
    encoder.start(found)
    start_decoder(decoder, found)
    with torch.no_grad():
        back_BCHW = decoder(encoder(packed_BCHW), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(back_BCHW, packed_BCHW, atol=2e-2, rtol=1e-2)


def test_the_detector_s_own_answer_loses_nothing_and_another_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = 3549
    logits, distances = (
        torch.randn(1, cells, 80, generator=generator),
        torch.randn(1, cells, 4, 11, generator=generator),
    )
    same, _ = detection_loss((logits, distances), (logits, distances))
    assert abs(float(same)) < 1e-5
    for changed in ((logits + 0.5, distances), (logits, distances.flip(3))):
        assert float(detection_loss((logits, distances), changed)[0]) > 0.01


def test_overlap_of_paired_boxes() -> None:
    a = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 1, 1]]])
    b = torch.tensor([[[1.0, 0, 3, 2], [5, 5, 6, 6]]])
    torch.testing.assert_close(paired_iou(a, b), torch.tensor([[1 / 3, 0.0]]))


def test_training_reaches_encoder_rates_and_decoder_and_leaves_the_heads() -> None:
    torch.manual_seed(0)
    heads = nanodet.Heads()
    rates = Rates(4, PRICES, hard=True)
    module = DetectorDistillation(MapEncoder(4), rates, DenseDecoder(4, PACKED, 8, len(PRICES)), heads)
    module.train()
    loss, figures = module.loss(MapBatch(maps(2, nanodet.SIDE // 16)))
    loss.backward()  # type: ignore[no-untyped-call]
    assert {"task", "scores", "boxes", "distances", "features", "bytes0", "bytes1"} <= figures.keys()
    assert module.encoder.linear.weight.grad is not None
    assert module.decoder.linear.weight.grad is not None
    assert rates.log_gain_RC.grad is not None
    assert all(parameter.grad is None for parameter in heads.parameters())


def test_the_cloud_s_part_gives_a_box_and_scores_for_each_cell() -> None:
    part = FromLatent(DenseDecoder(4, PACKED, 8, 2), nanodet.Heads())
    with torch.no_grad():
        boxes_BN4, scores_BNC = part(torch.zeros(2, 4, 26, 26), torch.tensor([0, 1]))
    assert boxes_BN4.shape == (2, 3549, 4)
    assert scores_BNC.shape == (2, 3549, 80)
