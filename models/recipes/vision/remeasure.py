"""A bundle that exists -> the same bundle with figures measured anew. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from isthmus.models.bundle.files import Files, fingerprint_of, read_json
from isthmus.models.bundle.manifest import FileEntry, FileName
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.recipes.vision import elpv, fashion, own_data, photos
from isthmus.models.recipes.vision.export import UNITS, Data, write_measured
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Preprocessing

WRITTEN_AGAIN = ("schema_version", "files", "fingerprint", "scores", "images", "calibration_samples")
FASHION = Path("runs/fashion/data")


def remeasure(source: Path, folder: Path, images: Path | None) -> Bundle:
    """Measure a bundle anew, also one of the schema before: only its figures and certificates change.

    Raises BundleError where it is none, or a file of it is not as the manifest says; InvalidInput without `images`
    where its data do not come with a package.
    """
    content = read_json(source)
    try:
        if content["fingerprint"] != fingerprint_of(content):
            raise BundleError(f"{source}: the manifest is not what its fingerprint says")
        entries = TypeAdapter(dict[FileName, FileEntry]).validate_python(content["files"])
        manifest, name = without_figures(content), str(content["name"])
        spec = Preprocessing.model_validate(content["preprocessing"])
        labels = tuple(map(str, content["tasks"][0]["labels"]))
    except (KeyError, TypeError, AttributeError, IndexError, ValidationError) as error:
        raise BundleError(f"{source}: not a vision bundle: {error!r:.100}") from error
    stored = Files(source, entries)
    files = {each: stored.read(each) for each in entries}
    return write_measured(folder, manifest, files, data_of(name, labels, spec, images))


def without_figures(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's entries that are not measured."""
    manifest = {key: value for key, value in content.items() if key not in WRITTEN_AGAIN}
    manifest["units"] = UNITS
    manifest["heads"] = {name: {"files": head["files"]} for name, head in content["heads"].items()}
    manifest["taps"] = [
        {**tap, "widths": [{key: width[key] for key in ("width", "encoder_macs")} for width in tap["widths"]]}
        for tap in content["taps"]
    ]
    return manifest


def data_of(name: str, labels: tuple[str, ...], spec: Preprocessing, images: Path | None) -> Data:
    """Samples that did not train a bundle: of ours by their names and labels, else the user's folder."""
    if name == "elpv" and labels == elpv.TASKS[0].labels and images is None:
        return elpv.measuring_data()
    if name == "fashion" and labels == fashion.LABELS:
        return fashion.measuring_data(images or FASHION)
    if images is None:
        raise InvalidInput(f"--data is missing: images to measure {name} with, that did not train it")
    if name == "photos" and len(labels) == 1000:
        return photos.measuring_data(images)
    found = own_data.find(images)
    if found.classes and found.classes != labels:
        raise InvalidInput(f"{images} has other classes than {name}: {', '.join(found.classes)[:100]}")
    parts = own_data.load(found, spec)
    return Data(own_data.samples(parts["calibration"]), own_data.samples(parts["test"]))
