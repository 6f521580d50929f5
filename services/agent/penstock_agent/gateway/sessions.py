"""The sessions of all episodes that run in this service.

Owns which key is whose. Invariant: a key finds its own session or none. What is kept of a session that has ended is
only its key, of the last few thousand, so that a client that comes too late gets the reason.
"""

from collections import OrderedDict

from penstock.config.agent import AgentSection
from penstock.contracts import Ticket
from penstock_agent.capture.rendering import Rendering
from penstock_agent.capture.tree import EpisodeTree
from penstock_agent.gateway.keys import Keys, has_key_shape
from penstock_agent.gateway.refusals import KeyRefusedError, SessionClosedError
from penstock_agent.gateway.session import CallMetrics, EpisodeOf, Generates, Session

NUM_ENDED = 4096  # keys of ended episodes that are recognised: half a megabyte


class Sessions:
    """Opens sessions and finds them."""

    def __init__(
        self, section: AgentSection, *, url: str, rendering: Rendering, servers: Generates, metrics: CallMetrics
    ) -> None:
        """url: of this service, as agents reach it."""
        self._section = section
        self._url = url
        self._rendering = rendering
        self._servers = servers
        self._metrics = metrics
        self._keys = Keys()
        self._open: dict[str, Session] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()

    def open(self, ticket: Ticket, *, episode: int, attempt: int, lease: int) -> Session:
        """The session of an episode, to be entered with `async with`; its key is good until it ends.

        episode: index of the ticket's seed. attempt: how many attempts at it failed before. lease: number of the
        trainer's lease under which the ticket was taken.
        """
        key = self._keys.make(ticket.key, ticket.attempt, episode, attempt)
        section = self._section
        session = Session(
            EpisodeOf(ticket, episode, attempt, lease),
            key=key,
            url=self._url,
            limits=section,
            tree=EpisodeTree(self._rendering, history=section.history, train_auxiliary=section.train_auxiliary),
            stop_token_ids=self._rendering.stop_token_ids,
            servers=self._servers,
            metrics=self._metrics,
            on_close=self._forget,
        )
        self._open[key] = session
        return session

    def find(self, key: str) -> Session:
        """The session with this key; SessionClosedError or KeyRefusedError says why there is none."""
        if not has_key_shape(key):
            what = "a key of another form" if key else "no key"
            raise KeyRefusedError(
                f"the request has {what}; expected the episode's own (psk_...), as `Authorization: Bearer` or in the "
                "path /s/<key>/v1: an agent gets it as its api_key, or as OPENAI_API_KEY"
            )
        session = self._open.get(key)
        if session is not None:
            return session
        if (episode := self._ended.get(key)) is not None:
            raise SessionClosedError(f"the key of an episode that has ended: {episode}; expected no further request")
        raise KeyRefusedError("no episode of this service has this key: it ended long ago, or with an earlier service")

    def _forget(self, session: Session) -> None:
        del self._open[session.key]
        self._ended[session.key] = str(session.episode)
        if len(self._ended) > NUM_ENDED:
            self._ended.popitem(last=False)
