"""Named tensors out of any file, and no code of the file's author runs."""

from __future__ import annotations

import collections
import os
import pickle

import pytest
import torch
from torch import nn

from gfml.base.checkpoints import save_state
from gfml.base.errors import UserError
from gfml.base.weights import read_weights, write_weights


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def model():
    torch.manual_seed(0)
    layer = nn.Sequential(collections.OrderedDict(a=nn.Linear(3, 2), norm=nn.BatchNorm1d(2)))
    layer.register_buffer("passing", torch.ones(2), persistent=False)
    return layer


@pytest.mark.parametrize("wrap", [lambda m: m.state_dict(), lambda m: {"model_state_dict": m.state_dict(), "epoch": 3},
                                  lambda m: {"state_dict": dict(m.state_dict())}, lambda m: (m, [1.0, 2.0], None), lambda m: m,
                                  lambda m: {"model": m.state_dict(), "best": torch.tensor(1.0)}, nn.DataParallel,
                                  lambda m: {f"_orig_mod.module.{k}": v for k, v in m.state_dict().items()}])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_forms_of_torch_save(wrap, zipped, model, tmp_path):
    torch.save(wrap(model), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    same(read_weights(tmp_path / "w.pth"), model.state_dict())


def test_own_checkpoints_and_safetensors(model, tmp_path):
    save_state(tmp_path / "best.pt", {"model": model.state_dict(), "epoch": 2})
    same(read_weights(tmp_path / "best.pt"), model.state_dict())
    pytest.importorskip("safetensors")
    write_weights(tmp_path / "w.safetensors", model.state_dict(), {"from": "a test"})
    same(read_weights(tmp_path / "w.safetensors"), model.state_dict())


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_one_flipped_bit_is_told(name, model, tmp_path):
    """Neither torch.load nor safetensors notices it."""
    path, state = tmp_path / name, model.state_dict()
    if name.endswith("tensors"):
        pytest.importorskip("safetensors")
        write_weights(path, state, {"from": "a test"})
    else:
        torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state["a.weight"].numpy().tobytes()) + 1] ^= 16
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged: .*checksum; "):
        read_weights(path)


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_runs(model, tmp_path):
    torch.save((Evil(f"touch {tmp_path / 'was_here'}"), model), tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"), model.state_dict())
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps({"a": 1}), pickle.dumps([1, 2])])
def test_what_holds_no_tensors(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="give (another file|a file)") as found:
        read_weights(tmp_path / "w.pth")
    assert "delete" not in str(found.value)
    with pytest.raises(UserError, match="no file"):
        read_weights(tmp_path / "absent.pth")
