"""What a page that is open costs the training that serves it: the demo, asked and left alone by turns.

    python -m benchmarks.view_beside

Runs examples/demo, and asks its trainer as ten open pages ask (a refresh a second) during every other five steps.
Prints the median seconds of a step with and without, and their ratio. The first steps and those of a change are left
out.
"""

import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import yaml

from benchmarks.chaos.launch import ROOT, Launch
from penstock.records import RunRecords

DEMO = ROOT / "examples" / "demo" / "config.yaml"
NAME = "beside"
TURN_STEPS = 5
WARM_UP_STEPS = 5
REFRESH_SECONDS = 1.0  # a page refreshes every ten
CURVES = (
    *("reward_mean", "statistics/reward_std", "seconds/step", "generation_seconds", "seconds/wait", "seconds/update"),
    *("seconds/push_wait", "seconds/commit", "staleness_mean", "staleness_max", "statistics/behaviour_kl"),
    *("statistics/entropy", "statistics/length_generated", "statistics/grad_norm", "statistics/loss"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = folder / "config.yaml"
        demo = yaml.safe_load(DEMO.read_text())
        demo["run"] |= {"name": NAME, "root": str(folder / "runs")}
        config.write_text(yaml.safe_dump(demo))
        launch = Launch(config, folder / "runs" / NAME, {})
        launch.start()
        num_asked = 0
        try:
            with httpx.Client(timeout=None) as client:
                while launch.exit_code() is None:
                    if is_asked(launch.num_steps()) and (url := trainer_url(folder)):
                        num_asked += asks(client, url)
                    time.sleep(REFRESH_SECONDS)
            show(RunRecords(launch.run_folder), num_asked)
        finally:
            launch.end()


def is_asked(step: int) -> bool:
    """Whether the trainer is asked during a step."""
    return step // TURN_STEPS % 2 == 1


def asks(client: httpx.Client, url: str) -> int:
    """One refresh of the view Learning; 0 if the trainer has just ended."""
    about = f"{url}/v1/view/runs/{NAME}"
    with contextlib.suppress(httpx.TransportError):
        for path in (f"{url}/v1/view/runs", about, f"{about}/evaluations"):
            client.get(path).raise_for_status()
        client.get(f"{about}/curves", params={"name": CURVES}).raise_for_status()
        return 1
    return 0


def trainer_url(folder: Path) -> str | None:
    """Where the trainer is, as it tells Prometheus; None before it does."""
    with contextlib.suppress(FileNotFoundError):
        for each in json.loads((folder / "runs" / f"{NAME}.targets.json").read_text()):
            if each["labels"]["job"].endswith("trainer"):
                return f"http://{each['targets'][0]}"
    return None


def show(run: RunRecords, num_asked: int) -> None:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for line in run.steps():
        step = line["step"]
        if step >= WARM_UP_STEPS and step % TURN_STEPS:
            seconds[is_asked(step)].append(line["seconds"]["step"])
    asked, alone = (statistics.median(seconds[each]) for each in (True, False))
    print(f"{num_asked} refreshes; seconds of a step, median: {asked:.2f} asked ({len(seconds[True])} steps), ", end="")
    print(f"{alone:.2f} alone ({len(seconds[False])} steps); ratio {asked / alone:.3f}")


if __name__ == "__main__":
    main()
