"""The device's own model: a checkpoint, its decoder with KV caches, and what bundles add.

Imported by agents that have a model: it brings ONNX Runtime.
"""

from __future__ import annotations

from functools import cached_property

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.handoff import HandoffSettings, estimate_of, settings_of
from isthmus.edge_agent.language.local_model import LocalModel
from isthmus.edge_agent.language.router_bundles import open_bundles
from isthmus.edge_agent.language.tokenizer_cache import cache_folder
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2, Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.onnx_cache import GraphCache

WARM_UP_TOKENS = 8  # drafted before the first prompt, to compile kernels and to learn what a draft costs


class DeviceModel:
    """`context`: tokens that it holds here; `model_context`: those that it could hold."""

    def __init__(self, config: LanguageConfig, source: str) -> None:
        """Opens `source`, and the bundles that are configured or installed for it. Raises BundleError, InvalidInput."""
        self._config, self._source = config, source
        self._checkpoint: Checkpoint | None = (checkpoint := Checkpoint.open(source))
        self.name = checkpoint.name
        self.aliases = (SMOLLM2,) if source == SMOLLM2 else ()
        self.tokenizer = checkpoint.tokenizer
        self.vocab = checkpoint.config.vocab
        self.model_context = checkpoint.config.context
        self.context = min(config.context, self.model_context)
        self.handoff = open_handoff(config, checkpoint)
        self.routers = open_bundles(config, self.name, lambda: self.fingerprint)
        self.estimate = (
            estimate_of(self.handoff[0].manifest, self.handoff[1], checkpoint.config) if self.handoff else None
        )

    @cached_property
    def fingerprint(self) -> bytes:
        """Of its weights, all of which are read: only bundles, and a cloud with several models, ask for it."""
        return (self._checkpoint or Checkpoint.open(self._source)).fingerprint

    def start(self, stats: SpeculationStats) -> LocalModel:
        """Build the decoder and warm it up, once. `stats` learns what a token takes."""
        config, checkpoint, handoff = self._config, self._checkpoint, self.handoff
        assert checkpoint is not None  # it is started once
        if handoff:
            _ = self.fingerprint
        graphs = GraphCache((config.graphs or cache_folder("graphs")) if config.keep_graphs else None)
        decoder = OnnxDecoder(
            checkpoint,
            self.context,
            config.device_bits,
            config.threads,
            handoff[0].depths if handoff else (),
            kv_bits=config.kv_bits,
            graphs=graphs,
        )
        exits = ExitingDecoder(handoff[0], checkpoint, decoder, config.threads, graphs=graphs) if handoff else None
        local = LocalModel(decoder, exits, stats, caches=2 * config.max_answers)
        local.warm_up(WARM_UP_TOKENS)
        self._checkpoint = None  # its memory map counts as the agent's
        return local


def open_handoff(config: LanguageConfig, checkpoint: Checkpoint) -> tuple[HandoffBundle, HandoffSettings] | None:
    """The handoff bundle, and how to use it. Raises BundleError, InvalidInput."""
    if not config.handoff:
        return None
    handoff = HandoffBundle.open(config.handoff, checkpoint)
    return handoff, settings_of(handoff.manifest, config)
