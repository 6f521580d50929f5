"""Draws the tickets of a recorded run with a curriculum again, and compares their prompts with the recorded ones.

Owns the comparison. It needs the ledger alone: sizes of the sets and outcomes are in it, so neither prompts nor queue.
"""

from penstock_trainer.data.drawing.curriculum import Curriculum, outcomes_of
from penstock_trainer.data.drawing.draw_order import DrawnSet, DrawOrder
from penstock_trainer.offline.recording import Recording


def check_draws(recording: Recording) -> str:
    """What was found, in a line; "" for a run without a curriculum. DataError names the first ticket that differs."""
    run, ledger, data = recording.run, recording.ledger, recording.config.data
    if not any(each.outcomes for each in ledger.steps):
        return ""
    if not data.curriculum.described or data.curriculum.described not in run.draws:
        return f"the draws are not compared: the run was begun with {run.draws}, and data.curriculum is another one"
    if [each.step for each in ledger.steps] != list(range(len(ledger.steps))):
        return "the draws are not compared: they follow from all steps of the run, and some are not recorded here"
    weights = {each.name: each.section.weight for each in data.training_sets}
    sets = [DrawnSet(name, size, weights.get(name)) for name, size in run.set_sizes.items()]
    order = DrawOrder(run.seed, sets or [DrawnSet("", run.dataset_length)])
    drops = outcomes_of(ledger)
    numbers = {*ledger.trained, *drops}
    curriculum = Curriculum(order, run.seed, data.curriculum, run.batch_size)
    curriculum.restore(ledger.steps, drops, max(numbers) + 1)
    return f"the prompts of all {len(numbers)} tickets that ended are those that the curriculum draws"
