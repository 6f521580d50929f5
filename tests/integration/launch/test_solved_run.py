"""A run that has solved its task is finished, and says so wherever people look: the real processes.

The engine is the pure one; the reward is a random one at first, then full for whatever comes.
"""

import json

import pytest

from tests.integration.launch.user_commands import UserCommands, said

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_STEPS = 40
LEARNING = """
import os

def learning(prompt, completion, answer, metadata):
    with open("calls", "ab", buffering=0) as file:
        file.write(b".")
    return 1.0 if os.path.getsize("calls") > 60 else float(sum(map(ord, completion)) % 2)
"""


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_a_solved_run_is_finished_and_says_so(setup: UserCommands, dynamic_sampling: bool) -> None:
    setup.embed_queue()
    setup.use_pure_engine()
    setup.score_by("learning", LEARNING)
    setup.write_rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(2 * NUM_STEPS)))
    setup.document["data"]["eval"] = {"path": "heldout.jsonl"}
    setup.document["total_train_epochs"] = 1
    setup.document["loss"] = {"dynamic_sampling": dynamic_sampling}
    (setup.folder / "heldout.jsonl").write_text('{"prompt": "7+8=", "answer": "15"}\n')
    code, output = setup.launch()
    assert code == 0, output
    ending = " ".join(said(output).split())
    summary = json.loads((setup.run_folder / "summary.json").read_text())
    steps = summary["steps"]
    assert 0 < steps < NUM_STEPS
    assert f"Finished: {steps} of {NUM_STEPS} steps" in ending
    reason = "stopped solved: in the last 20 tickets no reward was below 1, the highest of the run, which reaches"
    assert reason in ending
    assert (summary["stopped_early"]["solved_tickets"], summary["heldout_steps_end"]) == (20, steps)
    assert [int(each.name.split(".")[0]) for each in (setup.run_folder / "checkpoints").iterdir()][-1:] == [steps]
    assert (setup.run_folder / "final" / "model.safetensors").is_file()

    code, status = setup.run("penstock_launch", "status")
    assert code == 0, status
    assert f"finished: {steps} step" in status
    assert reason in " ".join(status.split())

    code, output = setup.launch("--run.existing", "resume")
    assert code == 0, output
    again = " ".join(said(output).split())
    assert reason in again
    assert "train longer" not in again
    assert "to train on" in (setup.run_folder / "logs" / "trainer.log").read_text()
    assert json.loads((setup.run_folder / "summary.json").read_text())["steps"] == steps
