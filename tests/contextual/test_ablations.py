"""The list of ablations: every command is understood, a launched one is run and its table holds the runs' figures."""

from __future__ import annotations

import json

import pytest

from contextual import ablations
from contextual.main import PROGRAM
from contextual.names import ABLATIONS
from gfml.base.errors import UserError


def test_every_command_is_one_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main(["--dataset", "digits", "--seeds", "1", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(ablations.variants())
    seen = set()
    for line in printed:
        words = line.partition("  # ")[0].split()
        assert words[:2] == ["python", "contextual/main.py"]
        options = PROGRAM.parse(words[2:])
        seen.add((options.loss, options.ablation))
    assert {("hybrid", name) for name in ABLATIONS} <= seen


def test_published_numbers_are_names() -> None:
    assert [variant.name for variant in ablations.chosen(["0", "7", "lam-0.8"])] == ["none", "inside", "lam-0.8"]
    with pytest.raises(UserError, match=r"unknown ablation 'insid'.*did you mean 'inside'"):
        ablations.chosen(["insid"])


def test_a_wrong_flag_stops_before_the_first_run(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    for launch in (["--launch"], []):
        with pytest.raises(SystemExit) as stop:
            ablations.main([*launch, "--only", "none", "--epoch", "1", "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "--epochs" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"), [(["--seeds", "x"], "--seeds"), (["--only"], "--only"), (["--seeds", "-1"], "-1")]
)
def test_own_flags_are_answered_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ablations.main(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_a_launched_run_becomes_a_row(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--launch",
        "--only",
        "inside",
        "--epochs",
        "1",
        "--batches-per-epoch",
        "2",
        "--pictures",
        "0",
        "--nmi",
        "0",
    ]
    flags += ["--out", str(tmp_path)]
    assert ablations.main(flags) == 0
    (stored,) = tmp_path.glob("*/result.json")
    result = json.loads(stored.read_text())
    assert "ablation inside" in result["loss"]
    shown = [f"{result['test'][name]:.4f}" for name in ablations.COLUMNS]
    # A finished run is shown, not trained again.
    before = stored.stat().st_mtime_ns
    assert ablations.main(flags) == 0
    assert stored.stat().st_mtime_ns == before
    table = capsys.readouterr().out
    line = [line for line in table.splitlines() if line.startswith("| inside |")][-1]
    assert line.split(" | ")[2:-1] == ["1", "1", *shown]
