"""Command lines shared by every program: strict flags, TOML configs that are themselves flags, one-line errors.

Precedence, lowest first: parser default, TOML files in the order given, command line. A TOML file is turned into
argument tokens placed before the user's and everything is parsed once, so one parser checks types, choices and names.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import os
import re
import select
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gfml.base import settings as kinds
from gfml.base.allocator import keep_freed_memory
from gfml.base.errors import Terminated, UserError, as_flags, suggest
from gfml.base.files import FULL, keep_handed_locks
from gfml.base.home import find_config
from gfml.base.settings import Setting, flags_of, groups, help_text
from gfml.base.settings import TopksAction as TopksAction
from gfml.base.settings import number as number

if TYPE_CHECKING:
    import torch


class Options(argparse.Namespace):
    """Parsed flags. ``explicit`` names those set on the command line or in a TOML file."""

    # A slot, so that vars(options) holds the flags alone.
    __slots__ = ("explicit",)
    explicit: frozenset[str]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, argparse.SUPPRESS) or action.nargs == 0 or "%(default)" in text
        return text if silent or not action.option_strings else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser without guesses.

    Flags are never abbreviated; each is accepted with ``-`` and ``_`` between its words, unless the other spelling
    is a flag of its own or :meth:`one_spelling` forbids it. Errors are one line on stderr and exit code 2; they list
    the choices, name the nearest flag and, for values from a TOML file, the file.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        self._exact: set[str] = set()
        self._origin: dict[str, str] = {}
        super().__init__(*args, exit_on_error=False, **kwargs)
        # The standard pattern takes -1e-3 and the list -5,-7 for flags.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(,.*)?$|^-inf$")

    def one_spelling(self, *flags: str) -> None:
        """Accept these flags only as written: no automatic second spelling with ``-`` or ``_``."""
        for flag in flags:
            if flag not in self._option_string_actions:
                raise ValueError(f"{flag} is not a flag of this parser")
        self._exact.update(flags)

    def parse_args(self, args: Sequence[str] | None = None) -> Options:  # type: ignore[override]
        """Parse a command line, with the TOML files it names; see the module's docstring."""
        files, own = self._split_configs(list(sys.argv[1:] if args is None else args))
        own = self._respell(own)
        tokens = self._config_tokens(files) + own
        try:
            options, unknown = super().parse_known_args(tokens, Options())
        except argparse.ArgumentError as error:
            self.error(f"{error}{self._where(error, own)}{self._dashed(error, tokens)}")
        if unknown:
            self._unknown(unknown)
        options.explicit = frozenset(self._dests(tokens))
        return options

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"{self.prog}: error: {as_flags(' '.join(message.split()))}\n")

    def tokens_of(self, values: Mapping[str, Any]) -> list[str]:
        """Values by name as words of a command line; None stands for "none" where it is not the default."""
        tokens: list[str] = []
        for name, value in values.items():
            flag = self._flag_of(name, "the settings")
            if value is None and self._option_string_actions[flag].default is None:
                continue
            value = list(value) if isinstance(value, tuple) else "none" if value is None else value
            tokens += self._tokens_of(flag, name, value, "the settings")
        return tokens

    # -- spelling

    def _respell(self, tokens: list[str]) -> list[str]:
        end = tokens.index("--") if "--" in tokens else len(tokens)
        return [self._known_spelling(token) for token in tokens[:end]] + tokens[end:]

    def _known_spelling(self, token: str) -> str:
        """``token`` with its flag spelled as the parser knows it; unchanged when that is unknown or ambiguous."""
        name, equals, value = token.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return token
        plain = name.replace("_", "-")
        found = [flag for flag in self._flags() if flag not in self._exact and flag.replace("_", "-") == plain]
        return f"{found[0]}{equals}{value}" if len(found) == 1 else token

    def _flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def _dests(self, tokens: Iterable[str]) -> set[str]:
        """The destinations of the flags among ``tokens``."""
        names = {token.partition("=")[0] if token.startswith("--") else token[:2] for token in tokens}
        return {action.dest for flag, action in self._option_string_actions.items() if flag in names}

    # -- errors

    def _unknown(self, tokens: list[str]) -> NoReturn:
        flag = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
        if flag is None:
            self.error(f"found {tokens[0]!r} where no value is wanted; see --help")
        self.error(f"unknown flag {flag}{suggest(flag, self._flags()) or '; see --help'}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = suggest(str(value), names)
            message = f"unknown value {str(value)!r}: choose one of {', '.join(names)}{near}"
            raise argparse.ArgumentError(action, message)

    def _where(self, error: argparse.ArgumentError, own: list[str]) -> str:
        flags = (error.argument_name or "").split("/")
        path = next((self._origin[flag] for flag in flags if flag in self._origin), None)
        if path is None:
            return ""
        action = self._option_string_actions[flags[0]]
        return f" (set in {path}{' and on the command line' if action.dest in self._dests(own) else ''})"

    @staticmethod
    def _dashed(error: argparse.ArgumentError, tokens: list[str]) -> str:
        """How to give a value that was taken for a flag."""
        flags = (error.argument_name or "").split("/")
        place = next((place for place, token in enumerate(tokens[:-1]) if token in flags), None)
        if place is None or not re.match("-[^-]", tokens[place + 1]) or "expected" not in str(error):
            return ""
        return f"; a value that begins with - is written {tokens[place]}={tokens[place + 1]}"

    # -- TOML files

    def _split_configs(self, tokens: list[str]) -> tuple[list[str], list[str]]:
        """Take ``--config`` out of the tokens; ``--resume RUN`` puts RUN/config.toml before the other files."""
        files, rest, base = [], [], []
        tokens = tokens[::-1]
        while tokens:
            token = tokens.pop()
            if token == "--":
                rest += [token, *tokens[::-1]]
                break
            name, equals, value = token.partition("=")
            known = name in ("--config", "--resume") and name in self._option_string_actions
            if not known or not (equals or (tokens and not tokens[-1].startswith("--"))):
                rest.append(token)
                continue
            value = value if equals else tokens.pop()
            if name == "--config":
                files.append(value)
            else:
                base = [str(Path(value) / "config.toml")]
                rest.append(f"--resume={value}")
        if base and (file := Path(base[0]).parent).is_file():
            weights = f"weights of another program are judged by gfml import {file} --from NAME"
            self.error(
                f"found the file {file} for --resume, wanted the directory of an earlier run: give it; {weights}"
            )
        if base and not Path(base[0]).is_file():
            self.error(f"--resume found no run: there is no file {base[0]}; give the directory of an earlier run")
        return base + files, rest

    def _config_tokens(self, files: list[str]) -> list[str]:
        """Argument tokens of all files; of a key set twice, the later file counts."""
        tokens: dict[str, list[str]] = {}
        self._origin = {}
        for path in files:
            seen: dict[str, str] = {}
            for key, value in self._read_toml(path).items():
                flag = self._flag_of(key, path)
                if flag in seen:
                    self.error(f"{path} sets {flag} twice, as {seen[flag]} and {key}: keep one")
                seen[flag] = key
                tokens[flag] = self._tokens_of(flag, key, value, path)
                self._origin[flag] = path
        # The files themselves come last: a list before them cannot swallow a positional argument of the user's.
        return [token for part in tokens.values() for token in part] + [f"--config={path}" for path in files]

    def _read_toml(self, path: str) -> dict[str, Any]:
        try:
            return tomllib.loads(find_config(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.error(f"no config file {path}: check --config")
        except OSError as error:
            self.error(f"cannot read the config file {path}: {error.strerror}")
        except UnicodeDecodeError:
            self.error(f"the config file {path} is not UTF-8 text: save it as TOML in UTF-8")
        except tomllib.TOMLDecodeError as error:
            self.error(f"the config file {path} is not valid TOML: {error}")

    def _flag_of(self, key: str, path: str) -> str:
        flag = self._known_spelling(f"--{key}")
        action = self._option_string_actions.get(flag)
        known = [name for name, action in self._option_string_actions.items() if _is_config_flag(name, action)]
        if action is None or flag not in known:
            near = suggest(key, [name[2:] for name in known]) or "; keys are flag names without the leading --"
            self.error(f"{path} sets the unknown key {key!r}{near}")
        return next(name for name in action.option_strings if name.startswith("--"))

    def _tokens_of(self, flag: str, key: str, value: Any, path: str) -> list[str]:
        action = self._option_string_actions[flag]
        if isinstance(value, dict):
            self.error(f"{path} has the table [{key}]: configs are flat, write {key} = VALUE")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (bool, int, float, str)) for item in items):
            self.error(f"{path} sets {key} to {value!r}: values are strings, numbers, booleans and lists of these")
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            return self._switch_tokens(action, flag, key, value, path)
        words = [_word(item, action) for item in items]
        if isinstance(value, list) and action.nargs is not None:
            if any(word.startswith("--") for word in words):
                self.error(f"{path} sets {key} to {value!r}: no value of a list may start with --")
            return [flag, *words]
        return [f"{flag}=[{', '.join(words)}]" if isinstance(value, list) else f"{flag}={words[0]}"]

    def _switch_tokens(self, action: argparse.Action, flag: str, key: str, value: Any, path: str) -> list[str]:
        # bool is an int: 0 and 1 pass, 2 and "yes" do not.
        if isinstance(value, (str, float, list)) or value not in (0, 1):
            self.error(f"{path} sets {key} to {value!r}: choose true or false")
        if value:
            return [flag]
        no = f"--no-{flag[2:]}"
        return [no] if no in action.option_strings else []


def _is_config_flag(name: str, action: argparse.Action) -> bool:
    if not name.startswith("--") or action.dest in ("help", "config", "resume"):
        return False
    return not (isinstance(action, argparse.BooleanOptionalAction) and name.startswith("--no-"))


def _word(value: bool | int | float | str, action: argparse.Action) -> str:
    if isinstance(value, bool):
        return str(int(value)) if action.type is int else str(value).lower()
    return value if isinstance(value, str) else repr(value)


# -- flags from settings


def parser_of(program: str, about: str, settings: type) -> Parser:
    """The command line of a program: a flag for every setting."""
    parser = Parser(prog=program, description=about)
    add_settings(parser, settings)
    return parser


def add_settings(
    parser: Parser, settings: type, *, only: Collection[str] | None = None, without_defaults: bool = False
) -> None:
    """A flag for every setting of a class. only: of these names; without_defaults: a flag not given leaves no value."""
    for title, found in groups(settings):
        chosen = [one for one in found if only is None or one[0] in only]
        group = parser.add_argument_group(title) if chosen else parser
        for name, default, told in chosen:
            how = _how(default, told)
            if without_defaults:
                how["default"] = argparse.SUPPRESS
            group.add_argument(*flags_of(name, told), dest=name, help=help_text(told), **how)
            if told.exact:
                parser.one_spelling(*(flag for flag in flags_of(name, told)[1:] if "_" in flag))


def _how(default: Any, told: Setting) -> dict[str, Any]:
    """The keywords of ``add_argument`` for a setting."""
    how: dict[str, Any] = {"default": default}
    if (isinstance(default, bool) and told.kind is None) or told.kind is bool:
        return how | {"action": argparse.BooleanOptionalAction}
    if told.action is not None:
        how["action"] = told.action
    if told.nargs is not None:
        how["nargs"] = told.nargs
    if told.const is not None:
        how["const"] = told.const
    if told.choices:
        how["choices"] = told.choices
    if told.unit is not None:
        how["metavar"] = told.unit
    kind = told.kind or (type(default) if isinstance(default, (int, float)) else None)
    if kind is not None and not isinstance(told.action, type):
        how["type"] = kinds.number(kind) if kind in (int, float) and not told.choices else kind
    return how


# -- common flags


def resolve_device(options: Any) -> torch.device:
    """The device that ``--device`` or ``--gpu_id`` asks for.

    ``--device`` counts when it is not auto. Raises UserError when the asked CUDA device does not exist.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = options.device
    if name == "auto":
        if count == 0:
            if "gpu_id" in options.explicit:
                print("note: there is no CUDA device, --gpu_id is ignored and the CPU is used", file=sys.stderr)
            return torch.device("cpu")
        name = f"cuda:{options.gpu_id}" if "gpu_id" in options.explicit else "cuda"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"found {count} CUDA devices, wanted {name}: choose a smaller number or --device cpu")
    return device


def set_threads(options: Any) -> None:
    """Apply ``--threads``, and ``--tf32`` where a program has it; memory that a step frees is kept for the next one."""
    import torch

    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    if (wanted := getattr(options, "tf32", "auto")) != "auto":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted == "1"


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more, as after ``| head``; then it is turned away, so that leaving is silent."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run_main(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)`` and return the exit code: 0, 2 after what the user can mend, 130 after Ctrl-C, 143 after
    SIGTERM, 141 when stdout is closed.

    The user can mend a UserError, a place that cannot be used, and memory that does not suffice. Any other exception
    keeps its traceback. Use as ``sys.exit(run_main(main))``. One of several processes (torchrun) ends here.
    """
    code = _outcome(main, argv)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # gloo's threads may still hold the last tensors. Letting go of them while the interpreter is taken down
        # aborts the process once in a few hundred runs, after all its work, and torchrun then ends the others.
        atexit._run_exitfuncs()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)
    return code


def _outcome(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    """``main(argv)`` and the exit code that stands for how it ended."""
    # Read when torch is first imported, which main does later: waiting threads sleep instead of spinning, which
    # costs little alone and saves a shared machine (ten times the step time was seen with spinning threads).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_handed_locks()
    try:
        with _sigterm_raises():
            return main(argv) or 0
    except UserError as error:
        return _say(error)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    except KeyboardInterrupt as interrupt:
        # The run directory, if one was open, left a note that says how to go on.
        note = "; ".join(getattr(interrupt, "__notes__", ())) or "run the same command again to continue"
        ended = isinstance(interrupt, Terminated)
        print(f"{'terminated' if ended else 'interrupted'}: {as_flags(note)}", file=sys.stderr)
        return 143 if ended else 130
    except (OSError, MemoryError, RuntimeError) as error:
        if (message := _mendable(error)) is None:
            raise
        return _say(message)


def _say(error: object) -> int:
    print(f"error: {as_flags(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


def _mendable(error: Exception) -> str | None:
    """What to tell the user of an error that is no fault of the program; None for others."""
    if isinstance(error, OSError):
        if error.errno in FULL:  # of a stream, such as the log
            where = f" while writing {error.filename}" if error.filename is not None else ""
            return f"disk full{where}: free some space and run the same command again; earlier files are intact"
        places = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
        if error.filename is not None and error.errno in places:
            name = str(error.filename)
            shown = name if len(name) <= 120 else f"{name[:100]}... ({len(name)} letters)"
            return f"cannot use {shown} ({error.strerror}): give another place, or the right to use this one"
    elif isinstance(error, MemoryError) or re.search(
        "out of memory|can't allocate memory|Unable to alloc|calculation overflowed|Maximum allowed dimension exceeded",
        str(error),
    ):
        first = str(error).splitlines()[0]
        asked = re.search("(you tried to allocate|Unable to allocate) .*", first)
        return (
            f"the memory does not suffice ({asked[0] if asked else first[:120]}): give smaller widths, batches or data"
        )
    elif "home directory" in str(error):
        return "there is no home directory: set HOME, or give --data-root and --cache-dir"
    return None


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` in this process, unless somebody else has a use for it."""
    main_process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != main_process:
            os._exit(128 + number)
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
