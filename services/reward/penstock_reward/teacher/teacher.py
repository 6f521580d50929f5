"""A teacher that servers have: the log-probabilities that it gives to the trained tokens of a group.

Owns the attempts. Invariants: a trajectory gets all of its log-probabilities or a reason why it has none, and never a
number that no server gave; a server that does not answer delays groups and fails none, however long that lasts: the
trainer's watchdog ends such a run. What fails a group is its own: a question that the server refuses, or that was there
when servers broke down and came back, MOST_BREAKDOWNS times.

    questions --> the first one --> the others, together --> answers
                    |   (so the server computes their common prompt once)
                    |-- refused --> each by itself; what is refused again has failed
                    '-- failed as in an outage --> the server is down; wait for one that is up, and ask again
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.config import TeacherSection
from penstock.contracts import RolloutGroup
from penstock.errors import EngineDiedError, EngineError, EngineRejectedError
from penstock_reward.metrics import RewardMetrics, TeacherFailure
from penstock_reward.teacher.questions import Logprobs, Question, packed, questions_of
from penstock_reward.teacher.server import TeacherServer
from penstock_reward.teacher.servers import TeacherServers

MOST_BREAKDOWNS = 3  # other groups may have caused two, as with engines (`penstock.broker.worker.MAX_ENGINE_DEATHS`)


@dataclass(frozen=True)
class TeacherAnswers:
    """logprobs: see `ScoredGroup`. failed: of trajectories that have none, the reason."""

    logprobs: tuple[bytes, ...]
    failed: dict[int, str]


class Teacher:
    """Asks the servers of one teacher."""

    def __init__(self, servers: TeacherServers, metrics: RewardMetrics, *, max_running: int) -> None:
        self.servers = servers
        self._metrics = metrics
        self._max_running = max_running

    async def taught(self, group: RolloutGroup, is_asked: Sequence[bool]) -> TeacherAnswers:
        """The log-probabilities of the trajectories for which `is_asked` is true; waits while no server is up."""
        questions, failed = questions_of(group, is_asked), dict[int, str]()
        answers: list[tuple[Question, Logprobs]] = []
        with self._metrics.at_teacher():
            for part in self._parts(questions):
                due = [each for each in part if each.trajectory not in failed]
                if due:
                    answers += await self._answers(due, failed)
        return TeacherAnswers(packed(group, answers, failed), failed)

    def _parts(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        rest, size = questions[1:], self._max_running
        return [questions[:1], *(rest[start : start + size] for start in range(0, len(rest), size))]

    async def _answers(self, questions: Sequence[Question], failed: dict[int, str]) -> list[tuple[Question, Logprobs]]:
        """Of those that could be answered; adds the others to `failed`."""
        try:
            found = await self._attempts(questions)
            return list(zip(questions, found, strict=True))
        except EngineRejectedError as error:
            self._metrics.teacher_failed("refused")
            if len(questions) == 1:
                failed[questions[0].trajectory] = str(error)
                return []
        except (EngineError, TimeoutError) as error:
            failed.update({each.trajectory: str(error) for each in questions})
            return []
        return [pair for each in questions for pair in await self._answers([each], failed)]

    async def _attempts(self, questions: Sequence[Question]) -> list[list[float]]:
        """The answers. EngineRejectedError if they were refused; another error if it was the questions' own fault."""
        failures: list[tuple[TeacherServer, int]] = []
        last: Exception | None = None
        while True:
            async with self.servers.room(len(questions), [each for each, _ in failures]) as server:
                # Of a server that is still down nobody knows yet what broke it.
                num_breakdowns = sum(each.num_answered > number for each, number in failures)
                if last is not None and num_breakdowns >= MOST_BREAKDOWNS:
                    raise last
                try:
                    return await self._ask(server, questions)
                except EngineRejectedError:
                    raise
                except (EngineError, TimeoutError) as error:
                    last = error
                    failures.append((server, server.num_answered))
                    self._metrics.teacher_failed(_kind(error))
                    self.servers.failed(server, str(error))

    async def _ask(self, server: TeacherServer, questions: Sequence[Question]) -> list[list[float]]:
        start = time.monotonic()
        answers = await server.logprobs(questions)
        num_tokens = sum(each.num_answers for each in questions)
        self._metrics.teacher_answered(time.monotonic() - start, num_tokens)
        return answers


def make_teacher(section: TeacherSection, metrics: RewardMetrics) -> Teacher | None:
    """The teacher of `teacher.urls`; None without any."""
    if not section.urls:
        return None
    most = section.max_running_requests
    servers = TeacherServers([TeacherServer(url, section.timeout_seconds) for url in section.urls], most)
    metrics.watch_teacher(lambda: len(servers.down))
    return Teacher(servers, metrics, max_running=most)


def _kind(error: Exception) -> TeacherFailure:
    if isinstance(error, TimeoutError):
        return "timeout"
    return "died" if isinstance(error, EngineDiedError) else "error"
