"""The one command: which commands and papers it finds, and what it hands on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gfml.program import console
from gfml.program.cli import run_main

PROGRAM = """
'''A toy paper.'''
import json, sys
from gfml.base.errors import UserError
from gfml.program.cli import run_main

def main(argv=None):
    if "bad" in sys.argv:
        raise UserError("found bad")
    print(json.dumps(sys.argv))

if __name__ == "__main__":
    sys.exit(run_main(main))
"""


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "toy_of_the_console"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "train.py").write_text(PROGRAM)
    (folder / "judge_it.py").write_text(PROGRAM)
    (folder / "helper.py").write_text("import gfml\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gfml"])
    yield folder
    sys.modules.pop(folder.name)


@pytest.mark.parametrize(
    ("words", "program", "given"),
    [
        (["toy_of_the_console", "--lr", "1"], "train.py", ["--lr", "1"]),
        (["toy-of-the-console", "judge-it", "RUN"], "judge_it.py", ["RUN"]),
        (["toy_of_the_console", "train"], "train.py", []),
    ],
)
def test_a_paper_is_found_by_its_name(
    words: list[str], program: str, given: list[str], paper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        console.main(words)
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert Path(found[0]) == paper / program and found[1:] == given


def test_its_exit_code_is_the_command_s(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        console.main(["toy_of_the_console", "bad"])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: found bad\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recsis"], "unknown command or paper 'recsis'.*did you mean 'recsys'"),
        (["numpy"], "unknown command or paper 'numpy'"),
        (["no.such"], "unknown command or paper"),
        (["../recsys"], "unknown command or paper"),
        (["comparee"], "did you mean 'compare'"),
    ],
)
def test_a_wrong_name_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(console.main, words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main([]) == 0 and console.main(["--version"]) == 0
    said = capsys.readouterr().out
    for name in [*console.papers(), *console.COMMANDS]:
        assert f"\n  {name} " in said
    assert {"recsys", "hlrm"} <= set(console.papers()) and {"compare", "reproduce"} <= set(console.COMMANDS)
    assert "gfml 0." in said
