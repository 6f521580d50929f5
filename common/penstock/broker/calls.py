"""Scripts and reads called over connections of their own, one call at a time on each.

Owns these connections. Invariant: a connection is used again only after it has given all answers of its last call.
The client's pool looks for stray data before each call and wraps it in retries, which adds a third to the client's cost
of a group (docs/adr/0008). Here the first attempt skips both. If the connection is broken, the client repeats the call
with its back-off.
"""

from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis
from hiredis import pack_command
from redis.exceptions import ConnectionError, NoScriptError, OutOfMemoryError, ResponseError, TimeoutError

from penstock.broker.scripts import ScriptCall

Command = Sequence[Any]


class Calls:
    """The calls of one client."""

    def __init__(self, client: "aioredis.Redis") -> None:
        self._client: Any = client  # parts of it have no types
        self._idle: list[Any] = []

    async def run(self, call: ScriptCall, first: Sequence[Command] = ()) -> Any:
        """Run a script that may be repeated; its text is sent only if the server does not have it.

        `first`: commands that may be repeated too and go before it, in the same round trip. The script must check
        itself whether a full Redis has refused them.
        """
        command = ("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments)
        *before, answer = await self._exchange([*first, command])
        for each in before:
            if isinstance(each, ResponseError) and not isinstance(each, OutOfMemoryError):
                raise each
        if isinstance(answer, NoScriptError):
            _checked(*await self._exchange([("SCRIPT", "LOAD", call.script.text)]))
            [answer] = await self._exchange([command])
        return _checked(answer)

    async def read(self, *command: Any) -> Any:
        """The answer of a command that changes nothing."""
        [answer] = await self._exchange([command])
        return _checked(answer)

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        """An answer for each command: the error if it was refused."""
        connection = self._idle.pop() if self._idle else self._client.connection_pool.make_connection()
        try:
            await connection.send_packed_command([pack_command(tuple(each)) for each in commands])
            answers = [await _answer(self._client.parse_response(connection, each[0])) for each in commands]
        except (ConnectionError, TimeoutError, OSError):
            await connection.disconnect(nowait=True)
            return [await _answer(self._client.execute_command(*each)) for each in commands]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)
        return answers

    async def close(self) -> None:
        """Close the connections that no call is using; a call that is cancelled closes its own."""
        while self._idle:
            await self._idle.pop().disconnect()


async def _answer(call: Any) -> Any:
    try:
        return await call
    except ResponseError as error:
        return error


def _checked(answer: Any) -> Any:
    if isinstance(answer, ResponseError):
        raise answer
    return answer
