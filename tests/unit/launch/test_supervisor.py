"""The supervisor with real child processes: restarts, ends in order, leaves nothing behind."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.broker.embedded import EmbeddedServer
from penstock.runtime.process import ProcessIdentity, descendants
from penstock_launch.supervise.child import Child, ChildState, Command, EmbeddedQueue
from penstock_launch.supervise.life import LocalLife
from penstock_launch.supervise.process_trees import ProcessTrees
from penstock_launch.supervise.restarts import RestartPolicy
from penstock_launch.supervise.supervisor import Grace, RunOutcome, Supervisor
from tests.patience import START_SECONDS

FAST = RestartPolicy(first_delay_seconds=0.02, longest_delay_seconds=0.1)
PATIENT = Grace(START_SECONDS, START_SECONDS, START_SECONDS)
SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
LINGERING_TRAINER = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    print('checkpoint written', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('up', flush=True)
time.sleep(600)
"""


class SupervisorSetup:
    """Children that run scripts, and the supervisor's events."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[str] = []
        self.children: list[Child] = []
        self.trees = ProcessTrees(folder, "setup")
        self.mark = folder / "mark"

    def child(self, name: str, script: str) -> Child:
        command = Command(name, (sys.executable, "-S", "-c", script), dict(os.environ), self.folder / f"{name}.log")
        self.children.append(Child(command, FAST))
        return self.children[-1]

    def waits_for_mark(self, exit_code: int) -> str:
        """The script of a child that ends when the test ends it."""
        wait = f"while not os.path.exists({str(self.mark)!r}): time.sleep(0.01)"
        return f"import os, sys, time\n{wait}\nsys.exit({exit_code})"

    def supervisor(self, grace: Grace | None = None) -> Supervisor:
        return Supervisor(self.children, self.events.append, self.trees.survivors, grace)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def setup(tmp_path: Path) -> SupervisorSetup:
    return SupervisorSetup(tmp_path)


async def until(condition: Callable[[], object], timeout_seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)


def gone(child: Child) -> bool:
    return child.identity is None or not child.identity.alive


async def test_trainer_exit_0_finishes_the_run_and_ends_the_others(setup: SupervisorSetup) -> None:
    rollout = setup.child("rollout", SLEEP)
    setup.child("trainer", "import time; time.sleep(0.2)")
    outcome = await setup.supervisor().run()
    assert outcome == RunOutcome(0, "the trainer has finished")
    assert gone(rollout)


async def test_a_child_that_died_is_restarted_with_backoff(setup: SupervisorSetup) -> None:
    mark = setup.folder / "lives"
    script = (
        f"import sys, time\nopen({str(mark)!r}, 'a').write('x')\nif len(open({str(mark)!r}).read()) < 3: sys.exit(7)\n"
    )
    reward = setup.child("reward", script + "time.sleep(600)")
    setup.child("trainer", SLEEP)
    supervisor = setup.supervisor(PATIENT)
    task = asyncio.create_task(supervisor.run())
    await until(lambda: reward.restarts == 2 and reward.running and len(mark.read_text()) == 3)
    supervisor.interrupt(signal.SIGTERM)
    outcome = await task
    died = [event for event in setup.events if ": died (" in event]
    assert [event.rpartition("restart in ")[2] for event in died] == ["0.02 s", "0.04 s"]
    assert "exit code 7" in died[0]
    assert outcome.exit_code == 128 + signal.SIGTERM


async def test_five_deaths_end_everything_with_the_last_lines_of_the_log(setup: SupervisorSetup) -> None:
    trainer = setup.child("trainer", SLEEP)
    setup.child(
        "reward", "import sys; print('{\"event\": \"x\"}'); print('no such thing', file=sys.stderr); sys.exit(1)"
    )
    outcome = await setup.supervisor(PATIENT).run()
    assert outcome.exit_code == 1
    assert outcome.reason == "reward ended (exit code 1): it died 5 times within 120 s"
    assert outcome.lines[-1] == "no such thing"
    assert gone(trainer)


async def test_an_unexpected_error_is_named_without_the_way_to_it(setup: SupervisorSetup) -> None:
    event = {"level": "error", "event": "reward ended", "traceback": "Traceback (most recent call last):\nKeyError: 3"}
    setup.child("reward", f"import sys; print({json.dumps(event)!r}); sys.exit(70)")
    outcome = await setup.supervisor(PATIENT).run()
    assert outcome.lines == ("reward ended: KeyError: 3",)
    assert any(": died (exit code 70): reward ended: KeyError: 3; restart in" in event for event in setup.events)


@pytest.mark.parametrize(("length", "said"), [(95, "reward \u00e9nded"), (40, "reward"), (20, '{"level": "error", "')])
async def test_of_an_event_that_a_full_disk_has_cut_the_beginning_is_named(
    setup: SupervisorSetup, length: int, said: str
) -> None:
    event = {
        "level": "error",
        "event": "reward \u00e9nded\n",
        "traceback": "Traceback (most recent call last):\nKeyError",
    }
    setup.child("reward", f"import sys; print({json.dumps(event)[:length]!r}); sys.exit(70)")
    outcome = await setup.supervisor(PATIENT).run()
    assert outcome.lines == (said,)


async def test_exit_code_2_ends_everything_at_once_with_the_message(setup: SupervisorSetup) -> None:
    rollout = setup.child("rollout", SLEEP)
    script = "import sys; print('trainer: config: actor.path: no such folder', file=sys.stderr); sys.exit(2)"
    trainer = setup.child("trainer", script)
    outcome = await setup.supervisor().run()
    assert outcome.exit_code == 2
    assert outcome.lines == ("trainer: config: actor.path: no such folder",)
    assert trainer.restarts == 0
    assert gone(rollout)


async def test_of_several_services_of_a_kind_one_may_be_given_up(setup: SupervisorSetup) -> None:
    setup.child("rollout-0", "import sys; print('no such device', file=sys.stderr); sys.exit(6)")
    setup.child("rollout-1", SLEEP)
    setup.child("trainer", setup.waits_for_mark(exit_code=0))
    running = asyncio.create_task(setup.supervisor(PATIENT).run())
    reason = "its inference engine does not start: no such device"
    await until(lambda: f"rollout-0: given up (exit code 6), {reason}; the run goes on without it" in setup.events)
    assert [child.given_up for child in setup.children] == [reason, "", ""]
    setup.mark.touch()
    assert await running == RunOutcome(0, "the trainer has finished")


async def test_the_last_service_of_a_kind_is_not_given_up(setup: SupervisorSetup) -> None:
    setup.child("rollout-0", "import sys; sys.exit(6)")
    setup.child("rollout-1", setup.waits_for_mark(exit_code=6))
    setup.child("trainer", SLEEP)
    running = asyncio.create_task(setup.supervisor(PATIENT).run())
    await until(lambda: any(each.startswith("rollout-0: given up") for each in setup.events))
    setup.mark.touch()
    reason = "its inference engine does not start, and rollout-0 had been given up"
    assert await running == RunOutcome(6, f"rollout-1 ended (exit code 6): {reason}")


async def test_a_wrong_configuration_ends_all_though_others_run(setup: SupervisorSetup) -> None:
    setup.child("rollout-0", "import sys; sys.exit(2)")
    setup.child("rollout-1", SLEEP)
    setup.child("trainer", SLEEP)
    outcome = await setup.supervisor(PATIENT).run()
    assert outcome.exit_code == 2


async def test_a_request_to_stop_ends_all_in_order_with_its_own_words(setup: SupervisorSetup) -> None:
    setup.child("trainer", LINGERING_TRAINER)
    supervisor = setup.supervisor(PATIENT)
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "up" in setup.log("trainer"))
    asked = RunOutcome(138, "the time limit is near")
    supervisor.stop(asked)
    supervisor.stop(RunOutcome(1, "too late"))
    await until(lambda: supervisor.ending.startswith("ending: waiting for the end of trainer (at most "))
    assert await task == asked
    assert any(event.startswith("trainer: ended after ") for event in setup.events)
    assert "checkpoint written" in setup.log("trainer")


async def test_a_command_that_does_not_exist_is_named(setup: SupervisorSetup) -> None:
    setup.children.append(Child(Command("trainer", ("/no/such/program",), {}, setup.folder / "trainer.log"), FAST))
    outcome = await setup.supervisor().run()
    assert outcome.exit_code == 127
    assert outcome.lines == ("cannot start /no/such/program: No such file or directory",)


async def test_ctrl_c_ends_the_trainer_before_the_others_within_the_grace(setup: SupervisorSetup) -> None:
    setup.child("trainer", LINGERING_TRAINER)
    seen = setup.folder / "others_ended_at"
    rollout = setup.child(
        "rollout",
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(seen)!r}, 'w').write(str(time.time())), sys.exit(0)))\n"
        "print('up', flush=True)\ntime.sleep(600)",
    )
    supervisor = setup.supervisor(PATIENT)
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "up" in setup.log("trainer") and "up" in setup.log("rollout"))
    asked_at = time.time()
    supervisor.interrupt(signal.SIGINT)
    outcome = await task
    assert outcome.exit_code == 130
    assert "checkpoint written" in setup.log("trainer")
    assert float(seen.read_text()) >= asked_at + 0.3
    assert all(map(gone, setup.children))
    assert rollout.restarts == 0


async def test_a_second_hang_up_kills_nothing(setup: SupervisorSetup) -> None:
    """A terminal that is closed sends SIGHUP twice: itself, and by its shell."""
    setup.child("trainer", LINGERING_TRAINER)
    supervisor = setup.supervisor(PATIENT)
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "up" in setup.log("trainer"))
    supervisor.interrupt(signal.SIGHUP)
    supervisor.interrupt(signal.SIGHUP)
    assert await task == RunOutcome(129, "stopped by SIGHUP")
    assert "checkpoint written" in setup.log("trainer")


async def test_a_child_that_the_host_cannot_start_counts_as_dead_and_ends_all_in_order(setup: SupervisorSetup) -> None:
    """As on a full disk, which has no room for its log."""
    setup.child("trainer", LINGERING_TRAINER)
    setup.child("reward", SLEEP)
    (setup.folder / "reward.log").mkdir()  # in the way of the log
    outcome = await setup.supervisor(PATIENT).run()
    assert outcome.exit_code == 1
    assert outcome.reason == "reward ended (cannot be started: Is a directory): it died 5 times within 120 s"
    assert "Is a directory" in outcome.lines[0]
    refused = [event for event in setup.events if event.startswith("reward: died (cannot be started: Is a directory)")]
    assert len(refused) == 4
    assert all(map(gone, setup.children))


@pytest.mark.redis
async def test_a_queue_whose_server_is_gone_at_its_restart_ends_all_in_order(
    setup: SupervisorSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its binary was upgraded meanwhile, or its path is no longer mounted."""
    setup.child("trainer", LINGERING_TRAINER)
    with EmbeddedServer(setup.folder / "queue") as server:
        life = LocalLife(server.process, server.log_path) if server.process else None
        setup.children.append(Child(EmbeddedQueue(server), FAST, running=life))
        supervisor = setup.supervisor(PATIENT)
        task = asyncio.create_task(supervisor.run())
        await until(lambda: "up" in setup.log("trainer"))
        monkeypatch.setattr("penstock.broker.embedded.SERVER_NAMES", ())
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        server.kill()
        outcome = await task
    assert outcome.reason.startswith("queue ended (cannot be started: no queue server")
    assert "checkpoint written" in setup.log("trainer")


async def test_a_deaf_child_is_killed_after_the_grace(setup: SupervisorSetup) -> None:
    deaf = setup.child("rollout", DEAF)
    setup.child("trainer", LINGERING_TRAINER)
    supervisor = setup.supervisor(Grace(START_SECONDS, 0.3, START_SECONDS))
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "deaf" in setup.log("rollout") and "up" in setup.log("trainer"))
    supervisor.interrupt(signal.SIGTERM)
    await task
    assert gone(deaf)
    assert any("rollout: did not end within 0.3 s and is killed" in event for event in setup.events)


async def test_a_second_ctrl_c_kills_at_once(setup: SupervisorSetup) -> None:
    setup.child("trainer", DEAF)
    supervisor = setup.supervisor(Grace(60, 60, 60))
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "deaf" in setup.log("trainer"))
    supervisor.interrupt(signal.SIGINT)
    await asyncio.sleep(0.1)
    assert not task.done()
    supervisor.interrupt(signal.SIGINT)
    await asyncio.wait_for(task, START_SECONDS)
    assert all(map(gone, setup.children))


async def test_what_a_killed_child_leaves_behind_is_killed_before_its_restart(setup: SupervisorSetup) -> None:
    detached = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']"
    )
    rollout = setup.child("rollout", f"{detached}, start_new_session=True); print('up', flush=True); time.sleep(600)")
    setup.child("trainer", SLEEP)
    supervisor = setup.supervisor(PATIENT)
    task = asyncio.create_task(supervisor.run())
    await until(lambda: "up" in setup.log("rollout"))
    assert rollout.identity is not None
    setup.trees.sample({"rollout": rollout.identity})
    grandchildren = descendants(rollout.identity.pid)
    assert len(grandchildren) == 1
    rollout.identity.send(signal.SIGKILL)
    await until(lambda: rollout.restarts == 1)
    await until(lambda: not grandchildren[0].alive)
    supervisor.interrupt(signal.SIGTERM)
    await task


async def test_a_cancelled_supervisor_leaves_nothing(setup: SupervisorSetup) -> None:
    setup.child("trainer", SLEEP)
    task = asyncio.create_task(setup.supervisor().run())
    await until(lambda: setup.children[0].running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(map(gone, setup.children))
    assert setup.children[0].state is ChildState.ENDED


def test_identity_is_lost_when_a_process_ends() -> None:
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    assert own.alive
    assert not ProcessIdentity(own.pid, "ticks:1").alive
    assert not ProcessIdentity(own.pid, "ticks:1").send(signal.SIGKILL)


@pytest.mark.parametrize("cpus", [{0}, {10**6}, set[int]()])
def test_a_child_runs_on_its_cpus_and_the_launcher_where_it_did(tmp_path: Path, cpus: set[int]) -> None:
    """A CPU that is not there, or that the system does not allow, is no reason not to start."""
    before = os.sched_getaffinity(0)
    own = frozenset({min(before)} if cpus == {0} else cpus)
    command = Command("c", (sys.executable, "-c", SLEEP), os.environ, tmp_path / "log", cpus=own)
    life = command.spawn(lambda: None)
    try:
        assert os.sched_getaffinity(life.pid) == (own if cpus == {0} else before)
        assert os.sched_getaffinity(0) == before
    finally:
        life.kill()
