"""The page's HTTP surface: static files, and one read for each question of `RunView`.

Parses and calls; decides nothing. Invariant: one thread answers all questions in turn, so that a page beside a training
takes at most a share of one core from it, and memory holds one answer. The thread has the priority of its process: one
of a lower priority would keep Python's lock while it waits for a core, and training would wait for both.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Response
from fastapi import Path as PathValue
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.runtime.http import make_app
from penstock.view.guard import DATA, ViewGuard
from penstock.view.page_files import page_file
from penstock.view.runs import Runs
from penstock.view.search import Wanted

RUN, STEP, GROUP = f"{DATA}/runs/{{run}}", "/steps/{step}", "/groups/{group}"

Names = Annotated[list[str], Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=500)]
Points = Annotated[int, Query(ge=2, le=4000)]
AtLeast0 = Annotated[int, Query(ge=0)]


def view_app(runs: Runs, token: SecretStr | None) -> FastAPI:
    """The page of these runs, served alone."""
    app = make_app("penstock view", not_ready=lambda: None, metrics=CollectorRegistry(), token=token)
    add_page(app, runs, token)
    return app


def add_page(app: FastAPI, runs: Runs, token: SecretStr | None) -> None:
    """Add the page of these runs to an app, at `/`."""
    app.add_middleware(ViewGuard, token=token)
    thread = ThreadPoolExecutor(1, "view")

    async def answer(ask: Callable[[], Any]) -> Response:
        data = await asyncio.get_running_loop().run_in_executor(thread, lambda: msgspec.json.encode(ask()))
        return Response(data, media_type="application/json")

    @app.get("/")
    async def page() -> Response:
        return page_file("index.html")

    @app.get("/view/{name}")
    async def static(name: str) -> Response:
        return page_file(name)

    @app.get(f"{DATA}/runs")
    async def list_runs() -> Response:
        return await answer(runs.list)

    @app.get(RUN)
    async def overview(run: str) -> Response:
        return await answer(lambda: runs.of(run).overview())

    @app.get(RUN + "/curves")
    async def curves(run: str, name: Names, points: Points = 600, first: int = 1, last: int | None = None) -> Response:
        return await answer(lambda: runs.of(run).curves(name, points, first, last))

    @app.get(RUN + "/steps")
    async def steps(run: str, name: Names, before: int | None = None, limit: Limit = 100) -> Response:
        return await answer(lambda: runs.of(run).steps(name, before, limit))

    @app.get(RUN + STEP)
    async def step_page(run: str, step: int) -> Response:
        return await answer(lambda: runs.of(run).step(step))

    @app.get(RUN + STEP + GROUP)
    async def group_page(run: str, step: int, group: int, base: int | None = None) -> Response:
        return await answer(lambda: runs.of(run).group(step, group, base))

    @app.get(RUN + STEP + GROUP + "/{index}")
    async def tokens(
        run: str, step: int, group: int, index: int, offset: AtLeast0 = 0, limit: AtLeast0 = 2000
    ) -> Response:
        return await answer(lambda: runs.of(run).tokens(step, group, index, offset, limit))

    @app.get(RUN + "/evaluations")
    async def evaluations(run: str) -> Response:
        return await answer(lambda: runs.of(run).evaluations())

    @app.get(RUN + "/evaluations/{number}")
    async def evaluation(run: str, number: int) -> Response:
        return await answer(lambda: runs.of(run).evaluation(number))

    @app.get(RUN + "/samples")
    async def samples(
        run: str, wanted: Annotated[Wanted, Query()], end: int | None = None, limit: Limit = 50
    ) -> Response:
        return await answer(lambda: runs.of(run).samples(wanted, end, limit))

    @app.get(RUN + "/completions")
    async def completions(
        run: str,
        wanted: Annotated[Wanted, Query()],
        at_step: int | None = None,
        at_group: AtLeast0 = 0,
        limit: Limit = 50,
    ) -> Response:
        start = None if at_step is None else (at_step, at_group)
        return await answer(lambda: runs.of(run).search_steps(wanted, start, limit))

    @app.get(RUN + "/tickets")
    async def tickets(run: str, reason: str = "", offset: AtLeast0 = 0, limit: Limit = 100) -> Response:
        return await answer(lambda: runs.of(run).tickets(reason, offset, limit))

    @app.get(RUN + "/tickets/{number}")
    async def ticket(run: str, number: Annotated[int, PathValue(ge=0)]) -> Response:
        return await answer(lambda: runs.of(run).ticket(number))

    @app.get(RUN + "/dropped")
    async def dropped(run: str, reason: str = "", ticket: int | None = None, limit: Limit = 50) -> Response:
        return await answer(lambda: runs.of(run).dropped(reason, ticket, limit))

    @app.get(RUN + "/dead_letters")
    async def dead_letters(run: str, ticket: str | None = None, limit: Limit = 50) -> Response:
        return await answer(lambda: runs.of(run).dead_letters(ticket, limit))

    @app.get(RUN + "/timeline")
    async def timeline(run: str, first: int = 1, last: int = 8) -> Response:
        return await answer(lambda: runs.of(run).timeline(first, last))
