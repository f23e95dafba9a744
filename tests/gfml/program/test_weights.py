"""Published weights: told before they are fetched, and no long silence without a network."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest

from gfml.base.errors import UserError
from gfml.program import weights


@pytest.fixture
def silent_place():
    """An address that takes calls and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/weights"


def test_a_place_without_an_answer_is_one_line_in_time(silent_place, monkeypatch, capsys):
    monkeypatch.setattr(weights, "SECONDS", 0.2)
    monkeypatch.setattr(weights, "_place", lambda name: silent_place)
    with pytest.raises(UserError, match="no answer from http://127.0.0.1.*; train with --pretrained 0") as error:
        weights.pretrained("resnet18", "train with --pretrained 0")
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == f"fetching the pretrained weights of resnet18 from {silent_place}\n"


def test_an_error_page_is_an_answer(monkeypatch):
    class Missing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Missing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert weights._answers(f"http://127.0.0.1:{server.server_port}/x")
    finally:
        server.shutdown()
    assert not weights._answers("http://127.0.0.1:9/x")


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch, tmp_path):
    import huggingface_hub

    assert weights._place("test_vit").startswith("https://")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *words: str(tmp_path / "model.safetensors"))
    assert weights._place("test_vit") is None
