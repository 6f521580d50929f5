"""What a chat template writes behind an assistant's turn, if that is the same whatever came before.

Owns the proof, by probes, that it is. Invariant: what follows a turn begins with one token that ends it, and the tokens
behind that one do not depend on those before it; for a template of which this is not true, nothing is known.

    template:  ... header | the turn | <end> | rest of the template, new messages, header of the next turn
    sampled:              | its exact tokens, with <end>, or without if it was cut
    appended:                                | from here, or from <end> on if the turn was cut
"""

from collections.abc import Sequence

from penstock.errors import CallRefusedError
from penstock_agent.capture.chat_template import ChatTemplate, Tokenizer
from penstock_agent.capture.messages import Message, Tool

TURN = "penstockprobeturn"
"""Stands for a turn in texts of the template; no words of its kind follow it."""
QUESTION: Message = {"role": "user", "content": "penstockprobequestion"}
ANSWER: Message = {"role": "assistant", "content": "penstockprobeanswer"}
SYSTEM: Message = {"role": "system", "content": "penstockprobesystem"}
HISTORIES: tuple[tuple[Message, ...], ...] = (
    (QUESTION,),
    (SYSTEM, QUESTION),
    (QUESTION, ANSWER, {"role": "user", "content": "other"}),
    (QUESTION, {"role": "assistant", "content": "b\n\nc "}, QUESTION, ANSWER, {"role": "user", "content": " e\n"}),
)


class Suffixes:
    """Suffixes of one template.

    end, end_token_id: the token that ends a turn; "" and None if the template is not of this kind.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._special = tokenizer.get_added_vocab()
        self.end_token_id: int | None = None
        self._before_end, self.end = self._find_end() or ("", "")
        if self.end and self._is_stable():
            self.end_token_id = self._special[self.end]
        else:
            self.end = ""

    def after(
        self, path_ids: Sequence[int], turn: Message, new: Sequence[Message], tools: Sequence[Tool]
    ) -> list[int] | None:
        """The tokens that follow a path which ends with a sampled turn; None if they cannot be known."""
        if self.end_token_id is None or any(message.get("role") == "assistant" for message in new):
            return None
        calls = [{**call, "function": {**call["function"], "arguments": {}}} for call in turn.get("tool_calls") or ()]
        if any(self.end in str(call) for call in calls):
            return None
        stand_in = {"role": "assistant", "content": TURN, **({"tool_calls": calls} if calls else {})}
        text = self._behind((QUESTION,), stand_in, new, tools)
        if text is None:
            return None
        if path_ids[-1] == self.end_token_id:
            return self._tokens(text)
        return self._template.encode(self._before_end + self.end + text)

    def _behind(
        self, history: Sequence[Message], turn: Message, new: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> str | None:
        """The template's text behind the token that ends a turn."""
        try:
            text = self._template.text([*history, turn, *new], tools)
        except CallRefusedError:
            return None
        _, found, rest = text.partition(TURN)
        _, ended, behind = rest.partition(self.end)
        return behind if found and ended else None

    def _find_end(self) -> tuple[str, str] | None:
        """The space that the template puts behind a turn, and the special token behind that."""
        try:
            text = self._template.text([QUESTION, {"role": "assistant", "content": TURN}, QUESTION], ())
        except CallRefusedError:
            return None
        rest = text.partition(TURN)[2]
        ends = [token for token in self._special if rest.lstrip().startswith(token)]
        if not ends:
            return None
        end = max(ends, key=len)
        return rest.partition(end)[0], end

    def _is_stable(self) -> bool:
        """Whether the suffix is the same behind all histories, and its tokens are those that it has in a whole text."""
        turn = {"role": "assistant", "content": TURN}
        texts = {self._behind(history, turn, (QUESTION,)) for history in HISTORIES}
        texts.discard(None)  # a history that the template refuses is no counterexample
        if len(texts) != 1:
            return False
        whole = self._template.text([QUESTION, turn, QUESTION], ())
        head = whole.partition(TURN)[0] + TURN + self._before_end + self.end
        (text,) = texts
        assert text is not None
        return whole == head + text and self._template.encode(whole) == self._template.encode(head) + self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a text behind the end of a turn."""
        return self._template.encode(self.end + text)[1:]
