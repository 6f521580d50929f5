"""Which messages of an episode were recorded, and where their tokens end.

Owns a trie of messages. Invariant: a point is known by all messages before it, and by the tools if the prompt shows
them; so whoever reaches a point has sent exactly the conversation that is recorded there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from penstock_agent.capture.messages import Form, Message, written
from penstock_agent.capture.tokens import TokenNode


@dataclass(eq=False)
class Point:
    """The end of a message in a conversation.

    form: of the message. text: of it, for transcripts; end: what a transcript adds before the next message. prompt:
    where the tokens of a call end whose last message it is. answer: where its own tokens end, if it was sampled.
    """

    parent: "Point | None" = None
    form: Form = b""
    text: str = ""
    end: str = ""
    prompt: TokenNode | None = None
    answer: TokenNode | None = None
    below: "dict[Form, Point]" = field(default_factory=dict)

    def path(self) -> "list[Point]":
        """From the first message to this one."""
        points = []
        step = self
        while step.parent is not None:
            points.append(step)
            step = step.parent
        return points[::-1]

    def extend(self, forms: Sequence[Form], messages: Sequence[Message]) -> "Point":
        """The point after further messages, which are recorded as far as they are new."""
        point = self
        for form, message in zip(forms, messages, strict=True):
            if form not in point.below:
                point.below[form] = Point(point, form, written(message))
            point = point.below[form]
        return point


def walk(start: Point, forms: Sequence[Form]) -> Iterator[tuple[Point, int]]:
    """The recorded points along a conversation, each with the number of messages so far."""
    point = start
    for number, form in enumerate(forms, start=1):
        found = point.below.get(form)
        if found is None:
            return
        point = found
        yield point, number
