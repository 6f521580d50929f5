"""`penstock replay` on a recorded run, as a user sees it."""

import re
import shutil
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import LedgerState
from penstock_launch.__main__ import run
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from tests.unit.trainer.episode_groups import branching_group
from tests.unit.trainer.model.families import save_family
from tests.unit.trainer.model.noisy_sampler import routed_group
from tests.unit.trainer.offline.recorded_run import (
    CHECKPOINT_AFTER,
    NUM_STEPS,
    SECRET,
    RecordedRun,
    equal_from,
    record,
    verdicts,
    write_config,
)
from tests.unit.trainer.trainer_groups import example_groups, save_tiny_model


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [((), 0, 5), (("--steps", "2:3"), 0, 3), (("--steps", "5:"), 3, 5), (("--steps", "4"), 3, 4)],
)
def test_a_replay_gives_the_recorded_digests_and_writes_nothing(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], start: int, end: int
) -> None:
    before = tree(recorded.folder)
    assert recorded.command("replay", *words) == 0
    output = capsys.readouterr().out
    assert verdicts(output) == equal_from(start, end)
    assert f"{end - start} of {end - start} steps have the recorded digest, and none another" in output
    assert tree(recorded.folder) == before


def test_a_step_is_replayed_through_its_recorded_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_family("qwen3_moe", tmp_path / "model")
    actor = {"path": str(tmp_path / "model"), "dtype": "float32", "group_size": 4, "router_replay": True}
    config = write_config(tmp_path, actor=actor)
    record(tmp_path, config, groups_of=lambda step: list(map(routed_group, example_groups(seed=step))))
    assert RecordedRun(tmp_path).command("replay") == 0
    assert verdicts(capsys.readouterr().out) == equal_from(0)


def test_lead_in_steps_are_marked(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.command("replay", "--steps", "5:5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "before the steps asked for" in line] == ["4"]


def test_the_first_step_that_differs_is_named(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Put another group into step 3; the file is otherwise as committed."""
    files = StepFiles(recorded.path / "steps", 0)
    changed = files.write(2, 1, example_groups(seed=99))

    def commit(ledger: LedgerState) -> None:
        ledger.steps[2] = changed

    recorded.change(commit)
    assert recorded.command("replay", "--steps", ":4") == 1
    output = capsys.readouterr().out
    assert [name for name, is_equal in verdicts(output) if is_equal] == ["start", "step 1", "step 2"]
    assert re.search(r"^first difference: step 3: [0-9a-f]{16}; recorded is [0-9a-f]{16}$", output, re.MULTILINE)
    # From the checkpoint after it, all digests are equal.
    assert recorded.command("replay", "--steps", "4:") == 0


def test_altered_weights_at_the_start_are_named(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(recorded.folder / "model" / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1e-3
    save_file(weights, recorded.folder / "model" / "model.safetensors", metadata={"format": "pt"})
    assert recorded.command("replay", "--steps", ":2") == 1
    assert "first difference: the weights to start from: " in capsys.readouterr().out


def test_a_damaged_step_file_is_the_first_difference(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(recorded.step_file(1).read_bytes())
    data[len(data) // 2] ^= 1
    recorded.step_file(1).write_bytes(data)
    assert recorded.command("replay") == 1
    output = capsys.readouterr().out
    assert verdicts(output)[-1] == ("step 2", False)
    assert re.search(r"STEP FILE DAMAGED: step 2: .* has digest [0-9a-f]{16}; the ledger records", output)
    assert "first difference: step 2: no weights, since its step file is damaged" in output


def test_another_objective_is_told_and_seen(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.command("replay", "--optimizer.lr", "2e-3", "--steps", ":2") == 1
    output = capsys.readouterr().out
    assert "note: optimizer.lr is 0.002 and was 0.001 when the run was started" in output
    assert "first difference: step 1: " in output


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"num_ranks": 2}, "trained by 2 ranks, which add in another order"),
        ({"device": "cuda"}, "trained on cuda, where"),
    ],
)
def test_what_has_other_bits_by_right_proves_nothing(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str], change: dict[str, object], seen: str
) -> None:
    def other(ledger: LedgerState) -> None:
        for steps in (2, 3):
            record = ledger.weights[steps]
            policy = PolicyIdentity(record.policy.number, "0" * 16)
            ledger.weights[steps] = msgspec.structs.replace(record, policy=policy, **change)

    recorded.change(other)
    assert recorded.command("replay", "--steps", ":4") == 1
    output = capsys.readouterr().out
    assert f"note: an unequal digest will prove nothing: steps were {seen}" in output
    assert re.search(r"first difference: step 2: .*; this proves nothing, see the notes above", output)
    assert "DIFFERS" not in output


def test_arithmetic_that_is_not_deterministic_proves_nothing(
    recorded: RecordedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Learner, "is_deterministic", property(lambda learner: False))
    monkeypatch.setattr(Learner, "device", property(lambda learner: "cuda"))
    assert recorded.command("replay", "--steps", ":2") == 0
    assert "note: an unequal digest will prove nothing: arithmetic on cuda is not" in capsys.readouterr().out
    assert recorded.command("replay", "--steps", ":2", "--optimizer.lr", "2e-3") == 1
    assert re.search(r"first difference: step 1: .*; this proves nothing", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ("x", "--steps: saw 'x'; expected A:B"),
        ("4:3", "--steps: saw '4:3', which holds no step"),
        ("4:9", "steps 6:9 are not recorded; expected some of 2:5"),
        (
            "1:2",
            "the files of steps 1 are gone: pruned by checkpoint.keep_step_bytes, or deleted; expected some of 2:5",
        ),
        ("3", "the files of steps 1 are gone (the start for step 3 is after 0 steps): "),
        ("0:2", "--steps: saw '0:2'; expected steps from 1 on"),
    ],
)
def test_steps_that_cannot_be_trained_are_told_from_those_that_can(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str], steps: str, seen: str
) -> None:
    recorded.step_file(0).unlink()
    assert recorded.command("replay", "--steps", steps) == 2
    assert seen in capsys.readouterr().err


def test_by_default_it_trains_what_is_there(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    recorded.step_file(0).unlink()
    assert recorded.command("replay") == 0
    output = capsys.readouterr().out
    assert verdicts(output) == equal_from(CHECKPOINT_AFTER)
    assert "steps 1 are recorded, but their files are gone" in output
    for step in range(1, NUM_STEPS):
        recorded.step_file(step).unlink()
    assert recorded.command("replay") == 2
    assert "holds none of the 5 recorded steps" in capsys.readouterr().err


def test_a_file_that_the_journal_does_not_name_counts_for_nothing(recorded: RecordedRun) -> None:
    """Written before a crash, and written again by a later life of the trainer with another lease."""
    shutil.copy(recorded.step_file(0), recorded.path / "steps" / "00000005.1.pack")
    shutil.copy(recorded.step_file(0), recorded.path / "steps" / "00000002.2.pack")
    assert recorded.command("replay") == 0


@pytest.mark.parametrize(
    ("words", "code", "seen"),
    [
        (["--run.name", "other"], 2, "run 'other' is not in .*check run.name and run.root"),
        (["--bundle", "{folder}/none.tar"], 2, "none.tar cannot be read .*No such file"),
    ],
)
def test_an_unknown_run_is_named(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str], words: list[str], code: int, seen: str
) -> None:
    assert recorded.command("replay", *(word.format(folder=recorded.folder) for word in words)) == code
    assert re.search(seen, capsys.readouterr().err)


def test_a_run_without_a_journal_asks_its_queue(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    recorded.journal.path.unlink()
    assert recorded.command("replay", "--redis.timeout_seconds", "1") == 4
    error = capsys.readouterr().err
    assert "redis.url redis://u:**********@127.0.0.1:1/0" in error
    assert SECRET not in error


def test_a_step_file_outside_the_folder_is_refused(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    def outside(ledger: LedgerState) -> None:
        ledger.steps[0] = msgspec.structs.replace(ledger.steps[0], file="../../config.yaml")

    recorded.change(outside)
    assert recorded.command("replay") == 2
    assert "its file is called '../../config.yaml'" in capsys.readouterr().err


def test_an_adapter_and_dithered_weights_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    actor = {"path": str(tmp_path / "model"), "dtype": "float32", "group_size": 4, "lora": {"rank": 2}}
    record(tmp_path, write_config(tmp_path, actor=actor, rollout={"engine": {"dtype": "bfloat16"}}, kl_ctl=0.1))
    recorded = RecordedRun(tmp_path)
    assert recorded.command("replay") == 0
    bundle = recorded.bundle("--steps", "5:", "--with-model")
    assert run(["replay", "--bundle", str(bundle)]) == 0
    assert verdicts(capsys.readouterr().out)[-3:] == equal_from(3)


def test_each_step_has_its_own_settings_whatever_the_file_says_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration changed in the middle of the run, and again after it; its bytes are of two forms."""
    save_tiny_model(tmp_path / "model")
    changed = {"optimizer": {"lr": 3e-3}, "rollout": {"engine": {"dtype": "bfloat16"}}, "total_train_epochs": 2}
    record(tmp_path, write_config(tmp_path), then=write_config(tmp_path, **changed))
    write_config(tmp_path, optimizer={"lr": 9e-9}, loss={"surrogate": "cispo"})
    recorded = RecordedRun(tmp_path)
    assert recorded.command("replay") == 0
    assert "note: " not in capsys.readouterr().out
    bundle = recorded.bundle("--with-model")
    assert run(["replay", "--bundle", str(bundle)]) == 0
    assert verdicts(capsys.readouterr().out) == equal_from(0)
    assert run(["replay", "--bundle", str(bundle), "--optimizer.lr", "0.5"]) == 1
    output = capsys.readouterr().out
    assert "note: optimizer.lr is 0.5 and was 0.001 when step 1 was trained" in output
    assert "first difference: step 1: " in output


def test_a_run_of_episodes_is_replayed_and_bundled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    config = write_config(tmp_path, agent={"environment": "my_envs:Guess"})
    record(tmp_path, config, groups_of=lambda step: [branching_group(step), branching_group(step + 1, (0.0, 1.0))])
    episodes = RecordedRun(tmp_path)
    assert episodes.command("replay") == 0
    assert verdicts(capsys.readouterr().out) == equal_from(0)
    assert run(["replay", "--bundle", str(episodes.bundle("--steps", "2:4"))]) == 0
    assert "4 of 4 steps have the recorded digest, and none another" in capsys.readouterr().out
