from __future__ import annotations

import httpx
import pytest

from isthmus.edge_agent.http.forms import MAX_FIELD_BYTES, MAX_PARTS, read_form
from isthmus.models.errors import InvalidInput

KIND = "multipart/form-data; boundary=x"
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'


@pytest.mark.parametrize("kind", ["", "image/jpeg", "application/octet-stream", "nonsense;;;"])
def test_a_body_that_is_no_form_is_the_file(kind: str) -> None:
    assert read_form(b"--x\r\n", kind) == (b"--x\r\n", {})


def test_the_file_of_a_form_is_found_beside_fields_whatever_its_name() -> None:
    photo = bytes(range(256)) * 300 + b"\r\n--"
    fields = {"a": "b", "long": "c" * (MAX_FIELD_BYTES + 1), "full": "d" * MAX_FIELD_BYTES}
    request = httpx.Request("POST", "http://localhost", data=fields, files={"any": ("x.jpg", photo)})
    found = read_form(request.read(), request.headers["Content-Type"])
    assert found == (photo, {"a": "b", "full": "d" * MAX_FIELD_BYTES}), "a field that is too long is left out"


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("multipart/form-data", FILE, "without a boundary"),
        (KIND, b"junk", "form is broken"),
        (KIND, FILE + b"abc", "truncated"),
        (KIND, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n', "no file"),
        (KIND, FILE + b"1\r\n" + FILE + b"2\r\n--x--\r\n", "more than one file"),
        (KIND, b"--x\r\n\r\n\r\n" * (MAX_PARTS + 1), f"more than {MAX_PARTS} parts"),
        (KIND, b"--x\r\n" + b"a: " + b"b" * 5000, "bytes of headers|broken"),
        (KIND, b"--x\r\n" + b"a: b\r\n" * 100_000, "broken"),
    ],
)
def test_forms_without_exactly_one_file_are_refused_in_a_line(kind: str, body: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        read_form(body, kind)
    assert "\n" not in str(caught.value)
