"""The router bundles of the device's model, of which the cloud's model picks one: a bundle belongs to a pair of models.

--router FOLDER, or every installed bundle of kind router -> those made for the device's model
                                                         -> the one made for what the cloud declares
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.cloud_model import described
from isthmus.models.bundle.files import kind_of
from isthmus.models.bundle.installed import folders
from isthmus.models.errors import BundleError
from isthmus.models.language.router.bundle import RouterBundle
from isthmus.models.messages import ModelInfo

KIND = "router"
CERTIFIED_KV_BITS = 32
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterBundles:
    """`bundles` are of the device's model. `problem`: why the configured one is not among them."""

    bundles: tuple[RouterBundle, ...] = ()
    problem: str = ""

    def for_cloud(self, model: ModelInfo | None) -> RouterBundle | None:
        """The bundle of the pair; None where there is none, or no cloud is known."""
        return None if model is None else next((bundle for bundle in self.bundles if bundle.fits(model)), None)

    def for_answers(self, model: ModelInfo | None) -> RouterBundle | None:
        """The bundle of the pair that scores whole answers; the first that does while no cloud is known."""
        scoring = (bundle for bundle in self.bundles if bundle.verifier is not None)
        return next((bundle for bundle in scoring if model is None or bundle.fits(model)), None)

    def missing(self, model: ModelInfo) -> str:
        """Why there is no bundle for the pair, in one line."""
        if self.problem or not self.bundles:
            return self.problem or "no router bundle is installed for the device's model"
        made_for = ", ".join(f"{each.manifest.name} is for {each.manifest.cloud.name}" for each in self.bundles)
        return f"no router bundle is for {described(model)} in the cloud: {made_for}"


def open_bundles(config: LanguageConfig, name: str, weights: Callable[[], bytes]) -> RouterBundles:
    """The bundles for a device's model of this name; `weights` gives its fingerprint, and reads all of them.

    None with an 8-bit KV cache: it changes some choices, and the levels are certified without it. Raises BundleError
    for a configured bundle that is broken. An installed one that is broken is passed over.
    """
    bits = config.device_bits
    if config.kv_bits != CERTIFIED_KV_BITS:
        certified = f"router bundles are certified for KV caches of {CERTIFIED_KV_BITS} bits"
        problem = f"{certified}, and not used with {config.kv_bits}"
        if config.router is not None:
            log.warning("%s", problem)
        return RouterBundles(problem=problem)
    if config.router is not None:
        bundle = RouterBundle.open(config.router)
        if problem := mismatch(bundle, bits, weights):
            log.warning("%s", problem)
            return RouterBundles(problem=problem)
        return RouterBundles((bundle,))
    named = [(each, mismatch(each, bits, weights)) for each in installed() if each.manifest.device.name == name]
    fitting = tuple(bundle for bundle, problem in named if not problem)
    return RouterBundles(fitting, "" if fitting else "; ".join(problem for _, problem in named))


def mismatch(bundle: RouterBundle, bits: int, weights: Callable[[], bytes]) -> str:
    """Why a bundle is not of the device's model, in one line; empty where it is."""
    device = bundle.manifest.device
    made_for = f"router bundle {bundle.manifest.name} is for {device.name} {device.weights[:12]} in {device.bits} bits"
    if device.bits != bits:
        return f"{made_for}, the device's model has {bits}: it is not used"
    if device.weights != (found := weights().hex()):
        return f"{made_for}, the device holds {found[:12]}: it is not used"
    return ""


def installed(places: Sequence[Path] | None = None) -> Iterator[RouterBundle]:
    """Every readable router bundle among the installed ones, in the order in which these are looked through."""
    for place in folders() if places is None else places:
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            try:
                if folder.is_dir() and kind_of(folder) == KIND:
                    yield RouterBundle.open(folder)
            except BundleError as error:
                log.warning("an installed bundle is passed over: %s", error)
