"""The trainer's HTTP surface: version, status, and requests to checkpoint or stop.

Parses and calls; decides nothing. `penstock.view.app` adds the page of the run.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import to_body
from penstock.contracts.services import Announcement, snapshot_body, version_body
from penstock.runtime.http import make_app
from penstock_trainer.control import Requests
from penstock_trainer.telemetry.status import Status


def trainer_app(
    status: Status,
    requests: Requests,
    snapshot: Callable[[], Announcement],
    metrics: CollectorRegistry,
    token: SecretStr | None,
) -> FastAPI:
    """The trainer's app. `snapshot`: the newest version as files, with its canary."""

    def not_ready() -> str | None:
        return None if status.ready else status.phase

    app = make_app("penstock trainer", not_ready=not_ready, metrics=metrics, token=token)

    @app.get("/v1/weight_version")
    async def weight_version() -> dict[str, Any]:
        return {**version_body(status.policy), "state": status.phase}

    @app.get("/v1/status")
    async def read_status() -> dict[str, Any]:
        return to_body(status.shown())

    @app.post("/v1/checkpoint", status_code=202)
    async def checkpoint() -> dict[str, str]:
        requests.checkpoint = True
        return {"status": "a checkpoint is written after the current step"}

    @app.post("/v1/snapshot")
    async def write_snapshot() -> dict[str, Any]:
        return snapshot_body(await asyncio.to_thread(snapshot))

    @app.post("/v1/stop", status_code=202)
    async def stop() -> dict[str, str]:
        requests.stop.set()
        return {"status": "the trainer ends after the current step, with a checkpoint"}

    return app
