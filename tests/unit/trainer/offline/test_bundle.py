"""`penstock bundle` on a recorded run, and `penstock replay --bundle`, as a user sees them."""

import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import LedgerState
from penstock_launch.__main__ import run
from penstock_trainer.offline.bundle import extract
from tests.unit.trainer.offline.recorded_run import (
    SECRET,
    RecordedRun,
    equal_from,
    record,
    verdicts,
    write_config,
)
from tests.unit.trainer.trainer_groups import save_tiny_model


@pytest.mark.parametrize(
    ("words", "name", "start"), [((), "b.tar", 0), (("--with-model",), "b.tar.gz", 0), (("--steps", "5:"), "b.tgz", 3)]
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


@pytest.mark.parametrize("explicit", [True, False], ids=["ref.path is actor.path", "ref.path is empty"])
def test_a_bundle_has_all_models_that_a_step_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], explicit: bool
) -> None:
    """A teacher, and a reference that moves and begins as the policy: in another folder both are found again."""
    home = tmp_path / "home"
    home.mkdir()
    model, teacher = save_tiny_model(home / "model"), save_tiny_model(home / "teacher", "qwen3")
    changes = {
        "kl_ctl": 0.1,
        "ref": {"path": str(model) if explicit else "", "sync_steps": 2, "mixup_alpha": 0.5},
        "teacher": {"path": str(teacher)},
    }
    record(home, write_config(home, **changes))
    bundle = RecordedRun(home).bundle("--with-model", "--steps", "5:")
    shutil.move(bundle, tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert {"model/model.safetensors", "teacher/model.safetensors"} <= set(tar.getnames())
    shutil.rmtree(home)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(["replay", "--bundle", "b.tar"]) == 0
    assert verdicts(capsys.readouterr().out) == equal_from(3)


def test_a_bundle_of_a_bad_step_gives_the_same_first_difference(
    recorded: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(ledger: LedgerState) -> None:
        record = ledger.weights[5]
        ledger.weights[5] = msgspec.structs.replace(record, policy=PolicyIdentity(record.policy.number, "0" * 16))

    recorded.change(other)
    assert recorded.command("replay", "--steps", "4:") == 1
    here = capsys.readouterr().out.splitlines()[-1]
    bundle = recorded.bundle("--steps", "4:")
    capsys.readouterr()
    assert run(["replay", "--bundle", str(bundle)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == here
    assert here.startswith("first difference: step 5: ")


def test_a_bundle_holds_no_secret_and_no_pickle(recorded: RecordedRun) -> None:
    bundle = recorded.bundle("--with-model", "--steps", "4:")
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
        (("--out", "{folder}/b.tar", "--steps", "8:9"), "steps 8:9 are not recorded"),
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
