from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.edge_agent.vision import image_input as photos
from isthmus.edge_agent.vision.image_input import as_image
from isthmus.models.errors import InvalidInput


def test_a_photo_is_the_same_however_it_is_given(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    for given in (photo, path.read_bytes(), path, str(path)):
        np.testing.assert_array_equal(np.asarray(as_image(given)), np.asarray(photo))


def test_grey_photos_become_rgb(photo: Image.Image) -> None:
    assert as_image(photo.convert("L")).mode == "RGB"


@pytest.mark.parametrize(("name", "words"), [("none.png", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        as_image(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "MAX_FILE_BYTES", 10)
    (tmp_path / "large.png").write_bytes(bytes(11))
    with pytest.raises(InvalidInput, match="larger than 10 bytes"):
        as_image(tmp_path / "large.png")
