"""How fast the page of a long run answers, and what it holds in memory meanwhile.

    python -m benchmarks.view                        # 10,000 steps with 2 GB of step files, made in a temporary folder
    python -m benchmarks.view --steps 1000 --gigabytes 0.2 --folder /data/tmp

Makes a run of that size and one of a hundredth of its steps, serves both with `penstock view` in turn, and asks each
what a page asks. Prints seconds, and each time also as a ratio of the long run's to the short one's. With Chromium on
PATH it also measures the first contentful paint. The folder is deleted at the end.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.synthetic_run import write_long_run, write_tokenizer
from penstock.records.step_numbers import id_of, number_of

NUM_GROUPS, GROUP_SIZE = 8, 8
BYTES_A_TOKEN = 8  # an id and a log-probability
LOOKS = 100  # steps that are opened, spread over the run
SHORT = 100  # times fewer steps in the run that is compared with
CURVES = ("reward_mean", "statistics/reward_std", "seconds/step", "statistics/behaviour_kl", "statistics/entropy")
NUM_CURVES = 24  # of the view Learning
ANSWER_SECONDS = 120.0


@dataclass
class Figures:
    """Seconds by what was asked, and resident bytes of the server after its first answers and at the end."""

    seconds: dict[str, float]
    first_bytes: int
    last_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of step files")
    parser.add_argument("--folder", type=Path, help="where the runs are made; default: the system's temporary folder")
    arguments = parser.parse_args()
    num_tokens = round(arguments.gigabytes * 1e9 / arguments.steps / NUM_GROUPS / GROUP_SIZE / BYTES_A_TOKEN)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_tokenizer(folder / "model")
        found = []
        for name, steps in (("short", max(2, arguments.steps // SHORT)), ("long", arguments.steps)):
            shape = {"num_groups": NUM_GROUPS, "group_size": GROUP_SIZE, "num_tokens": num_tokens}
            run = write_long_run(folder / name, folder / "model", num_steps=steps, **shape)
            size = sum(path.stat().st_size for path in run.folder.glob("steps/*.pack"))
            print(f"{name}: {steps:,} steps, {size / 1e9:.2f} GB of step files", flush=True)
            found.append(measure(run.folder, steps))
    short, long = found
    print(f"{'':32} {'short':>9} {'long':>9} {'ratio':>7}")
    for what, seconds in long.seconds.items():
        print(f"{what:32} {short.seconds[what]:8.3f}s {seconds:8.3f}s {seconds / short.seconds[what]:7.1f}")
    for name, figures in (("short", short), ("long", long)):
        grown = (figures.last_bytes - figures.first_bytes) / 1e6
        print(
            f"memory, {name}: {figures.first_bytes / 1e6:.0f} MB after the first page, {grown:+.0f} MB after the rest"
        )


def measure(folder: Path, steps: int) -> Figures:
    """Ask a server of this run what a page asks."""
    with serving(folder) as (url, process), httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        about = f"/v1/view/runs/{folder.name}"

        def asked(path: str, **query: object) -> float:
            start = time.perf_counter()
            client.get(path, params=query).raise_for_status()  # type: ignore[arg-type]
            return time.perf_counter() - start

        seconds = {"page without its content": asked("/"), "first overview": asked(about)}
        seconds["curves"] = asked(f"{about}/curves", name=CURVES)
        names = client.get(about).json()["columns"][:NUM_CURVES]
        refresh = sum(map(asked, (about.rpartition("/")[0], about, f"{about}/evaluations")))
        seconds["a refresh of an open page"] = refresh + asked(f"{about}/curves", name=names)
        seconds["table of steps"] = asked(f"{about}/steps", name=CURVES)
        first_bytes = process.memory_info().rss
        looked_at = [number_of(steps * look // LOOKS) for look in range(LOOKS)]
        seconds |= spread("a step", [asked(f"{about}/steps/{step}") for step in looked_at])
        seconds |= spread("a group", [asked(f"{about}/steps/{step}/groups/3") for step in looked_at])
        seconds |= spread("tokens", [asked(f"{about}/steps/{step}/groups/3/2") for step in looked_at])
        seconds |= spread("a ticket", [asked(f"{about}/tickets/{id_of(step) * NUM_GROUPS}") for step in looked_at[:20]])
        seconds["search, nothing fits"] = asked(f"{about}/samples", text="nowhere")
        if (executable := shutil.which("chromium")) is not None:
            seconds["first contentful paint"] = first_paint(executable, url)
        return Figures(seconds, first_bytes, process.memory_info().rss)


def spread(what: str, seconds: list[float]) -> dict[str, float]:
    """The median and the largest."""
    return {f"{what}, median": statistics.median(seconds), f"{what}, slowest": max(seconds)}


def first_paint(executable: str, url: str) -> float:
    """Seconds from the request to the first text on the screen, with an empty cache."""
    from playwright.sync_api import sync_playwright

    look: Callable[[str], str] = "performance.getEntriesByName('first-contentful-paint')[0]?.{}".format
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--headless", "--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_function(look("startTime"))
        milliseconds = float(page.evaluate(look("startTime")))
        browser.close()
    return milliseconds / 1000


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`penstock view` of a run: its URL and its process."""
    command = [sys.executable, "-P", "-m", "penstock_launch", "view", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0], psutil.Process(process.pid)
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
