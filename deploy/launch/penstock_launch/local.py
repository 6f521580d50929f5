"""`penstock launch local`: one run, all its services on this host, from start to summary.

    configuration -> run folder (orphans, run.existing) -> queue -> all services at once -> supervise, follow, sample
                                                                                       '-> summary.json, report

Wires the parts and owns nothing else. Called by the command line.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

import httpx

from penstock.broker import Queue, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from penstock.errors import PenstockError
from penstock_launch.child import Child, Command, EmbeddedQueue
from penstock_launch.follow import Follower, make_client
from penstock_launch.restarts import RestartPolicy
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import commands
from penstock_launch.summary import LaunchFacts, closing_report, forget_trainer_summary, write_summary
from penstock_launch.supervisor import Outcome, Supervisor
from penstock_launch.trees import ProcessTrees
from penstock_launch.view import View, make_view

LOOK_EVERY_SECONDS = 0.5  # a training step takes longer, so that each gets its line
SAMPLE_EVERY_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EVENTS_LOG = "launcher.log"


def launch_local(config: Config, environ: Mapping[str, str], started_at: float) -> int:
    """Run to the end; the exit code. `started_at`: Unix seconds of the start of this process."""
    folder = RunFolder(config.run)
    with folder.locked():
        orphans = folder.end_orphans()
        continues = folder.prepare()
        forget_trainer_summary(folder.path)
        with (folder.logs / EVENTS_LOG).open("a", encoding="utf-8") as file:
            view = make_view(config.run.name, lambda line: _append(file, line))
            try:
                for orphan in orphans:
                    view.event(f"ended what an earlier launch had left running: {orphan}")
                view.event(f"run {config.run.name}: {'continues' if continues else 'new'}, in {folder.path}")
                launch = _Launch(config, folder, view)
                outcome = launch.run(environ)
            finally:
                view.close()
        facts = LaunchFacts(started_at, launch.trees.peak_rss_bytes, launch.restarts(), outcome)
        for line in closing_report(write_summary(folder.path, facts), folder.path, config.run.existing):
            print(line, flush=True)
    return outcome.exit_code


class _Launch:
    """The parts of one launch."""

    def __init__(self, config: Config, folder: RunFolder, view: View) -> None:
        self.trees = ProcessTrees(folder.path, config.run.name)
        self._config = config
        self._folder = folder
        self._view = view
        self._children: list[Child] = []

    def restarts(self) -> dict[str, int]:
        """By service."""
        return {child.name: child.restarts for child in self._children}

    def run(self, environ: Mapping[str, str]) -> Outcome:
        """Start everything and supervise it until nothing runs any more."""
        self.trees.sample({})
        server = self._start_queue()
        try:
            section = server.section(self._config.redis) if server else self._config.redis
            reachable = self._config.model_copy(update={"redis": section})
            self._folder.write_config(self._config)
            if server:
                self._folder.write_queue(section)
            services = commands(self._config, self._folder, section, environ)
            outcome = asyncio.run(self._supervise(reachable, services, server))
        finally:
            if server:
                server.stop()
                self._folder.forget_queue()
        self.trees.forget()
        return outcome

    def _start_queue(self) -> EmbeddedServer | None:
        """The embedded server, unless the user has one."""
        if self._config.redis.url:
            return None
        server = EmbeddedServer(self._folder.path / "queue", log_path=self._folder.logs / "queue.log")
        server.start()
        self._view.event(f"queue: {server.version} (embedded) on {server.url}")
        return server

    async def _supervise(self, config: Config, services: Sequence[Command], server: EmbeddedServer | None) -> Outcome:
        queue = await self._connect(config)
        policy = RestartPolicy()
        self._children = [Child(service, policy) for service in services]
        if server:
            self._children.insert(0, Child(EmbeddedQueue(server), policy, running=server.process))
        supervisor = Supervisor(self._children, self._view.event, self.trees.survivors)
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, supervisor.interrupt, number)
        try:
            async with make_client(config.token) as client, asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(self._follow(queue, client), name="follow"),
                    group.create_task(self._sample(), name="sample"),
                ]
                outcome = await supervisor.run()
                for task in beside:
                    task.cancel()
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
            with contextlib.suppress(PenstockError):
                await queue.close()
        return outcome

    async def _connect(self, config: Config) -> Queue:
        if self._config.redis.url:
            self._view.event(f"queue: connecting to redis.url (up to {config.redis.timeout_seconds:g} s)")
        queue = await connect(config)
        if self._config.redis.url:
            if self._config.run.existing == "replace":
                self._view.event(f"queue: deleted {await queue.delete_run()} keys of an earlier run")
            self._view.event(f"queue: {await queue.check_server()} at redis.url")
        return queue

    async def _follow(self, queue: Queue, client: httpx.AsyncClient) -> None:
        """Show what goes on, for ever."""
        follower = Follower(queue, client, self._children)
        while True:
            self._view.show(await follower.look())
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def _sample(self) -> None:
        """Measure memory and take note of all processes, for ever."""
        while True:
            roots = {child.name: child.identity for child in self._children if child.identity and child.running}
            await asyncio.to_thread(self.trees.sample, roots)
            await asyncio.sleep(SAMPLE_EVERY_SECONDS)


def _append(file: TextIO, line: str) -> None:
    """Add a line with the time of day, in UTC, to the launcher's log."""
    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
    file.flush()
