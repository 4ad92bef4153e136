"""Architecture name -> builder. A new architecture is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.models.vision.architecture import Architecture
from isthmus.models.vision.split import SplitClassifier

BUILDERS: dict[str, Callable[[Architecture], SplitClassifier]] = {
    "split_classifier": SplitClassifier,
}
