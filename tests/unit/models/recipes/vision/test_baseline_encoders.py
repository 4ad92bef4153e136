from __future__ import annotations

import pytest
import torch

from isthmus.models.recipes.vision import baseline_encoders


def test_encoders_are_as_large_as_their_papers_say() -> None:
    def weights(encoder: torch.nn.Module) -> int:
        return sum(p.numel() for p in encoder.parameters())

    assert weights(baseline_encoders.entropic_student_encoder()) == 138_672
    assert weights(baseline_encoders.patch_encoder(0)) == 32_960
    assert weights(baseline_encoders.patch_encoder(4)) == 623_552
    assert 4 * weights(baseline_encoders.few_channels_encoder(1)) / 1024 == pytest.approx(618, abs=15)


def test_eight_bits_in_training_are_those_of_the_payload() -> None:
    latent = torch.randn(2, 1, 5, 5)
    bits_B, got = baseline_encoders.EightBits()(latent, torch.zeros(2))
    _, step = baseline_encoders.affine(latent)
    assert ((got - latent).abs() <= step / 2 + 1e-6).all()
    assert bits_B.tolist() == [8 * 25 + 64] * 2
