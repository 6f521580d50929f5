"""A storm of 503: so many calls that a rollout server is full, and refuses those of the agent services.

Owns its threads and connections; `stop` ends them. Each call of the storm asks for as many completions as the server
runs at once. So one of them runs, as many as may wait do, and all others are refused, whoever sends them.
"""

import asyncio
import threading
from collections.abc import Sequence

import httpx

PAUSE_SECONDS = 0.1  # after a refusal; the agent service pauses for longer, so that the storm wins
CALL_SECONDS = 30.0
MAX_NEW_TOKENS = 200  # within the context of the tiny model


class Storm:
    """All storms of a run."""

    def __init__(self, max_running: int) -> None:
        """max_running: completions that a server runs at once."""
        self._max_running = max_running
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self.num_refused = 0
        """Calls of storms that were refused with 503."""

    def start(self, urls: Sequence[str], seconds: float) -> None:
        """Fill these servers for some time, in the background."""
        thread = threading.Thread(target=lambda: asyncio.run(self._rage(urls, seconds)), name="storm", daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End what still rages."""
        self._ending.set()
        for thread in self._threads:
            thread.join(CALL_SECONDS)

    async def _rage(self, urls: Sequence[str], seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(timeout=CALL_SECONDS, limits=limits, trust_env=False)
        async with http, asyncio.TaskGroup() as group:
            calls = [
                group.create_task(self._call_again_and_again(http, url))
                for url in urls
                for _ in range(self._max_running + 8)
            ]
            await asyncio.to_thread(self._ending.wait, seconds)
            for call in calls:
                call.cancel()

    async def _call_again_and_again(self, client: httpx.AsyncClient, url: str) -> None:
        body = {
            "prompt_ids": [3],
            "seeds": list(range(self._max_running)),
            "temperature": 1.0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "stop_token_ids": [],
            "at_least": None,
        }
        while True:
            try:
                response = await client.post(f"{url}/v1/generate", json=body)
                self.num_refused += response.status_code == 503
            except httpx.TransportError:
                pass  # it was killed meanwhile
            await asyncio.sleep(PAUSE_SECONDS)
