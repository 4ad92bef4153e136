"""Where `isthmus pull` finds the files of a bundle: a folder, an archive, or an http(s) address of either.

    locate(text) -> Folder | WebFolder | Archive          each .open(name) -> a stream of one file's bytes

An archive (zip, wheel, tar) is read member by member and never unpacked: links, paths that lead out of it, and more
bytes than MAX_BUNDLE_BYTES are refused before a byte is read. Knows nothing of hashes: whoever reads checks them.
"""

from __future__ import annotations

import http.client
import os
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from urllib.parse import quote, urlsplit

from isthmus.models.address import shown_url
from isthmus.models.bundle.files import MANIFEST
from isthmus.models.bundle.installed import NAME, SHIPPED
from isthmus.models.errors import BundleError, InvalidInput, LinkDown
from isthmus.models.settings import nearest

MAX_BUNDLE_BYTES = 4 << 30  # of all files: a bundle lists at most 100 files, of a gibibyte at most
MAX_MEMBERS = 10_000  # of an archive: a wheel with a few bundles has hundreds
TIMEOUT_S = 30.0  # without a byte
CHUNK_BYTES = 1 << 18
ARCHIVES = (".zip", ".whl", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

Progress = Callable[[int], None]  # bytes that came
Begin = Callable[[str, int | None], Progress]  # of a download or a bundle: name, bytes in all if known
Members = dict[str, Callable[[], IO[bytes] | None]]  # openers of an archive's files


class Source(Protocol):
    """A bundle's files by name."""

    def open(self, name: str) -> IO[bytes]:
        """Raises OSError and what `translated` knows."""
        ...


class Folder:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path}: not a regular file")
        return path.open("rb")


class WebFolder:
    """A folder behind an http(s) address."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def open(self, name: str) -> IO[bytes]:
        url = f"{self._url}/{quote(name)}"
        with translated(shown_url(url)):
            stream: IO[bytes] = get(url)
        return stream


class Archive:
    """One bundle in a zip or tar file. `members` by their path in it."""

    def __init__(self, members: Members, place: PurePosixPath) -> None:
        self._members, self._place = members, place

    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(str(self._place / name))
        stream = member() if member else None
        if stream is None:
            raise BundleError(f"{name} is missing in the archive")
        return stream


@contextmanager
def locate(text: str, choice: str | None, progress: Begin) -> Iterator[Source]:
    """The source that `text` names: an address, a path, or the name of a bundle. `choice`: which one of an archive.

    `progress` is told of a download by its name and size. Raises InvalidInput, LinkDown.
    """
    place = text if "://" in text or is_path(Path(text)) else by_name(text)
    with ExitStack() as stack:
        if "://" not in place and Path(place).is_dir():
            yield Folder(Path(place))
        elif "://" not in place:
            yield open_archive(Path(place), choice, stack)
        elif urlsplit(place).path.endswith(ARCHIVES):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-"))
            yield open_archive(download(place, Path(scratch), progress), choice, stack)
        else:
            yield WebFolder(place.removesuffix("/" + MANIFEST))


def is_path(path: Path) -> bool:
    """Whether it is meant as a path: a bare name is one only where a file or a bundle has it."""
    return len(path.parts) != 1 or path.is_file() or (path / MANIFEST).exists()


def by_name(name: str) -> str:
    """A folder or address for the name of a bundle: in ISTHMUS_BUNDLES, else among those that come with the package."""
    named = os.environ.get(NAME, "")
    if "://" in named:
        return f"{named.rstrip('/')}/{quote(name)}"
    for folder in (Path(named), SHIPPED) if named else (SHIPPED,):
        if (folder / name / MANIFEST).is_file():
            return str(folder / name)
    there = sorted(path.parent.name for path in SHIPPED.glob(f"*/{MANIFEST}"))
    raise InvalidInput(
        f"no bundle {name!r} comes with this package{nearest(name, there) or ','} which has"
        f" {', '.join(there) or 'none'}; others are pulled from a path (a checkout has some in models/zoo), from an"
        f" address, or by name from where {NAME} says"
    )


def get(url: str) -> Any:
    """The answer to a GET. Raises OSError and InvalidInput."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidInput(f"{shown_url(url)}: only http and https addresses can be fetched")
    return OPENER.open(url, timeout=TIMEOUT_S)


class WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone, and never from https to http."""

    def redirect_request(self, request: Any, *rest: Any) -> urllib.request.Request | None:
        target = urlsplit(rest[-1]).scheme
        if target not in ("http", "https") or (request.type == "https" and target == "http"):
            here, there = shown_url(request.full_url), shown_url(rest[-1])
            raise InvalidInput(f"{here} redirects to {there}, which is not followed")
        return super().redirect_request(request, *rest)


OPENER = urllib.request.build_opener(WebOnly)


def download(url: str, scratch: Path, progress: Begin) -> Path:
    """An archive, whole. Raises LinkDown when it ends early, InvalidInput when it is larger than a bundle may be."""
    path = scratch / PurePosixPath(urlsplit(url).path).name
    with translated(shown_url(url)), get(url) as response, path.open("wb") as file:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        done = copy(response, file, path.name, MAX_BUNDLE_BYTES, progress(path.name, size))
        if size is not None and done < size:
            raise LinkDown(f"{shown_url(url)}: ended after {done} of {size} bytes")
    return path


def copy(source: IO[bytes], target: IO[bytes], name: str, limit: int, progress: Progress) -> int:
    """All bytes of `source`; how many. Raises InvalidInput beyond `limit`."""
    done = 0
    while chunk := source.read(CHUNK_BYTES):
        done += len(chunk)
        if done > limit:
            raise InvalidInput(f"{name}: larger than the {limit} bytes that are expected")
        target.write(chunk)
        progress(len(chunk))
    return done


def open_archive(path: Path, choice: str | None, stack: ExitStack) -> Archive:
    """Raises InvalidInput unless it is an archive of plain files with one bundle, or with one that is `choice`."""
    with translated(str(path)):
        if zipfile.is_zipfile(path):
            members = zip_members(stack.enter_context(zipfile.ZipFile(path)))
        elif tarfile.is_tarfile(path):
            members = tar_members(stack.enter_context(tarfile.TarFile.open(path)))
        else:
            raise InvalidInput(f"{path}: neither a bundle's folder nor a zip, wheel or tar file")
    found = [PurePosixPath(name).parent for name in members if PurePosixPath(name).name == MANIFEST]
    chosen = [place for place in found if choice is None or place.name == choice]
    if len(chosen) != 1:
        names = ", ".join(sorted(place.name or "one without a folder" for place in found)) or "none"
        raise InvalidInput(f"{path}: holds the bundles {names}; --bundle says which one")
    return Archive(members, chosen[0])


def zip_members(archive: zipfile.ZipFile) -> Members:
    members: Members = {}
    for info in plain(archive.infolist(), archive.filename, lambda item: item.file_size):
        check_name(info.filename)
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InvalidInput(f"{info.filename!r} in the archive is a link or a device")
        if not info.is_dir():
            members[info.filename] = partial(archive.open, info)
    return members


def tar_members(archive: tarfile.TarFile) -> Members:
    members: Members = {}
    for info in plain(archive, archive.name, lambda item: item.size):
        check_name(info.name)
        if not (info.isfile() or info.isdir()):
            raise InvalidInput(f"{info.name!r} in the archive is a link or a device")
        if info.isfile():
            members[info.name.removeprefix("./")] = partial(archive.extractfile, info)
    return members


def plain(infos: Iterable[Any], name: Any, size_of: Callable[[Any], int]) -> Iterator[Any]:
    """Entries of an archive as long as they are few and small together. Raises InvalidInput."""
    total = 0
    for count, info in enumerate(infos, 1):
        total += size_of(info)
        if count > MAX_MEMBERS or total > MAX_BUNDLE_BYTES:
            raise InvalidInput(f"{name}: more than {MAX_MEMBERS} files or {MAX_BUNDLE_BYTES} bytes")
        yield info


def check_name(name: str) -> None:
    """Raises InvalidInput for a path that would lead out of the archive."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or "\\" in name or ":" in name or ".." in parts:
        raise InvalidInput(f"{name!r} in the archive leads out of it")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of files, archives and the network as ours, naming `what`."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise LinkDown(f"{what}: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise LinkDown(f"{what}: {error.reason}") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise LinkDown(f"{what}: {str(error) or type(error).__name__}") from error
    except OSError as error:
        raise InvalidInput(f"{what}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InvalidInput(f"{what}: a broken archive: {error}") from error
