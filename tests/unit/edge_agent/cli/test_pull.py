from __future__ import annotations

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isthmus.edge_agent.cli import pull as pulling
from isthmus.edge_agent.cli import sources
from isthmus.edge_agent.cli.isthmus import main
from isthmus.models.bundle.files import MANIFEST, MAX_MANIFEST_BYTES
from isthmus.models.bundle.installed import NAME
from isthmus.models.vision.bundle import Bundle

Answers = dict[str, bytes | tuple[int, dict[str, str], bytes]]


class Web:
    """An HTTP server on loopback. `answers` by path: a body, or a status with headers and a body."""

    def __init__(self, port: int, answers: Answers) -> None:
        self.url, self.answers = f"http://127.0.0.1:{port}", answers
        self.asked: list[str] = []

    def folder(self, path: str, bundle: Path) -> str:
        for file in bundle.iterdir():
            self.answers[f"{path}/{file.name}"] = file.read_bytes()
        return self.url + path


@pytest.fixture
def web() -> Iterator[Web]:
    answers: Answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            answer = answers.get(self.path.partition("?")[0], (404, {}, b""))
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # a client that has seen enough leaves
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Web(server.server_port, answers)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "bundles"


def invoke(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(main, ["pull", *map(str, arguments)], env={NAME: "", **environment})


def refused(to: Path, words: str, *arguments: object, **environment: str) -> None:
    """The pull ends with one line that has `words`, and leaves nothing."""
    result = invoke(*arguments, "--to", to, **environment)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert words in line
    assert not to.exists() or list(to.iterdir()) == []


def zipped(path: Path, bundle: Path, prefix: str = "a/b", **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in bundle.iterdir():
            archive.write(file, f"{prefix}/{file.name}" if prefix else file.name)
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, bundle: Path, mode: Any = "w:gz", *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(bundle, "./tiny")
        for info, data in more:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_name_that_comes_with_the_package(to: Path) -> None:
    result = invoke("fashion", "--to", to, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["name"], found["new"], found["folder"]) == ("fashion", True, str(to / "fashion"))
    assert Bundle.open(to / "fashion").manifest.fingerprint == found["fingerprint"]
    assert [path.name for path in to.iterdir()] == ["fashion"]


def test_by_default_it_goes_where_programs_look(tmp_path: Path, tiny_bundle: Bundle) -> None:
    data = {"XDG_DATA_HOME": str(tmp_path / "data")}
    assert invoke(tiny_bundle.folder, **data).exit_code == 0
    assert (tmp_path / "data/isthmus/bundles" / tiny_bundle.manifest.name / MANIFEST).exists()


def test_every_kind_of_source(tmp_path: Path, web: Web, tiny_bundle: Bundle) -> None:
    folder, name = tiny_bundle.folder, tiny_bundle.manifest.name
    wheel = zipped(tmp_path / "x-1-py3-none-any.whl", folder, "isthmus/models/zoo/tiny")
    packed = tarred(tmp_path / "b.tar.gz", folder)
    bare = zipped(tmp_path / "bare.zip", folder, prefix="")
    web.answers["/x.whl"], web.answers["/b.tgz"] = wheel.read_bytes(), packed.read_bytes()
    address = web.folder("/bundles/tiny", folder)
    places = [folder, wheel, packed, bare, tarred(tmp_path / "b.tar", folder, "w"), address, f"{address}/{MANIFEST}"]
    for number, place in enumerate([*places, f"{web.url}/x.whl", f"{web.url}/b.tgz?token=secret"]):
        to = tmp_path / str(number)
        result = invoke(place, "--to", to)
        assert result.exit_code == 0, (place, result.stderr)
        assert Bundle.open(to / name).manifest == tiny_bundle.manifest


def test_names_are_looked_up_where_told(to: Path, web: Web, tiny_bundle: Bundle, tmp_path: Path) -> None:
    web.folder("/bundles/tiny", tiny_bundle.folder)
    assert invoke("tiny", "--to", to, **{NAME: f"{web.url}/bundles/"}).exit_code == 0
    (tmp_path / "own").mkdir()
    (tmp_path / "own/small").symlink_to(tiny_bundle.folder)
    again = invoke("small", "--to", to, "--json", **{NAME: str(tmp_path / "own")})
    assert json.loads(again.stdout)["new"] is False
    refused(tmp_path / "none", "the server answers 404", "moon", **{NAME: f"{web.url}/bundles"})


def test_an_unknown_name_says_which_there_are(to: Path) -> None:
    refused(to, "no bundle 'fashoin' comes with this package, did you mean 'fashion'?", "fashoin")


def test_the_same_bundle_is_not_fetched_again_and_another_not_replaced(to: Path, web: Web, tiny_bundle: Bundle) -> None:
    address = web.folder("/tiny", tiny_bundle.folder)
    folder = to / tiny_bundle.manifest.name
    assert invoke(address, "--to", to).exit_code == 0
    web.asked.clear()
    assert "already there" in invoke(address, "--to", to).stdout
    assert web.asked == [f"/tiny/{MANIFEST}"]

    damaged = next(iter(tiny_bundle.manifest.files))
    (folder / damaged).write_bytes(b"mine")
    result = invoke(address, "--to", to)
    assert result.exit_code == 1 and "--force replaces it" in result.stderr
    assert (folder / damaged).read_bytes() == b"mine"
    assert invoke(address, "--to", to, "--force").exit_code == 0
    assert Bundle.open(folder).manifest == tiny_bundle.manifest
    assert [path.name for path in to.iterdir()] == [folder.name]


def test_a_folder_that_is_no_bundle_is_not_replaced_even_by_force(to: Path, tiny_bundle: Bundle) -> None:
    photo = to / tiny_bundle.manifest.name / "holiday.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    result = invoke(tiny_bundle.folder, "--to", to, "--force")
    assert result.exit_code == 1 and "it holds holiday.jpg; only a bundle is replaced" in result.stderr
    assert photo.read_bytes() == b"mine"


def test_of_several_bundles_one_is_chosen(to: Path, tmp_path: Path, tiny_bundle: Bundle) -> None:
    path = zipped(tmp_path / "b.zip", tiny_bundle.folder, "zoo/one")
    with zipfile.ZipFile(path, "a") as archive:
        for file in tiny_bundle.folder.iterdir():
            archive.write(file, f"zoo/two/{file.name}")
    refused(to, "holds the bundles one, two; --bundle says which one", path)
    refused(to, "holds the bundles one, two", path, "--bundle", "three")
    assert invoke(path, "--to", to, "--bundle", "two").exit_code == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "bytes, the manifest says"),
        (lambda data: data + b"x", "larger than the"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "SHA-256 is"),
        (None, "404"),
    ],
)
def test_a_file_that_is_not_what_the_manifest_says_is_refused(
    to: Path, web: Web, tiny_bundle: Bundle, damage: Callable[[bytes], bytes] | None, words: str
) -> None:
    address, name = web.folder("/tiny", tiny_bundle.folder), sorted(tiny_bundle.manifest.files)[-1]
    whole = web.answers.pop(f"/tiny/{name}")
    if damage is not None:
        assert isinstance(whole, bytes)
        web.answers[f"/tiny/{name}"] = damage(whole)
    refused(to, words, address)
    refused(to, name, address)


def test_a_server_that_stops_early_is_found_out(to: Path, web: Web, tiny_bundle: Bundle, tmp_path: Path) -> None:
    data = zipped(tmp_path / "b.zip", tiny_bundle.folder).read_bytes()
    web.answers["/b.zip"] = (200, {"Content-Length": str(len(data) + 5), "Connection": "close"}, data)
    refused(to, f"ended after {len(data)} of {len(data) + 5} bytes", f"{web.url}/b.zip")
    web.answers["/half.zip"] = data[: len(data) // 2]
    refused(to, "half.zip: neither a bundle's folder nor a zip", f"{web.url}/half.zip")
    web.answers["/half.tgz"] = tarred(tmp_path / "b.tgz", tiny_bundle.folder).read_bytes()[:-5000]
    refused(to, "half.tgz: a broken archive", f"{web.url}/half.tgz")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "c:evil"])
def test_an_archive_with_a_path_that_leads_out_is_refused(
    to: Path, tmp_path: Path, tiny_bundle: Bundle, name: str
) -> None:
    refused(to, "leads out of it", zipped(tmp_path / "b.zip", tiny_bundle.folder, **{name: b"x"}))
    refused(
        to, "leads out of it", tarred(tmp_path / "b.tgz", tiny_bundle.folder, "w:gz", (tarfile.TarInfo(name), b"x"))
    )
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_with_a_link_or_a_device_is_refused(
    to: Path, tmp_path: Path, tiny_bundle: Bundle, kind: bytes
) -> None:
    info = tarfile.TarInfo("tiny/link")
    info.type, info.linkname = kind, "/etc/passwd"
    refused(to, "is a link or a device", tarred(tmp_path / "b.tar", tiny_bundle.folder, "w", (info, b"")))


def test_a_link_in_a_zip_or_a_folder_is_refused(to: Path, tmp_path: Path, tiny_bundle: Bundle) -> None:
    path, link = zipped(tmp_path / "b.zip", tiny_bundle.folder), zipfile.ZipInfo("a/b/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(to, "is a link or a device", path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_bundle.folder.iterdir():
        (copy / file.name).symlink_to(file)
    refused(to, "not a regular file", copy)


def test_what_is_too_large_is_refused_before_it_is_stored(
    to: Path, web: Web, tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers[f"/tiny/{MANIFEST}"] = b"{" + b" " * MAX_MANIFEST_BYTES + b"}"
    refused(to, f"{MANIFEST}: larger than the {MAX_MANIFEST_BYTES} bytes", f"{web.url}/tiny")
    path = zipped(tmp_path / "bomb.zip", tiny_bundle.folder, bomb=bytes(1 << 20))
    packed = tarred(tmp_path / "bomb.tgz", tiny_bundle.folder, "w:gz", (tarfile.TarInfo("bomb"), bytes(1 << 20)))
    web.answers["/bomb.zip"] = path.read_bytes()
    for module in (sources, pulling):
        monkeypatch.setattr(module, "MAX_BUNDLE_BYTES", 1000)
    refused(to, "or 1000 bytes", path)
    refused(to, "or 1000 bytes", packed)
    refused(to, "larger than the 1000 bytes", f"{web.url}/bomb.zip")
    refused(to, "at most 1000 are fetched", tiny_bundle.folder)
    monkeypatch.setattr(sources, "MAX_BUNDLE_BYTES", 1 << 40)
    monkeypatch.setattr(sources, "MAX_MEMBERS", 3)
    refused(to, "more than 3 files", path)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (b"junk", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"schema_version": 2}', "schema_version"),
    ],
)
def test_a_manifest_that_is_none_is_refused(to: Path, web: Web, manifest: bytes, words: str) -> None:
    web.answers[f"/tiny/{MANIFEST}"] = manifest
    refused(to, words, f"{web.url}/tiny")


@pytest.mark.parametrize("change", ['"licence"', '"files"'])
def test_a_manifest_that_was_changed_is_refused(to: Path, web: Web, tiny_bundle: Bundle, change: str) -> None:
    address = web.folder("/tiny", tiny_bundle.folder)
    content = json.loads((tiny_bundle.folder / MANIFEST).read_text())
    if change == '"files"':
        content["files"]["../../evil"] = next(iter(content["files"].values()))
    else:
        content["licence"] += "!"
    web.answers[f"/tiny/{MANIFEST}"] = json.dumps(content).encode()
    refused(to, MANIFEST, address)


def test_addresses_are_of_the_web_and_stay_there(to: Path, web: Web, tiny_bundle: Bundle) -> None:
    refused(to, "only http and https", (tiny_bundle.folder / MANIFEST).as_uri())
    web.answers[f"/away/{MANIFEST}"] = (302, {"Location": "ftp://127.0.0.1/evil"}, b"")
    refused(to, "redirects to ftp://127.0.0.1/evil, which is not followed", f"{web.url}/away")
    web.folder("/new", tiny_bundle.folder)
    for name in (MANIFEST, *tiny_bundle.manifest.files):
        web.answers[f"/old/{name}"] = (302, {"Location": f"{web.url}/new/{name}"}, b"")
    assert invoke(f"{web.url}/old", "--to", to).exit_code == 0


def test_no_secret_of_an_address_is_shown(to: Path, web: Web) -> None:
    address = web.url.replace("http://", "http://user:hunter2@") + "/b.zip?token=hunter3"
    result = invoke(address, "--to", to)
    assert result.exit_code == 1
    assert "hunter" not in result.output and "/b.zip: " in result.stderr


def test_nobody_listens(to: Path) -> None:
    refused(to, "127.0.0.1:9/", "http://127.0.0.1:9/tiny")


@pytest.mark.parametrize("place", ["/nowhere/tiny", "no/where.zip", __file__])
def test_a_path_without_a_bundle(to: Path, place: str) -> None:
    refused(to, place, place)


def test_a_folder_that_cannot_be_written(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(tiny_bundle.folder, "--to", tmp_path / "file/bundles")
    assert result.exit_code == 1
    assert f"error: {tmp_path}/file/bundles: Not a directory" in result.stderr


def test_help_has_examples() -> None:
    assert "isthmus pull fashion" in CliRunner().invoke(main, ["--help"]).stdout
    assert "isthmus pull https://" in invoke("--help").stdout
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("isthmus, version ")
