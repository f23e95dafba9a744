"""What the user can mend is one line and code 2, whoever raised it; SIGTERM is a line and code 143."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.base.files import read_arrays
from gfml.program.cli import run_main


def told(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    def main(argv: object) -> None:
        raise error

    assert run_main(main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR])
def test_places_that_cannot_be_used(code, capsys):
    assert f"cannot use /data/x.csv ({os.strerror(code)})" in told(
        OSError(code, os.strerror(code), "/data/x.csv"), capsys
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_under_a_stream(code, capsys):
    """The log of a run is written line by line; the error of a flush names no file."""
    assert told(OSError(code, os.strerror(code)), capsys).startswith(
        "error: disk full: free some space and run the same"
    )
    assert "disk full while writing /data/x: " in told(OSError(code, os.strerror(code), "/data/x"), capsys)
    with pytest.raises(OSError) as full, open("/dev/full", "w") as stream:
        stream.write("x\n")
    assert "disk full: free some space" in told(full.value, capsys)


def test_a_very_long_name_is_shown_short(capsys):
    def main(argv: object) -> None:
        (Path("x" * 300) / "y").stat()

    assert run_main(main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(302 letters) (File name too long)" in line and len(line) < 250


def test_memory_that_does_not_suffice(capsys):
    for make in (lambda: torch.empty(10**9, 10**9), lambda: np.empty((10**9, 10**9)), lambda: torch.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            make()
        assert "the memory does not suffice" in told(error.value, capsys)


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("a fault"), OSError(errno.EIO, "x", "y"), OSError("no file")):
        with pytest.raises(type(error)):
            run_main(lambda argv, error=error: (_ for _ in ()).throw(error), [])


def test_sigterm_outside_training(capsys):
    assert run_main(lambda argv: signal.raise_signal(signal.SIGTERM), []) == 143
    assert capsys.readouterr().err == "terminated: run the same command again to continue\n"


def test_a_user_without_a_home():
    """As in containers that run under any number: data is looked for elsewhere, the cache names what to set."""
    code = """
import os, pwd, sys
os.environ.pop("HOME", None)
def nobody(number): raise KeyError(number)
pwd.getpwuid = nobody
from gfml.data.registry import data_roots
from gfml.program.cli import run_main
print(len(data_roots(None)))
from gfml.data import cache
sys.exit(run_main(lambda argv: cache.default_folder() if hasattr(cache, "default_folder") else __import__("pathlib").Path.home(), []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "1"
    assert done.stderr == "error: there is no home directory: set HOME, or give --data-root and --cache-dir\n"


@pytest.mark.parametrize("damage", ["empty", "half", "text", "object", "flipped", "header"])
def test_damaged_arrays_are_one_line(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0), b=np.array([{}], dtype=object) if damage == "object" else np.zeros(1))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[900] ^= 8
    elif damage == "header":
        data[60:64] = b"\xff{(\x00"
    elif damage != "object":
        data = {"empty": b"", "half": data[: len(data) // 2], "text": b"hello" * 50}[damage]
    path.write_bytes(data)
    with pytest.raises(
        UserError, match="cannot read .*a.npz as .npy or .npz .*wanted plain arrays: mend the file"
    ) as error:
        read_arrays(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no file"):
        read_arrays(tmp_path / "none.npy")
