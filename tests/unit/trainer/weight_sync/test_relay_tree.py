"""Who gets a version from whom, and what a fault changes about it."""

from collections import Counter

import pytest

from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.contracts.weight_sources import LeftFor, LeftParent, Parent
from penstock_trainer.weight_sync.relay_tree import LEAF_PUSHES, RelayTree

TRAINER = Parent("trainer-1", "http://trainer")


def servers(number: int) -> list[ServiceRecord]:
    return [ServiceRecord(ServiceKind.ROLLOUT, f"s{n}", f"http://s{n}", 0, "serving") for n in range(number)]


def children(tree: RelayTree, planned: list[ServiceRecord]) -> Counter[str]:
    return Counter(tree.parents_of(each)[0].name for each in planned)


@pytest.mark.parametrize("fan_out", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 64, 1000])
def test_each_has_at_most_so_many_children_and_the_tree_is_as_flat_as_it_can_be(fan_out: int, number: int) -> None:
    tree = RelayTree(fan_out, TRAINER)
    planned = tree.plan(servers(number))
    assert sorted(each.name for each in planned) == sorted(each.name for each in servers(number))
    assert max(children(tree, planned).values(), default=0) <= fan_out
    depth = max((len(tree.parents_of(each)) for each in planned), default=0)
    assert sum(fan_out**level for level in range(1, depth)) < max(number, 1)


@pytest.mark.parametrize("num_faulty", [0, 3, 60, 63, 64])
def test_parents_are_ancestors_and_come_first(num_faulty: int) -> None:
    tree = RelayTree(2, TRAINER)
    all_servers = servers(64)
    tree.note([LeftParent(each.name, "slow", "") for each in all_servers[:num_faulty]])
    seen: dict[str, tuple[Parent, ...]] = {TRAINER.name: ()}
    for server in tree.plan(all_servers):
        first, *others = tree.parents_of(server)
        assert [each.name for each in others] == [each.name for each in seen[first.name]]
        seen[server.name] = tree.parents_of(server)


@pytest.mark.parametrize(("reason", "pushes"), [("slow", LEAF_PUSHES), ("gone", LEAF_PUSHES), ("wrong", None)])
def test_a_parent_with_a_fault_has_no_children(reason: LeftFor, pushes: int | None) -> None:
    tree = RelayTree(2, TRAINER)
    tree.plan(servers(20))
    tree.note([LeftParent("s0", reason, "seen"), LeftParent(TRAINER.name, "gone", "seen")])
    had = [children(tree, tree.plan(servers(20)))["s0"] for _ in range(LEAF_PUSHES * 2)]
    last = len(had) if pushes is None else pushes
    assert had == [0] * last + [2] * (len(had) - last)


def test_if_all_had_faults_the_trainer_sends_to_all() -> None:
    tree = RelayTree(2, TRAINER)
    tree.note([LeftParent(each.name, "slow", "") for each in servers(5)])
    assert children(tree, tree.plan(servers(5))) == {TRAINER.name: 5}
