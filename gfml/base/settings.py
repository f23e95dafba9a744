"""A setting is one field of a frozen dataclass: flag, config key, argument, sweep space and documentation follow from it.

    @dataclass(frozen=True)
    class Loss(Settings):
        \"\"\"loss\"\"\"

        margin: float = setting(1.0, "slack of the mining, a squared distance", symbol="epsilon", also="margins")

The first line of a class's docstring heads its flags in ``--help``. Settings of a program inherit those of its parts.
Imports nothing heavy: flags are known before torch is.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gfml.base.toml import UNSAVED


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its name and default.

    help: meaning and unit. kind: from text to value; None takes that of the default. unit: what stands for the value in
    ``--help``. symbol: the paper's. also: further spellings, separated by spaces. key: its name in config files, where
    that is not its own. grid: values that the published search tried. nargs, const, action: as in argparse.
    beside: where and how fast, not what is computed. late: left out of configs at its default, so that runs from before
    it came keep their names. inert: accepted without effect; help says why. exact: further spellings
    with _ have no second one with -.
    """

    help: str
    kind: Callable[[str], Any] | None = None
    unit: str | tuple[str, ...] | None = None
    symbol: str = ""
    choices: tuple[Any, ...] = ()
    also: str = ""
    key: str = ""
    grid: tuple[Any, ...] = ()
    nargs: int | str | None = None
    const: Any = None
    action: Any = None
    beside: bool = False
    late: bool = False
    inert: bool = False
    exact: bool = False


def setting(default: Any, help: str, kind: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field with its default and what :class:`Setting` holds."""
    more = {name: tuple(value) if name in ("choices", "grid") else value for name, value in more.items()}
    return field(default=default, metadata={"setting": Setting(help, kind, **more)})


def inert(default: Any, why: str, **more: Any) -> Any:
    """A flag of an old command line, accepted without effect. why: said once when it is given."""
    return setting(default, why, inert=True, beside=True, **more)


def changed(owner: type, name: str, default: Any, **more: Any) -> Any:
    """The setting of another class with another default, and what else differs."""
    return field(default=default, metadata={"setting": dataclasses.replace(about(owner)[name], **more)})


def about(settings: type) -> dict[str, Setting]:
    """Every setting of a class by name."""
    found = {one.name: one.metadata.get("setting") for one in dataclasses.fields(settings)}
    return {name: one for name, one in found.items() if one is not None}


@dataclass(frozen=True)
class Settings:
    """All settings of a run, checked. explicit: names that the user set; unused: names that mean nothing in this run."""

    explicit: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    unused: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @classmethod
    def choose(cls, tokens: Sequence[str]) -> type[Self]:
        """The class for a command line, where its flags depend on one of them."""
        return cls

    @classmethod
    def translate(cls, tokens: list[str]) -> list[str]:
        """A command line in old spellings that need more than another name, in today's."""
        return tokens

    @classmethod
    def layers(cls, tokens: Sequence[str]) -> list[str]:
        """Words before the user's own: ``--config=FILE`` of the program's stored settings, lowest first."""
        return []

    @classmethod
    def resolve(cls, options: argparse.Namespace) -> None:
        """Fill in defaults that depend on others and check rules between settings, in place. ``options.explicit``: given.

        UserError where settings contradict each other.
        """

    def each(self) -> Sequence[Self]:
        """The settings of every run that this command line makes."""
        return [self]

    @property
    def resolved(self) -> dict[str, Any]:
        """The resolved config: values by key, ready for :func:`gfml.base.toml.toml_text`.

        A value of None is left out when it is the default and written as "none" when it is not.
        """
        config: dict[str, Any] = {}
        for one in dataclasses.fields(self):
            told, value = one.metadata.get("setting"), getattr(self, one.name)
            if told is None or told.inert or one.name in UNSAVED | self.unused or (told.late and value == one.default):
                continue
            if value is not None:
                config[_key(one.name, told)] = list(value) if isinstance(value, tuple) else value
            elif one.default is not None:
                config[_key(one.name, told)] = "none"
        return config

    @classmethod
    def beside(cls) -> frozenset[str]:
        """Keys that are no part of a run's identity, in the ``_`` spelling."""
        found = about(cls).items()
        return frozenset(_key(name, told).replace("-", "_") for name, told in found if told.beside)


def _key(name: str, told: Setting) -> str:
    return told.key or name.replace("_", "-")


def groups(settings: type) -> Iterator[tuple[str, list[tuple[str, Any, Setting]]]]:
    """Title and (name, default, setting) of every part: the classes in the order in which their fields stand."""
    owners: dict[str, type] = {}
    for cls in reversed(settings.__mro__):
        for name in inspect.get_annotations(cls):
            owners.setdefault(name, cls)
    parts: dict[str, list[tuple[str, Any, Setting]]] = {}
    for one in dataclasses.fields(settings):
        if "setting" in one.metadata:
            doc = owners[one.name].__doc__ or owners[one.name].__name__
            title = doc.strip().splitlines()[0].rstrip(".")
            parts.setdefault(title, []).append((one.name, one.default, one.metadata["setting"]))
    yield from parts.items()


def flags_of(name: str, told: Setting) -> list[str]:
    """The spellings of a setting on a command line, the plain one first."""
    return [
        f"--{name.replace('_', '-')}",
        *(word if word.startswith("-") else f"--{word}" for word in told.also.split()),
    ]


def frozen(settings: type, options: argparse.Namespace) -> Any:
    """The settings of parsed and resolved options."""
    values = {
        one.name: getattr(options, one.name) for one in dataclasses.fields(settings) if hasattr(options, one.name)
    }
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return settings(**values | {"explicit": options.explicit})


def help_text(told: Setting) -> str:
    """Meaning, the paper's symbol and the published search."""
    text = told.help + (f" (paper: {told.symbol})" if told.symbol else "")
    return text + (f"; published search: {', '.join(map(str, told.grid))}" if len(told.grid) > 1 else "")


# -- kinds: from text to value


def topks(text: str) -> tuple[int, ...]:
    """Cut-offs K, ascending without repeats, from ``"[10, 20]"``, ``"10,20"`` or ``"10 20"``."""
    words = re.split(r"[\s,]+", re.sub(r"^\s*[\[(]|[\])]\s*$", "", text).strip(" ,"))
    if not all(re.fullmatch(r"[0-9]+", word) and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted positive whole numbers such as 10 20 or [10, 20]")
    return tuple(sorted({int(word) for word in words}))


class TopksAction(argparse.Action):
    """``--topks 10 20``, ``--topks 10,20`` and ``--topks "[10, 20]"``; use with ``nargs="+"``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, topks(" ".join(values)))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


LARGEST = 2**32 - 1


def number(
    kind: type = float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    none: bool = False,
) -> Callable[[str], Any]:
    """An argument type: a finite number with above < x, least <= x <= most; ``none=True`` also takes "none".

    Whole numbers end at ``LARGEST``, as far as every seed and every array goes.
    """
    bounds = ((above, ">"), (least, ">="), (most, "<="))
    wanted = " and ".join(f"{sign} {bound}" for bound, sign in bounds if bound is not None)
    wanted = f"{'a whole number' if kind is int else 'a number'} {wanted}".strip() + (" or none" if none else "")

    def parse(text: str) -> Any:
        if none and text.lower() == "none":
            return None
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if kind is int and abs(value) > LARGEST:
            raise argparse.ArgumentTypeError(f"found {text[:40]}, wanted a whole number of at most {LARGEST}")
        good = abs(value) < float("inf") and (above is None or value > above)
        if not (good and (least is None or value >= least) and (most is None or value <= most)):
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted {wanted}")
        return value

    return parse


def device(text: str) -> str:
    """auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted auto, cpu, cuda or cuda:N")
    return text


def yes_or_no(text: str) -> bool:
    """yes, true, t, y, 1 and no, false, f, n, 0 in any case."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, wanted true or false")


positive = number(above=0)
nonnegative = number(least=0)
count = number(int, least=1)
whole = number(int, least=0)
share = number(least=0, most=1)
any_number = number()
norm = number(above=0, none=True)


def fill(options: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Set what was not given."""
    for name, value in values.items():
        if name not in options.explicit:
            setattr(options, name, value)


def as_tokens(values: Mapping[str, Any]) -> list[str]:
    """Settings by name as words of a command line."""
    tokens: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            tokens.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, (list, tuple)):
            tokens += [flag, *map(str, value)]
        else:
            tokens.append(f"{flag}={'none' if value is None else value}")
    return tokens
