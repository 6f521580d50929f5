"""Keys of sessions."""

from penstock_agent.gateway.keys import Keys, has_key_shape


def test_no_two_sessions_have_the_same_key() -> None:
    keys = Keys()
    made = [keys.make("12", attempt, episode, 0) for attempt in range(3) for episode in range(3)]
    again = [keys.make("12", 0, 0, 0) for _ in range(3)]  # a ticket that is delivered again
    assert len({*made, *again}) == 12
    assert all(map(has_key_shape, made))


def test_keys_of_two_services_differ() -> None:
    assert Keys().make("12", 0, 0, 0) != Keys().make("12", 0, 0, 0)
