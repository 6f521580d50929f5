"""The agent service's HTTP side: what all services answer, and the gateway that agents speak to."""

from collections.abc import Callable

from fastapi import FastAPI
from pydantic import SecretStr

from penstock.runtime.http import make_app
from penstock_agent.gateway.answers import TokenText
from penstock_agent.gateway.routes import BODY_BYTES, OWN_KEYS, add_gateway
from penstock_agent.gateway.sessions import Sessions
from penstock_agent.metrics import AgentMetrics


def make_agent_app(
    sessions: Sessions,
    metrics: AgentMetrics,
    token: SecretStr | None,
    *,
    not_ready: Callable[[], str | None],
    model: str,
    text_of: TokenText,
) -> FastAPI:
    """The app. model: its name in answers. text_of: a token's text."""
    app = make_app(
        "penstock agent",
        not_ready=not_ready,
        metrics=metrics.registry,
        token=token,
        body_bytes=BODY_BYTES,
        own_keys=OWN_KEYS,
    )
    add_gateway(app, sessions, model=model, text_of=text_of, metrics=metrics)
    return app
