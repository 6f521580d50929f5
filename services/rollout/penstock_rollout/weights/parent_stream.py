"""One answer of a parent: the chunks of a version as they come, and how fast they come.

Owns the connection, and the judgement whether its parent is gone, slow or wrong. Invariant: a parent that waits for
chunks itself is never judged slow: what counts is the time in which it had the chunk that was read.
"""

import contextlib
import http.client
import json
import math
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
import xxhash
from pydantic import SecretStr

from penstock.contracts.weight_sources import LeftFor, Parent, RelayRequest
from penstock.errors import WeightsError
from penstock.runtime.relay_route import LIST_BYTES_HEADER, PATH
from penstock.runtime.requests import auth_headers, transport_fault
from penstock.weights.chunks import MAX_LIST_BYTES, Chunk, ChunkList, decode_list
from penstock.weights.relay import HEAD

READ_BYTES = 2**18
SILENT_SECONDS = 5.0  # a parent that lives writes every second
LAST_SILENT_SECONDS = 30.0  # of the trainer, after which there is nobody left
LIST_SECONDS = 10.0  # for a few hundred kilobytes
SHOWN_BYTES = 300

Arriving = Generator[tuple[ChunkList, int, memoryview], None, None]


class ParentError(Exception):
    """This parent is of no use: `reason`."""

    def __init__(self, reason: LeftFor, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Judge(Protocol):
    """Decides while bytes come: raises ParentError to leave, or another error to end."""

    def __call__(self, pace: "Pace", parent_rate: float) -> None: ...


@dataclass
class Pace:
    """What one connection brought, and the seconds in which its parent had more to send."""

    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.num_bytes / self.seconds if self.seconds else 0.0


class ParentStream:
    """The chunks of one version from one parent. Blocks: for a thread of its own."""

    def __init__(self, parent: Parent, token: SecretStr | None, judge: Judge, *, is_last: bool, seconds: float) -> None:
        """`is_last`: there is no other parent. `seconds`: the longest silence if the time of all is up then."""
        self.pace = Pace()
        self._parent = parent
        self._headers = {**auth_headers(token), "Content-Type": "application/json"}
        self._judge = judge
        self._is_last = is_last
        self._silent_seconds = min(LAST_SILENT_SECONDS if is_last else SILENT_SECONDS, seconds)
        self._connection: http.client.HTTPConnection | None = None
        self._parent_rate = 0.0
        self._has_more = False

    def read(self, digest: str, known: ChunkList | None, start: int) -> Arriving:
        """(list, number, bytes) of each chunk from `start` on, each compared with its digest.

        The bytes are valid until the next chunk. ParentError: the parent is of no use (any more).
        """
        parts = urlsplit(self._parent.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        host = parts.hostname or ""
        try:
            with contextlib.closing(kind(host, parts.port, timeout=self._silent_seconds)) as connection:
                self._connection = connection
                request = RelayRequest(digest, start, known is None)
                body = json.dumps(msgspec.to_builtins(request))
                connection.request("POST", PATH, body, self._headers)
                response = connection.getresponse()
                if response.status != 200:
                    text = response.read(SHOWN_BYTES).decode(errors="replace")
                    raise ParentError("gone", f"HTTP {response.status}: {text}")
                chunks = known or self._read_list(response, digest)
                yield from self._read_chunks(response, chunks, start)
        except (http.client.HTTPException, OSError, EOFError) as error:
            raise ParentError("gone", transport_fault(error)) from error

    def end(self) -> None:
        """Let a read that waits fail. From another thread."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)

    def _read_list(self, response: http.client.HTTPResponse, digest: str) -> ChunkList:
        num_bytes = int(response.headers.get(LIST_BYTES_HEADER, "0"))
        if not 0 < num_bytes <= MAX_LIST_BYTES:
            raise ParentError("wrong", f"it has a list of chunks of {num_bytes} bytes")
        data = bytearray(num_bytes)
        self._fill(response, memoryview(data), counts=False, seconds=LIST_SECONDS)
        try:
            return decode_list(bytes(data), digest)
        except WeightsError as error:
            raise ParentError("wrong", str(error)) from error

    def _read_chunks(self, response: http.client.HTTPResponse, chunks: ChunkList, start: int) -> Arriving:
        buffer, wanted = memoryview(bytearray(chunks.chunk_bytes)), chunks.chunks
        for number in range(start, len(wanted)):
            yield chunks, number, self._read_chunk(response, number, wanted[number], buffer)

    def _read_chunk(
        self, response: http.client.HTTPResponse, number: int, chunk: Chunk, buffer: memoryview
    ) -> memoryview:
        head = memoryview(bytearray(HEAD.size))
        num_bytes = 0
        while num_bytes == 0:
            self._fill(response, head, counts=self._has_more)
            num_held, self._parent_rate, num_bytes = HEAD.unpack(head)
            self._has_more = num_held > number
        if num_bytes != chunk.num_bytes:
            raise ParentError("wrong", f"it sent {num_bytes} bytes as chunk {number}: expected {chunk.num_bytes}")
        data = buffer[:num_bytes]
        self._fill(response, data, counts=True)
        if (digest := xxhash.xxh3_64_hexdigest(data)) != chunk.digest:
            raise ParentError("wrong", f"it sent chunk {number} with digest {digest}: expected {chunk.digest}")
        self._has_more = num_held > number + 1
        return data

    def _fill(
        self, response: http.client.HTTPResponse, data: memoryview, *, counts: bool, seconds: float = math.inf
    ) -> None:
        """Read exactly so many bytes. `counts`: the parent has them, so that the time that they take is its own.

        ParentError: it takes longer than `seconds`, and there is another parent.
        """
        deadline = math.inf if self._is_last else time.monotonic() + seconds
        while data:
            begun = time.monotonic()
            piece = response.read1(min(len(data), READ_BYTES))
            if not piece:
                raise EOFError
            if counts:
                self.pace.seconds += time.monotonic() - begun
                self.pace.num_bytes += len(piece)
            data[: len(piece)] = piece
            data = data[len(piece) :]
            self._judge(self.pace, self._parent_rate)
            if time.monotonic() > deadline:
                raise ParentError("slow", f"its list of chunks took longer than {seconds:g} s")
