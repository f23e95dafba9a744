"""Fetch published files: with progress, resumable, checked, and never half there."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path

from gfml.base.errors import UserError
from gfml.base.files import atomic_open

_CHUNK = 1 << 20
_TIMEOUT = 20.0


def download(url: str, target: Path, checksum: str | None = None, *, progress: bool = True) -> None:
    """Fetch ``url`` to ``target``; what an interrupted call left in ``target.part`` is continued.

    ``checksum`` is ``sha256:<hex>`` or ``md5:<hex>``; on a mismatch the file is removed.
    Raises UserError when the address cannot be reached or the content is not the wanted one.
    """
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, partial, progress)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url} ({reason}): try again, or give `data_root`") from error
    except OSError as error:
        raise UserError(f"cannot write {partial} ({error.strerror}): give a writable `data_root`") from error
    if checksum is not None:
        kind, wanted = checksum.split(":")
        found = file_hash(partial, kind)
        if found != wanted:
            partial.unlink()
            raise UserError(f"{url} has {kind} {found[:16]}..., wanted {wanted[:16]}...: removed it, try again")
    os.replace(partial, target)


def _fetch(url: str, partial: Path, progress: bool) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        error.close()
        partial.unlink()  # what lies there is no beginning of the file: start again
        response = urllib.request.urlopen(url, timeout=_TIMEOUT)
    with response:
        _receive(response, partial, done if response.status == 206 else 0, progress)


def _receive(response: http.client.HTTPResponse, partial: Path, done: int, progress: bool) -> None:
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = None if length is None else done + int(length)
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=partial.stem, disable=not progress)
    with bar, open(partial, "ab" if done else "wb") as stream:
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {partial.stat().st_size} of {total} bytes")


def file_hash(path: Path, kind: str = "sha256") -> str:
    """Hex digest of the file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def unpack(archive: Path, members: Mapping[str, Path]) -> None:
    """Write the named members of a zip to the given paths, each atomically."""
    try:
        with zipfile.ZipFile(archive) as stored:
            for member, target in members.items():
                content = stored.read(member)
                with atomic_open(target, "wb") as stream:
                    stream.write(content)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive} is not the wanted archive ({error}): remove it and try again") from error
