"""A model's name, asked of a hub on this host by the real client."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from penstock_launch.check.hub import hub_line
from penstock_launch.doctor.report import Line


@contextmanager
def hub(status: int, body: bytes = b"{}") -> Iterator[str]:
    """The address of a hub that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Ask":
    """With a cache that is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Ask(monkeypatch)


class Ask:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, address: str) -> Line:
        self._monkeypatch.setattr(constants, "ENDPOINT", address)
        return hub_line("owner/smol", "actor.path", "model")


def test_a_name_that_the_hub_does_not_have_is_a_problem(ask: Ask) -> None:
    with hub(404) as address:
        line = ask(address)
    assert line.verdict == "problem"
    assert "actor.path is 'owner/smol': neither a folder" in line.seen
    assert f"({address}) shows to you: it answers 404" in line.seen
    assert "HF_TOKEN" in line.advice


def test_a_hub_that_cannot_be_reached_is_named(ask: Ask) -> None:
    with hub(200) as address:
        pass
    line = ask(address)
    assert (line.verdict, address in line.seen, "Set actor.path" in line.advice) == ("problem", True, True)


def test_a_hub_in_trouble_is_no_reason_to_refuse(ask: Ask) -> None:
    with hub(503) as address:
        line = ask(address)
    assert (line.verdict, "answers 503" in line.seen) == ("not looked at", True)


def test_a_name_that_the_hub_has_is_fetched_at_the_start(ask: Ask) -> None:
    with hub(200, b'{"id": "owner/smol", "siblings": [], "tags": [], "private": false}') as address:
        line = ask(address)
    assert (line.verdict, "fetched at the start" in line.seen) == ("not looked at", True)


def test_without_the_hub_the_cache_must_have_it(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = ask("http://127.0.0.1:9")
    assert (line.verdict, "HF_HUB_OFFLINE" in line.seen) == ("problem", True)
    snapshot = tmp_path / "models--owner--smol" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--smol" / "refs").mkdir()
    (tmp_path / "models--owner--smol" / "refs" / "main").write_text("a")
    assert ask("http://127.0.0.1:9").verdict == "ok"
