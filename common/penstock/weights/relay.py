"""The versions that this process passes on, and the stream in which it sends one.

Owns which chunks it may send. Invariant: a chunk is sent only after it was compared with its digest, or was staged
here; whoever receives it compares it again. Several streams of one version run at once, each at its own chunk.

    stream   the list of chunks, if it was asked for | frame | frame ...      until the last chunk, or `drop`
    frame    HEAD (num_held, rate, num_bytes) | one chunk, or no byte if the next one has not arrived here yet

A frame without bytes shows after each `ALIVE_SECONDS` that the sender lives. With `num_held` and `rate` its reader
distinguishes a sender that is slow from one that waits for chunks itself.
"""

import asyncio
import os
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from penstock.contracts.weight_sources import RelayRequest
from penstock.errors import WeightsError
from penstock.weights.bell import Bell
from penstock.weights.chunks import ChunkList, OpenFiles, encode_list

HEAD = struct.Struct("<IfI")
ALIVE_SECONDS = 1.0
COMING_SECONDS = 2.0  # from a server's request until its parent, which gets the same push, knows of the version
PIECE_BYTES = 2**18  # written at once: a reader over a slow link takes each within the time that connections have


class HeldVersion:
    """A version whose files are in a folder, or arrive there in the order of their chunks."""

    def __init__(self, folder: Path, chunks: ChunkList, *, complete: bool) -> None:
        self.folder = folder
        self.list_data, self.digest = encode_list(chunks)
        self.chunks = chunks.chunks
        self.num_held = len(self.chunks) if complete else 0
        """Chunks, from the first, that are here and compared with their digests."""
        self.rate = 0.0
        """Bytes a second with which they arrived, waits included; 0 if they were staged here."""
        self.is_dropped = False
        flags = os.O_RDONLY if complete else os.O_RDWR | os.O_CREAT
        self._files = OpenFiles(folder, [file.name for file in chunks.files], flags)
        self._using = threading.Lock()
        self._bell = Bell()

    @property
    def is_complete(self) -> bool:
        return self.num_held == len(self.chunks)

    def write(self, number: int, data: memoryview) -> None:
        """Store a chunk that was compared with its digest. In a thread."""
        chunk = self.chunks[number]
        self._files.write(chunk.file, chunk.start, data)

    def arrived(self, num_held: int, rate: float) -> None:
        """So many chunks are here now."""
        self.rate = rate
        self.num_held = num_held
        self._bell.ring()

    def drop(self) -> None:
        """Send nothing more of it; streams of it end."""
        with self._using:
            self.is_dropped = True
            self._files.close()
        self._bell.ring()

    def read(self, number: int) -> bytes | None:
        """A chunk; None if the version was dropped. In a thread."""
        chunk = self.chunks[number]
        with self._using:
            return None if self.is_dropped else self._files.read(chunk.file, chunk.start, chunk.num_bytes)

    async def wait(self, number: int) -> None:
        """Return once the chunk is here or the version is dropped, or after `ALIVE_SECONDS`."""
        await self._bell.wait(lambda: self.is_dropped or self.num_held > number, ALIVE_SECONDS)


class Relay:
    """The versions that one process passes on."""

    def __init__(self, count_sent: Callable[[int], None] = lambda _: None) -> None:
        """`count_sent`: gets the bytes of each chunk that was sent."""
        self._count_sent = count_sent
        self._held: dict[str, HeldVersion] = {}
        self._bell = Bell()

    def hold(self, version: HeldVersion) -> None:
        """Pass this version on."""
        if (before := self._held.pop(version.digest, None)) is not None:
            before.drop()
        self._held[version.digest] = version
        self._bell.ring()

    def drop_all_but(self, digests: set[str]) -> None:
        """Stop passing on versions, except those with these lists."""
        for digest in self._held.keys() - digests:
            self._held.pop(digest).drop()

    @property
    def digests(self) -> list[str]:
        """Those of the lists of its versions, in the order in which they came."""
        return list(self._held)

    async def find(self, digest: str) -> HeldVersion:
        """The version with this list; waits for one that comes within `COMING_SECONDS`. WeightsError: there is none."""
        await self._bell.wait(lambda: digest in self._held, COMING_SECONDS)
        if digest not in self._held:
            raise WeightsError(f"no version with the list of chunks {digest} is here; expected one of {self.digests}")
        return self._held[digest]

    async def stream(self, version: HeldVersion, request: RelayRequest) -> AsyncIterator[bytes]:
        """The answer to a request, in pieces."""
        if request.with_list:
            yield version.list_data
        for number in range(request.start, len(version.chunks)):
            while version.num_held <= number and not version.is_dropped:
                await version.wait(number)
                if version.num_held <= number:
                    yield HEAD.pack(version.num_held, version.rate, 0)
            if (data := await asyncio.to_thread(version.read, number)) is None:
                return
            yield HEAD.pack(version.num_held, version.rate, len(data))
            for start in range(0, len(data), PIECE_BYTES):
                yield data[start : start + PIECE_BYTES]
            self._count_sent(len(data))
