"""The speeds of a device, kept as JSON: measured there, used by the planner anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from isthmus.edge_agent.vision.forecast import Speeds, measure
from isthmus.models.bundle.manifest import Part
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.manifest import Precision

MAX_BYTES = 1 << 20

Name = Annotated[str, Field(min_length=1, max_length=255)]


class BundleSpeeds(Part):
    """Of one bundle, by precision. `name` is for people: the fingerprint says which bundle."""

    name: Name
    precisions: dict[Precision, Speeds]


class DeviceProfile(Part):
    """Of one device: its name, and speeds by the fingerprint of the bundle."""

    device: Name
    bundles: dict[str, BundleSpeeds]

    def speeds(self, bundle: Bundle, precision: Precision) -> Speeds:
        """Raises InvalidInput if the device was not measured with this bundle at this precision."""
        measured = self.bundles.get(bundle.fingerprint.hex())
        found = measured.precisions.get(precision) if measured else None
        if found is None or not found.fits(bundle.manifest):
            known = ", ".join(f"{each.name} {name}" for each in self.bundles.values() for name in each.precisions)
            raise InvalidInput(
                f"the profile of {self.device} has no speeds of bundle {bundle.manifest.name}"
                f" {bundle.fingerprint.hex()[:12]} at {precision}, it has {known or 'none'};"
                " measure it there with --save"
            )
        return found


def measure_profile(device: str, pairs: Sequence[tuple[Bundle, Precision]], threads: int) -> DeviceProfile:
    """The speeds of this machine."""
    bundles: dict[str, BundleSpeeds] = {}
    for bundle, precision in pairs:
        key = bundle.fingerprint.hex()
        before = bundles[key].precisions if key in bundles else {}
        found = {**before, precision: measure(bundle, precision, threads)}
        bundles[key] = BundleSpeeds(name=bundle.manifest.name, precisions=found)
    return DeviceProfile(device=device or "this device", bundles=bundles)


def read_profile(path: Path) -> DeviceProfile:
    """What `--save` wrote. Raises InvalidInput that names the file and the field."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_BYTES} bytes, which no profile of a device is")
    try:
        return DeviceProfile.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(f"{path}: not the profile of a device: {where}: {first['msg']}") from error
