"""A real browser on the page of runs: what is clicked, typed and filtered shows what the files hold."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from benchmarks.synthetic_run import END, SyntheticRun, completion, group, write_long_run, write_tokenizer
from penstock.contracts import Completion, ScoredGroup
from penstock.contracts.vocabulary import DropReason
from penstock.records import RunRecords
from penstock.records.step_numbers import number_of
from tests.deploy.browser import Scheme, Viewer, chromium, running_browser, serving, viewing
from tests.deploy.prometheus_setup import read_targets, running_system
from tests.patience import ANSWER_SECONDS
from tests.unit.common.view.conftest import episode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
NUM_STEPS = 10_000
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"
TURNED = f"abc{chr(0x202E)}def{chr(0x2066)}{chr(0)}"
HUGE = "long " * 40_000
VIEWS = (
    "",
    "?view=steps",
    "?view=step&step=1",
    "?view=group&step=1&group=0",
    "?view=tokens&step=1&group=0&completion=0",
    "?view=tokens&step=1&group=0&completion=0&as=table",
    "?view=tokens&step=1&group=3&completion=1&colour=difference",
    "?view=evaluations",
    "?view=search",
    "?view=search&where=steps&text=4",
    "?view=timeline",
    "?view=tickets&ticket=5",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    if executable is None:
        pytest.skip("no chromium on PATH; `apt-get install chromium` brings it on Debian and Ubuntu")
    expect.set_options(timeout=ANSWER_SECONDS * 1000)
    with running_browser(executable) as browser:
        yield browser


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str], list[int]]]:
    """A model's folder with a tokenizer, and how it encodes."""
    folder = tmp_path_factory.mktemp("model")
    return folder, write_tokenizer(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, encode: tuple[Path, Callable[[str], list[int]]]) -> Path:
    """A run with groups of all kinds, completions that would do harm as markup, and an episode."""
    model, to_ids = encode
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "small", str(model))
    run.begin(group_size=4, batch_size=4)

    def made(*texts: str) -> list[Completion]:
        return [completion([*to_ids(text), END], 0) for text in texts]

    def of(
        ticket: int, prompt: str, texts: tuple[str, ...], rewards: list[float | None], answer: str = "4"
    ) -> ScoredGroup:
        return group(ticket, prompt, to_ids(prompt), made(*texts), rewards, answer=answer)

    run.evaluate(0.25, [("7+7=", SCRIPT, "14", 0.0), ("8+8=", "16", "16", 1.0)])
    hostile = of(0, SCRIPT, (SCRIPT, TURNED, HUGE, "4"), [0.0, 0.5, 0.25, 1.0], answer=TURNED)
    flat = of(1, "1+1=", ("2", "2", "2", "2"), [1.0] * 4)
    failed = of(2, "3+3=", ("6", "7", "8", "9"), [None, None, None, 0.0])
    close = of(3, "2+2=", ("the answer is 4", "the answer is 5", "the sum is 4", "4"), [1.0, 0.0, 1.0, 1.0])
    ratios = [[[0.0] * each.num_tokens for each in one.group.trajectories] for one in (hostile, flat, failed, close)]
    ratios[3][1] = [-0.75 if place == 14 else 0.125 for place in range(len(ratios[3][1]))]
    ratios[2] = [[] for _ in ratios[2]]
    run.add_step([hostile, flat, failed, close], log_ratios=ratios)
    changed = completion([*to_ids("four"), END], 0, changes_at=2)
    again = group(4, "2+2=", to_ids("2+2="), [changed, *made("3", "4", "4")], [1.0, 0.0, 1.0, 1.0])
    agent = group(6, "", [], [episode(to_ids, 0), episode(to_ids, 0)], [1.0, 0.0])
    run.add_step([again, agent])
    run.drop_without_rewards(group(7, SCRIPT, to_ids("7"), made("8"), [None]), f"judge: {SCRIPT}")
    run.drop(5, DropReason.POISON, f"MalformedMessageError: {SCRIPT}")
    run.bury("5", f"MalformedMessageError: {SCRIPT}", f"{SCRIPT}{TURNED}")
    run.bury(SCRIPT, TURNED, HUGE)
    run.evaluate(0.5, [("7+7=", "14", "14", 1.0), ("8+8=", "16", "16", 1.0)], failed=[f"judge: {SCRIPT}"])
    return run.folder


@pytest.fixture(scope="module")
def served(small: Path) -> Iterator[str]:
    with serving(small) as url:
        yield url


@pytest.fixture
def viewer(browser: Browser, served: str) -> Iterator[Viewer]:
    with viewing(browser, served) as viewer:
        yield viewer


def test_learning_is_shown_first_with_what_the_files_hold(viewer: Viewer, small: Path) -> None:
    viewer.open()
    lines = list(RunRecords(small).steps())
    figures = viewer.page.locator("dl.figures").inner_text()
    assert f"{lines[0]['reward_mean']:.2f} \u2192 {lines[-1]['reward_mean']:.2f}" in figures
    assert "accuracy\n0.25 \u2192 0.50 (of 19; 1 failed)" in figures.lower()
    assert "held-out reward\n0.25 \u2192 0.50\n" in figures.lower()
    expect(viewer.page.locator(".plot .main-svg").first).to_be_visible()
    for title in ("Gap to ideal", "Staleness", "KL from the sampler", "Effective sample size", "Entropy", "Length"):
        expect(viewer.page.get_by_text(title, exact=True)).to_be_visible()
    expect(viewer.page.locator("figure.words")).to_contain_text("the trainer waits 35 %")
    drawn = viewer.page.locator(".plot").first.evaluate("plot => plot.data.find(t => t.name === 'training reward').y")
    assert drawn == [line["reward_mean"] for line in lines]


def test_from_a_step_to_a_token_by_clicks(viewer: Viewer) -> None:
    viewer.open()
    viewer.click(viewer.page.get_by_role("link", name="Steps"))
    viewer.click(viewer.page.get_by_role("region", name="Steps of small").get_by_role("link", name="1", exact=True))
    rows = viewer.table("Groups of step 1")
    assert [row[0] for row in rows] == ["3", "0", "1", "2"]  # by variance
    assert [row[6] for row in rows] == ["", "", "zero variance", "failed"]
    viewer.click(viewer.page.get_by_role("region", name="Groups").get_by_role("link", name="3", exact=True).first)
    cards = viewer.page.locator(".beside li")
    assert [card.locator("mark").inner_text() for card in cards.all() if card.locator("mark").count()] == [
        "s",
        "4",
        "5",
    ]
    assert cards.nth(3).locator(".same").inner_text() == "the answer is "
    viewer.click(cards.nth(3).get_by_role("link", name="number 1"))
    pieces = viewer.page.locator(".tokens .token:not(.context)").all_inner_texts()
    assert "".join(pieces).replace("\u00a0", " ") == "the answer is 5<|end|>"
    expect(viewer.page.locator(".token.special")).to_have_text("<|end|>")
    viewer.page.locator(".tokens .token.special").hover()
    expect(viewer.page.locator(".detail")).to_contain_text("id 256")
    address = viewer.page.url
    with viewing(viewer.page.context.browser, viewer.url) as other:  # type: ignore[arg-type]
        other.page.goto(address)
        other.settle()
        assert other.page.locator("h1").inner_text() == "Step 1, group 3, number 1"
    viewer.page.go_back()
    expect(viewer.page.locator("h1")).to_contain_text("Step 1, group 3")


def test_steps_are_counted_from_1_wherever_they_are_read_or_typed(viewer: Viewer) -> None:
    page, heading = viewer.page, viewer.page.locator("h1")
    viewer.open("?view=steps")
    assert [row[0] for row in viewer.table("Steps of small, the newest first")] == ["2", "1"]
    assert page.get_by_label("Go to step").get_attribute("min") == "1"
    page.get_by_label("Go to step").fill("1")
    viewer.click(page.get_by_role("button", name="Show"))
    expect(heading).to_have_text("Step 1 ")
    assert page.get_by_role("link", name="previous step").count() == 0
    viewer.click(page.get_by_role("link", name="next step"))
    expect(heading).to_have_text("Step 2 ")
    assert page.url.endswith("step=2")
    assert page.get_by_role("link", name="next step").count() == 0
    viewer.click(page.get_by_role("link", name="timeline around it"))
    expect(page.get_by_role("navigation", name="Steps")).to_contain_text("steps 1\u20134")
    words = "plot => plot.data.flatMap(trace => trace.customdata.map(each => each.words))"
    drawn = page.locator(".plot.js-plotly-plot").evaluate(words)
    assert {"step 1 computes", "step 2 computes", "ticket 0, step 1", "ticket 4, step 2"} <= set(drawn)
    assert {f"push of version {version}, generation paused 0.1 s" for version in (0, 1)} <= set(drawn)
    names = page.locator(".plot.js-plotly-plot").evaluate("plot => plot.layout.yaxis.ticktext")
    assert [name for name in names if name] == ["trainer", "weights", "rollout-0"]
    viewer.open("?view=search&step_min=2&step_max=2")
    assert [link.split(",")[0] for link in page.locator(".found a").all_inner_texts()] == ["step 2", "step 2"]
    viewer.open("?view=tickets&ticket=4")
    expect(page.get_by_role("link", name="trained in step 2")).to_be_visible()


def test_curves_begin_at_step_1_and_a_click_opens_the_step(viewer: Viewer) -> None:
    viewer.open()
    plot = viewer.page.locator(".plot.js-plotly-plot").first
    steps = "plot => plot.data.filter(t => t.name).map(t => [t.name, Array.from(t.x)])"
    assert dict(plot.evaluate(steps)) == {"training reward": [1, 2], "accuracy": [0, 2]}
    for x, step in ((0, 1), (1, 1), (2, 2)):
        viewer.open()
        plot.evaluate("(plot, x) => plot.emit('plotly_click', {points: [{x, data: {meta: 0}}]})", x)
        expect(viewer.page.locator("h1")).to_have_text(f"Step {step} ")


def test_an_address_of_a_step_before_the_first_is_answered_with_what_there_is(viewer: Viewer) -> None:
    viewer.page.goto(f"{viewer.url}/?view=step&step=0")
    expect(viewer.page.locator("main .problem")).to_contain_text("expected steps from 1 on")
    viewer.faults = [fault for fault in viewer.faults if "422" not in fault]


def test_tokens_are_coloured_by_what_was_recorded(viewer: Viewer) -> None:
    viewer.open("?view=tokens&step=2&group=0&completion=0")
    token = viewer.page.locator(".tokens .token")
    classes = token.evaluate_all("tokens => tokens.map(token => token.classList[1])")
    assert classes == ["context"] * 4 + ["v0", "v0", "v1", "v1", "v1"]
    expect(viewer.page.locator(".legend")).to_contain_text("version 1")
    for colour, expected in (
        ("mask", {"context", "trained"}),
        ("logprob", {"context", "surprise"}),
        ("none", {"context", "plain"}),
    ):
        viewer.page.get_by_label("Coloured by").select_option(colour)
        expect(viewer.page.locator(f".tokens .token.{max(expected - {'context'})}").first).to_be_visible()
        assert set(token.evaluate_all("tokens => tokens.map(token => token.classList[1])")) == expected
        assert f"colour={colour}" in viewer.page.url
    viewer.page.get_by_label("ids").check()
    expect(viewer.page.locator(".tokens sub").first).to_be_visible()
    viewer.page.get_by_text("Sampled by version").click()
    assert [row[3] for row in viewer.table("Versions that the engine asserted")] == ["the same", "the same"]


def test_the_largest_difference_of_trainer_and_sampler_is_found_from_the_step_on(viewer: Viewer) -> None:
    viewer.open("?view=step&step=1&sort=difference")
    rows = viewer.table("Groups of step 1")
    assert [(row[0], row[7]) for row in rows] == [("3", "\u22120.750"), ("0", "0.000"), ("1", "0.000"), ("2", "\u2013")]
    viewer.click(viewer.page.get_by_role("link", name="\u22120.750"))
    expect(viewer.page.get_by_label("Coloured by")).to_have_value("difference")
    token = viewer.page.locator(".tokens .token")
    classes = token.evaluate_all("tokens => tokens.map(token => token.classList[1])")
    assert set(classes) == {"context", "above", "below"}
    below = viewer.page.locator(".tokens .token.below")
    expect(below).to_have_count(1)
    below.hover()
    expect(viewer.page.locator(".detail")).to_contain_text("trainer \u2212 sampler \u22120.7500")
    viewer.click(viewer.page.get_by_role("link", name="\u22120.7500 at token"))
    expect(viewer.page.locator(".token.wanted.below")).to_be_in_viewport()
    expect(viewer.page.locator(".legend")).to_contain_text("+1.00 and more")
    viewer.open("?view=tokens&step=2&group=0&completion=0&colour=difference")
    expect(viewer.page.locator("p.problem")).to_contain_text("not recorded: there is no 00000001.1.log_ratios")
    expect(viewer.page.locator(".tokens .token.unknown").first).to_be_visible()


def test_an_episode_is_shown_turn_by_turn(viewer: Viewer) -> None:
    viewer.open("?view=tokens&step=2&group=1&completion=0")
    turns = viewer.page.locator(".segment").all_inner_texts()
    assert turns == [
        "0: user",
        "1: assistant (sampled)",
        "2: tool",
        "3: assistant (sampled)",
        "4: assistant (sampled), continues part 2",
    ]


def test_groups_are_filtered_and_sorted_and_the_address_keeps_it(viewer: Viewer) -> None:
    viewer.open("?view=step&step=1")
    for kind, groups in (("failed", ["2"]), ("flat", ["1"]), ("signal", ["3", "0"]), ("", ["3", "0", "1", "2"])):
        viewer.page.get_by_label("Groups", exact=True).select_option(kind)
        viewer.settle()
        expect(viewer.page.locator("output")).to_have_text(f"{len(groups)} of 4")
        assert [row[0] for row in viewer.table("Groups of step 1")] == groups
    viewer.page.get_by_label("Text").fill("2+2")
    viewer.page.get_by_label("Text").press("Enter")
    expect(viewer.page.locator("output")).to_have_text("1 of 4")
    viewer.page.reload()
    viewer.settle()
    assert [row[0] for row in viewer.table("Groups of step 1")] == ["3"]


def test_completions_are_found_by_text_reward_and_failure(viewer: Viewer) -> None:
    viewer.open("?view=search")
    assert viewer.page.locator(".found li").count() == 6
    viewer.page.get_by_label("Text").fill("ticket 3")
    viewer.click(viewer.page.get_by_role("button", name="Find"))
    expect(viewer.page.locator(".found li")).to_have_count(1)
    viewer.page.get_by_label("Text").fill("")
    viewer.page.get_by_label("Reward", exact=True).select_option("failed")
    viewer.click(viewer.page.get_by_role("button", name="Find"))
    expect(viewer.page.locator(".found li")).to_have_count(1)
    viewer.click(viewer.page.locator(".found a"))
    expect(viewer.page.locator("h1")).to_contain_text("Step 1, group 2")


def test_a_text_is_found_in_completions_that_were_not_kept_for_people(viewer: Viewer) -> None:
    viewer.open("?view=search&text=the+sum")
    expect(viewer.page.locator("output")).to_have_text("None fits.")
    viewer.page.get_by_label("Look in").select_option("steps")
    viewer.click(viewer.page.get_by_role("button", name="Find"))
    expect(viewer.page.locator(".found li")).to_have_count(1)
    expect(viewer.page.locator("output")).to_contain_text("1 found; 2 of 2 steps")
    assert "where=steps" in viewer.page.url
    viewer.click(viewer.page.locator(".found a"))
    expect(viewer.page.locator("h1")).to_contain_text("Step 1, group 3")
    viewer.open("?view=search&where=steps&text=onerror")
    assert "onerror" in viewer.page.locator(".found li").first.inner_text()
    assert viewer.page.evaluate("window.hacked") is None


def test_evaluations_are_compared_before_and_after(viewer: Viewer) -> None:
    viewer.open("?view=evaluations")
    rows = viewer.table("Completions of the same prompts before and after")
    assert [row[-1] for row in rows] == ["better", "the same"]
    assert rows[0][2].startswith(SCRIPT)
    assert [row[1] for row in viewer.table("Evaluations of small")] == ["0.25", "0.50 (of 19; 1 failed)"]
    assert [row[:3] for row in viewer.table("Held-out prompts whose reward failed")] == [
        ["2", f"judge: {SCRIPT}", "failed 0"]
    ]


@pytest.fixture
def of_two_sets(browser: Browser, tmp_path: Path, encode: tuple[Path, Callable[[str], list[int]]]) -> Iterator[Viewer]:
    """The page of a run with three evaluations of the main set and two of another, which ended in another order."""
    model, to_ids = encode
    run = SyntheticRun(tmp_path / "two", str(model))
    run.begin(group_size=4, batch_size=1)
    for step, (main, hard) in enumerate(((0.25, None), (0.5, 0.0), (0.75, 0.125))):
        if hard is not None:
            run.evaluate(hard, [("77*77=", f"hard {step}", "5929", hard)], name="hard")
        run.evaluate(main, [("7+7=", f"main {step}", "14", main)])
        texts = [completion([*to_ids("14"), END], step)] * 4
        run.add_step([group(step, "7+7=", to_ids("7+7="), texts, [0.0, 1.0, 1.0, 1.0], answer="14")])
    with serving(run.folder) as url, viewing(browser, url) as viewer:
        yield viewer


def test_the_chosen_set_is_the_one_that_is_shown(of_two_sets: Viewer) -> None:
    viewer = of_two_sets
    viewer.open("?view=evaluations")
    choice = viewer.page.get_by_label("Set", exact=True)
    assert choice.locator("option").all_inner_texts() == ["main", "hard"]
    compared = "Completions of the same prompts before and after"

    def seen() -> tuple[list[list[str]], list[float], list[list[str]]]:
        drawn = viewer.page.locator(".plot.js-plotly-plot").evaluate("plot => Array.from(plot.data[0].y)")
        accuracies = [row[:2] for row in viewer.table("Evaluations of two")]
        return accuracies, drawn, [[cell.splitlines()[0] for cell in row[:4]] for row in viewer.table(compared)]

    main = (
        [["0", "0.25"], ["1", "0.50"], ["2", "0.75"]],
        [0.25, 0.5, 0.75],
        [["7+7=", "14", "main 0", "main 2"]],
    )
    hard = ([["1", "0.00"], ["2", "0.13"]], [0.0, 0.125], [["77*77=", "5929", "hard 1", "hard 2"]])
    assert seen() == main
    choice.select_option("hard")
    expect(viewer.page.get_by_text("Accuracy on held-out prompts of hard, 95 % interval")).to_be_visible()
    viewer.settle()
    assert seen() == hard
    assert choice.input_value() == "hard"
    address = viewer.page.url
    viewer.page.get_by_label("After", exact=True).select_option("1 steps")
    expect(viewer.page.get_by_role("region", name=compared).locator("th").nth(3)).to_have_text("after 1 steps")
    viewer.settle()
    assert choice.input_value() == "hard", "another choice on the page leaves the set"
    assert seen()[2] == [["77*77=", "5929", "hard 1", "hard 1"]]
    viewer.page.goto(address)  # as a bookmark, or in a message
    viewer.settle()
    assert seen() == hard
    viewer.page.get_by_label("Set", exact=True).select_option("main")
    expect(viewer.page.get_by_text("Accuracy on held-out prompts of main, 95 % interval")).to_be_visible()
    viewer.settle()
    assert seen() == main
    viewer.open("?view=evaluations&set=gone")
    assert seen() == main


def test_each_set_has_a_curve_on_the_first_page(of_two_sets: Viewer) -> None:
    of_two_sets.open()
    assert "null" not in of_two_sets.page.locator("main").inner_text().splitlines()
    figures = of_two_sets.page.locator("dl.figures").inner_text().lower()
    assert "accuracy\n0.25 \u2192 0.75\n" in figures
    assert "accuracy hard\n0.00 \u2192 0.13\n" in figures
    drawn = of_two_sets.page.locator(".plot.js-plotly-plot").first.evaluate(
        "plot => Object.fromEntries(plot.data.map(t => [t.name, [Array.from(t.x), Array.from(t.y), t.line?.color]]))"
    )
    assert drawn["accuracy main"][:2] == [[0, 1, 2], [0.25, 0.5, 0.75]]
    assert drawn["accuracy hard"][:2] == [[1, 2], [0.0, 0.125]]
    colours = [drawn[name][2] for name in ("training reward", "accuracy main", "accuracy hard")]
    assert len({*colours}) == 3, colours


def test_an_evaluation_without_any_reward_is_no_point_and_says_so(
    browser: Browser, tmp_path: Path, encode: tuple[Path, Callable[[str], list[int]]]
) -> None:
    run = SyntheticRun(tmp_path / "unscored", str(encode[0]))
    run.begin(group_size=4, batch_size=4)
    run.evaluate(0.25, [])
    run.evaluate(None, [], failed=["judge: gone"] * 20)
    with serving(run.folder) as url, viewing(browser, url) as viewer:
        viewer.open("?view=evaluations")
        rows = viewer.table("Evaluations of unscored")
        assert [row[1:4] for row in rows] == [
            ["0.25", "0.11 \u2013 0.47", "0.250"],
            ["\u2013 (all 20 failed)", "\u2013", "\u2013"],
        ]
        drawn = viewer.page.locator(".plot.js-plotly-plot").evaluate("plot => Array.from(plot.data[0].y)")
        assert drawn == [0.25]


def test_a_ticket_says_why_it_ended(viewer: Viewer) -> None:
    viewer.open("?view=tickets")
    viewer.page.get_by_label("Ticket", exact=True).fill("5")
    viewer.click(viewer.page.get_by_role("button", name="Why did it end"))
    expect(viewer.page.locator("main")).to_contain_text("dropped as poison")
    letters = viewer.page.locator(".found li")
    expect(letters).to_have_count(1)
    expect(letters.locator(".problem")).to_have_text(f"MalformedMessageError: {SCRIPT}")
    assert letters.locator("pre").inner_text().startswith(f"{SCRIPT}abcU+202Edef")
    viewer.click(viewer.page.get_by_role("link", name="poison", exact=True))
    expect(letters).to_have_count(2)
    assert letters.first.locator(".head").inner_text().startswith(f"ticket {SCRIPT}")
    assert letters.first.locator("details[open]").count() == 0
    letters.first.get_by_text("Message", exact=True).click()
    expect(letters.first.locator("pre")).to_contain_text("long long")
    assert viewer.page.evaluate("window.hacked") is None
    assert viewer.table("Dropped tickets, the last one first")[0][3] == f"MalformedMessageError: {SCRIPT}"
    viewer.click(viewer.page.get_by_role("link", name="reward failed", exact=True))
    expect(viewer.page.locator(".found a")).to_have_text(
        "ticket 7, number 0: reward failed, while step 3 was collected"
    )
    expect(viewer.page.locator(".found .problem")).to_have_text(f"judge: {SCRIPT}")
    viewer.click(viewer.page.locator(".found a"))
    expect(viewer.page.locator("main")).to_contain_text("dropped as reward_failed")


@pytest.mark.parametrize("address", ["step&step=1", "group&step=1&group=0", "tickets", "search", "evaluations"])
def test_what_a_model_wrote_is_text_and_never_markup(viewer: Viewer, address: str) -> None:
    viewer.open(f"?view={address}")
    assert viewer.page.evaluate("window.hacked") is None
    assert viewer.page.locator("main img, main script, main b:has-text('bold')").count() == 0
    expect(viewer.page.locator("main").get_by_text("<script>").first).to_be_visible()


def test_marks_that_turn_text_are_shown_and_turn_nothing(viewer: Viewer) -> None:
    viewer.open("?view=group&step=1&group=0")
    marks = viewer.page.locator(".beside .hidden-character").all_inner_texts()
    assert {"U+202E", "U+2066", "U+0000"} <= set(marks)
    assert chr(0x202E) not in viewer.page.locator("main").inner_text()


def test_a_huge_completion_is_shown_in_pages(viewer: Viewer) -> None:
    viewer.open("?view=tokens&step=1&group=0&completion=2")
    assert viewer.page.locator(".tokens .token").count() == 2000
    viewer.click(viewer.page.get_by_role("link", name="later tokens"))
    expect(viewer.page.locator(".figures")).to_contain_text("2000\u20133999")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_can_be_used_by_everyone(browser: Browser, served: str, scheme: Scheme, width: int) -> None:
    with viewing(browser, served, scheme=scheme, width=width) as viewer:
        for address in VIEWS:
            viewer.open(address)
            found = Axe().run(viewer.page)
            assert found.violations_count == 0, f"{address}: {found.generate_report()}"
            assert viewer.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address


def test_a_token_is_asked_for_and_opens_the_page(browser: Browser, small: Path) -> None:
    with serving(small, environment={"PENSTOCK_TOKEN": "open sesame"}) as url, viewing(browser, url) as viewer:
        viewer.page.goto(f"{url}/?view=steps")
        viewer.page.get_by_label("Token").fill("wrong")
        viewer.page.get_by_role("button", name="Show").click()
        expect(viewer.page.get_by_label("Token")).to_have_value("")
        viewer.page.get_by_label("Token").fill("open sesame")
        viewer.page.get_by_role("button", name="Show").click()
        expect(viewer.page.locator("h1")).to_have_text("Steps")
        assert "sesame" not in viewer.page.url
        viewer.faults = [fault for fault in viewer.faults if "401" not in fault]


def test_ten_thousand_steps_and_two_runs_over_each_other(
    browser: Browser, small: Path, tmp_path: Path, encode: tuple[Path, Callable[[str], list[int]]]
) -> None:
    run = write_long_run(tmp_path / "long", encode[0], num_steps=NUM_STEPS, num_groups=2, files_every=100)
    with serving(run.folder, small) as url, viewing(browser, url) as viewer:
        viewer.open()
        expect(viewer.page.locator(".figures")).to_contain_text("10,000")
        drawn = "plot => plot.data.filter(t => t.name && t.name.endsWith('training reward')).map(t => t.y.length)"
        assert viewer.page.locator(".plot.js-plotly-plot").first.evaluate(drawn)[0] <= 600
        viewer.page.get_by_label("small").check()
        expect(viewer.page.locator("h1")).to_have_text("2 runs")
        assert len(viewer.page.locator(".plot.js-plotly-plot").first.evaluate(drawn)) == 2
        assert "run=long&run=small" in viewer.page.url
        viewer.open("?run=long&view=steps")
        viewer.page.get_by_label("Go to step").fill("5001")
        viewer.click(viewer.page.get_by_role("button", name="Show"))
        line = next(run_line for run_line in RunRecords(run.folder).steps_after(4999))
        expect(viewer.page.locator(".figures")).to_contain_text(f"{line['reward_mean']:.3f}")
        assert [row[0] for row in viewer.table("Groups of step 5001")] == ["0", "1"]
        viewer.click(viewer.page.get_by_role("link", name="next step"))
        expect(viewer.page.locator(".problem")).to_contain_text("its file is gone")


def test_a_running_trainer_serves_its_page_and_a_killed_run_is_shown_from_its_folder(
    browser: Browser, tmp_path: Path
) -> None:
    with running_system(tmp_path) as system:
        targets = [each for each in read_targets(system) if each["labels"]["job"].endswith("trainer")]
        with viewing(browser, f"http://{targets[0]['targets'][0]}") as viewer:
            viewer.open()
            expect(viewer.page.locator("#runs")).to_contain_text("running")
            viewer.open("?view=step&step=2")
            assert viewer.table("Groups of step 2")
        system.launch.kill()
        folder = tmp_path / "runs" / "watched"
        with serving(folder) as url, viewing(browser, url) as viewer:
            viewer.open()
            expect(viewer.page.locator("#runs")).to_contain_text("crashed")
            viewer.open("?view=group&step=2&group=0")
            assert viewer.page.locator(".beside li").count() == 4


@pytest.mark.skipif("PENSTOCK_PICTURES_OF" not in os.environ, reason="PENSTOCK_PICTURES_OF names no folder of a run")
def test_pictures_of_the_docs_are_taken(browser: Browser) -> None:
    """PENSTOCK_PICTURES_OF: the folder of a run of the demo; the pictures in docs/ are of it."""
    folder = Path(os.environ["PENSTOCK_PICTURES_OF"])
    step = next(number_of(line["step"]) for line in RunRecords(folder).steps() if 0.5 < line["reward_mean"] < 0.8)
    with serving(folder) as url, viewing(browser, url) as viewer:
        for name, address in (
            ("learning", ""),
            ("step", f"?view=step&step={step}"),
            ("group", f"?view=group&step={step}&group=2"),
        ):
            viewer.open(address)
            if name != "group":
                expect(viewer.page.locator(".plot .main-svg").last).to_be_visible()
            viewer.page.screenshot(path=PICTURES / f"view_{name}.png")
            assert re.search(r"\d", viewer.page.locator("main").inner_text())
