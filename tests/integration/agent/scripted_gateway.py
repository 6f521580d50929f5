"""A gateway on loopback that answers OpenAI clients from a script, for agents with a client of their own."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from penstock_agent.environments.episode import EpisodeCutError
from tests.unit.agent.environments.scripted_session import Answer, ScriptedSession


@contextmanager
def scripted_gateway(*answers: Answer, num_refusals: int = 0, **keys: Any) -> Iterator[ScriptedSession]:
    """A session whose base_url answers; it refuses its first `num_refusals` calls with 503."""
    session = ScriptedSession(*answers, **keys)
    refusals = [None] * num_refusals

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = self._request()
            if request is None or not self.path.endswith("/v1/chat/completions"):
                return
            if refusals:
                refusals.pop()
                self._send(503, {"error": {"message": "no server"}})
                return
            try:
                message = session.answer(request["messages"], request.get("tools", []))
            except EpisodeCutError as error:
                self._send(400, {"error": {"message": str(error), "type": "episode_cut"}})
                return
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            model = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
            self._send(200, {**model, "choices": [choice]})

        def do_PUT(self) -> None:
            request = self._request()
            if request is not None and self.path.endswith("/v1/reward"):
                session.reward = float(request["reward"])
                self._send(200, {})

        def _request(self) -> dict[str, Any] | None:
            if self.headers["Authorization"] != f"Bearer {session.api_key}":
                self._send(401, {"error": {"message": "wrong key"}})
                return None
            request: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            return request

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Requests are not logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    session.base_url = f"http://127.0.0.1:{server.server_port}/s/{session.api_key}/v1"
    try:
        yield session
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
