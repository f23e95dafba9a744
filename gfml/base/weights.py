"""Named tensors out of any file of weights, without running what the file says.

Read are ours, state dicts in torch.save's formats (the old one too), safetensors, and whole pickled modules: of these, only
tensors are built, every other class stays an empty shell, so that no code of the file's author runs.
"""

from __future__ import annotations

import os
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gfml.base.checkpoints import FORMAT, broken_part, load_plain
from gfml.base.errors import UserError
from gfml.base.files import atomic_open

# Where programs put the state inside what they save, outermost first.
WRAPPERS = ("state", "model", "state_dict", "model_state_dict", "net", "module")
# What torch.compile and DataParallel put before every name of the model they hold.
_SHELLS = ("_orig_mod.", "module.", "_orig_mod.")
_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """{name: tensor} on the CPU, without the prefixes of DataParallel and torch.compile. Of a tuple or list the first element
    that holds tensors counts.

    Errors: UserError when there is no file, a damaged one, or nothing with named tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        if broken := broken_part(path):
            raise UserError(f"{path} is damaged: its part {broken} does not have its checksum; fetch or save it again")
        content = load_plain(path)
    except UserError:
        raise
    except Exception:  # classes, or a damaged file: the reader of shells tells which
        content = _shells(path)
    found = _named(content)
    if not found:
        raise UserError(
            f"{path} holds no named tensors: give a file that torch.save wrote of a model or its state_dict()"
        )
    for prefix in _SHELLS:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def write_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A safetensors file of these tensors, with ``about`` in its header. UserError where the library is absent."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("writing weights needs safetensors: pip install safetensors") from None
    with atomic_open(path, "wb") as stream:
        state = {name: value.contiguous().clone() for name, value in state.items()}
        stream.write(save(state, {**about, "crc32": _checksum(state)}))


def _checksum(state: Mapping[str, Tensor]) -> str:
    """Of all bytes in the order of the names; the format has none."""
    total = 0
    for name in sorted(state):
        total = zlib.crc32(state[name].cpu().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"reading {path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as archive:
            names, about = archive.keys(), archive.metadata() or {}
            state = {name: archive.get_tensor(name) for name in names}
    except Exception as error:  # the library's own error class is not public
        raise UserError(f"{path} is no readable safetensors file ({_line(error)}): give another file") from error
    if about.get("crc32") not in (None, _checksum(state)):
        raise UserError(f"{path} is damaged: it does not have its checksum; export it again")
    return state


class _Shell:
    """Stands for an object of any class: keeps what was put into it and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.content: Any = None

    def __setstate__(self, state: Any) -> None:
        self.content = state

    def __call__(self, *_: Any, **__: Any) -> _Shell:
        return _Shell()

    def append(self, _: Any) -> None:
        """An element of a list of an unknown class."""

    extend = append

    def __setitem__(self, key: Any, value: Any) -> None:
        """An entry of a dict of an unknown class."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _TENSORS.get((module, name)) or type(name, (_Shell,), {})


def _shells(path: Path) -> Any:
    module = SimpleNamespace(
        __name__="gfml.base.weights",
        Unpickler=_Unpickler,
        load=lambda stream, **options: _Unpickler(stream, **options).load(),
    )
    try:
        # With an unpickler of one's own torch.load uses that one alone; ours builds tensors and shells.
        return torch.load(path, map_location="cpu", pickle_module=module)
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(f"{path} cannot be read as weights ({_line(error)}): give another file") from error


def _named(content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping or of a module's shell by their dotted names; {} where there are none."""
    if isinstance(content, _Shell):
        return dict(_of_module(content, ""))
    if isinstance(content, (tuple, list)):
        return next((found for part in content if (found := _named(part))), {})
    if not isinstance(content, Mapping):
        return {}
    content = content["state"] if content.get("format") == FORMAT else content
    inner = (_named(content[name]) for name in WRAPPERS if isinstance(content.get(name), (Mapping, _Shell)))
    own = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return next(filter(None, inner), own)


def _of_module(shell: _Shell, prefix: str) -> list[tuple[str, Tensor]]:
    """Parameters, buffers and those of its parts, as state_dict() would name them."""
    state = shell.content if isinstance(shell.content, Mapping) else {}
    dropped = state.get("_non_persistent_buffers_set") or ()
    found = [
        (prefix + name, value.detach() if isinstance(value, Tensor) else value)
        for kind in ("_parameters", "_buffers")
        for name, value in (state.get(kind) or {}).items()
        if isinstance(value, Tensor) and name not in dropped
    ]
    for name, part in (state.get("_modules") or {}).items():
        if isinstance(part, _Shell):
            found += _of_module(part, f"{prefix}{name}.")
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
