"""A line of `dead.jsonl`: one message that no service could use, for people to read.

Owns its fields, once for the trainer that writes them and for readers. The message itself, which can be sent again, is
in the queue.
"""

import msgspec


class DeadLetterLine(msgspec.Struct, frozen=True):
    """A dead letter.

    id: by which `penstock dead show` and `retry` name it. ticket: as the message said, empty if it named none. stage:
    of work, at which it was. since: Unix seconds. num_bytes: of the message with its parts. problem: why it does not
    fit its stage; empty if it does. text: the message as JSON, or its first bytes, cut in the middle.
    """

    id: str
    ticket: str
    attempt: str
    stage: str
    since: float
    reason: str
    num_bytes: int
    problem: str = ""
    text: str = ""
