"""The connection of one service to one run's keys in Redis or Valkey.

Owns the wait for a full server, the translation of errors, and the reads of every kind of service: the announced
version, the registered services, the depths of the streams. Invariant: a call either has its effect once or raises;
every script may be repeated after a broken connection. `connect.py` makes it; `worker.py` and `trainer.py` build on it.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import redis.asyncio as aioredis
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from penstock.broker.calls import Calls, Command
from penstock.broker.identity import RunIdentity, owner_in
from penstock.broker.keys import GROUP, Keys, Stage
from penstock.broker.scripts import Script, ScriptCall
from penstock.config.secrets import hide
from penstock.contracts import ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord, Turn, read_announced
from penstock.errors import ConfigError, LeaseLostError, LostWritesError, PenstockError, QueueError, StrangerError

log = logging.getLogger(__name__)

REGISTER = Script("anyone/register")
TURN = Script("anyone/turn")

OLDEST_VERSION = (6, 2)  # XPENDING ... IDLE, XAUTOCLAIM and GETDEL appeared there
LONGEST_BLOCK_SECONDS = 30.0  # of one wait for a wake-up
RELEASED = b"released"  # the consumer of entries that nobody holds any more (lua/shared/released.lua)
SHOWN = re.compile(rb"(\d+)\|([a-z]+)\|([0-9a-f]+)\|(.*)", re.DOTALL)  # a service, as show() in lua/shared writes it
FULL_RETRY_SECONDS = 1.0
NO_CONNECTION_LEFT = "max number of clients reached"


class Queue:
    """The calls that every service may make to a run's Redis."""

    def __init__(
        self,
        client: "aioredis.Redis",
        keys: Keys,
        identity: RunIdentity,
        shown_url: str,
        timeout_seconds: float,
        secrets: Sequence[str] = (),
    ) -> None:
        """`timeout_seconds`: for each call, including its repetitions after broken connections.

        `secrets`: no error shows them; an old server repeats a command that it does not know, with the password in it.
        """
        self.client = client
        self.keys = keys
        self.identity = identity
        self.longest_block_seconds = LONGEST_BLOCK_SECONDS
        self._timeout_seconds = timeout_seconds
        self.shown_url = shown_url
        self._secrets = secrets
        self._calls = Calls(client)

    async def close_idle(self) -> None:
        """Close the connections of the client's pool that no call uses: most services need them only at their start."""
        await self.client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        await self._calls.close()
        await self.client.aclose()

    async def run(self, call: ScriptCall, first: Sequence[Command] = ()) -> Any:
        """Run a script; wait while Redis or its disk is full: the script has changed nothing. `first`: see `Calls`.

        StrangerError names what the run has that this process does not.
        """
        try:
            return await self._with_room(lambda: self._calls.run(call, first))
        except StrangerError:
            raise await self.stranger() from None

    async def _with_room(self, make_call: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call, again until Redis has room for it."""
        warned = False
        while True:
            try:
                return await self.guard(make_call())
            except (OutOfMemoryError, FullDiskError) as error:
                if not warned:
                    what = "make room on its disk" if isinstance(error, FullDiskError) else "raise its maxmemory"
                    log.warning("Redis at %s is full (%s): waiting; %s", self.shown_url, error, what)
                    warned = True
                await asyncio.sleep(FULL_RETRY_SECONDS)

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """The strings under keys; None for one that does not exist."""
        if not keys:
            return []
        found: list[bytes | None] = await self.guard(self._calls.read("MGET", *keys))
        return found

    async def read_map(self, key: str) -> dict[bytes, bytes]:
        """The hash under a key; empty if it does not exist."""
        found: dict[bytes, bytes] = await self.guard(self._calls.read("HGETALL", key))
        return found

    async def wait_for_wakeup(self, key: str, timeout_seconds: float) -> None:
        """Return once this list has an element, and take it out; or after the timeout."""
        seconds = max(0.001, min(timeout_seconds, self.longest_block_seconds))
        # Twice: a connection that breaks at the end of a wait begins the wait again.
        await self.guard(self._calls.read("BLPOP", key, seconds), blocks_seconds=2 * seconds)

    async def guard(self, call: Any, *, blocks_seconds: float = 0.0) -> Any:
        """Await a Redis call and turn its errors into Penstock's. blocks_seconds: for which the server may keep it."""
        try:
            async with asyncio.timeout(self._timeout_seconds + blocks_seconds):
                return await call
        except OutOfMemoryError:
            raise
        except AuthenticationError as error:
            raise ConfigError(f"redis.url {self.shown_url}: {self._text(error)}; set redis.password") from None
        except (ConnectionError, TimeoutError, OSError) as error:
            if NO_CONNECTION_LEFT in str(error):
                raise QueueError(
                    f"redis.url {self.shown_url}: all connections that the server allows are in use; expected room for "
                    "several of each service; raise its maxclients, and its limit of open files (ulimit -n), which "
                    "bounds it"
                ) from None
            raise QueueError(
                f"redis.url {self.shown_url}: no answer within {self._timeout_seconds + blocks_seconds:g} s "
                f"(redis.timeout_seconds; {self._text(error) or 'it does not answer'}); "
                "expected a running Redis or Valkey"
            ) from None
        except ResponseError as error:
            if disk_is_full(error):
                raise FullDiskError(f"Redis at {self.shown_url} takes no writes: {error}") from None
            if (refused := refusal(str(error))) is not None:
                raise refused from None
            raise QueueError(f"Redis at {self.shown_url} refused a call: {self._text(error)}") from None
        except RedisError as error:
            raise QueueError(f"Redis at {self.shown_url}: {self._text(error)}") from None

    def _text(self, error: Exception) -> str:
        return hide(str(error), self._secrets)

    async def check_server(self, *, make_groups: bool = True) -> str:
        """Name and version of the server; makes the consumer groups. ConfigError if it cannot keep a run."""
        info = await self.guard(self.client.info("server"))
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
            raise ConfigError(f"redis.url {self.shown_url}: Redis {version}; expected 6.2 or newer, or Valkey")
        if "cluster" in (info.get("redis_mode"), info.get("server_mode")):  # the latter is Valkey's name for it
            raise ConfigError(
                f"redis.url {self.shown_url}: a node of a Redis Cluster; expected a single server. A run has all its "
                "keys in one hash slot, so that a cluster would serve it with one node at a time, and lose the last "
                "acknowledged writes if another node takes over"
            )
        memory = await self.guard(self.client.info("memory"))
        # volatile-*: evicts only keys with a time to live, which are written again if they are missing.
        if int(memory.get("maxmemory", 0)) and str(memory.get("maxmemory_policy", "")).startswith("allkeys"):
            raise ConfigError(
                f"redis.url {self.shown_url}: maxmemory-policy {memory['maxmemory_policy']}, which deletes a run's "
                "groups and ledger when memory is short; expected noeviction"
            )
        for stage in Stage if make_groups else ():
            await self._with_room(partial(self._make_group, self.keys.stream(stage)))
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {version}"

    async def _make_group(self, stream: str) -> None:
        try:
            await self.client.xgroup_create(stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def announced(self) -> Announcement | None:
        """The announced version, or None before the trainer has announced any."""
        fields = await self.read_map(self.keys.policy)
        return read_announced(fields) if fields else None

    async def turn(self) -> Turn | None:
        """The trainer's turn on the GPUs; None while it is the engines'."""
        found = await self.run(TURN(lease=self.keys.lease, turn=self.keys.turn))
        return None if found is None else Turn(*found)

    async def register(self, record: ServiceRecord, ttl_seconds: float) -> None:
        """Show a service to the others for `ttl_seconds`. StrangerError: the run is another's."""
        await self.run(
            REGISTER(
                services=self.keys.services,
                identity=self.keys.identity,
                lease=self.keys.lease,
                launcher=self.keys.launcher,
                name=record.name,
                record=msgspec.json.encode(record),
                alive_ms=int(ttl_seconds * 1000),
                **self.identity.compared,
            )
        )

    async def unregister(self, name: str) -> None:
        await self.forget(self.keys.services, name)

    async def forget(self, key: str, field: str) -> None:
        """Delete a field that expires by itself: a service that ends does not wait for a full disk."""
        with contextlib.suppress(FullDiskError):
            await self.guard(self.client.hdel(key, field))

    async def leave(self, key: str, member: str) -> None:
        """Take a member out of a sorted set that forgets it by itself, as `forget` does."""
        with contextlib.suppress(FullDiskError):
            await self.guard(self.client.zrem(key, member))

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete keys that expire by themselves, as `forget` does."""
        with contextlib.suppress(FullDiskError):
            await self.guard(self.client.delete(*keys))

    async def services(self) -> list[ServiceRecord]:
        """The services of the run's configuration whose heartbeat has not expired, by name.

        They are told apart here, not by a script: that would cost the server eight times as much, for each reader.
        """
        kinds = list(ServiceKind)
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.hgetall(self.keys.services)
            pipeline.hmget(self.keys.identity, *kinds)
            clock, values, digests = await self.guard(pipeline.execute())
        now_ms = clock[0] * 1000 + clock[1] // 1000
        expected = {str(kind).encode(): digest for kind, digest in zip(kinds, digests, strict=True) if digest}
        alive = []
        for match in filter(None, map(SHOWN.fullmatch, values.values())):
            deadline, kind, digest, record = match.groups()
            if int(deadline) > now_ms and expected.get(kind, digest) == digest:
                alive.append(msgspec.json.decode(record, type=ServiceRecord))
        return sorted(alive, key=lambda each: each.name)

    async def depths(self) -> dict[str, int]:
        """Groups in each stream, and in `dead`; held ones count until they are handed over."""
        names = [*Stage, "dead"]
        async with self.client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.xlen(self.keys.name(name))
            return dict(zip(map(str, names), await self.guard(pipeline.execute()), strict=True))

    async def oldest_age_seconds(self) -> dict[str, float]:
        """Age of the oldest group in each stream; 0 for an empty one."""
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for stage in Stage:
                pipeline.xrange(self.keys.stream(stage), count=1)
            clock, *oldest = await self.guard(pipeline.execute())
        now_ms = clock[0] * 1000 + clock[1] // 1000
        return {
            str(stage): max(0.0, (now_ms - int(entries[0][0].split(b"-")[0])) / 1000) if entries else 0.0
            for stage, entries in zip(Stage, oldest, strict=True)
        }

    async def whereabouts(self, ticket: int) -> str:
        """Where an outstanding ticket is, and who holds it since when, as text for a log line."""
        place = await self.guard(self.client.hget(self.keys.live, str(ticket)))
        if place is None:
            return "which is in no stream of the queue"
        stage, entry, _ = place.decode().split("|")
        if stage not in list(Stage):
            return f"which is {stage}"
        pending = await self.guard(
            self.client.xpending_range(self.keys.name(stage), GROUP, min=entry, max=entry, count=1)
        )
        if not pending or pending[0]["consumer"] == RELEASED:
            return f"which nobody has taken from {stage}"
        holder, idle_ms = pending[0]["consumer"].decode(), pending[0]["time_since_delivered"]
        return f"which {holder} holds from {stage}, not renewed for {idle_ms / 1000:.0f} s"

    async def require_run(self, run: str) -> None:
        """ConfigError if the server holds nothing of the run."""
        if await self.guard(self.client.exists(self.keys.ledger, self.keys.counters, self.keys.dead)):
            return
        suffix = ":ledger"
        pattern = f"{Keys('*').pattern.removesuffix(':*')}{suffix}"
        found = [key.decode() async for key in self.client.scan_iter(match=pattern, count=500)]
        runs = sorted(key.partition("{")[2].removesuffix(f"}}{suffix}") for key in found)
        raise ConfigError(
            f"run.name: Redis at {self.shown_url} has no run {run!r}; expected "
            f"{'one of ' + ', '.join(runs) if runs else 'one that has begun, and there is none'}; "
            "check run.name and redis.url"
        )

    async def stranger(self, *, deletes: bool = False) -> StrangerError:
        """Why this process may not work for the run. `deletes`: it would delete it."""
        fields = await self.guard(self.client.hgetall(self.keys.identity))
        intent = " and is not deleted (run.existing is replace)" if deletes else ""
        shown = ", ".join(each.name for each in await self.services())
        return StrangerError(
            f"run.name: {self.keys.run!r} on Redis at {self.shown_url} lives{intent}{shown and f' ({shown})'}. It is a "
            f"run {self.identity.unlike(fields)}. Choose another run.name, or end that run first"
        )

    async def elsewhere(self) -> ConfigError:
        """Why this process may not resume the run, which nobody works for."""
        fields = await self.guard(self.client.hgetall(self.keys.identity))
        return ConfigError(
            f"run.root: the folder of run {self.keys.run!r} here is not the one with the state of that run on Redis at "
            f"{self.shown_url} ({await self.contents()}), which was last that of {owner_in(fields)}. Expected the "
            "run.root with its steps and checkpoints, or another run.name; `penstock launch` with run.existing replace "
            "deletes that run's keys from the queue, so that it cannot be resumed"
        )

    async def contents(self) -> str:
        """What the run has in the queue, in words; empty if it has not begun."""
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.xlen(self.keys.ledger)
            pipeline.hmget(self.keys.counters, "issued", "trained")
            pipeline.xlen(self.keys.dead)
            records, (issued, trained), dead = await self.guard(pipeline.execute())
        if not records and not issued:
            return ""
        return f"a ledger of {records} records, {int(issued or 0)} tickets, {int(trained or 0)} trained, {dead} dead"

    async def delete_run(self, *, but_owner: bool = False) -> int:
        """Delete every key of the run; returns how many.

        `but_owner`: keep whose the run is, and the number of its last lease: old servers refuse lower ones.
        """
        kept = {self.keys.identity, self.keys.launcher, self.keys.last_lease} if but_owner else set()
        deleted = 0
        async for key in self.client.scan_iter(match=self.keys.pattern, count=500):
            if key.decode() not in kept:
                deleted += await self.guard(self.client.delete(key))
        return deleted


class FullDiskError(QueueError):
    """The server cannot write its file: it refuses every change until its disk has room again."""


def disk_is_full(error: RedisError) -> bool:
    """Whether a server refused a change because it cannot write its append-only file."""
    return str(error).startswith("MISCONF")


def refusal(error: str) -> PenstockError | None:
    """The error of a script that refuses its caller; None for any other error."""
    if "_STRANGER" in error:
        return StrangerError("the run has become one of another configuration or folder: another launch has taken it")
    holder = error.rpartition("FENCED ")[2]
    if "_LOST" in error:
        return LostWritesError(
            f"{error.rpartition('_LOST ')[2]}, which is not what this trainer wrote last: the queue has lost writes "
            "that it had acknowledged; the trainer starts again from the ledger"
        )
    if holder == error:
        return None
    if holder == "nobody":
        return LostWritesError(
            "the lease is held by nobody: it expired, or the queue has lost it; "
            "the trainer starts again from the ledger"
        )
    return LeaseLostError(f"the lease is held by {holder}; this trainer has lost it and stops")
