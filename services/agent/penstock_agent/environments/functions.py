"""The driver of a function: the user's agent runs in a worker process and speaks to the model as an OpenAI client."""

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock_agent.environments.agents import settle
from penstock_agent.environments.episode import ChatSession, Ending, Row
from penstock_agent.environments.pool import WorkerPool
from penstock_agent.environments.worker import BrokenEpisodeError, RaisedError


class FunctionDriver:
    """Runs the episodes of a function."""

    def __init__(self, section: AgentSection, pool: WorkerPool) -> None:
        self._section = section
        self._pool = pool

    async def run(self, row: Row, session: ChatSession) -> Ending:
        """One episode; see `episode.Driver`."""
        value: float | None = None
        fault = ""
        try:
            async with self._pool.worker(session.name) as worker:
                value = await worker.run_function(row, session.base_url, session.api_key)
        except RaisedError as error:
            fault = str(error)
        except BrokenEpisodeError as error:
            return Ending(Score(None, str(error)), error.end)
        if value is None:
            value = session.reward
        return settle(session, value, fault, self._section.cut_score)
