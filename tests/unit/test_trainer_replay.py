"""`penstock replay` and `penstock bundle` over a tiny run that was trained on the CPU, as their user sees them."""

import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
import yaml
from safetensors.torch import load_file, save_file

from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.ledger import LedgerState, RunRecord, WeightsRecord
from penstock.settings import load_config
from penstock_launch.__main__ import run
from penstock_trainer.bundle import extract
from penstock_trainer.checkpoint import CheckpointMeta, Checkpoints
from penstock_trainer.journal import Journal
from penstock_trainer.learner import Learner
from penstock_trainer.recording import parse_steps, spans
from penstock_trainer.staging import Staging
from penstock_trainer.step_files import StepFiles
from penstock_trainer.weight_files import Format
from tests.unit.trainer_groups import example_groups, save_tiny_model

NUM_STEPS = 5
CHECKPOINT_AFTER = 3
SECRET = "a-secret-of-this-run"
RUN = RunRecord("d" * 16, 20, 4, 4, 0)


@dataclass
class RecordedRun:
    """A run's folder, and the commands over it."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "r"

    @property
    def journal(self) -> Journal:
        return Journal(self.path / "steps")

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    def command(self, word: str, *words: str) -> int:
        return run([word, "--config", str(self.config_path), *words])

    def bundle(self, *words: str, name: str = "b.tar") -> Path:
        out = self.folder / name
        assert self.command("bundle", "--out", str(out), *words) == 0
        return out

    def step_file(self, step: int) -> Path:
        return self.path / "steps" / f"{step:08d}.1.pack"

    def change(self, change: Callable[[LedgerState], None]) -> None:
        ledger = self.journal.read()
        change(ledger)
        self.journal.begin(ledger)


def write_config(folder: Path, **changes: object) -> Config:
    document = {
        "run": {"root": str(folder / "runs"), "name": "r"},
        "actor": {"path": str(folder / "model"), "dtype": "float32", "group_size": 4},
        "data": {"train": {"path": "unused.jsonl"}, "batch_size": 4},
        "rollout": {"engine": {"dtype": "float32"}},
        "optimizer": {"lr": 1e-3, "schedule": "linear"},
        "redis": {"url": f"redis://u:{SECRET}@127.0.0.1:1/0", "password": SECRET},
        "token": SECRET,
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return load_config(["--config", str(folder / "config.yaml")], {})


def record(folder: Path, config: Config) -> None:
    """Train a run as the loop does, without its queue: file, update, weights, journal; a checkpoint on the way."""
    path = folder / "runs" / "r"
    learner = Learner(config, num_steps=NUM_STEPS)
    files, checkpoints = StepFiles(path / "steps", 0), Checkpoints(path / "checkpoints", 2)
    form = Format(config.rollout.engine.dtype, config.weights.rounding)
    digest = Staging(learner, folder / "weights", form).digest
    files.journal.begin(LedgerState(run=RUN, weights={0: WeightsRecord(digest(0), 0)}))
    version = 0
    for step in range(NUM_STEPS):
        committed = files.write(step, 1, example_groups(seed=step))
        result = learner.update(files.read(committed), version=version)
        version += int(result.changed)
        files.journal.append(committed, WeightsRecord(digest(version), step + 1, result.changed))
        if step + 1 == CHECKPOINT_AFTER:
            meta = CheckpointMeta(step + 1, version, 1, 0, ())
            written = checkpoints.begin(meta)
            learner.snapshot(written).write(written)
            files.journal.append(checkpoints.complete(written, meta))
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("recorded"))
    save_tiny_model(folder / "model")
    record(folder, write_config(folder))
    return folder


@pytest.fixture
def recorded(trained: Path, tmp_path: Path) -> RecordedRun:
    for name in ("runs", "model"):
        shutil.copytree(trained / name, tmp_path / name)
    write_config(tmp_path)
    return RecordedRun(tmp_path)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def verdicts(output: str) -> list[tuple[str, bool]]:
    """Each line of a step or start: its name, and whether its digest is the recorded one."""
    found = re.findall(r"^(start|step +\d+) .*?(equal|DIFFERS|DAMAGED)", output, re.MULTILINE)
    return [(" ".join(name.split()), verdict == "equal") for name, verdict in found]


def equal_from(start: int, end: int = NUM_STEPS) -> list[tuple[str, bool]]:
    return [("start", True), *((f"step {step}", True) for step in range(start, end))]


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [((), 0, 5), (("--steps", "1:3"), 0, 3), (("--steps", "4:"), 3, 5), (("--steps", "3:4"), 3, 4)],
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


def test_lead_in_steps_are_marked(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.command("replay", "--steps", "4:5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "before the steps asked for" in line] == ["3"]


def test_the_first_step_that_differs_is_named(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Another group in step 2, whose file is otherwise as committed."""
    files = StepFiles(recorded.path / "steps", 0)
    changed = files.write(2, 1, example_groups(seed=99))

    def commit(ledger: LedgerState) -> None:
        ledger.steps[2] = changed

    recorded.change(commit)
    assert recorded.command("replay", "--steps", ":4") == 1
    output = capsys.readouterr().out
    assert [name for name, is_equal in verdicts(output) if is_equal] == ["start", "step 0", "step 1"]
    assert re.search(r"^first difference: step 2: [0-9a-f]{16}; recorded is [0-9a-f]{16}$", output, re.MULTILINE)
    # From the checkpoint after it nothing is wrong.
    assert recorded.command("replay", "--steps", "3:") == 0


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
    assert verdicts(output)[-1] == ("step 1", False)
    assert re.search(r"STEP FILE DAMAGED: step 1: .* has digest [0-9a-f]{16}; the ledger says", output)
    assert "first difference: step 1: no weights, since its step file is damaged" in output


def test_another_objective_is_told_and_seen(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.command("replay", "--optimizer.lr", "2e-3", "--steps", ":2") == 1
    output = capsys.readouterr().out
    assert "note: optimizer.lr is 0.002 and was 0.001 when the run was started" in output
    assert "first difference: step 0: " in output


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
    assert re.search(r"first difference: step 1: .*; this proves nothing, see the notes above", output)
    assert "DIFFERS" not in output


def test_arithmetic_that_is_not_deterministic_proves_nothing(
    recorded: RecordedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Learner, "is_deterministic", property(lambda learner: False))
    monkeypatch.setattr(Learner, "device", property(lambda learner: "cuda"))
    assert recorded.command("replay", "--steps", ":2") == 0
    assert "note: an unequal digest will prove nothing: arithmetic on cuda is not" in capsys.readouterr().out
    assert recorded.command("replay", "--steps", ":2", "--optimizer.lr", "2e-3") == 1
    assert re.search(r"first difference: step 0: .*; this proves nothing", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("steps", "seen"),
    [
        ("3", "--steps '3': expected a:b"),
        ("3:3", "--steps '3:3' holds no step"),
        ("3:9", "steps 5:9 are not recorded; expected some of 1:5"),
        (
            "0:2",
            "the files of steps 0:1 are gone: pruned by checkpoint.keep_step_bytes, or deleted; expected some of 1:5",
        ),
        ("2:3", "the files of steps 0:1 are gone (the start for step 2 is after 0 steps): "),
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
    assert "steps 0:1 are recorded, but their files are gone" in output
    for step in range(1, NUM_STEPS):
        recorded.step_file(step).unlink()
    assert recorded.command("replay") == 2
    assert "holds none of the 5 recorded steps" in capsys.readouterr().err


def test_a_file_that_the_journal_does_not_name_counts_for_nothing(recorded: RecordedRun) -> None:
    """Written before a crash, and by a later life of the trainer again under another lease."""
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
    assert "redis.url redis://127.0.0.1:1/0" in error
    assert SECRET not in error


@pytest.mark.parametrize(
    ("words", "name", "start"), [((), "b.tar", 0), (("--with-model",), "b.tar.gz", 0), (("--steps", "4:"), "b.tgz", 3)]
)
def test_a_bundle_gives_the_same_verdict_elsewhere(
    recorded: RecordedRun,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    name: str,
    start: int,
) -> None:
    elsewhere = Path(tmp_path_factory.mktemp("elsewhere"))
    shutil.move(recorded.bundle(*words, name=name), elsewhere / name)
    shutil.move(recorded.folder / "model", elsewhere / "m")
    shutil.rmtree(recorded.folder)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PENSTOCK_OPTIMIZER__LR", "1.0")  # the bundle's configuration counts
    given = [] if "--with-model" in words else ["--actor.path", "m"]
    capsys.readouterr()
    assert run(["replay", "--bundle", name, *given]) == 0
    output = capsys.readouterr().out
    assert verdicts(output) == equal_from(start)
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted([name, "m"])


def test_a_bundle_of_a_bad_step_gives_the_same_first_difference(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(ledger: LedgerState) -> None:
        record = ledger.weights[5]
        ledger.weights[5] = msgspec.structs.replace(record, policy=PolicyIdentity(record.policy.number, "0" * 16))

    recorded.change(other)
    assert recorded.command("replay", "--steps", "3:") == 1
    here = capsys.readouterr().out.splitlines()[-1]
    bundle = recorded.bundle("--steps", "3:")
    capsys.readouterr()
    assert run(["replay", "--bundle", str(bundle)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == here
    assert here.startswith("first difference: step 4: ")


def test_a_bundle_holds_no_secret_and_no_pickle(recorded: RecordedRun) -> None:
    bundle = recorded.bundle("--with-model", "--steps", "3:")
    assert SECRET.encode() not in bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
        readme = tar.extractfile("README")
        assert readme is not None
        lines = readme.read().decode().splitlines()
    assert len(lines) == 2
    assert "penstock replay --bundle" in lines[1]
    assert names == [
        "README",
        "bundle.json",
        "config.yaml",
        "steps/ledger.jsonl",
        "steps/00000003.1.pack",
        "steps/00000004.1.pack",
        "start/checkpoint.json",
        "start/state.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
    ]


def test_a_bundle_names_the_model_that_it_needs(recorded: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = recorded.bundle()
    save_tiny_model(recorded.folder / "other", "qwen3")
    assert run(["replay", "--bundle", str(bundle), "--actor.path", str(recorded.folder / "other")]) == 2
    assert re.search(
        r"other' with fingerprint [0-9a-f]{16}: expected .*model with fingerprint", capsys.readouterr().err
    )
    shutil.rmtree(recorded.folder / "model")
    assert run(["replay", "--bundle", str(bundle)]) == 2
    assert "give its folder as --actor.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (("--out", "{folder}/b.zip"), "expected a name that ends in one of .tar, .tar.gz, .tgz"),
        (("--out", "{folder}/config.tar"), "config.tar exists already"),
        (("--out", "{folder}/none/b.tar"), "cannot be written .*No such file"),
        (("--out", "{folder}/b.tar", "--steps", "7:9"), "steps 7:9 are not recorded"),
    ],
)
def test_a_bundle_that_cannot_be_written_is_told(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], seen: str
) -> None:
    (recorded.folder / "config.tar").touch()
    before = sorted(recorded.folder.iterdir())
    assert recorded.command("bundle", *(word.format(folder=recorded.folder) for word in words)) == 2
    assert re.search(seen, capsys.readouterr().err)
    assert sorted(recorded.folder.iterdir()) == before


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside"),
        member("/tmp/outside"),
        member("steps/../../outside"),
        member("model/evil.py"),
        member("model/pytorch_model.bin"),
        member("start/.metadata"),
        member("steps", tarfile.SYMTYPE, "/tmp"),
        member("config.yaml", tarfile.SYMTYPE, "../outside"),
        member("bundle.json", tarfile.LNKTYPE, "../outside"),
        member("README", tarfile.FIFOTYPE),
        member("README", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_a_malicious_bundle_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], evil: tarfile.TarInfo
) -> None:
    path, folder = tmp_path / "evil.tar", tmp_path / "inside"
    folder.mkdir()
    with tarfile.open(path, "w") as tar:
        tar.addfile(member("README"), BytesIO(b"x"))
        tar.addfile(evil, BytesIO(b"x"))
    assert run(["replay", "--bundle", str(path)]) == 2
    assert f"holds {evil.name!r}: expected only files" in capsys.readouterr().err
    with pytest.raises(Exception, match="nothing was unpacked"):
        extract(path, folder)
    assert sorted(tmp_path.rglob("*")) == [path, folder]


@pytest.mark.parametrize("damage", ["cut", "no tar", "no manifest"])
def test_a_damaged_bundle_is_told(recorded: RecordedRun, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    bundle = recorded.bundle(name="b.tar.gz")
    if damage == "no manifest":
        with tarfile.open(bundle, "w") as tar:
            tar.addfile(member("README"), BytesIO(b"x"))
    else:
        bundle.write_bytes(bundle.read_bytes()[:2000] if damage == "cut" else b"no tar")
    capsys.readouterr()
    assert run(["replay", "--bundle", str(bundle)]) == 2
    assert "cannot be read" in capsys.readouterr().err


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
    bundle = recorded.bundle("--steps", "4:", "--with-model")
    assert run(["replay", "--bundle", str(bundle)]) == 0
    assert verdicts(capsys.readouterr().out)[-3:] == equal_from(3)


def test_steps_are_written_as_they_are_read() -> None:
    assert [parse_steps(text) for text in ("", "3:5", "3:", ":5", ":")] == [
        (None, None),
        (3, 5),
        (3, None),
        (None, 5),
        (None, None),
    ]
    assert spans([0, 1, 2, 7, 9, 10]) == "0:3, 7:8, 9:11"
