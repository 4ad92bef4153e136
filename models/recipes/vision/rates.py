"""The codec in training: a gain vector and a learned prior for each rate, estimated bits, straight-through rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from isthmus.models.recipes.vision.compressai_entropy import likelihood_of, new_prior
from isthmus.models.recipes.vision.views import BATCH

ENOUGH_POSITIONS = 400  # of a channel; larger maps are subsampled


def thinned(latent_BCHW: Tensor) -> tuple[Tensor, float]:
    """A random subsampling of rows and columns, enough to estimate the bits, and the factor to scale these by."""
    height, width = latent_BCHW.shape[2:]
    stride = max(1, round((height * width / ENOUGH_POSITIONS) ** 0.5))
    top, left = torch.randint(stride, (2,)).tolist()
    seen_BCHW = latent_BCHW[:, :, top::stride, left::stride]
    return seen_BCHW, height * width / (seen_BCHW.shape[2] * seen_BCHW.shape[3])


class Rates(nn.Module):
    """Gains and priors. `per_kilobyte`: the price of a coded kilobyte at each rate, highest first."""

    def __init__(
        self,
        channels: int,
        per_kilobyte: Sequence[float],
        lr_scale: float = 1.0,
        log_gains: tuple[float, float] = (1.0, 2.5),
        hard: bool = False,
    ) -> None:
        """`lr_scale`: learning rate of the priors relative to the networks; `log_gains`: initial, coarse to fine.

        `hard`: estimate the bits of the integers in place of noisy values. Below a tenth of a bit a value, the estimate
        with noise is three times too high, and trains the encoder to save bytes that are not spent.
        """
        super().__init__()
        steps = torch.linspace(*log_gains, len(per_kilobyte))[:, None].expand(-1, channels)
        self.log_gain_RC = nn.Parameter(steps.clone())
        self.priors = nn.ModuleList(new_prior(channels) for _ in per_kilobyte)
        self.per_kilobyte = tuple(per_kilobyte)
        self.hard = hard
        for parameter in self.priors.parameters():
            parameter.lr_scale = lr_scale  # type: ignore[attr-defined]

    def forward(self, latent_BCHW: Tensor, rate_B: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of each input under its rate's prior, and the latent as the cloud decodes it (rounded)."""
        gain_BC11 = self.log_gain_RC.exp()[rate_B][:, :, None, None]
        scaled_BCHW = latent_BCHW.float() * gain_BC11
        rounded_BCHW = scaled_BCHW + (scaled_BCHW.round() - scaled_BCHW).detach()
        bits_B = scaled_BCHW.new_zeros(len(rate_B))
        for rate, prior in enumerate(self.priors):
            chosen = rate_B == rate
            if chosen.any():
                seen_BCHW, times = thinned((rounded_BCHW if self.hard else scaled_BCHW)[chosen])
                likelihood = likelihood_of(prior, seen_BCHW) if self.hard else prior(seen_BCHW, training=True)[1]
                bits_B = bits_B.index_put((chosen,), -times * likelihood.log2().sum((1, 2, 3)))
        return bits_B, rounded_BCHW / gain_BC11

    def price(self, bits_B: Tensor, rate_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean price of a batch, and its mean bytes at each rate."""
        kilobytes_B = bits_B / 8 / 1024
        price = (kilobytes_B * torch.tensor(self.per_kilobyte)[rate_B]).mean()
        each = {f"bytes{r}": 1024 * kilobytes_B[rate_B == r].mean().item() for r in range(len(self.per_kilobyte))}
        return price, each

    @torch.no_grad()
    def integers(self, latent_BCHW: Tensor, rate: int) -> NDArray[np.int32]:
        """The integers of a batch of latents, before clipping."""
        gain_C11 = self.log_gain_RC.exp()[rate][:, None, None]
        return (latent_BCHW.float() * gain_C11).round().to(torch.int32).numpy()

    @property
    def gains_RC(self) -> NDArray[np.float32]:
        gains: NDArray[np.float32] = self.log_gain_RC.detach().exp().numpy()
        return gains


@torch.no_grad()
def integers(array: NDArray[Any], encode: Callable[[Tensor], Tensor], rates: Rates) -> list[NDArray[np.int32]]:
    """The integers (N, C, H, W) of an array's rows after `encode`, for each rate; tables are fitted to them."""
    found: list[list[NDArray[np.int32]]] = [[] for _ in rates.per_kilobyte]
    for start in track(range(0, len(array), BATCH), "integers"):
        latent_BCHW = encode(torch.from_numpy(np.array(array[start : start + BATCH])).float())
        for rate, retained in enumerate(found):
            retained.append(rates.integers(latent_BCHW, rate))
    return [np.concatenate(retained) for retained in found]
