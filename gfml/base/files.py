"""Files appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import BadZipFile

from gfml.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w", *, newline: str | None = None) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it onto ``path`` on success.

    On any error the temporary file is removed and what stood at ``path`` is left as it was; a temporary file of the
    same name that a killed process left goes too.
    A full disk or a missing permission becomes a :class:`UserError` that names the path.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        handle, temporary = _temporary(path)
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as stream:
            yield stream
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside ``path``, locked as long as it is open: how :func:`remove_leftovers` knows who lives."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # taken for a leftover before it was locked


def remove_leftovers(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Remove temporary files of ``name``, of any file by default, that no living process is writing."""
    for path in Path(folder).glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """A failing write within becomes one line, see :func:`explain_os_error`."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path) from error


def try_lock(path: Path) -> IO[str] | None:
    """The file at ``path``, locked until it is closed or the process ends; None while another process has it.

    A process forked from this one shares the lock. UserError where the place cannot be written.
    """
    with os_errors(path):
        lock = open(path, "a", encoding="utf-8")
    # :func:`is_locked` holds it for an instant; only a writer holds it longer.
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            lock.close()
            raise explain_os_error(error, path) from error
    lock.close()
    return None


# The variable by which a launcher tells a program what locks it has from it: descriptor:inode of each.
HANDED = "GFML_LOCKS"


def handed_down(locks: Sequence[IO[str]]) -> dict[str, str]:
    """The environment of a program that inherits these locks."""
    return {HANDED: " ".join(f"{lock.fileno()}:{os.fstat(lock.fileno()).st_ino}" for lock in locks)}


def keep_handed_locks() -> None:
    """Leave locks of a launcher to this process alone: readers that it forks would outlive it with them for seconds."""
    for number, inode in (map(int, word.split(":")) for word in os.environ.pop(HANDED, "").split()):
        with contextlib.suppress(OSError):  # not handed on by a process between
            if os.fstat(number).st_ino == inode:
                os.register_at_fork(after_in_child=os.fdopen(number, "a").close)


def is_locked(path: Path) -> bool:
    """Whether a process has the lock of :func:`try_lock`."""
    try:
        with open(path, encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): ask its owner to let you") from None
    return False


# A full disk, and a used-up quota.
FULL = (errno.ENOSPC, errno.EDQUOT)


def explain_os_error(error: OSError, path: str | os.PathLike[str]) -> UserError:
    """One line for the usual reasons why a file cannot be written."""
    if error.errno in FULL:
        return UserError(
            f"disk full while writing {path}: free some space and run the same command again; earlier files are intact"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path} ({error.strerror}): give a writable directory, for runs with `out`")
    return UserError(f"cannot write {path} ({error.strerror or error}): check the path given with `out`")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> None:
    """A CSV file of the rows; columns in order of first appearance, those of ``first`` first. A missing value is empty."""
    with atomic_open(path, newline="") as stream:
        columns = dict.fromkeys([*first, *(key for row in rows for key in row)])
        writer = csv.DictWriter(stream, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_arrays(path: str | os.PathLike[str], advice: str = "mend the file or give another") -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or that of an .npy file as "array"; no pickles. UserError when they cannot be read."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"array": loaded}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: {advice}") from None
    # A damaged file raises almost anything: wrong checksums, cut-off streams, headers that are no Python.
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, NotImplementedError, BadZipFile, zlib.error) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read {path} as .npy or .npz ({why}), wanted plain arrays: {advice}") from None


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is written as ``null`` is not: it raises."""
    with atomic_open(path) as stream:
        json.dump(value, stream, indent=2, allow_nan=False)
        stream.write("\n")


def _umask() -> int:
    # The umask can only be read by setting it; the pair leaves it unchanged.
    mask = os.umask(0)
    os.umask(mask)
    return mask
