"""A program: its settings and where its experiment is. Imports nothing heavy, so that ``--help`` and a wrong flag are quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.base.runs import checksums, find_done, read_result, told_checksums
from gfml.base.settings import Settings, about, as_tokens, frozen
from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import Parser, parser_of

if TYPE_CHECKING:
    from gfml.program.experiment import Experiment


# What is printed of a finished run, and where it is kept.
IS_DONE, TEXT = "{} is done; this is its result (--eval-only judges it anew, --overwrite trains anew)", "result.txt"


@dataclass(frozen=True)
class Program:
    """What a paper declares. file: as it is called, such as mcl/main.py, a module mcl.main that holds it as ``PROGRAM``.

    family: the first word of its run directories. settings: its flags. experiment: the class that says how the data is
    read, what is built and how it is judged (:class:`gfml.program.experiment.Experiment`), or "module:Class", which is
    imported when the flags are known to be good. about: for ``--help``.
    """

    file: str
    family: str
    settings: type[Settings]
    experiment: type[Experiment] | str
    about: str

    @property
    def module(self) -> str:
        """The module that declares it."""
        return self.file.removesuffix(".py").replace("/", ".")

    def parser(self, tokens: Sequence[str] = ()) -> Parser:
        """The command line; ``tokens`` matter where flags depend on others."""
        return parser_of(self.file, self.about, self.settings.choose(tokens))

    def parse(self, argv: Sequence[str] | None = None) -> Any:
        """Checked settings of a command line; a mistake is one line on stderr and exit code 2."""
        tokens = self.settings.translate(list(sys.argv[1:] if argv is None else argv))
        settings = self.settings.choose(tokens)
        parser = parser_of(self.file, self.about, settings)
        return self._checked(settings, parser, settings.layers(tokens) + tokens)

    def of(self, config: Mapping[str, Any] | None = None, **values: Any) -> Any:
        """The same from values by name: ``PROGRAM.of(dataset="lastfm", lr=1e-2)``. config: others below them."""
        values = {**{key.replace("-", "_"): value for key, value in (config or {}).items()}, **values}
        settings = self.settings.choose(as_tokens(values))
        parser = parser_of(self.file, self.about, settings)
        return self._checked(settings, parser, parser.tokens_of(values))

    def _checked(self, settings: type[Settings], parser: Parser, tokens: Sequence[str]) -> Any:
        options = parser.parse_args(tokens)
        try:
            settings.resolve(options)
        except UserError as error:
            parser.error(str(error))
        for name, told in about(settings).items():
            if told.inert and name in options.explicit:
                print(f"note: --{name.replace('_', '-')} has no effect: {told.help}", file=sys.stderr)
        return frozen(settings, options)

    def with_changes(self, config: str, changes: Mapping[str, Any]) -> Any:
        """The settings of a stored config with some values changed."""
        return self.parse([f"--config={config}", *as_tokens(changes)])

    def runs(self, argv: Sequence[str]) -> Sequence[Any]:
        """The settings of every run that a command line makes."""
        return self.parse(argv).each()

    def load_experiment(self) -> type[Experiment]:
        """The class of the experiment."""
        if not isinstance(self.experiment, str):
            return self.experiment
        module, _, name = self.experiment.partition(":")
        return getattr(importlib.import_module(module), name)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The program: parse, then one life of a run for each that the flags ask for."""
        return self.run(self.parse(argv))

    def run(self, settings: Any) -> int:
        """The runs of these settings."""
        if (text := self._done(settings)) is not None:
            print(text)
            return 0
        # Heavy imports wait until the flags are known to be good and there is something to do.
        from gfml.program.driver import drive

        return drive(self, settings)

    def _done(self, settings: Any) -> str | None:
        """What a command prints whose one run was finished before; None where there is more to do than to print."""
        if not settings.only_shown or "WORLD_SIZE" in os.environ or len(settings.each()) > 1:
            return None
        apart, name, resume = LOCATION_FLAGS | settings.beside(), settings.run_name, settings.resume
        path = find_done(settings.out, self.family, settings.resolved, apart, name, resume)
        if path is None or not (path / TEXT).is_file():
            return None
        read_result(path)  # refuses a damaged one
        if told_checksums(path)[1:] not in ([], checksums(path)[1:]):
            return None  # it is made again from the result
        text = (path / TEXT).read_text(encoding="utf-8", errors="replace").removesuffix("\n")
        return "\n".join([IS_DONE.format(path), text, places(path)])


def places(path: Path) -> str:
    """Where everything of a run is, a line each."""
    lines = [f"run directory   {path}"]
    for what, name in (
        ("report", "report/report.html"),
        ("report", "report.html"),
        ("epochs", "epochs.csv"),
        ("index", "ann"),
    ):
        if (path / name).exists():
            lines.append(f"{what:<15} {path / name}")
    if (path / "tensorboard").exists():
        lines.append(f"TensorBoard     tensorboard --logdir {path / 'tensorboard'}")
    return "\n".join(lines)


def program_of(module: str) -> Program:
    """The program that a module of a paper declares. UserError where it declares none."""
    try:
        found = getattr(importlib.import_module(module), "PROGRAM", None)
    except ModuleNotFoundError as error:
        raise UserError(f"there is no program {module} ({error}): install the package that has it") from None
    if not isinstance(found, Program):
        raise UserError(f"{module} declares no program: name one such as recsys.main")
    return found
