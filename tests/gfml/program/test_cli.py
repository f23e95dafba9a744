"""Flags, TOML configs and the outer shell of a program."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base import settings as kinds
from gfml.base.errors import UserError
from gfml.base.settings import frozen, setting
from gfml.base.toml import toml_text
from gfml.program import cli
from gfml.program.flags import MIRROR_MODES, MirrorSettings, RunSettings


@dataclass(frozen=True)
class Toy(RunSettings, MirrorSettings):
    lr: float = setting(0.001, "learning rate", kinds.positive)
    emb_norm: int = setting(1, "normalise", choices=(0, 1))
    mass_reg: float = setting(0.01, "weight of the regulariser", kinds.nonnegative, also="weight_decay", exact=True)
    model: str = setting("mf", "model", choices=("mf", "lgn", "cml"))
    topks: tuple[int, ...] = setting((10, 20), "cut-offs", nargs="+", action=cli.TopksAction)
    names: tuple[str, ...] = setting(("a",), "names", nargs="+")
    bounds: tuple[float, float] | None = setting(None, "range", float, nargs=2)
    use_rank_weight: bool = setting(False, "by rank")
    plain: bool = setting(False, "a switch")
    patience: int | None = setting(30, "evaluations", kinds.number(int, least=1, none=True))
    comment: str = setting("lgn", "text")


def make_parser() -> cli.Parser:
    return cli.parser_of("prog", "", Toy)


def config_of(options: cli.Options) -> dict[str, object]:
    return frozen(Toy, options).resolved


def parse(*tokens: str) -> cli.Options:
    return make_parser().parse_args(list(tokens))


def error_of(capsys: pytest.CaptureFixture[str], *tokens: str) -> str:
    """The one line of a refused command line."""
    with pytest.raises(SystemExit) as stop:
        parse(*tokens)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("prog: error: ")
    return captured.err


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_importing_is_light():
    code = "import sys, gfml.program.cli; sys.exit(bool({'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_mirror_modes_are_those_of_the_step():
    from gfml.mirror import MODES

    assert set(MIRROR_MODES) == {"off", *MODES}


# -- spelling


@pytest.mark.parametrize("tokens", [("--emb_norm", "0"), ("--emb-norm", "0"), ("--emb-norm=0",), ("--emb_norm=0",)])
def test_both_spellings(tokens):
    assert parse(*tokens).emb_norm == 0


@pytest.mark.parametrize("flag", ["--no-use_rank_weight", "--no-use-rank-weight", "--no_use_rank_weight"])
def test_both_spellings_of_a_negated_switch(flag):
    assert parse("--use-rank-weight", flag).use_rank_weight is False


def test_a_second_spelling_can_be_forbidden(capsys):
    assert parse("--weight_decay", "0.5").mass_reg == 0.5
    assert "unknown flag --weight-decay; did you mean '--weight_decay'?" in error_of(capsys, "--weight-decay", "0.5")
    with pytest.raises(ValueError, match="--weigth"):
        make_parser().one_spelling("--weigth")


def test_a_spelling_that_is_another_flag_stays_that_flag():
    parser = make_parser()
    parser.add_argument("--weight-decay", dest="adamw", type=float, default=0.0)
    options = parser.parse_args(["--weight-decay", "0.1", "--weight_decay", "0.2"])
    assert (options.adamw, options.mass_reg) == (0.1, 0.2)


def test_flags_are_not_abbreviated(capsys):
    assert "unknown flag --emb" in error_of(capsys, "--emb", "0")


def test_words_after_a_double_dash_are_left_alone():
    parser = cli.Parser(prog="prog")
    parser.add_argument("--a-b", default="x")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args(["--a_b", "1", "--", "--a_b", "--config"])
    assert options.a_b == "1" and options.rest[-2:] == ["--a_b", "--config"]


# -- errors


def test_errors_are_one_helpful_line(capsys):
    assert "unknown flag --emb_nrom; did you mean '--emb-norm'?" in error_of(capsys, "--emb_nrom", "1")
    assert "unknown flag --zzzzzz; see --help" in error_of(capsys, "--zzzzzz=3")
    choices = error_of(capsys, "--model", "lgm")
    assert "--model: unknown value 'lgm': choose one of mf, lgn, cml; did you mean 'lgn'?" in choices
    assert "choose one of 0, 1" in error_of(capsys, "--emb_norm", "2")
    assert "--lr: found '-1', wanted a number > 0" in error_of(capsys, "--lr", "-1")
    assert "found 'nan'" in error_of(capsys, "--lr", "nan")
    assert "invalid int value: 'x'" in error_of(capsys, "--emb_norm", "x")
    assert "expected one argument" in error_of(capsys, "--lr")
    assert "found 'stray'" in error_of(capsys, "stray")
    assert "wanted auto, cpu, cuda or cuda:N" in error_of(capsys, "--device", "gpu")


def test_required_flags_are_asked_for_in_one_line(capsys):
    parser = cli.Parser(prog="prog")
    parser.add_argument("--need", required=True)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([])
    assert stop.value.code == 2 and "--need" in capsys.readouterr().err


def test_help_shows_defaults_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "learning rate (default: 0.001)" in text and "seed of every generator (default: 2020)" in text


def test_negative_numbers_are_values():
    assert parse("--bounds", "-1e-3", "-.5").bounds == [-0.001, -0.5]
    assert parse("--mirror-alpha1", "-2").mirror_alpha1 == -2


def test_names_that_begin_with_a_dash(capsys):
    parser = cli.Parser(prog="test")
    parser.add_argument("--items")
    assert parser.parse_args(["--items", "-5,7,-8"]).items == "-5,7,-8"
    with pytest.raises(SystemExit):
        parser.parse_args(["--items", "-ann"])
    assert capsys.readouterr().err.endswith("; a value that begins with - is written --items=-ann\n")
    assert parser.parse_args(["--items=-ann"]).items == "-ann"


@pytest.mark.parametrize("text", ["[10, 20]", "10,20", "10 20", "(20, 10)", "20,10,20", " [10,20,] "])
def test_topks_forms(text):
    assert kinds.topks(text) == (10, 20)


@pytest.mark.parametrize(
    "tokens", [["10", "20"], ["10,20"], ["[10, 20]"], ["[10,", "20]"], ["20", "10", "10"]], ids="|".join
)
def test_topks_flag(tokens):
    assert parse("--topks", *tokens).topks == (10, 20)


@pytest.mark.parametrize(
    "text", ["", "[]", "0", "10 0", "-5", "10.5", "[[10]]", "ten", "[10 20", "__import__('os')", "10;20"]
)
def test_topks_refuses(text, capsys):
    if text != "[10 20":  # a bracket left open is read all the same
        assert "wanted positive whole numbers" in error_of(capsys, f"--topks={text}")
    else:
        assert kinds.topks(text) == (10, 20)


# -- TOML


def test_precedence(tmp_path):
    one = write(tmp_path / "one.toml", 'lr = 0.1\nmodel = "lgn"\nemb_norm = 0\n')
    two = write(tmp_path / "two.toml", "lr = 0.2\n")
    options = parse("--emb_norm", "1", "--config", one, f"--config={two}")
    assert (options.lr, options.model, options.emb_norm, options.seed) == (0.2, "lgn", 1, 2020)
    assert options.config == [one, two]
    assert parse("--config", two, "--config", one, "--lr", "0.3").lr == 0.3
    assert parse("--config", two, "--config", one).lr == 0.1


def test_explicit_names_what_was_set_anywhere(tmp_path):
    path = write(tmp_path / "c.toml", "emb-norm = 1\n")
    assert parse().explicit == frozenset()
    assert parse("--no-use-rank-weight", "--lr=1").explicit == {"use_rank_weight", "lr"}
    assert parse("--config", path, "--topks", "5").explicit == {"config", "emb_norm", "topks"}
    assert "explicit" not in vars(parse())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("emb_nrom = 1", "sets the unknown key 'emb_nrom'; did you mean 'emb-norm'?"),
        ('model = "lgm"', "did you mean 'lgn'? (set in "),
        ('lr = "fast"', "found 'fast', wanted a number > 0 (set in "),
        ("emb_norm = 1.5", "invalid int value: '1.5' (set in "),
        ("emb_norm = 2", "choose one of 0, 1 (set in "),
        ("lr = ", "not valid TOML"),
        ("lr = 1\nlr = 2", "not valid TOML"),
        ("[model]\nname = 1", "configs are flat"),
        ("lr = 2020-01-01", "values are strings, numbers, booleans"),
        ('use_rank_weight = "yes"', "choose true or false"),
        ("plain = 2", "choose true or false"),
        ("help = true", "unknown key 'help'"),
        ('config = "other.toml"', "unknown key 'config'"),
        ('resume = "run"', "unknown key 'resume'"),
        ("no-progress = true", "unknown key 'no-progress'"),
        ("weight-decay = 1", "unknown key 'weight-decay'; did you mean 'weight_decay'?"),
        ("emb_norm = 1\nemb-norm = 0", "sets --emb-norm twice"),
        ('names = ["--overwrite"]', "no value of a list may start with --"),
        ("topks = [10, -1]", "wanted positive whole numbers"),
        ("lr = [1, 2]", "found '[1, 2]'"),
    ],
)
def test_bad_configs_name_the_file(text, expected, tmp_path, capsys):
    path = write(tmp_path / "bad.toml", text + "\n")
    message = error_of(capsys, "--config", path)
    assert path in message and expected in message


def test_a_bad_file_value_behind_a_good_flag_still_names_the_file(tmp_path, capsys):
    path = write(tmp_path / "bad.toml", 'lr = "fast"\n')
    assert f"(set in {path} and on the command line)" in error_of(capsys, "--config", path, "--lr", "1")
    assert "set in" not in error_of(capsys, "--config", write(tmp_path / "good.toml", "lr = 1.0\n"), "--model", "x")


def test_malformed_toml_names_the_line(tmp_path, capsys):
    assert "line 2" in error_of(capsys, "--config", write(tmp_path / "bad.toml", "lr = 1\nmodel = mf\n"))


def test_missing_and_unreadable_configs(tmp_path, capsys):
    assert "no config file" in error_of(capsys, "--config", str(tmp_path / "none.toml"))
    assert "cannot read the config file" in error_of(capsys, "--config", str(tmp_path))
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in error_of(capsys, "--config", str(tmp_path / "bin.toml"))
    assert "expected one argument" in error_of(capsys, "--config")
    assert "expected one argument" in error_of(capsys, "--config", "--lr", "1")
    assert "expected one argument" in error_of(capsys, "--resume", "--lr", "1")


def test_booleans_may_be_written_as_numbers_and_back(tmp_path):
    path = write(tmp_path / "c.toml", "emb_norm = false\nuse_rank_weight = 1\nprogress = 0\nplain = true\n")
    options = parse("--config", path)
    assert (options.emb_norm, options.use_rank_weight, options.progress, options.plain) == (0, True, False, True)
    later = write(tmp_path / "d.toml", "plain = false\n")
    assert parse("--config", path, "--config", later).plain is False


def test_a_list_in_a_file_does_not_swallow_positionals(tmp_path):
    parser = make_parser()
    parser.add_argument("runs", nargs="*")
    options = parser.parse_args(["--config", write(tmp_path / "c.toml", 'names = ["x", "y"]\n'), "one", "two"])
    assert options.names == ["x", "y"] and options.runs == ["one", "two"]


def test_the_resolved_config_is_a_config(tmp_path):
    parser = make_parser()
    odd = 'quote " backslash \\ tab \t newline \n é 漢 \x7f = # -'
    tokens = [
        "--lr", "1e-5", "--emb_norm", "0", "--topks", "5,50", "--names", "x y", "--bounds", "-1.5", "3e30",
        "--use_rank_weight", "--plain", "--patience", "none", f"--comment={odd}", "--model", "cml", "--no-progress",
        "--mirror", "fused", "--mirror-clip", "0.5", "--seed", "7", "--threads", "1",
    ]  # fmt: skip
    first = parser.parse_args(tokens)
    text = toml_text(config_of(first))
    second = parser.parse_args(["--config", write(tmp_path / "c.toml", text)])
    assert {**vars(second), "config": None} == vars(first)
    assert toml_text(config_of(second)) == text
    assert tomllib.loads(text)["topks"] == [5, 50]


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(),
    value=st.floats(1e-300, 1e300),
    names=st.lists(st.from_regex(r"[^-\x00].*", fullmatch=True), min_size=1),
)
def test_any_string_and_number_survives_the_round_trip(tmp_path_factory, text, value, names):
    parser = make_parser()
    options = parser.parse_args([f"--comment={text}", f"--lr={value!r}"])
    options.names = names
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_text(toml_text(config_of(options)), encoding="utf-8", newline="")
    again = parser.parse_args(["--config", str(path)])
    assert (again.comment, again.lr, again.names) == (text, value, names)


def test_the_default_config_is_a_config(tmp_path):
    parser = make_parser()
    text = toml_text(config_of(parser.parse_args([])))
    again = frozen(Toy, parser.parse_args(["--config", write(tmp_path / "c.toml", text)]))
    assert replace(again, config=None) == frozen(Toy, parser.parse_args([]))


def test_flags_of_the_moment_are_not_saved():
    parser = make_parser()
    config = config_of(parser.parse_args(["--overwrite", "--eval-only", "--run-name", "x", "--gpu_id", "1"]))
    assert not {"overwrite", "eval-only", "run-name", "gpu_id", "config", "resume", "help"} & set(config)


def test_toml_text_refuses_what_toml_flags_cannot_hold():
    with pytest.raises(ValueError, match="dict"):
        toml_text({"a": {}})


def test_resume_takes_the_runs_config_as_base(tmp_path, capsys):
    run = tmp_path / "run"
    assert "--resume found no run" in error_of(capsys, "--resume", str(run))
    file = write(tmp_path / "theirs.pth", "")
    assert f"gfml import {file} --from NAME" in error_of(capsys, "--resume", file)
    run.mkdir()
    write(run / "config.toml", "lr = 0.5\nseed = 3\n")
    other = write(tmp_path / "c.toml", "seed = 4\n")
    options = parse("--resume", str(run), "--config", other)
    assert (options.lr, options.seed, options.resume) == (0.5, 4, str(run))


# -- device


def test_device_without_cuda(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.resolve_device(parse()) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert cli.resolve_device(parse("--gpu_id", "1")) == torch.device("cpu")
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="found 0 CUDA devices, wanted cuda"):
        cli.resolve_device(parse("--device", "cuda"))


def test_device_with_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.resolve_device(parse()).type == "cuda"
    assert cli.resolve_device(parse("--gpu_id", "1")) == torch.device("cuda:1")
    assert cli.resolve_device(parse("--gpu_id", "1", "--device", "cpu")) == torch.device("cpu")
    assert cli.resolve_device(parse("--device", "cuda:1")) == torch.device("cuda:1")
    with pytest.raises(UserError, match="found 2 CUDA devices, wanted cuda:2"):
        cli.resolve_device(parse("--gpu_id", "2"))


def test_threads(monkeypatch):
    import torch

    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    cli.set_threads(parse())
    cli.set_threads(parse("--threads", "3"))
    assert calls == [3]


# -- exit codes


def test_exit_codes(capsys):
    def user_error(argv):
        raise UserError("found a,\nwanted b")

    def interrupted(argv):
        error = KeyboardInterrupt()
        error.add_note("continue with --resume runs/x")
        raise error

    def bug(argv):
        raise RuntimeError("bug")

    assert cli.run_main(lambda argv: None) == 0
    assert cli.run_main(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert cli.run_main(user_error) == 2
    assert capsys.readouterr().err == "error: found a, wanted b\n"
    assert cli.run_main(interrupted) == 130
    assert capsys.readouterr().err == "interrupted: continue with --resume runs/x\n"
    with pytest.raises(RuntimeError, match="bug"):
        cli.run_main(bug)


@pytest.mark.parametrize("ending, code", (("return 0", 0), ("raise UserError('no')", 2), ("return 3", 3)))
def test_one_of_several_processes_outlives_no_interpreter(ending: str, code: int) -> None:
    """What aborts while the interpreter is taken down, as gloo's threads may, has no say; the rest is done."""
    lines = ["import atexit, os, sys", "from gfml.base.errors import UserError", "from gfml.program.cli import run_main",
             "class Late:", "    def __del__(self): os.abort()", "late = Late()", "atexit.register(print, 'goodbye')",
             "def main(argv):", "    print('hello')", f"    {ending}", "sys.exit(run_main(main))"]  # fmt: skip
    several = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    for environment, expected in ((several, code), (os.environ, -signal.SIGABRT)):
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert done.stdout == "hello\ngoodbye\n" or expected < 0


def test_a_closed_pipe_is_no_error() -> None:
    """``program | head``: no traceback, and a broken pipe elsewhere is still one."""
    code = "import sys; from gfml.program.cli import run_main\ndef main(argv):\n    for i in range(100_000): print('a line')\nsys.exit(run_main(main))"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -c \"$CODE\" | head -n 1"],
                          env={**os.environ, "CODE": code}, capture_output=True, text=True)  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("a line\n", "", 141)

    def other(argv: object) -> int:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError):
        cli.run_main(other)


@pytest.mark.parametrize("text", ["1" + "0" * 60, "-" + "9" * 30, "4294967296"])
def test_whole_numbers_that_no_array_or_seed_reaches_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number of at most 4294967295"):
        kinds.number(int)(text)
    assert kinds.number(int)("4294967295") == 2**32 - 1
