"""Seeds of calls."""

from penstock_agent.gateway.seeds import Seeds


def test_they_differ_by_episode_prompt_and_sibling() -> None:
    drawn = [Seeds(seed).take(prompt, 1) for seed in (0, 1, 2**63 - 1) for prompt in (b"aaaa", b"bbbb")]
    drawn += [seeds.take(b"aaaa", 2) for seeds in [Seeds(0)] if seeds.take(b"aaaa", 1)]
    assert len(set(drawn)) == 7
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_a_call_that_failed_leaves_its_seed_to_the_next() -> None:
    seeds = Seeds(5)
    first, second = seeds.take(b"aaaa", 1), seeds.take(b"aaaa", 2)
    seeds.give_back(b"aaaa", 1)
    assert seeds.take(b"aaaa", 3) == first
    assert seeds.take(b"aaaa", 4) not in (first, second)


def test_they_are_the_same_in_every_process() -> None:
    assert Seeds(7).take(b"aaaa", 1) == 2377209727688960749
