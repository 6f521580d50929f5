"""Carries a plan out: queue, trainer and reward service as processes of their own, and hosts of rollout services.

Owns what is started. Invariant: when it returns or raises, nothing that it started is left.

    few services -> [measure] -> many services -> [measure] -> [measure; hosts end and return]
        -> SIGTERM to the trainer -> verdict
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import redis
import redis.asyncio as aioredis
import yaml

from benchmarks.chaos.launch import ROOT
from benchmarks.chaos.reader import Findings, RunReader
from benchmarks.scale.costs import LedgerWatch, MemorySamples, Window, moment, window
from benchmarks.scale.host import Host, HostPlan
from benchmarks.scale.plan import RUN, ScalePlan, document, prepare
from benchmarks.scale.verdict import Verdict
from penstock.broker.embedded import EmbeddedServer
from penstock.config.load import load_config
from penstock.runtime.process import tied_command

SAMPLE_SECONDS = 5.0
TUNING = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
# As the launcher has it for a trainer on CPUs.
TRAINER_TUNING = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_MAX_": "0"}


class ScaleError(Exception):
    """A process ended that should not have, or no step was trained in time; the text names the log."""


class ScaleRun:
    """One run in a folder of its own."""

    def __init__(self, plan: ScalePlan, folder: Path, server: EmbeddedServer) -> None:
        self._plan, self._folder, self.server = plan, folder, server
        own = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self._environment = {**own, **TUNING, "PENSTOCK_REDIS__PASSWORD": server.password}
        self._hosts: list[Host] = []
        self._host_numbers = itertools.count()
        self._chooser = random.Random(plan.seed)
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self.num_joined = self.num_killed = self.num_left = 0

    async def carry_out(self) -> Verdict:
        """Run it and read what it left."""
        plan = self._plan
        client = aioredis.Redis(port=self.server.port, password=self.server.password)
        watch = LedgerWatch(client, RUN)
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.callback(self._end)
                for name in ("trainer", "reward"):
                    self._start_service(name)
                processes = self._processes()
                await self._join(plan.few, plan.few)
                few = await self._measured(watch, processes, plan.few, plan.compared_seconds)
                await self._join(plan.many - plan.few, plan.many)
                many = await self._measured(watch, processes, plan.many, plan.compared_seconds)
                samples = MemorySamples(client, processes)
                sampling = asyncio.create_task(samples.sample(min(SAMPLE_SECONDS, plan.seconds / 20)))
                disturbing = asyncio.create_task(self._disturb())
                try:
                    disturbed = await self._measured(watch, processes, plan.many, plan.seconds)
                finally:
                    for task in (sampling, disturbing):
                        task.cancel()
                    await asyncio.gather(sampling, disturbing, return_exceptions=True)
                await asyncio.to_thread(self._stop_trainer)
                await watch.look()  # the version of its last steps
        finally:
            await client.aclose()
        return self._read((few, many, disturbed), samples, watch.num_versions)

    async def _measured(
        self, watch: LedgerWatch, processes: dict[str, psutil.Process], num_services: int, seconds: float
    ) -> Window:
        """Costs from a step after the warm-up to the first step after `seconds`."""
        await self._steps_for(watch, self._plan.warm_up_seconds)
        before = moment(watch, processes)
        await self._steps_for(watch, seconds)
        return window(num_services, before, moment(watch, processes))

    async def _steps_for(self, watch: LedgerWatch, seconds: float) -> None:
        """Return at the first step that is committed after so many seconds."""
        loop = asyncio.get_running_loop()
        end, is_first = loop.time() + seconds, True
        while is_first or loop.time() < end:
            is_first = False
            try:
                await watch.next_step(self._plan.step_deadline_seconds, self._require_alive)
            except TimeoutError:
                raise ScaleError(
                    f"no step within {self._plan.step_deadline_seconds:g} s after {watch.num_steps}; see "
                    f"{self._folder / 'logs'}"
                ) from None

    def _require_alive(self) -> None:
        ended = [name for name, process in self._services.items() if process.poll() is not None]
        ended += [host.plan.name for host in self._hosts if host.failed]
        if ended:
            raise ScaleError(f"{', '.join(ended)} ended by itself; see {self._folder / 'logs'}")

    def _start_service(self, name: str) -> None:
        config = self._config_file(f"{name}.yaml", self._plan.room_of(self._plan.many))
        command = tied_command([sys.executable, "-m", f"penstock_{name}", "--config", str(config)])
        environment = {**self._environment, **(TRAINER_TUNING if name == "trainer" else {})}
        with self._log_path(name).open("wb") as output:
            self._services[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def _processes(self) -> dict[str, psutil.Process]:
        assert self.server.process is not None
        started = {"queue": self.server.process, **self._services}
        return {name: psutil.Process(process.pid) for name, process in started.items()}

    async def _join(self, count: int, num_services: int) -> None:
        """Start so many services, on as few hosts as hold them. num_services: with them."""
        while count > 0:
            await self._start_host(min(count, self._plan.per_host), self._plan.room_of(num_services))
            count -= self._plan.per_host

    async def _start_host(self, num_services: int, room: int) -> None:
        name = f"host-{next(self._host_numbers)}"
        path = self._config_file(f"{name}.yaml", room)
        config = load_config(["--config", str(path)], self._environment)
        plan = HostPlan(name, config, num_services, self._plan.generation_seconds, self._log_path(name))
        host = Host(plan)
        self._hosts.append(host)
        try:
            await asyncio.to_thread(host.wait_started)
        except EOFError:
            raise ScaleError(f"{name} did not start; see {plan.log_path}") from None
        self.num_joined += num_services

    async def _disturb(self) -> None:
        """For ever: a host ends, in turns by SIGKILL and in order, and another one takes its place."""
        for number in itertools.count():
            await asyncio.sleep(self._plan.disturb_seconds)
            host = self._hosts.pop(self._chooser.randrange(len(self._hosts)))
            if number % 2 == 0:
                await asyncio.to_thread(host.kill)
                self.num_killed += host.plan.num_services
            else:
                await asyncio.to_thread(host.stop)
                self.num_left += host.plan.num_services
            await asyncio.sleep(self._plan.away_seconds)
            await self._start_host(host.plan.num_services, self._plan.room_of(self._plan.many))

    def _config_file(self, name: str, room: int) -> Path:
        path = self._folder / "configs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(document(self._plan, self._folder, self.server.url, room)), encoding="utf-8")
        return path

    def _log_path(self, name: str) -> Path:
        path = self._folder / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def _stop_trainer(self) -> None:
        trainer = self._services["trainer"]
        trainer.send_signal(signal.SIGTERM)
        try:
            code = trainer.wait(self._plan.step_deadline_seconds)  # it ends its step, and pushes what that made
        except subprocess.TimeoutExpired:
            raise ScaleError(f"the trainer did not stop within {self._plan.step_deadline_seconds:g} s") from None
        if code != 0:
            raise ScaleError(f"the trainer ended with exit code {code}; see {self._log_path('trainer')}")

    def _end(self) -> None:
        for host in self._hosts:
            host.kill()
        for process in self._services.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def _read(self, windows: tuple[Window, Window, Window], samples: MemorySamples, num_versions: int) -> Verdict:
        plan = self._plan
        few, many, disturbed = windows
        found = read_records(self.server, plan, self._folder)
        return Verdict(
            plan=plan,
            found=found,
            few=few,
            many=many,
            disturbed=disturbed,
            memory=samples.taken,
            num_joined=self.num_joined,
            num_killed=self.num_killed,
            num_left=self.num_left,
            num_versions=num_versions,
            num_refused=_count_in(self._folder / "logs", "is fenced"),
            num_late=_count_in(self._folder / "logs", "late: ticket"),
        )


def read_records(server: EmbeddedServer, plan: ScalePlan, folder: Path) -> Findings:
    """What became of the tickets of a stopped run, from its ledger, streams, step files and lines of steps."""
    with redis.Redis(port=server.port, password=server.password) as client:
        reader = RunReader(client, RUN, folder / "runs" / RUN)
        return reader.read(num_tickets=None, batch_size=plan.batch_size, max_staleness=plan.max_staleness)


def _count_in(folder: Path, text: str) -> int:
    return sum(path.read_text(errors="replace").count(text) for path in folder.glob("*.log"))


@contextlib.contextmanager
def scale_run(plan: ScalePlan, folder: Path) -> Iterator[ScaleRun]:
    """A run over a queue of its own, which lasts as long as the context."""
    folder.mkdir(parents=True)
    prepare(plan, folder)
    with EmbeddedServer(folder / "queue") as server:
        yield ScaleRun(plan, folder, server)
