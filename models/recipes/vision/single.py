"""Our light tap at one rate per training run, to measure the cost of one encoder for all rates.

Front, initialisation, epochs and coder are those of the bundle; only the widest width is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.models.codecs import checkerboard as contextual
from isthmus.models.codecs.checkerboard import ContextualCodec
from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.common.fit_tables import fit
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.vision import light
from isthmus.models.recipes.vision.bottleneck import BottleneckModel, new_bottleneck
from isthmus.models.recipes.vision.components import Components
from isthmus.models.recipes.vision.light import Teacher
from isthmus.models.recipes.vision.parts import macs
from isthmus.models.recipes.vision.rates import integers
from isthmus.models.recipes.vision.views import Views
from isthmus.models.vision.architecture import TapArchitecture
from isthmus.models.vision.slim import FrozenSlim, SlimEncoder
from isthmus.models.vision.split import SplitClassifier

METHOD = "ours-single"
PRICES = (4.0, 1.4, 0.4)  # of a kilobyte; some of the bundle's own
NO_CAP = 1 << 20

Tensors = dict[str, NDArray[Any]]


def train_all(
    run: Run, views: Views, teacher: Teacher, tap: TapArchitecture, encoder: SlimEncoder, requested: Components
) -> None:
    """One run for each price, from the slimmed encoder, and the tables for its integers."""
    for price in PRICES:
        bottleneck = light.train_bottleneck(
            run, f"{METHOD}-{price:g}", views, teacher, tap, encoder, requested, (price,)
        )
        sent = integers(views.passes[0]["front"], partial(bottleneck.encoder, width=-1), bottleneck.rates)
        tensors = contextual.to_tensors(fit(sent, bottleneck.rates.gains_RC))
        safetensors.numpy.save_file(tensors, tables_of(run.folder, price))


def tables_of(work: Path, price: float) -> Path:
    """The file of a run's tables; it is written last, so a run that has it is finished."""
    return work / f"{METHOD}-{price:g}.safetensors"


def trained(work: Path, split: SplitClassifier, tap: TapArchitecture) -> list[SingleRate]:
    """The results of `train_all` in `work`. Raises InvalidInput when a price is missing."""
    found = []
    for price in PRICES:
        path = tables_of(work, price)
        if not path.exists():
            raise InvalidInput(
                f"{path} is missing: train it with `python -m isthmus.models.recipes baselines {METHOD}`"
            )
        state = torch.load(work / f"{METHOD}-{price:g}-refine.ckpt", weights_only=True)
        bottleneck = new_bottleneck(split, tap, split.tap(0).slim.bottleneck, (price,), split.cuts[-1], settled=True)
        bottleneck.load_state_dict(state["average"])
        tensors = safetensors.numpy.load_file(path)
        found.append(SingleRate(f"price {price:g}", bottleneck.eval(), split, tensors))
    return found


class SingleRate:
    """One of the runs with its encoder and decoder in use, and real bytes between them."""

    method = METHOD

    def __init__(
        self, setting: str, bottleneck: BottleneckModel, split: SplitClassifier, tensors: Tensors, side: int = 300
    ) -> None:
        """`split`: provides the front; `side`: pixels of an image's side."""
        self.setting = setting
        self._bottleneck = bottleneck
        self._encoder = deepcopy(split.tap(0).slim)
        self._encoder.bottleneck.load_state_dict(bottleneck.encoder.state_dict())
        self._encoder.eval()
        images_1CHW = torch.zeros(1, 3, side, side)
        with torch.inference_mode():
            _, *shape = self._encoder(images_1CHW).shape
        self._codec = ContextualCodec(contextual.from_tensors(tensors, 1), (shape[0], shape[1], shape[2]), NO_CAP)
        self.encoder_macs = macs(self._encoder, images_1CHW)
        state = FrozenSlim(self._encoder).state_dict().values()
        self.encoder_bits = 8 * (sum(t.nbytes for t in state) + sum(array.nbytes for array in tensors.values()))

    @torch.inference_mode()
    def encode(self, images_B3HW: Tensor) -> list[bytes]:
        """Payloads of normalised images."""
        latents_BCHW = self._encoder(images_B3HW).numpy()
        return [self._codec.encode(self._codec.quantise(latent_CHW, 0), 0) for latent_CHW in latents_BCHW]

    @torch.inference_mode()
    def answer(self, payloads: Sequence[bytes]) -> NDArray[np.float32]:
        """Probabilities of the first task, (B, K)."""
        latents = [self._codec.dequantise(self._codec.decode(data, 0), 0) for data in payloads]
        rate_B = torch.zeros(len(payloads), dtype=torch.long)
        features_BCHW = self._bottleneck.decode(torch.from_numpy(np.stack(latents)), rate_B)
        probabilities: NDArray[np.float32] = self._bottleneck.whole_tail()(features_BCHW).softmax(1).numpy()
        return probabilities
