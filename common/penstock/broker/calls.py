"""Scripts called over connections of their own, one call at a time on each.

Owns these connections. Invariant: a connection is used again only after it has given the whole answer of its last call.
The client's pool looks for stray data before each call and wraps it in retries: half of what a call costs. Here the
first attempt does without; one that meets a broken connection is repeated by the client, with its back-off. Called by
`queue.py`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import ConnectionError, NoScriptError, ResponseError, TimeoutError


class Calls:
    """The scripts of one client."""

    def __init__(self, client: "aioredis.Redis") -> None:
        self._client: Any = client  # parts of it have no types
        self._idle: list[Any] = []
        self._digests: dict[str, str] = {}

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script that may be repeated; the server is sent its text only where it does not know it."""
        digest = self._digests.get(script)
        if digest is None:
            digest = self._digests[script] = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        command = ("EVALSHA", digest, len(keys), *keys, *args)
        try:
            return await self._call(command)
        except NoScriptError:
            await self._client.script_load(script)
            return await self._call(command)

    async def _call(self, command: Sequence[Any]) -> Any:
        connection = self._idle.pop() if self._idle else self._client.connection_pool.make_connection()
        try:
            await connection.send_packed_command(connection.pack_command(*command))
            answer = await connection.read_response()
        except ResponseError:
            self._idle.append(connection)
            raise
        except (ConnectionError, TimeoutError, OSError):
            await connection.disconnect(nowait=True)
            return await self._client.execute_command(*command)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)
        return answer

    async def close(self) -> None:
        """Close the connections that no call is using; a call that is cancelled closes its own."""
        while self._idle:
            await self._idle.pop().disconnect()
