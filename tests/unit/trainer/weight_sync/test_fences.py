"""Which rollout servers count as fenced, and until when."""

from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock_trainer.weight_sync.publisher import Fences, Push

V3, V4, V5 = (PolicyIdentity(number, f"{number:016x}") for number in (3, 4, 5))


def announcement(identity: PolicyIdentity) -> Announcement:
    return Announcement(identity, "/weights", 7)


def server(name: str, policy: PolicyIdentity | None, state: str = "serving") -> ServiceRecord:
    return ServiceRecord(ServiceKind.ROLLOUT, name, "http://r", 1, state, policy)


def test_a_server_that_missed_a_push_is_fenced_until_it_serves_it() -> None:
    fences = Fences()
    fences.pushed(announcement(V4), Push(("a",), {"b": "HTTP 502"}, 1.0, 0.1))
    # Records may be some seconds old: an old one of a server that took the push does not mean that it is fenced.
    assert fences.server_states([server("a", V3), server("b", V3)]) == {"serving": 1, "fenced": 1}
    assert fences.server_states([server("a", V4), server("b", None, "waiting")]) == {"serving": 1, "fenced": 1}
    assert fences.server_states([server("a", V4), server("b", V4)]) == {"serving": 2}


def test_a_later_push_that_succeeds_ends_it() -> None:
    fences = Fences()
    fences.pushed(announcement(V4), Push((), {"b": "no answer"}, 1.0, 0.1))
    fences.pushed(announcement(V5), Push(("b",), {}, 1.0, 0.1))
    assert fences.server_states([server("b", V3)]) == {"serving": 1}


def test_other_bytes_of_the_same_number_do_not() -> None:
    fences = Fences()
    fences.pushed(announcement(V4), Push((), {"b": "no answer"}, 1.0, 0.1))
    assert fences.server_states([server("b", PolicyIdentity(4, "f" * 16))]) == {"fenced": 1}
    assert fences.server_states([server("b", V5)]) == {"serving": 1}


def test_one_that_is_gone_is_forgotten_and_other_services_are_no_servers() -> None:
    fences = Fences()
    fences.pushed(announcement(V4), Push((), {"b": "no answer"}, 1.0, 0.1))
    assert fences.server_states([ServiceRecord(ServiceKind.REWARD, "b", "http://r", 1, "ready")]) == {}
    assert fences.server_states([server("b", None, "starting")]) == {"starting": 1}
