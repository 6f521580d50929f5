"""One SGLang server of a teacher: what it is asked, and how its answers are read.

Owns its HTTP. Invariant: an answer is a finite log-probability of exactly each token that was asked, or an error.

    connection broke, nothing listens, 5xx     EngineDiedError, EngineError: of the server, and may pass
    no answer in time                          TimeoutError: likewise
    400, 422; log-probabilities not finite     EngineRejectedError: of the question

SGLang computes log-probabilities of given tokens by the softmax of the logits, at temperature 1, whatever the request
says; the configuration refuses others.
"""

import math
from array import array
from collections.abc import Sequence

import httpx
import msgspec

from penstock.errors import EngineDiedError, EngineError, EngineRejectedError
from penstock.runtime.requests import transport_fault
from penstock_reward.teacher.questions import Question

JSON = {"Content-Type": "application/json"}
KEEPALIVE_SECONDS = 2.0  # below the 5 s after which the server closes
PROBE = Question(0, array("i", [0, 0]), 1, ((1, 0, 1),))  # any vocabulary has token 0


class _Pair(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token of the sequence, with its log-probability before it; its text, the third element, is not read."""

    logprob: float | None
    token: int


class _Meta(msgspec.Struct, frozen=True):
    input_token_logprobs: list[_Pair]


class _Item(msgspec.Struct, frozen=True):
    meta_info: _Meta


_decoder = msgspec.json.Decoder(list[_Item])


class TeacherServer:
    """Calls the server at one address."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.url = url
        self.num_answered = 0
        """Requests so far that it has answered, also with a refusal."""
        self._timeout_seconds = timeout_seconds
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
            verify=url.startswith("https"),  # loading certificates takes longer than all the calls
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """The answers, in the order of the questions; errors: see above."""
        response = await self._send(msgspec.json.encode(request_body(questions)))
        if response.status_code in (400, 422):
            self.num_answered += 1
            raise EngineRejectedError(f"the teacher's server at {self.url} refused: {response.text[:500]}")
        if response.status_code != 200:
            raise EngineError(
                f"the teacher's server at {self.url} answered with {response.status_code}: {response.text[:500]}"
            )
        found = read_answer(response.content, questions)
        self.num_answered += 1
        return found

    async def _send(self, content: bytes) -> httpx.Response:
        try:
            return await self._http.post("/generate", content=content, headers=JSON)
        except httpx.TimeoutException:
            raise TimeoutError(
                f"the teacher's server at {self.url} did not answer in {self._timeout_seconds:g} s "
                "(teacher.timeout_seconds): raise that, or lower teacher.max_running_requests"
            ) from None
        except httpx.TransportError as error:
            raise EngineDiedError(
                f"the teacher's server at {self.url} gave no answer: {transport_fault(error)}"
            ) from None


def request_body(questions: Sequence[Question]) -> dict[str, object]:
    """The request for all of them at once.

    It asks for the token before the first wanted one, too, whose log-probability SGLang leaves out. What is before that
    one may come from the prefix cache.
    """
    return {
        "input_ids": [question.token_ids.tolist() for question in questions],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [question.start - 1 for question in questions],
    }


def read_answer(body: bytes, questions: Sequence[Question]) -> list[list[float]]:
    """The wanted log-probabilities of each question. EngineError if the answer is of something else."""
    try:
        items = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"the teacher's answer lacks a part: {error}; expected SGLang 0.5.21 or newer") from error
    if len(items) != len(questions):
        raise EngineError(f"the teacher answered {len(items)} times to {len(questions)} questions")
    return [_read(item.meta_info.input_token_logprobs, each) for item, each in zip(items, questions, strict=True)]


def _read(pairs: Sequence[_Pair], question: Question) -> list[float]:
    wanted, asked = pairs[-question.num_answers :], question.token_ids[question.start :].tolist()
    if len(pairs) < question.num_answers or [pair.token for pair in wanted] != asked:
        raise EngineError(
            f"the teacher answered log-probabilities of {len(pairs)} tokens, which are not those asked: expected "
            f"{question.num_answers} of a sequence of {len(question.token_ids)}"
        )
    found = [math.nan if pair.logprob is None else pair.logprob for pair in wanted]
    if not all(map(math.isfinite, found)):
        raise EngineRejectedError("the teacher answered with a log-probability that is not finite")
    return found
