"""Deltas, from the trainer's staging to a server's copy: the bits of full versions, whichever ones are missed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts import Dtype
from penstock.errors import WeightsError
from penstock.weights.local_folder import shared_memory
from penstock.weights.manifest import MANIFEST_NAME, read_manifest
from penstock_rollout.weights.local_copy import ChainError
from penstock_trainer.weights.deltas import DELTA_NAME
from penstock_trainer.weights.files import WEIGHTS_NAME, Format
from tests.unit.rollout.weights.delta_world import World, flip


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def chain(world: World, num_steps: int) -> list[tuple[Path, bytes]]:
    """Versions 0 to num_steps, each with its bytes as a full file."""
    written = [(world.write(0), world.full())]
    for version in range(1, num_steps + 1):
        world.source.step()
        written.append((world.write(version), world.full()))
    return written


steps = st.tuples(
    st.sampled_from(["model.embed.weight", "model.norm.weight", "model.scalar"]),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    st.sampled_from([0.001, 1.0]),
)
plans = st.lists(
    st.tuples(
        st.lists(steps, max_size=2),
        st.sets(st.integers(0, 2)),  # servers that see this version
        st.sampled_from(["nothing", "nothing", "nothing", "new trainer", "new server", "complete"]),
    ),
    max_size=10,
)


@settings(max_examples=25)
@given(plans, st.sampled_from(["bfloat16", "float32"]), st.integers(1, 5))
def test_any_updates_seen_by_anyone_in_part_give_the_full_bits(
    plan: list[tuple[list[tuple[str, float, float]], set[int], str]], dtype: Dtype, full_every: int
) -> None:
    with TemporaryDirectory(dir=shared_memory(2**26)) as folder:
        world = World(Path(folder), Format(dtype, "dithered"), full_every)
        servers = [world.server() for _ in range(3)]
        for version, (changes, seen_by, event) in enumerate([([], {0, 1, 2}, "nothing"), *plan]):
            for name, lr, share in changes:
                world.source.step(name, lr, share)
            if event == "new trainer":
                world.start_trainer()
            staged = world.write(version)
            if event == "complete":
                world.staging.complete()
            if event == "new server":
                servers[0].close()
            expected = world.full()
            for server in seen_by:
                world.check(servers[server], staged, expected)
            assert world.identities[version].digest == world.staging.digest(version).digest
        world.check(world.server(), staged, expected)  # a late joiner
        world.close()


def test_a_small_step_is_a_small_delta(world: World) -> None:
    (first, _), (second, expected) = chain(world, 1)
    manifest = read_manifest(second)
    assert manifest.delta is not None
    assert manifest.delta.base == first.name
    assert manifest.delta.tensors.keys() == {"model.embed.weight"}  # nothing else changed
    assert manifest.delta.num_bytes == (second / DELTA_NAME).stat().st_size < len(expected) / 20
    assert not (second / WEIGHTS_NAME).exists()
    assert not read_manifest(first).delta


def test_a_version_in_every_so_many_is_full_too(world: World) -> None:
    kinds = []
    for version in range(9):
        world.source.step()
        staged = world.write(version)
        kinds.append(((staged / DELTA_NAME).exists(), (staged / WEIGHTS_NAME).exists()))
    only, both = (True, False), (True, True)
    assert kinds == [(False, True), only, only, only, both, only, only, only, both]


@pytest.mark.parametrize("full_every", [1, 2, 3, 7])
def test_pruning_keeps_what_a_chain_needs_and_no_more(tmp_path: Path, full_every: int) -> None:
    world = World(tmp_path, full_every=full_every)
    written: dict[str, bytes] = {}
    for version in range(3 * full_every + 4):
        world.source.step()
        staged = world.write(version)
        written[staged.name] = world.full()
        present = sorted((world.folder / "weights").iterdir())
        assert len(present) <= full_every + 3
        for folder in present[-3:]:  # announced, being pushed, written
            joiner = world.server()
            world.check(joiner, folder, written[folder.name])
            joiner.close()
    world.staging.prune({version - 1})
    assert version - 1 in {int(path.name.partition(".")[0]) for path in (world.folder / "weights").iterdir()}
    world.check(world.server(), world.staging.folder_of(version - 1, 1), written[f"{version - 1:08d}.1"])
    world.close()


def test_a_new_trainer_begins_with_a_full_version_and_keeps_what_was_announced(world: World) -> None:
    server = world.server()
    versions = chain(world, 3)
    world.check(server, *versions[2])
    world.start_trainer()
    world.staging.prune({3})
    world.check(server, *versions[3])  # by the delta of the earlier life
    world.check(world.server(), *versions[3])  # by its full chain
    again = world.write(3)
    assert again.name == "00000003.2"
    assert read_manifest(again).delta is None
    world.source.step()
    after = world.write(4)
    assert read_manifest(after).delta is not None
    world.check(server, after, world.full())


def cut(path: Path, position: int) -> None:
    path.write_bytes(path.read_bytes()[:position])


DAMAGES: dict[str, Callable[[Path, Path, Path], object]] = {
    "a flipped delta": lambda _, second, __: flip(second / DELTA_NAME, 40),
    "a flipped last byte": lambda _, second, __: flip(second / DELTA_NAME, -1),
    "a truncated delta": lambda _, second, __: cut(second / DELTA_NAME, 100),
    "an empty delta": lambda _, second, __: cut(second / DELTA_NAME, 0),
    "a missing delta": lambda _, second, __: (second / DELTA_NAME).unlink(),
    "a truncated manifest": lambda _, second, __: cut(second / MANIFEST_NAME, 100),
    "a missing link": lambda _, second, __: shutil.rmtree(second),
    "another version in its place": lambda first, second, _: shutil.copy(first / MANIFEST_NAME, second / MANIFEST_NAME),
    "a flipped full file": lambda first, _, __: flip(first / WEIGHTS_NAME, -1),
    "a truncated full file": lambda first, _, __: cut(first / WEIGHTS_NAME, 1000),
    "a missing full file": lambda first, _, __: (first / WEIGHTS_NAME).unlink(),
    "a flipped digest in the manifest": lambda _, __, third: (third / MANIFEST_NAME).write_text(
        (third / MANIFEST_NAME).read_text().replace(read_manifest(third).tensors["model.embed.weight"].digest, "0" * 16)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_and_the_full_weights_repair_it(world: World, damage: str) -> None:
    (first, _), (second, _), (third, expected) = chain(world, 2)
    manifest = (third / MANIFEST_NAME).read_bytes()
    DAMAGES[damage](first, second, third)
    joiner = world.server()
    with pytest.raises(ChainError, match="expected") as caught:
        joiner.bring(third, read_manifest(third))
    named = first if "full file" in damage else third if "digest in" in damage else second
    assert str(named) in str(caught.value)
    (third / MANIFEST_NAME).write_bytes(manifest)
    world.staging.complete()
    world.check(joiner, third, expected)
    world.source.step()
    world.check(joiner, world.write(3), world.full())  # from there it continues by a delta


def test_a_server_that_cannot_follow_from_what_it_has_starts_from_a_full_version(world: World) -> None:
    server = world.server()
    versions = chain(world, 1)
    world.check(server, *versions[1])
    world.source.step()
    damaged = world.write(2)
    world.source.step()
    newest = world.write(3)
    flip(damaged / DELTA_NAME, 50)
    with pytest.raises(ChainError, match=str(damaged / DELTA_NAME)):
        server.bring(newest, read_manifest(newest))
    world.staging.complete()
    assert (newest / WEIGHTS_NAME).exists()
    world.staging.complete()  # there is nothing more to add
    world.check(server, newest, world.full())


def test_a_server_reads_no_more_than_it_needs(world: World) -> None:
    server = world.server()
    versions = chain(world, 3)
    world.check(server, *versions[0])
    (versions[0][0] / WEIGHTS_NAME).unlink()  # the version that it holds is enough
    world.check(server, *versions[3])
    world.source.step(lr=1.0)  # the deltas have more bytes than a full version
    changed = world.write(4)
    delta = read_manifest(changed).delta
    assert delta is not None
    assert delta.num_bytes <= len(world.full()) * 1.01
    world.check(server, changed, world.full())


def test_a_version_that_was_not_written_in_full_is_no_base(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(world, 1)
    monkeypatch.setattr("penstock_trainer.weights.deltas.encode", fail)
    world.source.step()
    with pytest.raises(WeightsError, match=r"version 2 cannot be staged .*weights\.folder"):
        world.write(2)
    monkeypatch.undo()
    staged = world.write(2)
    assert read_manifest(staged).delta is None
    world.check(world.server(), staged, world.full())


def fail(*_: object) -> bytes:
    raise OSError(28, "No space left on device")
