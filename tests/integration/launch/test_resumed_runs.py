"""A run goes on with what it was trained with: after other keys, and after the loss of all data of its queue.

Real trainers, rollout and reward services, killed at any moment; the engine is a fake whose completions are a pure
function of prompt and seed, so that with max_staleness 0 two runs have the same bits.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from penstock.broker import connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts.ledger import LedgerState
from penstock_trainer.checkpoints.step_files import StepFiles
from tests.integration.launch.user_commands import SPREAD, UserCommands, ended, eventually, read_only, said
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

CONFIG_EXIT, STALL_EXIT = 2, 3
NUM_PROMPTS, BATCH_SIZE, EPOCHS = 4, 2, 5
NUM_TICKETS = NUM_PROMPTS * EPOCHS


class Run(UserCommands):
    """A run whose services are started and killed one by one."""

    def __init__(self, folder: Path, model: Path, server: EmbeddedServer, engine_url: str) -> None:
        super().__init__(folder, model, server)
        self.score_by("spread", SPREAD)
        self.write_rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(NUM_PROMPTS)))
        self.document["total_train_epochs"] = EPOCHS
        self.document["staleness"]["max_staleness"] = 0
        self.document["optimizer"] = {"lr": 1e-3}
        self.document["rollout"]["engine"] = {"url": engine_url}

    @property
    def config(self) -> Config:
        return Config.model_validate(self.document)

    @property
    def steps(self) -> StepFiles:
        return StepFiles(self.folder / "runs" / self.document["run"]["name"] / "steps", 0)

    def start_all(self) -> "subprocess.Popen[str]":
        """Start every service; returns the trainer."""
        self.start_services(self.document["rollout"]["engine"]["url"])
        return self.start("penstock_trainer")

    def kill_all(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    @contextlib.asynccontextmanager
    async def queue(self) -> AsyncIterator[TrainerQueue]:
        connected = await connect(self.config)
        try:
            yield read_only(connected)
        finally:
            await connected.close()

    async def until_steps(self, count: int, trainer: "subprocess.Popen[str]") -> LedgerState:
        """The ledger, once it has that many steps with their weights."""
        async with self.queue() as queue:

            async def num_weights() -> int:
                return len((await queue.ledger()).weights)

            await eventually(num_weights, count + 1, trainer)
            return await queue.ledger()

    async def finished(self, trainer: "subprocess.Popen[str]") -> tuple[LedgerState, str]:
        """The ledger after the trainer's end, and the output of the trainer."""
        exit_code = await ended(trainer)
        assert trainer.stdout is not None
        output = trainer.stdout.read()
        assert exit_code == 0, output
        async with self.queue() as queue:
            ledger, counters = await queue.ledger(), await queue.counters()
        tickets = [number for record in ledger.steps for number in record.tickets]
        assert sorted(tickets) == list(range(NUM_TICKETS)), "each prompt is trained once in each epoch"
        assert (counters.issued, counters.trained, counters.outstanding) == (NUM_TICKETS, NUM_TICKETS, 0)
        assert [record.step for record in ledger.steps] == list(range(NUM_TICKETS // BATCH_SIZE))
        return ledger, output


def another_model(model: Path, folder: Path) -> Path:
    """The same shapes and tokenizer, and one weight of another value."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    first = min(weights)
    weights[first] = weights[first] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def warnings(output: str) -> list[str]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["event"] for line in lines if line["level"] == "warning"]


@pytest.fixture
def own_queue(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A queue of this test alone: it loses all its data."""
    with EmbeddedServer(tmp_path / "queue") as server:
        yield server


@pytest.fixture
async def run(
    tmp_path: Path, tiny_model: Path, own_queue: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Run]:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # that of the tiny model
    async with serving(FakeSGLang()) as url:
        run = Run(tmp_path, tiny_model, own_queue, url)
        try:
            yield run
        finally:
            run.end()


async def test_a_queue_that_lost_all_data_is_rebuilt_and_the_weights_are_those_of_an_undisturbed_run(run: Run) -> None:
    run.document["checkpoint"] = {"every_steps": 3}
    undisturbed, _ = await run.finished(run.start_all())
    run.kill_all()
    run.document["run"]["name"] = "disturbed"
    trainer = run.start_all()
    before = await run.until_steps(4, trainer)
    run.kill_all()
    async with run.queue() as queue:
        await queue.queue.client.flushall()
    ledger, output = await run.finished(run.start_all())
    in_journal = len(before.weights) - 2  # the last weights may not have been in it, and version 0 is of no step
    assert in_journal >= 3
    assert ledger.steps[:in_journal] == before.steps[:in_journal]
    assert ledger.policies == undisturbed.policies
    assert len(ledger.policies) > in_journal
    [lost] = [line for line in warnings(output) if "the queue has lost all data of this run" in line]
    assert re.search(r"its ledger is rebuilt from .*ledger\.jsonl, with [3-9] steps, 0 dropped tickets", lost)
    assert ledger.checkpoints[0].steps == 3
    code, replayed = await asyncio.to_thread(run.run, "penstock_launch", "replay")
    assert code == 0, replayed


async def test_a_launched_run_goes_on_when_its_queue_loses_all_data_under_it(run: Run) -> None:
    """Whatever each service is doing then: the launcher starts again what ends."""
    run.document["checkpoint"] = {"every_steps": 3}
    launcher = run.start("penstock_launch", "launch", "local")
    before = await run.until_steps(4, launcher)
    async with run.queue() as queue:
        await queue.queue.client.flushall()
    ledger, output = await run.finished(launcher)
    assert "Traceback" not in output
    in_journal = len(before.weights) - 2
    assert ledger.steps[:in_journal] == before.steps[:in_journal]
    log = (run.steps.journal.path.parents[1] / "logs" / "trainer.log").read_text()
    assert len([line for line in warnings(log) if "the queue has lost all data of this run" in line]) == 1


async def test_a_folder_without_its_journal_is_not_begun_anew(run: Run) -> None:
    run.document["checkpoint"] = {"every_steps": 1}
    trainer = run.start_all()
    await run.until_steps(3, trainer)
    run.kill_all()
    async with run.queue() as queue:
        await queue.queue.client.flushall()
    run.steps.journal.path.unlink()
    names = sorted(path.name for path in (run.steps.journal.path.parents[1] / "checkpoints").iterdir())
    code, output = await asyncio.to_thread(run.run, "penstock_trainer")
    assert code == CONFIG_EXIT, output
    assert "Traceback" not in output
    assert re.search(r"data: the queue holds nothing of this run, and its folder holds checkpoint \d+\.1 but", output)
    assert sorted(path.name for path in (run.steps.journal.path.parents[1] / "checkpoints").iterdir()) == names


async def test_changed_keys_hold_from_the_next_step_on_and_recorded_steps_keep_their_own(run: Run) -> None:
    """Killed before the first checkpoint, so that every step is trained again."""
    run.document["checkpoint"] = {"every_steps": 0}
    run.document["optimizer"] = {"lr": 1e-3, "schedule": "linear"}
    run.document["total_train_epochs"] = EPOCHS - 1
    trainer = run.start_all()
    await run.until_steps(3, trainer)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    async with run.queue() as queue:
        before = await queue.ledger()
    num_before = len(before.steps) - (before.unfinished is not None)  # one without weights gets the new settings
    run.document["total_train_epochs"] = EPOCHS
    run.document["optimizer"] = {"lr": 2e-3, "schedule": "linear"}
    run.document["loss"] = {"aggregation": "token-mean"}
    run.document["sampling"]["temperature"] = 0.5
    ledger, output = await run.finished(run.start("penstock_trainer"))
    assert ledger.steps[:num_before] == before.steps[:num_before]
    assert [record.step for record in ledger.steps if record.settings == before.steps[0].settings] == [
        *range(num_before)
    ]
    for record in ledger.steps:
        temperatures = {group.group.ticket.sampling.temperature for group in run.steps.read(record)}
        assert temperatures == {1.0 if record.step < len(before.steps) else 0.5}, record
    holds = f"the new value holds from step {num_before + 1} on"
    assert {line for line in warnings(output) if "holds" in line} == {
        f"total_train_epochs was {EPOCHS - 1} and is {EPOCHS}: {holds}",
        f"optimizer.lr was 0.001 and is 0.002: {holds}",
        f"loss.aggregation was 'seq-mean-token-sum' and is 'token-mean': {holds}",
        f"sampling.temperature was 1.0 and is 0.5: {holds}",
    }
    code, replayed = await asyncio.to_thread(run.run, "penstock_launch", "replay")
    assert code == 0, replayed
    assert f"{NUM_TICKETS // BATCH_SIZE} of {NUM_TICKETS // BATCH_SIZE} steps have the recorded digest" in replayed
    code, replayed = await asyncio.to_thread(
        run.run, "penstock_launch", "replay", "--steps=:", "--optimizer.lr", "0.003"
    )
    assert code == 1, replayed
    assert "note: optimizer.lr is 0.003 and was 0.001 when step 1 was trained" in replayed


async def test_another_model_of_the_same_shape_is_refused_by_name(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    run.document["checkpoint"] = {"every_steps": 1}
    trainer = run.start_all()
    await run.until_steps(2, trainer)
    trainer.send_signal(signal.SIGTERM)
    await ended(trainer)
    other = another_model(tiny_model, tmp_path / "other")
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model)
    run.document["actor"]["path"] = str(other)
    code, output = await asyncio.to_thread(run.run, "penstock_trainer")
    assert code == CONFIG_EXIT, output
    assert "Traceback" not in output
    seen = rf"actor\.path was {tiny_model} \(weights [0-9a-f]{{16}}\) and is {other} \(weights [0-9a-f]{{16}}\)"
    assert re.search(rf"^trainer: config: this run cannot be resumed: {seen}\. Expected", said(output), re.MULTILINE)
    run.document["actor"]["path"] = str(moved)
    run.kill_all()  # a rollout service with the old path is a stranger now
    await run.finished(run.start_all())


RAISES = "def spread(prompt, completion, answer, metadata):\n    raise KeyError('units')\n"


@pytest.mark.parametrize("embedded", [True, False], ids=["queue of the launch", "queue of the user"])
def test_a_try_that_failed_before_its_first_step_leaves_nothing_that_the_next_one_resumes(
    tmp_path: Path, tiny_model: Path, own_queue: EmbeddedServer, embedded: bool
) -> None:
    """The first one drops all its tickets, and other keys could not change within a run."""
    user = UserCommands(tmp_path, tiny_model, None if embedded else own_queue)
    user.use_pure_engine()
    user.score_by("spread", RAISES)
    user.document["total_train_epochs"] = 1
    code, output = user.launch()
    assert code == STALL_EXIT, output
    assert "KeyError: 'units'" in output
    user.score_by("spread", SPREAD)
    user.document["actor"]["group_size"] = 4
    user.write_rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(NUM_PROMPTS)))
    code, output = user.launch()
    assert code == 0, output
    assert "ended before its first step: this run begins anew" in output
    assert "Finished: 2 steps" in output
    assert "4 issued = 4 trained + 0 dropped" in output
