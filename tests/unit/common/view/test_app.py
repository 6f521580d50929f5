"""Who may read the page's data, and what comes with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from pydantic import SecretStr

from benchmarks.synthetic_run import completion, group
from penstock.records import RunRecords
from penstock.view.app import view_app
from penstock.view.runs import Runs
from tests.unit.common.view.conftest import Made

DATA = "/v1/view/runs"


@asynccontextmanager
async def page(made: Made, token: str = "", reader: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    app = view_app(Runs([RunRecords(made.run.folder)]), SecretStr(token) if token else None)
    transport = httpx.ASGITransport(app, client=(reader, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/mine",
        "/mine/curves?name=reward_mean",
        "/mine/steps?name=reward_mean",
        "/mine/steps/1",
        "/mine/steps/1/groups/0",
        "/mine/steps/1/groups/0/0",
        "/mine/evaluations",
        "/mine/evaluations/1",
        "/mine/samples?text=ticket&limit=1",
        "/mine/tickets?reason=poison",
        "/mine/tickets/5",
        "/mine/timeline?first=1&last=2",
    ],
)
async def test_each_question_is_answered_with_the_token_alone(made: Made, path: str) -> None:
    async with page(made, "secret") as client:
        assert (await client.get(DATA + path)).status_code == 401
        assert (await client.get(DATA + path, headers={"Authorization": "Bearer wrong"})).status_code == 401
        answer = await client.get(DATA + path, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200, answer.text
    assert answer.json()
    assert answer.headers["cache-control"] == "no-store"


async def test_dropped_completions_are_answered_with_the_token_alone(made: Made) -> None:
    made.run.drop_without_rewards(group(7, "p", [1], [completion([1], 2)], [None]), "judge: gone")
    async with page(made, "secret") as client:
        assert (await client.get(f"{DATA}/mine/dropped")).status_code == 401
        answer = await client.get(f"{DATA}/mine/dropped?limit=1", headers={"Authorization": "Bearer secret"})
    assert [(line["ticket"], line["step"]) for line in answer.json()] == [(7, 3)]


async def test_without_a_token_only_this_host_reads_data(made: Made) -> None:
    async with page(made) as client:
        assert (await client.get(DATA)).status_code == 200
    async with page(made, reader="192.0.2.7") as client:
        refused = await client.get(DATA)
        assert refused.status_code == 403
        assert "PENSTOCK_TOKEN" in refused.text
        assert (await client.get("/")).status_code == 200


async def test_a_page_of_another_site_reads_nothing(made: Made) -> None:
    async with page(made) as client:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            assert (await client.get(DATA, headers={"Sec-Fetch-Site": site})).status_code == status


@pytest.mark.parametrize("path", ["/", "/view/app.js", DATA, "/view/none.js"])
async def test_every_answer_forbids_code_of_others(made: Made, path: str) -> None:
    async with page(made) as client:
        policy = (await client.get(path)).headers["content-security-policy"]
    directives = dict(each.strip().split(" ", 1) for each in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["connect-src"] == directives["style-src"] == "'self'"
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/view/../app.py", 404),
        ("/view/..%2Fapp.py", 404),
        ("/view/app.py", 422),
        ("/view/none.js", 422),
        (DATA + "/other", 422),
        (DATA + "/mine/steps/0", 422),
        (DATA + "/mine/steps/1/groups/77", 422),
        (DATA + "/mine/steps/1/groups/0/77", 422),
        (DATA + "/mine/evaluations/9", 422),
        (DATA + "/mine/samples?reward_min=high", 422),
        (DATA + "/mine/curves?name=a&points=100000", 422),
        (DATA + "/mine/tickets/-1", 422),
    ],
)
async def test_what_there_is_not_is_an_error_that_says_so(made: Made, path: str, status: int) -> None:
    async with page(made) as client:
        answer = await client.get(path)
    assert answer.status_code == status
    assert answer.json()["detail"]


async def test_the_page_changes_nothing(made: Made) -> None:
    async with page(made, "secret") as client:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await client.request(method, DATA, headers={"Authorization": "Bearer secret"})
            assert answer.status_code == 405


async def test_the_page_names_no_other_host_and_holds_no_code_of_its_own(made: Made) -> None:
    async with page(made) as client:
        document = (await client.get("/")).text
        script = await client.get("/view/plotly.min.js")
    assert "http" not in document.replace("http-equiv", "")
    assert '<script type="module" src="view/app.js"></script>' in document
    assert document.count("<script") == 1
    assert script.status_code == 200
    assert script.headers["content-type"].startswith("text/javascript")


def test_runs_of_one_name_have_different_keys(made: Made) -> None:
    records = RunRecords(made.run.folder)
    assert list(Runs([records, records, records]).keys) == ["mine", "mine~2", "mine~3"]
