"""Pages of the site that are made from what is there: a page per paper, flags, reference, and the navigation."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gfml.program.console import COMMANDS, FIRST, papers, programs_of

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks.pages")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
# What is made here, and so has no file.
MADE = ("docs/flags.md", "docs/papers/", "docs/reference/")
# Title and page of the hand-written part, in reading order; a page that is not there yet is left out.
GUIDE = (
    ("First steps", "index.md"),
    ("Own data", "own-data.md"),
    ("Own model", "own-model.md"),
    ("A multimodal model", "adding-a-model.md"),
    ("Own paper", "adding-a-paper.md"),
    ("Library use", "library.md"),
    ("Metrics", "metrics.md"),
    ("GPU", "gpu.md"),
    ("Studies", "studies.md"),
    ("Scaling", "scaling.md"),
    ("Architecture", "architecture.md"),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, from the pages that are there."""
    docs = Path(config.docs_dir)
    known = [(title, page) for title, page in GUIDE if (docs / page).is_file()]
    more = sorted(
        str(path.relative_to(docs).as_posix())
        for path in docs.rglob("*.md")
        if path.relative_to(docs).as_posix() not in {page for _, page in GUIDE} | {"capabilities.md"}
    )
    tables = [{"Capabilities": "capabilities.md"}] if (docs / "capabilities.md").is_file() else []
    config.nav = [
        *({title: page} for title, page in known),
        *({"More": more},) * bool(more),
        {"Papers": [{paper: f"papers/{paper}.md"} for paper in papers()]},
        {"Reference": [*tables, {"Flags": "flags.md"}, *({title: page} for title, page, _ in reference())]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and the pictures they show."""
    texts = {f"papers/{paper}.md": _readme(paper, files, config) for paper in papers()}
    texts["flags.md"] = flags()
    texts |= {page: text for _, page, text in reference()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to pages of the site, or become plain text."""
    source = page.file.src_uri
    if source.startswith(("papers/", "reference/")):
        return markdown
    return _rewritten(markdown, f"docs/{source}", source)


def _readme(paper: str, files: Files, config: MkDocsConfig) -> str:
    text = (ROOT / paper / "README.md").read_text(encoding="utf-8")
    for mark, _, target, _ in LINK.findall(text):
        picture = posixpath.normpath(f"{paper}/{target}")
        if mark and (ROOT / picture).is_file():
            files.append(File.generated(config, f"papers/{picture}", abs_src_path=str(ROOT / picture)))
    return _rewritten(text, f"{paper}/README.md", f"papers/{paper}.md")


def _rewritten(text: str, place: str, page: str) -> str:
    """Links of a file of the repository as links between pages; place: the file, page: where its text goes."""

    def link(found: re.Match[str]) -> str:
        mark, shown, target, anchor = found[1], found[2], found[3], found[4] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if not (ROOT / inside).exists() and not inside.startswith(MADE):
            LOG.warning("%s links to %s, which is not there", place, target)
        to = _page_of(inside, mark=bool(mark))
        if to is None:
            return shown if "`" in shown else f"`{inside}`" if shown == target else f"{shown} (`{inside}`)"
        return f"{mark}[{shown}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)


def _page_of(inside: str, *, mark: bool) -> str | None:
    """The page or picture of the site that shows a file of the repository."""
    if inside == "README.md":
        return "index.md"
    if inside.startswith("docs/"):
        return inside.removeprefix("docs/")
    folder = inside.partition("/")[0]
    if folder in papers() and inside in (folder, f"{folder}/README.md"):
        return f"papers/{folder}.md"
    return f"papers/{inside}" if mark else None


def flags() -> str:
    """The help of every program and command, as they print it."""
    programs = [(paper, name) for paper in papers() for name in programs_of(paper)]
    calls = [[paper, *([] if name == _first(paper) else [name])] for paper, name in programs]
    calls += [[command] for command in COMMANDS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(_help, calls))
    parts = [f"## gfml {' '.join(call)}\n\n```text\n{text}```\n" for call, text in zip(calls, texts, strict=True)]
    intro = "What `--help` prints for each. `gfml PAPER` and `python PAPER/main.py` are the same program.\n"
    return "\n".join(["# Flags", intro, *parts])


def _first(paper: str) -> str:
    return next(name for name in FIRST if name in programs_of(paper))


def _help(words: list[str]) -> str:
    command = [sys.executable, "-m", "gfml.program.console", *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "100"})
    if done.returncode:
        LOG.warning("gfml %s --help failed: %s", " ".join(words), done.stderr.strip())
    return done.stdout.replace(f"{ROOT}/", "")


def reference() -> list[tuple[str, str, str]]:
    """Title, page and text of the reference: the mathematics, and a page per room of the core."""
    top = [path.stem for path in sorted((ROOT / "gfml").glob("*.py")) if path.stem != "__init__"]
    pages = [("Mathematics", "reference/mathematics.md", [f"gfml.{name}" for name in top])]
    for folder in sorted(path.parent for path in (ROOT / "gfml").glob("*/__init__.py")):
        names = [path.stem for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        modules = [f"gfml.{folder.name}", *(f"gfml.{folder.name}.{name}" for name in names)]
        pages.append((f"gfml.{folder.name}", f"reference/{folder.name}.md", modules))
    return [
        (title, page, "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])) for title, page, names in pages
    ]
