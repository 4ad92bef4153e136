"""Routed answers in closed loop: each token follows those that the device or the cloud chose before it.

    prompt -> device's choice, confidence -> at or above the threshold: that token
                                          -> below it: the cloud's choice after the same text

Certificates are measured with the cloud's own text before each token. Here the text drifts from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from isthmus.models.language.drafts import shared_length
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.language.llama import LayerCache, Llama
from isthmus.models.recipes.language.prompts import ANSWER_TOKENS


class CloudText:
    """The cloud's choices along one text, which is read as far as needed."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._caches: list[LayerCache | None] = [None] * len(model.layers)
        self.choices: list[int] = []  # after each token that was read

    @torch.inference_mode()
    def after(self, text: Sequence[int]) -> int:
        """The choice after a text that continues the last one."""
        x_BTH: Tensor = self._model.embed(torch.tensor([text[len(self.choices) :]]))
        for index, layer in enumerate(self._model.layers):
            x_BTH, self._caches[index] = layer(x_BTH, self._caches[index])
        self.choices += self._model.logits(x_BTH[0]).float().argmax(-1).tolist()
        return self.choices[-1]


def routed_losses(
    decoder: OnnxDecoder,
    head: ConfidenceHead,
    model: Llama,
    likely: float,
    prompts: Sequence[Sequence[int]],
    eos_ids: frozenset[int],
) -> tuple[NDArray[np.float64], float]:
    """For each prompt (P,) the share of the answer's tokens that the cloud would not choose there; the offload rate."""
    losses, asked, total = [], 0, 0
    for prompt in track(prompts, f"closed loop from {likely:.3f}"):
        text, cloud = list(prompt), CloudText(model)
        while len(text) < len(prompt) + ANSWER_TOKENS and not (len(text) > len(prompt) and text[-1] in eos_ids):
            known = shared_length(decoder.ids, text)
            decoder.truncate(min(known, len(text) - 1))
            logits_V = decoder.extend(text[decoder.length :])
            sure = head(logits_V, text) >= likely
            asked += not sure
            text.append(int(logits_V.argmax()) if sure else cloud.after(text))
        if len(cloud.choices) < len(text) - 1:
            cloud.after(text[:-1])
        answer = np.array(text[len(prompt) :])
        losses.append(float((answer != np.array(cloud.choices[len(prompt) - 1 :][: len(answer)])).mean()))
        total += len(answer)
    return np.array(losses), asked / total
