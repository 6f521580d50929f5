"""`penstock launch local`: all processes of a run on this host, as children of this process, each on its own GPUs."""

from collections.abc import Callable, Mapping
from functools import cached_property

from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config, RedisSection
from penstock_launch.gpus.shares import PlacedRun, place
from penstock_launch.launch import LaunchTerms, StartedQueue, launch_run
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import commands
from penstock_launch.supervise.child import Child, Command, EmbeddedQueue
from penstock_launch.supervise.life import LocalLife
from penstock_launch.supervise.restarts import RestartPolicy
from penstock_launch.typed import Typed


def launch_local(config: Config, environ: Mapping[str, str], started_at: float, typed: Typed) -> int:
    """Run to the end; returns the exit code. `started_at`: Unix seconds of the start of this process."""
    return launch_run(config, ThisHost(config, environ), environ, started_at, LaunchTerms(typed=typed))


class ThisHost:
    """The site of a local launch."""

    sees_all = True

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = environ

    @cached_property
    def _placed(self) -> PlacedRun:
        return place(self._config, self._environ)

    def place(self) -> list[str]:
        return self._placed.lines()

    def start_queue(
        self, redis: RedisSection, folder: RunFolder, policy: RestartPolicy, on_end: Callable[[], None]
    ) -> StartedQueue:
        server = EmbeddedServer(folder.queue, log_path=folder.logs / "queue.log")
        server.start()
        assert server.process is not None
        child = Child(EmbeddedQueue(server), policy, running=LocalLife(server.process, server.log_path))
        return StartedQueue(child, server.section(redis), f"{server.version} (embedded)", server.stop)

    def services(
        self, config: Config, folder: RunFolder, redis: RedisSection, environ: Mapping[str, str]
    ) -> list[Command]:
        return commands(config, folder, redis, environ, self._placed.share)
