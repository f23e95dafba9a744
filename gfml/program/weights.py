"""Published weights of timm's models: told before they are fetched, and a network that is not there is found out soon."""

from __future__ import annotations

import logging
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

from torch import nn

from gfml.base.errors import UserError

# Longest wait for the first answer of the place the weights come from.
SECONDS = 20.0


def pretrained(name: str, advice: str, **options: Any) -> nn.Module:
    """timm's model of that name with its published weights, from the cache where they lie in it.

    options: of ``timm.create_model``. UserError that ends in ``advice`` when they cannot be had.
    """
    import timm

    # Its warnings about each retry would bury the one line that says what to do.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    place = _place(name)
    if place is not None:
        print(f"fetching the pretrained weights of {name} from {place}", file=sys.stderr, flush=True)
        if not _answers(place):
            raise UserError(
                f"cannot get the pretrained weights of {name}: no answer from {place} in {SECONDS:.0f} s; {advice}"
            )
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's client raises its own and the network's errors
        raise UserError(f"cannot get the pretrained weights of {name} ({type(error).__name__}): {advice}") from error


def _place(name: str) -> str | None:
    """The address the weights would be fetched from; None where they are in the hub's cache, or where timm has none."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        return None
    if not known.hf_hub_id:
        return known.url or None
    files = (known.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(known.hf_hub_id, file), str) for file in files if file):
        return None
    return f"{constants.ENDPOINT}/{known.hf_hub_id}"


def _answers(place: str) -> bool:
    """Whether anything answers there in time, an error page included; looking a name up has no limit of its own."""
    found: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=SECONDS).close()
            found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError):
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found == [True]
