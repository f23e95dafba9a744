"""Break runs on purpose and count what is lost, silent or a traceback. Bounded; no network but loopback; about 20 minutes.

    python scripts/stress.py                       everything: kills, storage, inputs, types
    python scripts/stress.py kills --number 8      one part, smaller

kills    runs of all programs and of a list of commands, killed at random moments after their first epoch, go on and are
         compared bit for bit with a run that nobody disturbed
storage  disks that are full or fail at the n-th write, files that are cut, flipped, lost: a run then goes on as if
         nothing had been, or ends in one line, whose advice is followed
inputs   bad flags, TOML files, tables and pictures: one line and exit code 2
types    every float type and mixture through the public functions: the right value, or refused on entry

Every run is a forked child of this process, which has the libraries loaded. Exit code 1 if anything was lost or silent.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
DEMO = "--demo-users 60 --demo-items 40 --demo-interactions 900 --seed 7 --device cpu --threads 1 --no-progress --checkpoint-every 1"
RANKING = f"{DEMO} --dataset demo --epochs 12 --eval-every 2 --topks 5 --baselines none --report 0"
PROGRAMS = {
    "recsys": f"recsys.main {RANKING} --model lgn --loss_mode mix_bpr --embedding-dim 8 --batch-size 64 --es_metric ndcg@5 --refit",
    "mcl": f"mcl.main {RANKING} --dim 8 --batch_size 10 --num_neg 40 --select-metric recall@5",
    "cml_baseline": f"cml_baseline.main {RANKING} --dim 8 --batch-size 50 --select-metric recall@5",
    "mirror_grad": f"mirror_grad.main {RANKING.removesuffix(' --report 0')} -m FREEDOM --features random --embedding-dim 8 --batch-size 64 --select-metric recall@5",
    "hlrm": f"hlrm.train {DEMO} --emb_size 8 --num_relations 3 --num_inter 4 --train_batch_size 64 --epochs 12 --topk 5 --eval_size 10",
    "vision": "vision.main --model-name vit_gra --hidden 16 --mlp-hidden 16 --num-layers 1 --head 2 --num_split 1 --patch 2 --epochs 8 "
    "--batch-size 64 --device cpu --threads 1 --no-progress --checkpoint-every 1 --report 0 --mixup --val_fraction 0.2 --ema 0.9",
    "contextual": "contextual.main --backbone small --pretrained 0 --lr 1e-3 --val-share 0.3 --width 4 --embedding-size 8 "
    "--image-size 16 --batch-size 16 --IPC 4 --batches-per-epoch 3 --epochs 8 --eval-every 1 --workers 0 --device cpu --threads 1 "
    "--no-progress --pictures 0 --baselines none --nmi 0 --ks 1 2 --checkpoint-every 1 --report 0",
}  # fmt: skip

GRID = (
    f"mirror_grad.main {RANKING.removesuffix(' --report 0')} -m BPR --embedding-dim 8 --batch-size 64 "
    "--select-metric recall@5 --grid learning_rate=0.02,0.001"
)


# -- runs as children


def preload() -> None:
    """The libraries of all programs, once, before children are forked."""
    for name in PROGRAMS:
        importlib.import_module(f"{name}.experiment")
    for name in ("timm", "torchvision.transforms.v2", "sklearn.cluster", "sklearn.datasets", "scipy.stats"):
        importlib.import_module(name)


def command(name: str) -> tuple[str, list[str]]:
    """Module and flags of a program's small run."""
    module, *words = (PROGRAMS | {"grid": GRID})[name].split()
    return module, words


def start(module: str, words: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """The process number of a child that runs ``module.main(words)``; what it prints goes to ``log``."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        with open(log, "wb") as stream:
            for place in (1, 2):
                os.dup2(stream.fileno(), place)
        os.chdir(log.parent)
        if before is not None:
            before()
        from gfml.program.cli import run_main

        code = run_main(importlib.import_module(module).main, list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(number: int, seconds: float = 120.0) -> int:
    """The exit code of a child, -9 if it was killed or took too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(number, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def run(
    module: str, words: Sequence[str], log: Path, before: Callable[[], None] | None = None, seconds: float = 120.0
) -> tuple[int, str]:
    """Exit code and output of a whole run."""
    code = finish(start(module, words, log, before), seconds)
    return code, log.read_text(errors="replace")


def error_line(text: str) -> str | None:
    """The one line that says what is wrong; None where there is a traceback or no such line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if "Traceback" in text or not lines or not re.match(r"(error|.*: error): ", lines[-1]):
        return None
    return lines[-1]


def outcome(path: Path) -> dict[str, Any]:
    """What a finished run computed: its weights, metrics and test result, without times."""
    found: dict[str, Any] = {}
    for name in ("final.pt", "best.pt", "last.pt"):
        if (path / name).is_file():
            found[name] = without_times(torch.load(path / name, weights_only=True)["state"])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((path / "result.json").read_text())
    return found | {"rows": without_times(rows), "test": without_times(result.get("test", result.get("selection")))}


def grid_outcome(out: Path) -> dict[str, Any]:
    """What a finished sweep computed: its ledger and every run."""
    [ledger] = out.glob("sweeps/*/trials.json")
    trials = [
        {key: trial[key] for key in ("run", "state", "epoch", "value")}
        for trial in json.loads(ledger.read_text())["trials"]
    ]
    return {"trials": trials} | {path.parent.name: outcome(path.parent) for path in sorted(out.glob("*/done"))}


def without_times(value: Any) -> Any:
    """The value without what a clock says, and without the checksum of that."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if "second" not in str(key) and key != "logged"}
    return [without_times(part) for part in value] if isinstance(value, (list, tuple)) else value


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


class Undisturbed:
    """Runs that nobody disturbs, one for each program: what they found, and their seconds after the first epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.seconds = folder, {}, {}

    def of(self, name: str) -> dict[str, Any]:
        if name not in self.found:
            module, words = command(name)
            path = self.folder / name
            place = ["--out", str(path)] if name == "grid" else ["--out", str(self.folder), "--run-name", name]
            number = start(module, [*words, *place], self.folder / f"{name}.log")
            await_epoch(number, path)
            began = time.monotonic()
            if finish(number):
                raise RuntimeError(f"{name} does not run: {(self.folder / f'{name}.log').read_text().splitlines()[-1]}")
            self.seconds[name] = time.monotonic() - began
            self.found[name] = grid_outcome(path) if name == "grid" else outcome(path)
        return self.found[name]


def await_epoch(number: int, path: Path) -> bool:
    """Whether the child has finished an epoch, of a run in the path or below it, and still runs."""
    while not any(rows.stat().st_size for rows in (*path.glob("metrics.jsonl"), *path.glob("*/metrics.jsonl"))):
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.002)
    return True


# -- kills


def kills(folder: Path, number: int, draw: random.Random) -> Counter[str]:
    """``number`` kills, dealt to the programs in turn, one in fifteen to a list of commands or to a sweep."""
    counts: Counter[str] = Counter()
    whole = Undisturbed(folder)
    turns = itertools.cycle([*PROGRAMS] * 2 + ["commands"] + [*PROGRAMS] * 2 + ["grid"])
    for attempt in range(4 * number):
        if counts["killed"] == number:
            break
        name = next(turns)
        killed, verdict = (
            kill_commands(folder, attempt, draw, whole)
            if name == "commands"
            else kill(name, folder, attempt, draw, whole)
        )
        counts["killed"] += killed
        counts[verdict if killed else "too late, not counted"] += 1
        if verdict != "equal":
            print(f"  {name}, attempt {attempt}: {verdict}", flush=True)
    return counts


def kill(name: str, folder: Path, attempt: int, draw: random.Random, whole: Undisturbed) -> tuple[bool, str]:
    expected = whole.of(name)
    module, words = command(name)
    path, log = folder / f"k{attempt}", folder / f"k{attempt}.log"
    words += ["--out", str(path)] if name == "grid" else ["--out", str(folder), "--run-name", path.name]
    number = start(module, words, log)
    killed = await_epoch(number, path)
    if killed:
        time.sleep(draw.uniform(0, whole.seconds[name]))
        os.kill(number, signal.SIGKILL)
    killed = finish(number) == -signal.SIGKILL and killed
    code, text = run(module, words, log)
    if code:
        return killed, f"LOST: exit code {code}: {text.strip().splitlines()[-1][:200]}"
    found = grid_outcome(path) if name == "grid" else outcome(path)
    verdict = "equal" if equal(expected, found) else "DIFFERENT"
    if [*path.rglob(".*.tmp")]:
        verdict = "LEFT a temporary file"
    shutil.rmtree(path)
    return killed, verdict


def kill_commands(folder: Path, attempt: int, draw: random.Random, whole: Undisturbed) -> tuple[bool, str]:
    """The launcher of two runs, and sometimes the program at work too; the same list then finishes both."""
    expected = {name: whole.of(name) for name in ("cml_baseline", "mcl")}
    out = folder / f"s{attempt}"
    lines = [f"python {name}/main.py {shlex.join(command(name)[1])} --out {out}" for name in expected]
    words = [sys.executable, str(ROOT / "scripts" / "run_commands.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def launch() -> subprocess.Popen[str]:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True,
                                   cwd=ROOT, env=environment)  # fmt: skip
        process.stdin.write("\n".join(lines) + "\n")
        process.stdin.close()
        return process

    process = launch()
    while process.poll() is None and not any(path.stat().st_size for path in out.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 2))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    below = (
        [int(word) for word in children.read_text().split()] if process.poll() is None and draw.random() < 0.7 else []
    )
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    for number in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    for _ in range(20):
        if launch().wait(300) == 0 and len([*out.glob("*/done")]) == 2:
            break
        time.sleep(1)  # the program goes on without its launcher
    found = [outcome(path) for path in sorted(out.glob("*-*")) if path.is_dir()]
    same = len(found) == 2 and all(map(equal, (expected["cml_baseline"], expected["mcl"]), found))
    shutil.rmtree(out)
    return killed, "equal" if same else "DIFFERENT"


# -- storage


def failing(code: int, place: int) -> Callable[[], None]:
    """From now on the ``place``-th file that is put in its place fails so, and all that follow."""

    def prepare() -> None:
        replace, calls = os.replace, iter(range(10**9))

        def broken(source: Any, target: Any) -> None:
            if next(calls) >= place:
                raise OSError(code, os.strerror(code))
            replace(source, target)

        os.replace = broken

    return prepare


def flip(path: Path, draw: random.Random) -> None:
    """One bit of the middle half of a file, where its content is."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def mid_run(path: Path) -> None:
    """Make a finished run one that was killed just before its end."""
    for name in ("done", "result.json", "final.pt"):
        (path / name).unlink(missing_ok=True)


DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {
    "a flipped bit in last.pt": lambda path, draw: flip(path / "last.pt", draw),
    "half of last.pt": lambda path, draw: cut(path / "last.pt"),
    "no last.pt": lambda path, draw: (path / "last.pt").unlink(),
    "a flipped bit in best.pt": lambda path, draw: flip(path / "best.pt", draw),
    "no best.pt": lambda path, draw: (path / "best.pt").unlink(),
    "metrics.jsonl of noise": lambda path, draw: (path / "metrics.jsonl").write_bytes(b"\xff\xfe\n"),
    "run.json of noise": lambda path, draw: (path / "run.json").write_text("{"),
    "done without its result": lambda path, draw: (path / "done").write_text("x\n"),
    "a leftover of a write": lambda path, draw: (path / ".last.pt.abc.tmp").write_bytes(b"half"),
}


def storage(folder: Path, number: int, draw: random.Random) -> Counter[str]:
    """For each program three failing disks and every damage, up to ``number``."""
    counts: Counter[str] = Counter()
    whole = Undisturbed(folder)
    for name in PROGRAMS:
        try:
            expected = whole.of(name)
        except RuntimeError as error:
            print(f"  {error}", flush=True)
            counts["programs that do NOT run"] += 1
            continue
        disks = [(f"{errno.errorcode[code]} at a write", code) for code in (errno.ENOSPC, errno.EIO, errno.EACCES)]
        for what, code in [*disks, *((damage, 0) for damage in DAMAGE)][:number]:
            verdict = one_fault(name, what, code, folder, draw, expected)
            counts["faults"] += 1
            counts[verdict] += 1
            if verdict.isupper() or verdict[:4].isupper():
                print(f"  {name}, {what}: {verdict}", flush=True)
    return counts


def one_fault(name: str, what: str, code: int, folder: Path, draw: random.Random, expected: dict[str, Any]) -> str:
    module, words = command(name)
    path, log = folder / "fault", folder / "fault.log"
    for old in folder.glob("fault*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    words = [*words, "--out", str(folder), "--run-name", "fault"]
    told = "went on"
    if code:
        ended, text = run(module, words, log, failing(code, draw.randrange(3, 20)))
        if ended not in (0, 2) or (ended == 2 and error_line(text) is None):
            return f"TRACEBACK: {text.strip().splitlines()[-1][:160]}"
        told = "one line, then went on" if ended else "went on"
    else:
        shutil.copytree(folder / name, path)
        mid_run(path)
        DAMAGE[what](path, draw)
    ended, text = run(module, words, log)
    if ended:
        line = error_line(text)
        if line is None:
            return f"TRACEBACK: {text.strip().splitlines()[-1][:160]}"
        if not follow(line, module, words, log):
            return f"DEAD END: {line[:300]}"
        told = "one line, its advice helped"
    return told if equal(expected, outcome(path)) else f"SILENT: another result after {what}"


def follow(line: str, module: str, words: list[str], log: Path) -> bool:
    """Do what the line advises; whether the run is then done."""
    if found := re.search(r"train anew with (.*), which keeps", line):
        return run(module, shlex.split(found[1]), log)[0] == 0
    if found := re.search(r"(?:checkpoint|read) (\S+) \(.*delete it and run the same command again", line):
        Path(found[1]).unlink()
        return run(module, words, log)[0] == 0
    return False


# -- inputs


def bad_inputs(folder: Path, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, module, flags), endlessly."""
    while True:
        yield from bad_flags(draw)
        yield from bad_toml(folder, draw)
        yield from bad_tables(folder, draw)
        yield from bad_pictures(folder, draw)


def bad_flags(draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    values = [
        "",
        "-1",
        "nan",
        "inf",
        "1e400",
        "x",
        "0x10",
        "--",
        "-",
        "10" * 30,
        "1,5",
        "ü",
        "y" * 300,
        "/proc/self/mem",
        "None",
    ]
    for _ in range(28):
        module, words = command(draw.choice([*PROGRAMS]))
        known = [
            word for word in words if word.startswith("--") and not word.startswith(("--no-", "--refit", "--mixup"))
        ]
        flag = draw.choice(known)
        if draw.random() < 0.2:
            yield "flags", module, [*words, f"{flag[:-1]}{draw.choice('abcxyz')}q", "1"]
        else:
            place = words.index(flag) + 1
            yield "flags", module, [*words[:place], draw.choice(values), *words[place + 1 :]]


def bad_toml(folder: Path, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    texts = ["= 3", "epochs = ", "epochs = 'x'", "epochs = [1, 2]", "[epochs]\nx = 1", "epoch = 3", "seed = -1", "lr = 'fast'",
             "epochs = 1979-05-27", "seed = 1e400", "seed = true\nseed = 2", "threads = 10000000", "\x00", "out = 3.5.1", "topk = {a = 1}"]  # fmt: skip
    for _ in range(22):
        module, words = command(draw.choice([*PROGRAMS]))
        path = folder / f"c{draw.randrange(10**9)}.toml"
        path.write_bytes(draw.choice(texts).encode() if draw.random() < 0.85 else b"seed = '\xff\xfe'")
        yield "TOML", module, [*words, "--config", str(path)]


def bad_tables(folder: Path, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    good = "user,item,rating\n" + "".join(f"u{n % 20},i{(n * 7) % 15},{n % 5 + 1}\n" for n in range(90))
    damage: list[tuple[str, bytes]] = [
        (".csv", b""), (".csv", b"user,item\n"), (".csv", b"a,b,c\n1,2,3\n"), (".csv", good.encode().replace(b"u3,", b"u3", 1)),
        (".csv", good.encode().replace(b",3\n", b",three\n", 1)), (".csv", b"\xff\xfe" + good.encode("utf-16-le")[:101]),
        (".csv", good.encode() + b'"u1,i1,3\n'), (".csv", bytes(draw.randrange(256) for _ in range(500))),
        (".csv", good.encode().replace(b"i0,", b",", 1)), (".npz", b"PK\x03\x04" + bytes(60)), (".npz", b""), (".parquet", b"PAR1xx"),
        (".json", b"{"), (".json", b'{"user": 1}\n[1]\n'), (".inter", b"user_id:token\titem_id:token\n1\n"), (".csv.gz", b"\x1f\x8b\x08"),
        (".csv", b"user,item\n" + b"a,b\n" * 3), (".mat", b"x"), (".zip", b"PK\x05\x06" + bytes(18)), (".h5", b"\x89HDF"),
    ]  # fmt: skip
    for suffix, content in draw.sample(damage, 14):
        name = draw.choice(["recsys", "mcl", "cml_baseline", "hlrm", "mirror_grad"])
        module, words = command(name)
        path = folder / f"t{draw.randrange(10**9)}{suffix}"
        path.write_bytes(content)
        yield "tables", module, [*words, "--dataset", str(path), "--no-cache"]


def bad_pictures(folder: Path, draw: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, "PNG")
    good = stream.getvalue()
    wide = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(wide, "TIFF")
    broken = {"empty.png": b"", "cut.png": good[:50], "text.jpg": b"hello", "flip.png": good[:40] + b"\0\0" + good[42:],
              "float.tif": wide.getvalue(), "huge.png": good[:16] + b"\xff" * 8 + good[24:], "fake.gif": b"GIF89a", "noise.webp": b"RIFFxxxxWEBP"}  # fmt: skip
    for name in broken:
        place = folder / f"p{draw.randrange(10**9)}"
        for label in "abcdefgh":
            for number in range(3):
                (place / label).mkdir(parents=True, exist_ok=True)
                (place / label / f"{number}.png").write_bytes(good)
        (place / draw.choice("abcd") / name).write_bytes(broken[name])
        module, words = command(draw.choice(["vision", "contextual"]))
        yield "pictures", module, [*words, "--dataset", str(place)]


def inputs(folder: Path, number: int, draw: random.Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind, module, words in itertools.islice(bad_inputs(folder, draw), number):
        log = folder / "input.log"
        code, text = run(module, [*words, "--out", str(folder / "runs")], log, seconds=40.0)
        if code in (0, -signal.SIGKILL):  # killed: it trains, such as for 10^30 epochs
            verdict = "valid after all"
        elif code == 2 and error_line(text) is not None:
            verdict = "one line"
        else:
            verdict = "TRACEBACK"
            print(f"  {module} {shlex.join(words)[-200:]!r}: code {code}: {text.strip().splitlines()[-1:]}", flush=True)
        counts["inputs"] += 1
        counts[f"{kind}: {verdict}"] += 1
        shutil.rmtree(folder / "runs", ignore_errors=True)
    return counts


# -- types


def functions() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Public functions of tensors, with arguments in float64 that overflow or vanish in half precision where they can."""
    from gfml import attention, cml, gravity, longtail, losses
    from gfml.distances import DISTANCES, SquaredDistance, softplus
    from gfml.metrics import classification, retrieval
    from gfml.ranking import graph, neighbours, sparse, topk

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, y, many, large = draw(6, 5, scale=30), draw(6, 5, scale=30), draw(6, 3, 5, scale=30), draw(6, 5, scale=300)
    pos, neg, logits, ids = draw(6), draw(6, 3), draw(6, 3, scale=5), torch.arange(6)
    labels, counts = torch.tensor([0, 1, 2, 0, 1, 2]), np.array([9, 4, 2])
    found: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {}
    for kind in DISTANCES:
        own, force = SquaredDistance(kind), gravity.Gravity(6, 6, distance=kind)
        found |= {
            f"paired {kind}": (own.paired, (x, y)), f"one to many {kind}": (own.paired, (x, many)), f"all pairs {kind}": (own.all_pairs, (large, y)),
            f"gravity {kind}": (lambda u, v, force=force: force(u, v, ids, ids), (x, y)),
            f"gravity of all items {kind}": (lambda u, v, force=force: force.all_items(u, v, ids), (x, y)),
            f"gravity logits {kind}": (lambda q, k, own=own: attention.gravity_logits(q[None, None], k[None, None], 0.0, lamb=1.0, divisor=2.0, distance=own), (x, y)),
        }  # fmt: skip
    for name in longtail.LOSSES:
        found[f"loss {name}"] = (lambda z, name=name: longtail.class_loss(name, counts)(z, labels), (logits,))
    for form in ("squared", "paper", "signed"):
        found[f"covariance {form}"] = (lambda rows, form=form: losses.covariance(rows, form), (large,))
    edges = graph.build_graph(sp_eye())
    found |= {
        "power law": (lambda q, k: attention.power_law_weights(q[None, None], k[None, None], torch.zeros(1, 1, 1, 6), 1.5, 0.1), (x / 10, y / 10)),
        "softplus": (softplus, (x,)), "unit rows": (gravity.unit_rows, (large,)), "unit rows, tiny": (gravity.unit_rows, (x * 1e-6,)),
        "bpr": (losses.bpr, (pos, neg)), "bce": (losses.bce, (pos, neg)), "half mean square": (losses.half_mean_square, (large,)),
        "regulariser": (losses.embedding_reg, (large, x, many)), "published masses": (losses.mass_reg_compat, (large[:, 0], pos, neg)),
        "hinge": (lambda p, n: losses.warp_hinge(p, n, margin=500.0, num_items=100).loss, (100 * pos.abs(), 100 * neg.abs())),
        "feature loss": (cml.feature_loss, (large, y)), "distance scorer": (lambda u, v: cml.SquaredDistanceScorer(u, v).score(ids), (large, y)),
        "retrieval": (lambda q, r: torch.tensor(retrieval.retrieve(q, labels, r, labels, whole=True).means["map"]), (x, y)),
        "nmi": (lambda q: torch.tensor(retrieval.nmi(q, labels)), (x,)), "without prior": (lambda z: longtail.without_prior(z, counts), (logits,)),
        "classification": (lambda z: torch.tensor([*classification.classification_metrics(z, labels).values()]), (logits,)),
        "top items, factors": (lambda u, v: topk.topk_items(topk.FactorScorer(u, v), ids, 3, seen=None), (x, y)),
        "top items, table": (lambda s: topk.topk_items(topk.DenseScorer(s), ids, 3, seen=None), (x,)),
        "top items, gravity": (lambda u, v: topk.topk_items(gravity.GravityScorer(gravity.Gravity(6, 6, mass="item", emb_norm=False), u, v), ids, 3, seen=None), (x, y)),
        "nearest rows": (lambda rows: neighbours.nearest_ids(rows, 3), (large,)),
        "similar rows": (lambda rows: torch.tensor(neighbours.nearest_rows(rows, 3, shrink=9.0).toarray()), (large,)),
        "covariance, weighted": (lambda rows, weight: losses.covariance(rows, weight=(weight > 0).to(weight)), (large, pos)),
        "bpr, weighted": (lambda p, n, weight: losses.bpr(p, n, weight.abs()), (pos, neg, pos)),
        "dots of entries": (lambda u, v: sparse.entry_dots(u, v, ids[:2], ids[2:4]), (large, y)),
        "propagation": (lambda nodes: graph.propagate(edges, nodes, 2), (torch.cat([x, y]),)),
    }  # fmt: skip
    return found


def sp_eye() -> Any:
    import scipy.sparse as sp

    return sp.csr_array(sp.eye_array(6, format="csr", dtype=np.float32))


def types() -> Counter[str]:
    """Every mixture of four float types: the value of the rounded arguments in float64, or refused."""
    counts: Counter[str] = Counter()
    for name, (call, arguments) in functions().items():
        for mixture in itertools.product(
            (torch.float16, torch.bfloat16, torch.float32, torch.float64), repeat=len(arguments)
        ):
            rounded = [value.to(kind) for value, kind in zip(arguments, mixture, strict=True)]
            wanted = call(*(value.double() for value in rounded)).detach().double()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = call(*rounded).detach()
            except ValueError:
                verdict = "refused"
            except Exception as error:
                verdict = f"CRASH {type(error).__name__}"
            else:
                room = 20 * torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
                scale = wanted.abs() + 1e-3 * wanted.abs().max() + 1e-9
                verdict = (
                    "right" if bool(((found.double() - wanted).abs() <= max(room, 2e-4) * scale).all()) else "WRONG"
                )
            counts["calls"] += 1
            counts[verdict] += 1
            if verdict not in ("right", "refused"):
                print(f"  {name} of {', '.join(str(kind)[6:] for kind in mixture)}: {verdict}", flush=True)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/stress.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="kills, storage, inputs, types (default: all)")
    parser.add_argument("--number", type=int, help="how many kills (60), faults a program (12), inputs (400)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    preload()
    parts = {"kills": (kills, 60), "storage": (storage, 12), "inputs": (inputs, 400)}
    bad = False
    for part in given.parts or [*parts, "types"]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if part == "types":
                counts = types()
            else:
                work, number = parts[part]
                counts = work(Path(folder), given.number or number, random.Random(given.seed))
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        print(f"{part}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
        bad |= any(
            word.isupper() and len(word) > 3 for name in counts if counts[name] for word in re.findall(r"[A-Z]+", name)
        )
    return int(bad)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
