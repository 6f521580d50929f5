"""The content of a step's file of log-ratios: of each token, the trainer's log-probability minus the sampler's.

Owns its form, for the trainer that writes it and for readers. `penstock_trainer.learner.log_ratios` says which values
they are.
"""

import struct

from penstock.contracts.wire import Contract

SUFFIX = ".log_ratios"  # in place of the step file's
BYTES_A_TOKEN = 2


class LogRatiosFile(Contract, frozen=True, tag_field="schema", tag="log-ratios/1"):
    """Beside a step file, and of its groups.

    digest: of the step file. groups: of each trajectory of each group, little-endian float16 of each token that was
    sampled, in their order; nan: not computed. Empty bytes: none of its tokens was computed.
    """

    step: int
    digest: str
    groups: tuple[tuple[bytes, ...], ...]


def unpack_log_ratios(data: bytes) -> list[float]:
    """The values of one trajectory.

    >>> import struct
    >>> unpack_log_ratios(struct.pack("<2e", 0.5, -0.25))
    [0.5, -0.25]
    """
    return list(struct.unpack(f"<{len(data) // BYTES_A_TOKEN}e", data))
