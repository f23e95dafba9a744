"""Settings as text: flat TOML, and which flags are no part of what a run computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Flags of the moment: never written to a config, or reading it back would repeat the deed.
UNSAVED = frozenset({"help", "config", "resume", "overwrite", "eval_only", "run_name", "gpu_id"})
# Where a run happens and what it prints, not what it computes: no part of a run's identity.
LOCATION_FLAGS = UNSAVED | {
    "device", "threads", "out", "progress", "tensorboard", "checkpoint_every", "cuda_graph", "tf32", "metrics_as",
    "map_denominator", "graded",
}  # fmt: skip


def toml_text(config: Mapping[str, Any]) -> str:
    """A flat TOML document, keys in the order given; :class:`gfml.program.cli.Parser` reads it back to equal values."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in config.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        # A JSON string is a TOML basic string, but for the one control character JSON leaves raw.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    raise ValueError(f"found a {type(value).__name__} in a config, wanted strings, numbers, booleans or lists of these")
