"""What the calls of one episode were sent and what they returned, as a tree.

Owns the choice between continuing a recorded path and rendering a call whole. Invariants: the tokens that a call sends
are those of its path in the tree; sampled tokens enter the tree as the engine returned them; each call adds at most one
leaf, and each leaf but the first has a reason.

    messages of a call -> deepest recorded answer that they begin with?
        yes -> its exact tokens + what the rendering appends for the new messages
        no, or the rendering cannot know what to append -> the call rendered whole: a branch, which shares what is equal
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.contracts.trajectories import EpisodeCounts, Node, VersionSpan
from penstock.contracts.vocabulary import BranchReason, FinishReason
from penstock.contracts.wire import pack_int32, unpack_int32
from penstock.errors import CallRefusedError
from penstock_agent.capture.conversation import Point, walk
from penstock_agent.capture.messages import (
    Form,
    Message,
    Tool,
    check_messages,
    form_of_tokens,
    form_of_tools,
    forms,
    text_of,
    without_reasoning,
)
from penstock_agent.capture.rendering import Parsed, Rendering
from penstock_agent.capture.tokens import INT32, TokenNode, TokenTree

OPENING_ROLES = ("system", "developer")
CHARS_OF_TOKEN = 8  # a longer text than so many for each token is looked at before all of it is tokenised
AT_THE_CUT = 16  # tokens that the end of a text cut in a word may have, and the whole text may not


@dataclass(frozen=True)
class Call:
    """A call of the model. tools_form: of what its prompt shows of the tools. session: the client's, or empty."""

    messages: Sequence[Message]
    forms: tuple[Form, ...]
    tools: Sequence[Tool]
    tools_form: Form
    auxiliary: bool
    session: str

    @property
    def agent(self) -> "str | tuple[Form, ...]":
        """Whose conversation it is: the client's id, else how it opens (system messages and the one behind them)."""
        if self.session:
            return self.session
        opening = 0
        while opening < len(self.messages) - 1 and self.messages[opening].get("role") in OPENING_ROLES:
            opening += 1
        return self.forms[: opening + 1]


@dataclass(frozen=True)
class Prepared:
    """A call that can be sent.

    prompt_ids: int32, all that the engine is sent: the path of `below`, and then context_ids. branch: why it opens a
    branch, as far as that is known before its answer.
    """

    prompt_ids: bytes
    context_ids: bytes
    branch: BranchReason | None
    below: TokenNode
    call: Call

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids) // INT32


class EpisodeTree:
    """One episode. Calls may overlap: `prepare` changes nothing, and `add` needs no order.

    history: "exact" continues the tokens that the model sampled; "template" only if the template, rendered whole, has
    the same tokens.
    """

    def __init__(
        self, rendering: Rendering, *, history: Literal["exact", "template"] = "exact", train_auxiliary: bool = False
    ) -> None:
        self._rendering = rendering
        self._history = history
        self._tokens = TokenTree(train_auxiliary)
        self._conversations: dict[Form, Point] = {}  # by the tools, as far as a prompt shows them
        self._asides: dict[Form, Point] = {}  # those of auxiliary calls
        self._shown: dict[Form, Form] = {}
        self._deepest: dict[str | tuple[Form, ...], int] = {}  # messages of the longest call of each agent
        self._first: tuple[Point, str] | None = None
        self._last: Point | None = None
        self._counts: Counter[str] = Counter()
        self._branches: Counter[str] = Counter()

    def exceeds(self, messages: Sequence[Message], num_tokens: int) -> bool:
        """Whether a message that the model must read has more tokens than that, as its beginning shows.

        A text of megabytes would keep the service from its other episodes for seconds if all of it became tokens. What
        has no such message may still be too long.
        """
        num_chars = num_tokens * CHARS_OF_TOKEN
        for message in messages:
            text = "" if message.get("role") == "assistant" else text_of(message.get("content"))
            if len(text) > num_chars and self._rendering.count(text.strip()[:num_chars]) > num_tokens + AT_THE_CUT:
                return True
        return False

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, auxiliary: bool = False, session: str = ""
    ) -> Prepared:
        """The tokens to send for a call; CallRefusedError if it cannot be rendered.

        auxiliary: outside of the conversation, so that no later call continues it unless it is auxiliary too. session:
        the client's own id of the conversation, if it sends one; it tells a sub-agent from the main one.
        """
        check_messages(messages, tools)
        call = Call(tuple(messages), tuple(forms(messages)), tuple(tools), self._shown_tools(tools), auxiliary, session)
        below, context_ids, reason = self._place(call)
        return Prepared(self._tokens.path(below) + context_ids, context_ids, reason, below, call)

    def add(
        self,
        prepared: Prepared,
        token_ids: bytes,
        logprobs: bytes,
        spans: tuple[VersionSpan, ...],
        finish_reason: FinishReason,
        *,
        num_cached_tokens: int = 0,
    ) -> Parsed:
        """Record what a call returned (int32 ids of at least one token, float32 log-probabilities), as a message."""
        call = prepared.call
        parsed = self._rendering.parse(
            unpack_int32(prepared.prompt_ids), unpack_int32(token_ids), finish_reason, call.tools
        )
        role = str(call.messages[-1].get("role", ""))
        context, opens_leaf = self._tokens.attach(prepared.below, prepared.context_ids, role)
        answer = TokenNode(context, token_ids, logprobs, spans, "assistant", call.auxiliary)
        self._tokens.sample(answer)
        if opens_leaf and not call.auxiliary:
            self._branches[self._reason(call) if prepared.branch is None else prepared.branch] += 1
        self._counts["num_auxiliary" if call.auxiliary else "num_turns"] += 1
        self._counts["num_tool_calls"] += parsed.num_tool_calls
        self._counts["num_failed_tool_calls"] += parsed.num_failed_tool_calls
        self._counts["num_prompt_tokens"] += prepared.num_prompt_tokens
        self._counts["num_cached_tokens"] += num_cached_tokens
        self._record(call, parsed, context, answer)
        return parsed

    def nodes(self) -> tuple[Node, ...]:
        """All that was recorded, as an episode has it."""
        return self._tokens.nodes()

    def counts(self) -> EpisodeCounts:
        """What is known here: failures of tools and attempts are not."""
        return EpisodeCounts(**self._counts, branches=dict(self._branches))

    def transcript(self) -> str:
        """The conversation behind its first prompt, as text: what the model wrote, and what it read in between.

        It is that of the call that was recorded last, without auxiliary calls and, if the client sends ids of its
        conversations, without those of other ids than the first. Of it, the messages that the first call began with are
        left out. The model's turns are as it wrote them, thinking and calls of tools among them, without the token that
        ended them (but if the template is plain, text follows it as it was); of other messages it is the content.
        """
        if self._last is None or self._first is None:
            return ""
        points, prompt = self._last.path(), [point.form for point in self._first[0].path()]
        start = 0
        while start < min(len(prompt), len(points) - 1) and points[start].form == prompt[start]:
            start += 1
        *earlier, last = points[start:]
        return self._rendering.separator.join([*(point.text + point.end for point in earlier), last.text])

    def _place(self, call: Call) -> tuple[TokenNode, bytes, BranchReason | None]:
        """The recorded node that the call continues, the tokens behind it, and the reason if they open a branch."""
        prompt, answer, depth = self._recorded(call)
        if prompt is not None:
            return prompt, b"", "sibling"
        turn = answer.answer if answer else None
        path = b"" if turn is None else self._tokens.path(turn)
        if turn is not None and self._history == "exact":
            start = (len(path) - len(turn.token_ids)) // INT32
            before, new = call.messages[:depth], call.messages[depth:]
            after = self._rendering.continuation(array("i", path), start, before, new, call.tools)
            if after is not None:
                return turn, pack_int32(after), None
        whole = pack_int32(self._rendering.render(call.messages, call.tools))
        if turn is not None and whole.startswith(path):
            return turn, whole[len(path) :], None
        if turn is not None and not turn.leads_on:
            return self._tokens.root, whole, "template"
        return self._tokens.root, whole, self._reason(call) if self._tokens.root.leads_on else None

    def _recorded(self, call: Call) -> tuple[TokenNode | None, Point | None, int]:
        """The prompt if the same messages were asked before; the deepest answer that they begin with; its messages."""
        prompt, answer, depth = None, None, 0
        for known in (self._conversations, self._asides) if call.auxiliary else (self._conversations,):
            if call.tools_form not in known:
                continue
            for point, number in walk(known[call.tools_form], call.forms):
                if point.answer is not None and number > depth:
                    answer, depth = point, number
                if number == len(call.forms) and point.prompt is not None:
                    prompt = point.prompt
        return prompt, answer, depth

    def _reason(self, call: Call) -> BranchReason:
        """Why a call that can be rendered continues no path to its end, as things are now."""
        if self._recorded(call)[0] is not None:
            return "sibling"
        deepest = self._deepest.get(call.agent)
        if deepest is None:
            return "subagent"
        return "compacted" if len(call.forms) < deepest else "edited"

    def _record(self, call: Call, parsed: Parsed, context: TokenNode, answer: TokenNode) -> None:
        known = self._asides if call.auxiliary else self._conversations
        asked = known.setdefault(call.tools_form, Point()).extend(call.forms, call.messages)
        asked.prompt = context
        (form,) = forms([parsed.message])
        point = asked.extend([form], [parsed.message])
        point.answer, point.text, point.end = answer, parsed.text, parsed.end
        (bare,) = forms([without_reasoning(parsed.message)])
        asked.below[bare] = point
        if call.auxiliary:
            return
        self._deepest[call.agent] = max(self._deepest.get(call.agent, 0), len(call.forms))
        self._first = self._first or (asked, call.session)
        if call.session == self._first[1]:
            self._last = point

    def _shown_tools(self, tools: Sequence[Tool]) -> Form:
        """What a prompt shows of the tools: equal for lists of tools that give the same prompts."""
        form = form_of_tools(tools)
        if form not in self._shown:
            try:
                self._shown[form] = form_of_tokens(self._rendering.render([{"role": "user", "content": "x"}], tools))
            except CallRefusedError:  # such messages or such tools; the call itself will show which
                self._shown[form] = form
        return self._shown[form]
