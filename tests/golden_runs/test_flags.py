"""Published command lines: every flag of every program as it was, with its default, and the sources' own commands.

python tests/golden_runs/test_flags.py      store the flags as they are now in ``flags.json``
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from gfml.program.commands import read_command
from gfml.program.program import program_of

ROOT = Path(__file__).resolve().parents[2]
FILE, NAMES = (Path(__file__).parent / name for name in ("flags.json", "names.json"))
VISION = """--model-name vit_gra --max-epochs 200 --batch-size 128 --weight-decay 5e-5 --lr 1e-3 --min-lr 1e-5 --warmup-epoch 5
    --dropout 0.0 --head 12 --num-layers 7 --hidden 384 --mlp-hidden 384 --autoaugment --label-smoothing --lamb_gra 3.0
    --lamb_mix 0.5 --mix_on 1 --mix_mode split --dist_mode l2 --mass_pos tail --num_split 6 --split_mix 1 --dataset cimb10
    --num-classes 10 --project-name 221104-cimb10"""
# As the sources print them, but for their folders.
PUBLISHED = (
    "recsys/main.py --dataset lastfm --model mf",
    "mcl/main.py --gfml --dataset lastfm --gpu_id 0 --lr 0.001 --lambd 1.5 --lamb_p 0.7 --lamb_n 0.3",
    f"vision/main.py {VISION}",
    "mirror_grad/main.py",
    "mirror_grad/main.py --model DRAGON --dataset sports",
    "mirror_grad/main.py --model LayerGCN --dataset sports",
    "mirror_grad/main.py --not_mg",
    """contextual/train.py --loss Hybrid --dataset cub --batch-size 128 --eps 0.04 --lam 0.05 --lr 0.00014 --warm 0
    --bn-freeze 1 --gamma 0.1 --testfreq 10 --lr-decay-step 10 --epochs 60 --lr-decay-gamma 0.3 --xform_scale 0.16
    --bottleneck linear --data_root CUB_200_2011""",
    """contextual/train.py --loss Hybrid --dataset cars --batch-size 64 --eps 0.05 --lam 0.2 --lr 8e-05 --warm 0
    --bn-freeze 1 --gamma 0.1 --testfreq 10 --lr-decay-step 20 --epochs 160 --lr-decay-gamma 0.5 --xform_scale 0.12
    --bottleneck linear --data_root car196""",
    """contextual/train.py --loss Hybrid --dataset SOP --batch-size 128 --eps 0.05 --lam 0.2 --lr 6e-05 --warm 0
    --bn-freeze 1 --gamma 0.1 --testfreq 5 --lr-decay-step 15 --epochs 80 --lr-decay-gamma 0.3 --xform_scale 0.08
    --bottleneck identity --hierarchical 1 --data_root Stanford_Online_Products""",
    "contextual/main.py --dataset CUB --loss hybrid --lr 8e-05 --root CUB_200_2011",
    "contextual/main.py --dataset Cars --loss hybrid --lr 0.00016 --root car196",
    "contextual/main.py --dataset SOP --loss hybrid --lr 4e-05 --batch_size 128 --root Stanford_Online_Products",
    "contextual/main.py --dataset iNat --loss hybrid --lr 8e-05 --batch_size 256 --root train_mini_resized",
    "contextual/main.py --dataset inshop --loss hybrid --lr 4e-05 --batch_size 128 --root inshop",
    """hlrm/train.py --train_batch_size --eval_batch_size --num_inter --hlrm_type --epochs --lr --lr_scheduler_gamma --clip
    --patience --emb_size --num_relations --is_pretrained_embs --freeze_embs --save_model -- save_dir --loss_margin""",
    "cml_baseline/main.py",
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every program; mirror_grad has one for each model."""

    import hlrm.settings
    from mirror_grad.models import MODELS

    found: dict[str, argparse.ArgumentParser] = {
        "recsys": program_of("recsys.main").parser(),
        "mcl": program_of("mcl.main").parser(),
        "cml_baseline": program_of("cml_baseline.main").parser(),
        "hlrm": program_of("hlrm.train").parser(),
        "hlrm-eval": hlrm.settings.build_eval_parser(),
        "vision": program_of("vision.main").parser(),
        "contextual-256": program_of("contextual.main").parser(),
        "contextual-224": program_of("contextual.train").parser(),
    }
    return found | {f"mirror_grad-{name}": program_of("mirror_grad.main").parser(["--model", name]) for name in MODELS}


def flags_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Every spelling with its default and the number of its values."""
    found = {}
    for action in parser._actions:
        default = None if action.default == argparse.SUPPRESS else action.default
        for name in action.option_strings:
            found[name] = [list(default) if isinstance(default, tuple) else default, action.nargs]
    return found


@pytest.mark.parametrize("program", json.loads(FILE.read_text(encoding="utf-8")))
def test_flags_are_as_published(program: str) -> None:
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    # Of mirror_grad's models BPR stands for what all have, but for its one hyper-parameter.
    shared = {name: value for name, value in stored["mirror_grad-BPR"].items() if name != "--reg-weight"}
    base = shared if program.startswith("mirror_grad") else {}
    parser = parsers()[program]
    found = flags_of(parser)
    wanted = {**base, **stored[program]}
    assert {name: found.get(parser._known_spelling(name)) for name in wanted} == wanted


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_commands_parse(line: str) -> None:
    assert read_command(["python", *line.split()], ROOT).runs


@pytest.mark.parametrize("line", json.loads(NAMES.read_text(encoding="utf-8")))
def test_runs_keep_their_names(line: str) -> None:
    """The end of a run directory's name: what was trained before is found again."""
    assert digests(line) == json.loads(NAMES.read_text(encoding="utf-8"))[line]


def test_published_evaluation_parses() -> None:
    from hlrm.settings import parse_eval

    line = "--eval_batch_size --num_inter --hlrm_type --save_dir --eval_size --emb_size --topk --num_relations --is_pretrained_embs"
    assert parse_eval(line.split()).save_dir == "hlrm_base.pt"


def digests(line: str) -> list[str]:
    """The marks of the runs of a command."""
    return [run.digest for run in read_command(["python", *line.split()], ROOT).runs]


def store() -> None:
    """Write both files: of mirror_grad's models all flags once, then their own."""
    runs = runpy.run_path(str(Path(__file__).parent / "run.py"))["RUNS"]
    lines = [f"{module.replace('.', '/')}.py {flags.replace('{out}/', '')}" for module, flags in runs.values()]
    names = {
        line: digests(line)
        for line in [*PUBLISHED, *lines]
        if "hlrm/eval" not in line and line != "cml_baseline/main.py"
    }
    NAMES.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    found = {name: flags_of(parser) for name, parser in parsers().items()}
    shared = found["mirror_grad-BPR"]
    for name, flags in found.items():
        if name.startswith("mirror_grad-") and name != "mirror_grad-BPR":
            found[name] = {flag: value for flag, value in flags.items() if shared.get(flag) != value}
    lines = [f"{json.dumps(name)}: {json.dumps(flags)}" for name, flags in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    store()
