"""Flags, their layers, hyper-parameters of the chosen model, arms and grids."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib

import pytest

from gfml.base.errors import UserError
from gfml.base.home import configs
from gfml.program.search import grid_points
from mirror_grad import settings as flags
from mirror_grad.main import PROGRAM
from mirror_grad.models import MODELS
from mirror_grad.settings import arm_of, layers

parse = PROGRAM.parse

CONFIGS = configs() / "mirror_grad"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse([*map(str, words)])
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in text
    return text


def test_nothing_heavy_for_help_and_wrong_flags():
    code = (
        "import sys; from mirror_grad.main import PROGRAM\n"
        "try: PROGRAM.parse(['--model', 'VBPR', '--reg-weigth', '1'])\nexcept SystemExit: pass\n"
        "print(*sorted(sys.modules.keys() & {'torch', 'pandas', 'scipy', 'sklearn', 'timm', 'matplotlib', 'torchvision'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and "did you mean '--reg-weight'" in done.stderr


def test_defaults_are_the_published_programs():
    options = parse([])
    assert (options.model, options.dataset, options.mirror, options.seed) == (
        "SELFCFED_LGN",
        "amazon-baby",
        "two_step",
        999,
    )
    assert (options.learning_rate, options.batch_size, options.epochs, options.patience) == (1e-3, 2048, 1000, 20)
    assert (options.mirror_alpha1, options.mirror_every, options.mirror_counter) == (1.0, 3, "epoch")
    assert options.topks == (5, 10, 20, 50) and options.select_on == "val" and arm_of(options) == "mg"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--model LayerGCN --dataset sports",
        "--not_mg",
        "-m FREEDOM -d baby --not_mg",
        "--model=VBPR --dataset=clothing",
    ],
)
def test_commands_of_the_published_program(words):
    options = parse(words.split())
    assert (options.mirror == "off") == ("--not_mg" in words)


@pytest.mark.parametrize("model", MODELS)
def test_every_hyper_parameter_is_a_flag(model, capsys):
    for field in dataclasses.fields(MODELS[model].settings):
        kind, default = type(field.default), field.default
        new = (
            {"int": 7, "float": 0.125, "bool": not default}.get(kind.__name__)
            if kind is not str
            else field.metadata["setting"].choices[-1]
        )
        spellings = [f"--{field.name}", f"--{field.name.replace('_', '-')}"]
        for flag in spellings:
            words = [flag if new else f"--no-{flag[2:]}"] if kind is bool else [f"{flag}={new}"]
            options = parse(["-m", model, *words])
            assert getattr(options.settings, field.name) == new and type(getattr(options.settings, field.name)) is kind
        assert getattr(parse(["-m", model]).settings, field.name) == default or any(CONFIGS.glob(f"model/{model}.toml"))


def test_unknown_model_and_flags_of_another(capsys):
    assert "did you mean 'FREEDOM'" in refused(capsys, "-m", "FREDOM")
    assert re.search(
        "--knn-k is a hyper-parameter of .*FREEDOM.*, not of BPR", refused(capsys, "-m", "BPR", "--knn_k", 3)
    )
    assert "did you mean" in refused(capsys, "--mirror-alpa2", 0.1)
    assert "wanted a whole number" in refused(capsys, "-m", "LightGCN", "--n_layers", "2.5")


# -- layers


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Config files of one's own: name -> text."""

    def write(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.toml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    (tmp_path / "mirror_grad").symlink_to(tmp_path)
    write(overall="", mirror="")
    monkeypatch.setattr(flags, "configs", lambda: tmp_path)
    return write


def test_a_missing_settings_file_is_an_error(stored, tmp_path):
    """Without it the epoch would be selected by another metric."""
    (tmp_path / "overall.toml").unlink()
    with pytest.raises(UserError, match=r"overall.toml are missing"):
        parse(["-m", "VBPR"])


def test_later_layers_win(stored, tmp_path):
    stored(overall="learning-rate = 0.1\nbatch-size = 10\nepochs = 1\npatience = 2\nseed = 4",
           dataset__baby="batch-size = 20\nepochs = 2\npatience = 3\nseed = 5", model__VBPR="epochs = 3\npatience = 4\nreg-weight = 0.5\nseed = 6",
           mirror="patience = 5\nseed = 7", own="seed = 8")  # fmt: skip
    options = parse(["-m", "VBPR", "--config", str(tmp_path / "own.toml")])
    assert (options.learning_rate, options.batch_size, options.epochs, options.patience, options.seed) == (
        0.1,
        20,
        3,
        5,
        8,
    )
    assert options.settings.reg_weight == 0.5
    assert parse(["-m", "VBPR", "--config", str(tmp_path / "own.toml"), "--seed", "9"]).seed == 9
    plain = parse(["-m", "VBPR", "--not_mg"])
    assert (plain.patience, plain.seed) == (4, 6)
    assert parse(["-m", "BPR", "-d", "sports"]).batch_size == 10


@pytest.mark.parametrize("words", [["--mirror", "off"], ["--mirror-arm", "equal-grid"], ["--config", "OWN"]])
def test_the_mirror_layer_is_read_with_the_mirror_alone(stored, tmp_path, words):
    stored(mirror="patience = 5", own='mirror = "off"')
    assert parse([word.replace("OWN", str(tmp_path / "own.toml")) for word in words]).patience == 20
    assert parse([]).patience == 5 and parse(["--mirror-arm", "equal-lr"]).patience == 5


def test_a_config_may_name_model_and_data(stored, tmp_path):
    stored(model__VBPR="reg-weight = 0.5", own='model = "VBPR"\ndataset = "sports"')
    options = parse(["--config", str(tmp_path / "own.toml")])
    assert (options.model, options.dataset, options.settings.reg_weight) == ("VBPR", "amazon-sports", 0.5)


def test_unknown_keys_in_a_layer_are_named(stored, capsys):
    stored(overall="learnin-rate = 0.1")
    text = refused(capsys, "-m", "BPR")
    assert "overall.toml" in text and "did you mean 'learning-rate'" in text


def test_a_resolved_config_gives_the_same_run_back(tmp_path):
    from gfml.base.toml import toml_text

    for words in (
        ["-m", "FREEDOM", "--mirror-arm", "equal-steps"],
        ["-m", "VBPR", "--not_mg", "--lr", "0.01"],
        ["-m", "BPR", "--mirror-arm", "true-ascent"],
    ):
        options = parse(words)
        (tmp_path / "config.toml").write_text(toml_text(options.resolved))
        assert parse(["--config", str(tmp_path / "config.toml")]).resolved == options.resolved


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_stored_layers_are_used(path):
    kind, name = path.parent.name, path.stem
    words = {"dataset": ["-d", name], "model": ["-m", name, "-d", "demo"]}.get(kind, ["-d", "demo"])
    assert path in layers(flags._scan(words))
    options = parse(words)
    for key, value in tomllib.loads(path.read_text()).items():
        found = getattr(options, key.replace("-", "_"))
        assert (list(found) if isinstance(value, list) else found) == value


# -- arms, grids, refusals


def test_arms():
    found = {arm: parse(["-m", "BPR", "--mirror-arm", arm]) for arm in flags.ARMS}
    assert {arm: options.mirror for arm, options in found.items()} == {
        "mg": "two_step", "equal-steps": "repeat", "equal-lr": "off", "equal-grid": "off", "true-ascent": "precond"}  # fmt: skip
    assert [arm_of(options) for options in found.values()] == list(found)
    assert arm_of(parse(["--not_mg"])) == "plain"
    assert parse(["--mirror-arm", "true-ascent", "--learner", "sgd"]).mirror == "sgd_mirror"
    assert points_of(found["equal-grid"]) == [{"learning-rate": rate} for rate in ("0.0005", "0.001", "0.002")]


def test_published_names_of_the_mirror():
    options = parse(
        ["--alpha1", "1.5", "--alpha2", "0.3", "--beta", "4", "--stopping_step", "7", "--valid_metric", "Recall@10"]
    )
    assert (options.mirror_alpha1, options.mirror_alpha2, options.mirror_every, options.patience) == (1.5, 0.3, 4, 7)
    assert options.select_metric == "recall@10"


def points_of(options) -> list[dict]:
    return grid_points(options.space)


def test_grid_points():
    options = parse(["-m", "BPR", "--grid", "reg_weight=1,2", "learning-rate=0.1,0.2", "--not_mg"])
    assert points_of(options) == [{"reg-weight": r, "learning-rate": lr} for r in "12" for lr in ("0.1", "0.2")]
    published = parse(["-m", "BPR", "--grid", "published"])
    assert len(points_of(published)) == 3 * len(
        MODELS["BPR"].settings.__dataclass_fields__["reg_weight"].metadata["setting"].grid
    )
    assert len(points_of(parse(["-m", "BPR", "--grid", "published", "--not_mg"]))) * 3 == len(points_of(published))
    assert "grid" not in published.resolved


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--not_mg", "--mirror-arm", "equal-lr"], "give one of them"),
        (["--mirror", "fused", "--mirror-arm", "equal-lr"], "give one of them"),
        (["--alpha1", "0.1", "--alpha2", "0.2"], "wanted alpha1 > alpha2"),
        (["--mirror-phase", "3"], "wanted less than --mirror-every 3"),
        (["--mirror", "fused", "--mirror-clip-halves", "second"], "two_step"),
        (["--select-metric", "recall"], "ndcg@20"),
        (["--feature-dtype", "bfloat16"], "which has no linear map of features"),
        (["-m", "FREEDOM", "--feature-dtype", "bfloat16"], "wanted --no-train-features beside it"),
        (["--grid", "reg_weight"], "wanted published or NAME=V,V"),
        (["--grid", "reg_wight=1,2"], "did you mean '--reg-weight'"),
        (["--baselines", "none", "ease"], "cannot stand beside"),
        (["--model"], "expected one argument"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(words, said, capsys):
    assert said in refused(capsys, *(["-m", "BPR", *words] if words != ["--model"] else words))


def test_features_that_are_not_trained_may_be_of_bfloat16():
    for words in (["-m", "VBPR"], ["-m", "FREEDOM", "--no-train-features"]):
        assert parse([*words, "--feature-dtype", "bfloat16"]).feature_dtype == "bfloat16"


def test_flags_without_effect_say_so(capsys):
    assert "eval_batch_size" not in parse(["--eval_batch_size", "9"]).resolved
    assert "has no effect" in capsys.readouterr().err
