"""Prove on a GPU what tests without one cannot: the CPU's numbers, times, memory, no waiting, resume. Eight minutes.

    python scripts/gpu_check.py --data-root data --out gpu_check          every part, then a table and results.json
    python scripts/gpu_check.py --out gpu_check --only times-lightgcn --again
    python scripts/gpu_check.py --device cpu --tiny --out /some/where     the same code on toy sizes, without a GPU

Every part is a process of its own with its own time limit and a JSON file in ``--out``: a part that fails costs its own
results alone, and a second call runs only what is missing. Parts run side by side, but only one measures at a time.
Times are medians in milliseconds after a warm-up, by device events; every row holds ours against something timed in
the same process. Data sets that are not in ``--data-root`` leave their parts "not run". docs/gpu.md is made from
results.json by ``scripts/gpu_page.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

# Seconds that one part may take.
LIMIT = 150


def names() -> dict[str, list[str]]:
    """Parts by group, in the order in which they run."""
    import gpu_parts

    groups: dict[str, list[str]] = {}
    for name, part in gpu_parts.PARTS.items():
        groups.setdefault(part.group, []).append(name)
    return groups


def run_part(args: argparse.Namespace) -> int:
    """One part in this process: its result goes to a file of its own."""
    import gpu_parts
    from gpu_probe import NotRun

    started = time.perf_counter()
    result: dict[str, Any] = {"part": args.part, "status": "ok", "rows": []}
    try:
        for row in gpu_parts.PARTS[args.part].run(args):
            result["rows"].append(row)
            _write(args.out / f"{args.part}.json", result | {"status": "stopped"})
        if any(row.get("ok") is False for row in result["rows"]):
            result["status"] = "differs"
    except NotRun as reason:
        result |= {"status": "not run", "reason": str(reason)}
    except (Exception, SystemExit):
        result |= {"status": "failed", "error": traceback.format_exc()[-3000:]}
    result["seconds"] = round(time.perf_counter() - started, 1)
    _write(args.out / f"{args.part}.json", result)
    return 0 if result["status"] in ("ok", "not run") else 1


def _write(path: Path, content: object) -> None:
    from gfml.base.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def start(args: argparse.Namespace, name: str, until: float) -> dict[str, Any]:
    """A part as a process, unless its result is there; returns the result."""
    path = args.out / f"{name}.json"
    if path.is_file() and not args.again:
        found = json.loads(path.read_text())
        if found["status"] in ("ok", "not run"):
            return found
    path.unlink(missing_ok=True)
    left = min(LIMIT, until - time.monotonic())
    if left < 5:
        return {"part": name, "status": "not run", "reason": "no time left", "rows": []}
    words = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--part",
        name,
        "--device",
        args.device,
        "--out",
        str(args.out),
    ]
    words += ["--data-root", str(args.data_root)] + (["--tiny"] if args.tiny else [])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(args.out / f"{name}.log", "w") as log:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(words, timeout=left, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    if not path.is_file():
        tail = (args.out / f"{name}.log").read_text()[-2000:]
        return {"part": name, "status": "stopped", "error": tail, "rows": [], "seconds": round(left, 1)}
    return json.loads(path.read_text())


def machine(device: str) -> dict[str, Any]:
    """What the results were measured on."""
    import torch

    found: dict[str, Any] = {
        "device": device, "python": platform.python_version(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        import triton

        found |= {
            "card": card.name, "count": torch.cuda.device_count(), "memory_gib": round(card.total_memory / 2**30),
            "cuda": torch.version.cuda, "triton": triton.__version__,
        }  # fmt: skip
    return found


def table(results: list[dict[str, Any]]) -> str:
    """All rows as text."""
    lines = []
    for result in results:
        lines.append(
            f"{result['part']:<24} {result['status']:<8} {result.get('seconds', 0):6.1f} s  {result.get('reason', '')}"
        )
        if result.get("error"):
            lines += [f"    | {line}" for line in result["error"].strip().splitlines()[-6:]]
        for row in result["rows"]:
            values = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key not in ("work", "largest")
            ]
            lines.append(f"    {row['work']:<44} {', '.join(values)}")
    return "\n".join(lines)


def run_all(args: argparse.Namespace) -> int:
    """Every part of ``--only``, or all."""
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    groups = names()
    wanted = [
        name for group in groups.values() for name in group if not args.only or any(map(name.startswith, args.only))
    ]
    found: dict[str, dict[str, Any]] = {}
    for group, parts in groups.items():
        parts = [name for name in parts if name in wanted]
        os.environ["GPU_CHECK_LOCK"] = str(args.out / "lock")
        workers = args.builders if group == "times" else args.jobs
        with ThreadPoolExecutor(workers) as pool:
            calls = {name: pool.submit(start, args, name, until) for name in parts}
            for name, call in calls.items():
                found[name] = call.result()
                print(f"{name}: {found[name]['status']}", file=sys.stderr, flush=True)
                _write(args.out / "results.json", {"machine": machine(args.device), "parts": list(found.values())})
    print(table(list(found.values())))
    bad = [name for name, result in found.items() if result["status"] not in ("ok", "not run")]
    print(f"{len(found)} parts, not well: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying the script out")
    add("--out", type=lambda text: Path(text).resolve(), default=Path("gpu_check").resolve(), help="where results go")
    add(
        "--data-root",
        type=lambda text: Path(text).resolve(),
        default=Path("data").resolve(),
        help="gowalla, ml-1m, baby, cifar10",
    )
    add("--only", nargs="+", default=[], metavar="PART", help="parts by name or by how it begins")
    add("--again", action="store_true", help="run parts anew that have a result")
    add("--tiny", action="store_true", help="toy sizes")
    add("--seconds", type=float, default=450, help="no part starts or runs on after so many")
    add("--jobs", type=int, default=6, help="parts of correctness at a time")
    add("--builders", type=int, default=4, help="parts of times at a time; they build side by side and measure in turn")
    add("--list", action="store_true", help="name the parts")
    add("--part", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print("\n".join(f"{group}: {' '.join(parts)}" for group, parts in names().items()))
        return 0
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "error: found no CUDA device, wanted one: give --device cpu --tiny to try the script", file=sys.stderr
            )
            return 2
    return run_part(args) if args.part else run_all(args)


if __name__ == "__main__":
    sys.exit(main())
