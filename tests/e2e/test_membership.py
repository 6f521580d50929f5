"""Servers join and leave while a run trains: real services, the pure engine (docs/weights.md, Membership)."""

import asyncio
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml

from benchmarks.chaos.launch import ROOT, Launch
from benchmarks.chaos.parts import NOTHING, ChaosPart, prepare, read_part
from penstock.broker import connect
from penstock.config import Config
from penstock.contracts import ServerState
from penstock.contracts.services import ServiceRecord
from tests.patience import START_SECONDS

pytestmark = pytest.mark.slow

DEADLINE_SECONDS = 2 * START_SECONDS
PART = ChaosPart("members", NOTHING, num_steps=24, max_staleness=1, deadline_seconds=DEADLINE_SECONDS)
PACE_SECONDS = 0.06  # for one completion's reward: a step takes a second
WAITING_SECONDS = 2.0  # the same while a server starts, so few steps pass meanwhile, however long it takes


def joined(config: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """A rollout service that the launcher did not start."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("common", "services/rollout"))
    return subprocess.Popen(
        [sys.executable, "-m", "penstock_rollout", "--config", str(config)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )


def versions_by_server(run_folder: Path) -> dict[str, list[int]]:
    """The oldest version in each trained group, in the order of training."""
    found: dict[str, list[int]] = defaultdict(list)
    for path in sorted((run_folder / "steps").glob("*.pack")):
        for scored in msgspec.msgpack.decode(path.read_bytes())["groups"]:
            group = scored["group"]
            spans = [span["policy"]["number"] for each in group["completions"] for span in each["spans"]]
            found[group["server"]].append(min(spans))
    return found


class Watch:
    """Waits until a run reaches some state."""

    def __init__(self, launch: Launch, config: Config) -> None:
        self._launch = launch
        self._config = config

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds():
                self._launch.below()
                assert self._launch.exit_code() is None, self._launch.tail()
                await asyncio.sleep(0.1)

    async def announced(self) -> int:
        """The version that a joining server must load now."""
        queue = await connect(self._config)
        try:
            found = await queue.announced()
        finally:
            await queue.close()
        assert found is not None
        return found.identity.number

    async def serving(self, holds: Callable[[ServiceRecord], bool]) -> ServiceRecord:
        """Wait for a rollout service that serves; returns its record."""
        queue = await connect(self._config)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while True:
                    for record in await queue.services():
                        if record.server_state is ServerState.SERVING and holds(record):
                            return record
                    await asyncio.sleep(0.1)
        finally:
            await queue.close()


@pytest.mark.timeout(3 * DEADLINE_SECONDS)
async def test_a_server_joins_and_the_first_is_killed_and_comes_back(tmp_path: Path) -> None:
    launch, queue, pace_file = prepare(PART, tmp_path / "run")
    assert queue is not None
    pace_file.write_text(str(PACE_SECONDS))
    config_file = tmp_path / "run" / "config.yaml"
    document = yaml.safe_load(config_file.read_text())
    document["redis"] = {"url": queue.environment["PENSTOCK_REDIS__URL"], "password": queue.server.password}
    watch = Watch(launch, Config.model_validate(document))
    joiner: subprocess.Popen[bytes] | None = None
    try:
        launch.start()
        await watch.until(lambda: launch.num_steps() >= 3)
        first = await watch.serving(lambda each: True)
        pace_file.write_text(str(WAITING_SECONDS))
        announced = [await watch.announced()]
        joiner = joined(config_file, queue.environment)
        second = await watch.serving(lambda each: each.name != first.name)
        pace_file.write_text(str(PACE_SECONDS))
        await watch.until(lambda: second.name in versions_by_server(launch.run_folder))
        (victim,) = launch.victims("rollout").values()
        assert victim.pid == first.pid
        pace_file.write_text(str(WAITING_SECONDS))
        announced.append(await watch.announced())
        victim.kill()
        reborn = await watch.serving(lambda each: each.name not in (first.name, second.name))
        pace_file.write_text(str(PACE_SECONDS))
        await watch.until(lambda: reborn.name in versions_by_server(launch.run_folder))
        pace_file.write_text("0")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (code := launch.exit_code()) is None:
                launch.below()
                await asyncio.sleep(0.1)
        assert code == 0, launch.tail()
    finally:
        if joiner is not None:
            joiner.kill()
            joiner.wait()
        launch.end()
        try:
            findings = read_part(PART, launch, queue)
        finally:
            queue.stop()
    assert findings.problems == []
    assert (findings.trained, findings.dropped, findings.lost) == (PART.num_tickets, {}, 0)
    versions = versions_by_server(launch.run_folder)
    assert versions.keys() == {first.name, second.name, reborn.name}
    for record, version in zip((second, reborn), announced, strict=True):
        assert min(versions[record.name]) >= version > 0  # it has loaded what was announced when it joined, or newer
