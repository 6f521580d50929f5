"""Seeds and orders that a run draws from its own seed, without torch.

Invariant: they are functions of their arguments alone, the same on every machine and Python version, so that a ticket
can be issued again. Random numbers are SplitMix64 (Steele, Lea, Flood 2014): output i is mix(start + (i + 1) * GAMMA).
`random.shuffle` is no substitute: Python does not guarantee its algorithm.
"""

from collections.abc import Iterator

MASK_64 = (1 << 64) - 1
MASK_31 = (1 << 31) - 1
GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
SET_ORDERS, PROMPT_CHOICES = 1, 2  # what a start of three numbers is for


def _mix(value: int) -> int:
    """SplitMix64's output function: a bijection on 64 bits."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def start_of(*numbers: int) -> int:
    """Where SplitMix64 starts for several numbers; their order matters. 64 bits."""
    state = 0
    for number in numbers:
        state = _mix((state ^ number) + GAMMA)
    return state


def _outputs(start: int) -> Iterator[int]:
    """SplitMix64's endless outputs."""
    state = start
    while True:
        state = (state + GAMMA) & MASK_64
        yield _mix(state)


def permutation(seed: int, epoch: int, length: int) -> list[int]:
    """The order of prompts in an epoch: Fisher-Yates from the end, over SplitMix64(seed, epoch).

    Position i swaps with output mod (i + 1). The bias of the remainder is below length / 2**64.
    """
    order = list(range(length))
    outputs = _outputs(start_of(seed, epoch))
    for i in range(length - 1, 0, -1):
        j = next(outputs) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def set_seed(seed: int, number: int) -> int:
    """The seed of the orders in which one of several sets visits its prompts: 64 bits."""
    return start_of(seed, number, SET_ORDERS)


def draw_numbers(seed: int, ticket: int) -> Iterator[int]:
    """Random numbers of 64 bits, without end, that choose the prompt of a ticket."""
    return _outputs(start_of(seed, ticket, PROMPT_CHOICES))


def sampling_seed(seed: int, ticket: int, index: int) -> int:
    """The sampling seed of completion `index` of a ticket: 31 bits, never the same twice in one group.

    (base(seed, ticket) + index) mod 2**31 differs within the group; a bijection on 31 bits (odd
    factors and shifts) then scatters it, because engines hash seeds weakly.
    """
    value = (start_of(seed, ticket) + index) & MASK_31
    value ^= value >> 16
    value = (value * 0x45D9F3B) & MASK_31
    value ^= value >> 15
    value = (value * 0x2C1B3C6D) & MASK_31
    return value ^ (value >> 16)
