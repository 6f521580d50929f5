"""`POST /v1/weights/relay`: the route on which a process passes versions on. Parses and streams.

It is no GET, although it changes nothing: weights are sent only to those who have the token, if one is set.
"""

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from penstock.contracts.weight_sources import read_relay_request
from penstock.weights.relay import Relay

PATH = "/v1/weights/relay"
LIST_BYTES_HEADER = "x-list-bytes"


def add_relay(app: FastAPI, relay: Relay) -> None:
    """Add the route to a service's app."""

    @app.post(PATH)
    async def send_chunks(request: dict[str, Any]) -> Response:
        wanted = read_relay_request(request)
        version = await relay.find(wanted.chunks)
        return StreamingResponse(
            relay.stream(version, wanted),
            media_type="application/octet-stream",
            headers={LIST_BYTES_HEADER: str(len(version.list_data) if wanted.with_list else 0)},
        )
