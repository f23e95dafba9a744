"""What the READMEs tell a reader to type exists: scripts, flags, files, code, and tables made from stored numbers."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch

from gfml.program.commands import read_command
from gfml.program.console import programs_of

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
    if ".venv" not in path.parts
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(README, command) of every shell line that starts a Python program of the repository."""
    found = []
    for path in READMES:
        for block in blocks(path, "bash"):
            joined = block.replace("\\\n", " ")
            lines = [re.split(r"\s#\s", line)[0].strip() for line in joined.splitlines()]
            found += [
                (str(path.relative_to(ROOT)), line)
                for line in lines
                if line.startswith(("python ", ".venv/bin/python ", "gfml "))
            ]
    return found


@functools.cache
def help_of(installed: bool, *called: str) -> str:
    """What a script, or the command ``gfml ...``, prints for --help."""
    words = ["-m", "gfml.program.console", *called] if installed else [str(ROOT / called[0])]
    command = [sys.executable, *words, "--help"]
    with tempfile.TemporaryDirectory() as elsewhere:  # where no file has the name of a module
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize(("readme", "command"), commands(), ids=[command for _, command in commands()])
def test_the_command_exists(readme: str, command: str) -> None:
    words = command.split()
    if words[1] == "-m":
        return
    called = words[1:3] if words[0] == "gfml" and words[2:] and words[2] in programs_of(words[1]) else words[1:2]
    text = help_of(words[0] == "gfml", *called)
    for word in words[1 + len(called) :]:
        flag = word.partition("=")[0]
        if flag.startswith("--"):
            spellings = {flag, "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")}
            assert any(re.search(rf"{re.escape(name)}(?![\w-])", text) for name in spellings), (
                f"{readme}: {' '.join(called)} has no {flag}"
            )
        elif word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{readme}: {word} is missing"


def test_the_python_of_the_first_page_runs() -> None:
    [block] = blocks(ROOT / "README.md", "python")
    torch.manual_seed(0)
    names = {"num_users": 3, "num_items": 5, "user_vectors": torch.randn(4, 8), "item_vectors": torch.randn(4, 8),
             "user_ids": torch.tensor([0, 1, 2, 0]), "item_ids": torch.tensor([4, 0, 1, 2])}  # fmt: skip
    exec(compile(block, "README.md", "exec"), names)
    assert names["score"].shape == (4,) and bool(torch.isfinite(names["score"]).all())


@pytest.mark.parametrize("page", ["own-model.md", "library.md"])
def test_the_python_of_the_pages_runs(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks(ROOT / "docs" / page, "python"):
        exec(compile(block, page, "exec"), names)
    assert names


def test_the_two_commands_stand_first_and_exist() -> None:
    first = blocks(ROOT / "README.md", "bash")[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in first and re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def stored_settings() -> list[tuple[str, str]]:
    """(file, the command its header shows) of every file of settings that has one."""
    found = []
    for path in sorted((ROOT / "configs").glob("*/*.toml")):
        shown = re.search(r"^# (python (?!scripts/).*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if shown:
            found.append((str(path.relative_to(ROOT)), shown[1]))
    return found


def test_stored_settings_show_their_commands() -> None:
    assert len(stored_settings()) > 30 and {file.split("/")[1] for file, _ in stored_settings()} >= {
        "recsys",
        "mcl",
        "hlrm",
        "contextual",
        "vision",
    }


@pytest.mark.parametrize(("file", "command"), stored_settings(), ids=[file for file, _ in stored_settings()])
def test_stored_settings_are_understood(file: str, command: str) -> None:
    """The command in the header names the file, and the program takes all of it."""
    assert file in command.split()
    assert read_command(shlex.split(command), ROOT).runs


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_stored_files_are_toml(path: Path) -> None:
    assert tomllib.loads(path.read_text(encoding="utf-8"))


def test_tables_and_sentences_agree_with_the_stored_results() -> None:
    """Every block of results is exactly what its CSV gives, and no sentence quotes a figure that no CSV has."""
    blocks = [name for path in READMES for name in re.findall(r"<!-- results:([\w./-]+) -->", path.read_text("utf-8"))]
    assert len(blocks) > 10
    command = [sys.executable, str(ROOT / "scripts" / "results_table.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
