"""A service whose processes are on other nodes: one actor for each, all started and ended together.

Owns the actors over all lives of the service. An actor whose process has died starts the next one; an actor that is
lost, with its worker process or its node, is replaced by a new one on any node with room. Invariant: all processes of
one life end together.

    spawn -> [ actors placed -> processes started -> one of them ended -> the others end ] -> on_end, poll() answers
             in a thread of the life, since every call of Ray blocks
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, RuntimeEnvSetupError

from penstock.errors import ConfigError, PenstockError, RanksError
from penstock.runtime.process import KILL_SECONDS, ProcessIdentity
from penstock.runtime.service import UNEXPECTED_EXIT_CODE
from penstock_launch.on_ray.host import Ending, Order, ServiceHost, Where
from penstock_launch.supervise.life import describe_exit

BLAME_SECONDS = 2.0  # the failed rank may be seen later than the ranks that ended because of it
LEAVE_SECONDS = 60.0  # the others may still write their parts of a checkpoint
LOST_EXIT_CODE = -9  # the process is killed with its actor
SHOWN_CHARACTERS = 300
UNEXPECTED = Ending(UNEXPECTED_EXIT_CODE, (), "the thread that watched it ended by an error, shown above")


@dataclass(frozen=True)
class Member:
    """One process of a service. `options`: of its actor; `needs`: the same in words.

    overrides: additions to its command line on a node of this address.
    """

    options: Mapping[str, Any]
    needs: str
    order: Order
    overrides: Callable[[str], tuple[str, ...]] = lambda _: ()


class RemoteService:
    """A service of one process, or of the ranks of the trainer."""

    def __init__(
        self,
        name: str,
        log_path: Path,
        hint: str,
        members: Sequence[Member],
        place_seconds: float,
        *,
        may_wait_later: bool = False,
    ) -> None:
        """`place_seconds`: longest wait for a place. `may_wait_later`: no limit, once it has had a place."""
        self.name = name
        self.log_path = log_path
        self.hint = hint
        self.members = members
        self._place_seconds = place_seconds
        self._may_wait_later = may_wait_later
        self._had_place = False
        self._actors: list[Any] = [None] * len(members)

    def spawn(self, on_end: Callable[[], None]) -> "RemoteLife":
        return RemoteLife(self, on_end)

    def actors(self) -> list[Any]:
        """One actor for each member; lost ones are replaced."""
        for index, member in enumerate(self.members):
            if self._actors[index] is None:
                host = ray.remote(ServiceHost).options(max_restarts=0, max_task_retries=0, **member.options)
                self._actors[index] = host.remote(self.name if index == 0 else f"{self.name} rank {index}")
        return list(self._actors)

    def give_up(self, index: int) -> None:
        """End an actor and its process; the next life gets a new actor."""
        if self._actors[index] is not None:
            ray.kill(self._actors[index])
            self._actors[index] = None

    def answer(self, index: int, reference: Any, timeout_seconds: float | None = None) -> Any:
        """An actor's answer; _EndedError if the actor cannot give one."""
        try:
            return ray.get(reference, timeout=timeout_seconds)
        except GetTimeoutError:
            self.give_up(index)
            raise _EndedError(index, Ending(ConfigError.exit_code, (self._no_place(index),), "no place")) from None
        except RayTaskError as error:
            cause = error.cause
            code = cause.exit_code if isinstance(cause, PenstockError) else 1
            raise _EndedError(index, Ending(code, (f"{self.name}: {cause}",), "it could not be started")) from None
        except RuntimeEnvSetupError as error:
            line = f"{self.name}: ray.runtime_env: {_shown(error)}"
            raise _EndedError(index, Ending(ConfigError.exit_code, (line,), "no runtime environment")) from None
        except RayError as error:
            self.give_up(index)
            raise _EndedError(index, Ending(LOST_EXIT_CODE, (), f"its actor is lost: {_shown(error)}")) from None

    def places(self, actors: Sequence[Any]) -> list[Where]:
        """The nodes of the actors, once all actors have one."""
        unlimited = self._had_place and self._may_wait_later
        deadline = None if unlimited else time.monotonic() + self._place_seconds
        found: list[Where] = []
        for index, reference in enumerate([actor.where.remote() for actor in actors]):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            found.append(self.answer(index, reference, left))
        self._had_place = True
        return found

    def _no_place(self, index: int) -> str:
        return (
            f"{self.name}: no place within {self._place_seconds:g} s (ray.place_seconds): expected "
            f"{self.members[index].needs}; the cluster has {_resources(ray.cluster_resources())}, of these free "
            f"{_resources(ray.available_resources())}; add nodes, or ask for less in the section ray"
        )


class RemoteLife:
    """One life of a service on other nodes."""

    identity: ProcessIdentity | None = None  # not below this process

    def __init__(self, service: RemoteService, on_end: Callable[[], None]) -> None:
        self.pid: int | None = None
        self.host = ""
        self.progress = f"waits for a place with {service.members[0].needs}"
        self._service = service
        self._on_end = on_end
        self._actors = service.actors()
        self._killed = False
        self._ending: Ending | None = None
        self._thread = threading.Thread(target=self._live, name=f"life-{service.name}", daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return self._ending.exit_code if self._ending else None

    def ending(self, exit_code: int) -> str:
        return (self._ending.words if self._ending else "") or describe_exit(exit_code)

    def send(self, signal_number: int) -> None:
        if self.pid is None:
            self._give_up()
            return
        for actor in self._actors:
            actor.signal.remote(signal_number)

    def kill(self) -> None:
        if self._ending is not None:
            return
        self._killed = True
        if self.pid is None:
            self._give_up()
        else:
            for actor in self._actors:
                actor.kill.remote()
        self._thread.join(KILL_SECONDS)
        if self._thread.is_alive():
            self._give_up()
            self._thread.join(KILL_SECONDS)

    def log_tail(self) -> list[str]:
        return list(self._ending.lines) if self._ending else []

    def _give_up(self) -> None:
        for index in range(len(self._actors)):
            self._service.give_up(index)

    def _live(self) -> None:
        ending = UNEXPECTED  # the default: a life always ends
        try:
            self._start()
            ending = self._watch()
        except _EndedError as ended:
            self._end_others(ended.index)
            ending = ended.ending
        finally:
            self._ending = ending
            self._on_end()

    def _start(self) -> None:
        service = self._service
        places = service.places(self._actors)
        self.host = places[0].host
        self.progress = f"on {', '.join(f'{place.host} (node {place.node_id[:8]})' for place in places)}"
        meeting = self._meeting()
        starts = []
        for index, (actor, member, place) in enumerate(zip(self._actors, service.members, places, strict=True)):
            order = replace(
                member.order,
                arguments=(*member.order.arguments, *member.overrides(place.host)),
                environment={**member.order.environment, **meeting(index)},
            )
            starts.append(actor.start.remote(order))
        pids = [service.answer(index, start) for index, start in enumerate(starts)]
        self.pid = pids[0]
        if self._killed:
            self._give_up()

    def _meeting(self) -> Callable[[int], dict[str, str]]:
        """The variables that torchrun would set for a rank. Ray shows each rank only its own GPU, as number 0."""
        num_ranks = len(self._actors)
        if num_ranks == 1:
            return lambda _: {}
        port = self._service.answer(0, self._actors[0].free_port.remote())
        common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": self.host, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        return lambda rank: {**common, "RANK": str(rank)}

    def _watch(self) -> Ending:
        """Wait until all have ended; the ending that explains the others."""
        waits = {actor.wait.remote(): index for index, actor in enumerate(self._actors)}
        endings: list[tuple[int, Ending]] = []
        patience: float | None = None
        while waits:
            done, _ = ray.wait(list(waits), num_returns=1, timeout=patience)
            if not done:
                self._kill_some(waits.values())
                patience = None
                continue
            index = waits.pop(done[0])
            try:
                ending = self._service.answer(index, done[0])
            except _EndedError as ended:
                ending = ended.ending
            endings.append((index, ending))
            if len(endings) == 1:
                patience = LEAVE_SECONDS if ending.exit_code == 0 else BLAME_SECONDS
        return blamed(endings, len(self._actors))

    def _end_others(self, index: int) -> None:
        """One member could not be started: end the others too."""
        self._kill_some(other for other in range(len(self._actors)) if other != index)

    def _kill_some(self, indices: Any) -> None:
        for index in list(indices):
            self._actors[index].kill.remote()


class _EndedError(Exception):
    """The process of a member has ended or cannot be started."""

    def __init__(self, index: int, ending: Ending) -> None:
        super().__init__(ending.words)
        self.index = index
        self.ending = ending


def blamed(endings: Sequence[tuple[int, Ending]], num_members: int) -> Ending:
    """The first failure, preferred over ranks that ended because of another rank's end, or were killed for it."""
    failed = [(index, ending) for index, ending in endings if ending.exit_code != 0]
    if not failed:
        return Ending(0)
    index, ending = min(failed, key=lambda item: item[1].exit_code == RanksError.exit_code)
    if num_members == 1:
        return ending
    return replace(ending, words=f"rank {index} of {num_members}: {ending.words or describe_exit(ending.exit_code)}")


def _shown(error: Exception) -> str:
    """An error of Ray, which has many lines, as one line."""
    return " ".join(str(error).split())[:SHOWN_CHARACTERS]


def _resources(amounts: Mapping[str, float]) -> str:
    """The resources with a name, in words."""
    named = {name: amount for name, amount in amounts.items() if ":" not in name and "_group_" not in name}
    hidden = ("memory", "object_store_memory")
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items()) if name not in hidden) or "nothing"
