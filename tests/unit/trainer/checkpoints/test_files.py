"""Step files and checkpoints: complete or absent, read only as they were committed, pruned within their limits."""

import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from penstock.contracts.ledger import CheckpointRecord
from penstock.contracts.log_ratios import LogRatiosFile
from penstock.durable import write_durably
from penstock.errors import DataError, NonFiniteError, PenstockError
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.tensors import INDEX, copy_state, read_shapes, read_state
from tests.small_disk import full_disk
from tests.unit.trainer.trainer_groups import example_groups


def test_a_step_file_gives_back_its_groups(tmp_path: Path) -> None:
    files = StepFiles(tmp_path / "steps", keep_bytes=0)
    assert files.is_empty
    groups = example_groups(num_groups=3)
    record = files.write(7, 2, groups)
    assert (record.step, record.tickets, record.file) == (7, (0, 1, 2), "00000007.2.pack")
    assert files.read(record) == tuple(groups)
    assert not files.is_empty
    assert [path.name for path in (tmp_path / "steps").iterdir()] == [record.file]


def test_a_step_file_that_was_recorded_before_there_were_episodes_is_read(tmp_path: Path) -> None:
    groups = example_groups(num_groups=2)
    files = StepFiles(tmp_path, keep_bytes=0)
    record = files.write(7, 2, groups)
    path = tmp_path / record.file
    document = msgspec.msgpack.decode(path.read_bytes())
    for scored in document["groups"]:
        assert ("episodes" in scored["group"], scored["group"]["ticket"].pop("environment")) == (False, "")
    path.write_bytes(msgspec.msgpack.encode(document))
    older = msgspec.structs.replace(record, digest=xxhash.xxh3_64_hexdigest(path.read_bytes()))
    assert files.read(older) == tuple(groups)


def test_a_step_file_that_is_not_what_was_committed_is_refused(tmp_path: Path) -> None:
    files = StepFiles(tmp_path, keep_bytes=0)
    record = files.write(0, 1, example_groups(num_groups=1))
    other = files.write(1, 1, example_groups(num_groups=2))
    (tmp_path / record.file).write_bytes((tmp_path / other.file).read_bytes())
    with pytest.raises(DataError, match=rf"step 1: .* has digest {other.digest}; the ledger records {record.digest}"):
        files.read(record)
    (tmp_path / record.file).unlink()
    with pytest.raises(DataError, match=r"step 1: .*No such file.* needed to resume"):
        files.read(record)


@pytest.mark.parametrize(("oldest_needed", "left"), [(0, [0, 1, 2, 3]), (2, [2, 3]), (9, [3])])
def test_pruning_keeps_what_a_checkpoint_needs(tmp_path: Path, oldest_needed: int, left: list[int]) -> None:
    groups = example_groups(num_groups=1)
    size = (tmp_path / StepFiles(tmp_path, keep_bytes=0).write(0, 1, groups).file).stat().st_size
    files = StepFiles(tmp_path, keep_bytes=size)
    for step in (1, 2, 3):
        files.write(step, 1, groups)
    files.prune(oldest_needed)
    assert sorted(int(path.name.partition(".")[0]) for path in tmp_path.iterdir()) == left


def test_log_ratios_are_counted_and_deleted_with_their_step_file(tmp_path: Path) -> None:
    groups = example_groups(num_groups=1)
    files = StepFiles(tmp_path, keep_bytes=0)
    records = [files.write(step, 1, groups) for step in range(3)]
    size = (tmp_path / records[0].file).stat().st_size
    for record in records:
        files.write_log_ratios(record, ((b"12" * 9,),))
    keeps_two_without = StepFiles(tmp_path, keep_bytes=2 * size)
    keeps_two_without.prune(oldest_needed=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.1.log_ratios", "00000002.1.pack"]
    files.write_log_ratios(records[0], ((b"",),))  # its step file was deleted meanwhile
    keeps_two_without.prune(oldest_needed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.1.log_ratios", "00000002.1.pack"]


def test_log_ratios_are_written_once_and_are_no_step_file(tmp_path: Path) -> None:
    files = StepFiles(tmp_path / "steps", keep_bytes=0)
    record = files.write(4, 2, example_groups(num_groups=1))
    files.write_log_ratios(record, ((b"12",),))
    files.write_log_ratios(record, ((b"34",),))
    found = msgspec.msgpack.decode((tmp_path / "steps" / "00000004.2.log_ratios").read_bytes(), type=LogRatiosFile)
    assert found == LogRatiosFile(4, record.digest, ((b"12",),))
    (tmp_path / "steps" / record.file).unlink()
    assert files.is_empty


def test_a_durable_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"one", b"two"):
        write_durably(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_file_without_room_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        full_disk(),
        pytest.raises(PenstockError, match=r"00000000\.1\.pack \(\d+ bytes\) cannot be written .* run\.root"),
    ):
        StepFiles(tmp_path, keep_bytes=0).write(0, 1, example_groups(num_groups=1))
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_the_journal_without_room_says_so(tmp_path: Path) -> None:
    journal = StepFiles(tmp_path, keep_bytes=0).journal
    record = CheckpointRecord(5, "00000005.1")
    journal.append(record)
    with full_disk(), pytest.raises(PenstockError, match=r"ledger\.jsonl cannot be written .* run\.root"):
        journal.append(*[record] * 100)
    assert journal.read().checkpoints[0] == record  # what was cut off is no record


def meta(steps: int) -> CheckpointMeta:
    return CheckpointMeta(steps=steps, version=steps, lease=1, next_number=8, outstanding=(6, 7))


def write(checkpoints: Checkpoints, steps: int, state: dict[str, Tensor]) -> CheckpointRecord:
    folder = checkpoints.begin(meta(steps))
    copy_state(state, None, None).write(folder)
    return checkpoints.complete(folder, meta(steps))


def test_a_checkpoint_gives_back_its_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state = {"w": torch.arange(4.0), "num_steps": torch.tensor(3), "rng": torch.get_rng_state()}
    for _ in range(2):  # written again, after a crash before the ledger named it
        record = write(checkpoints, 5, state)
    assert record == CheckpointRecord(5, "00000005.1")
    assert checkpoints.exists(record)
    assert not checkpoints.exists(CheckpointRecord(6, "00000006.1"))
    found, folder = checkpoints.read(record.name)
    assert msgspec.structs.replace(found, files={}) == meta(5)
    assert read_shapes(folder) == {name: tensor.shape for name, tensor in state.items()}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read_state(folder, loaded)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_checkpoint_of_python_3_11_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Python 3.11.3, members of enums were pickled as getattr(class, name)."""

    def reduce_as_getattr(member: Enum, protocol: int) -> tuple[Any, ...]:
        return getattr, (type(member), member.name)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduce_as_getattr)
    record = write(Checkpoints(tmp_path, keep=2), 5, {"w": torch.arange(4.0)})
    assert b"getattr" in (tmp_path / record.name / INDEX).read_bytes()
    loaded = torch.zeros(4)
    read_state(tmp_path / record.name, {"w": loaded})
    assert loaded.tolist() == [0, 1, 2, 3]


def test_a_snapshot_keeps_what_training_changes_afterwards(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    weight = torch.arange(4.0)
    folder = checkpoints.begin(meta(5))
    snapshot = copy_state({"w": weight}, None, None)
    weight.zero_()
    snapshot.write(folder)
    read_state(folder, {"w": weight})
    assert weight.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_makes_no_checkpoint(tmp_path: Path, number: float) -> None:
    """Neither weights nor moments: a resume would go on from there for ever."""
    state = {"model.w": torch.ones(3), "optimizer.w.exp_avg": torch.tensor([1.0, number]), "rng": torch.ones(2).byte()}
    with pytest.raises(NonFiniteError, match=r"optimizer\.w\.exp_avg is not finite .*no checkpoint.*optimizer\.lr"):
        copy_state(state, None, None).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "cut", "junk", "absent", "meta", "index"])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    record = write(checkpoints, 5, {"w": torch.arange(100.0)})
    folder = tmp_path / record.name
    tensors, index = folder / "__0_0.distcp", folder / INDEX
    whole = tensors.read_bytes()
    match damage:
        case "absent":
            tensors.unlink()
        case "meta":
            (folder / "checkpoint.json").write_bytes(msgspec.json.encode({"steps": 5}))
        case "index":
            index.write_bytes(index.read_bytes()[:-20])
        case _:
            tensors.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "junk": bytes(len(whole))}[damage])
    with pytest.raises(DataError, match=r"checkpoint .*00000005\.1 cannot be read .*restore the folder"):
        read_state(checkpoints.read(record.name)[1], {"w": torch.zeros(100)})


# Each index makes a folder when it is read: a stand-in for any call.
FORGED = {
    "a function": b"cos\nmkdir\n(V%s\ntR.",
    "a function of an imported module": b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.mkdir\n(V%s\ntR.",
    "a method": b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nVmkdir\ntR(cpathlib\nPosixPath\n(V%s\ntRtR.",
}


@pytest.mark.parametrize("call", FORGED)
def test_reading_a_forged_index_calls_nothing(tmp_path: Path, call: str) -> None:
    record = write(Checkpoints(tmp_path, keep=2), 5, {"w": torch.arange(4.0)})
    index = FORGED[call] % str(tmp_path / "called").encode()
    (tmp_path / record.name / INDEX).write_bytes(index)
    with pytest.raises(DataError, match=r"which no checkpoint holds"):
        read_shapes(tmp_path / record.name)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("obstacle", ["no folder", "no room"])
def test_a_checkpoint_that_cannot_be_written_says_what_it_needs(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "new"
    if obstacle == "no room":
        (folder / "__0_0.distcp").mkdir(parents=True)  # a folder where the file should be
    with pytest.raises(PenstockError, match=r"checkpoint .*new cannot be written .*run\.root"):
        copy_state({"w": torch.zeros(1)}, None, None).write(folder)
    assert folder.exists() == (obstacle == "no room")


def test_what_a_user_keeps_beside_checkpoints_and_steps_is_left_alone(tmp_path: Path) -> None:
    checkpoints, files = Checkpoints(tmp_path / "checkpoints", keep=1), StepFiles(tmp_path / "steps", keep_bytes=0)
    committed = [write(checkpoints, steps, {}) for steps in (1, 2)]
    kept = ["best", "00000001.1.bak", "00000001.1-copy", "notes.txt", "latest", ".cache"]
    for name in kept[:3]:
        shutil.copytree(tmp_path / "checkpoints" / "00000001.1", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "notes.txt").write_text("the second one is good")
    (tmp_path / "checkpoints" / "latest").symlink_to("00000002.1")
    (tmp_path / "checkpoints" / ".cache").mkdir()
    assert checkpoints.names() == ["00000001.1", "00000002.1"]
    assert checkpoints.holds("best")
    assert checkpoints.prune(committed) == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {*kept, "00000002.1"}
    files.write(0, 3, example_groups(num_groups=1))
    for name in ("first.pack", "00000000.pack", "00000000.old.pack"):
        (tmp_path / "steps" / name).write_bytes(b"mine")
    assert not files.is_empty
    files.prune(oldest_needed=9)
    left = {path.name for path in (tmp_path / "steps").iterdir()}
    assert left == {"first.pack", "00000000.pack", "00000000.old.pack"}


def test_pruning_keeps_the_newest_checkpoints_that_the_ledger_names(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    committed = [write(checkpoints, steps, {}) for steps in (9, 10, 11)]
    write(checkpoints, 12, {})  # the ledger does not name it
    checkpoints.begin(meta(13))
    assert checkpoints.names() == ["00000009.1", "00000010.1", "00000011.1", "00000012.1"]
    assert checkpoints.prune(committed) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010.1", "00000011.1"]
    assert checkpoints.prune([]) == 0
