"""The reasoning-gym example: its configuration, its sets, and that none of their problems is trained."""

from penstock.config.load import load_config
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.held_out import load_held_out
from tests.unit.repository.test_repository import ROOT

CONFIG = ROOT / "examples" / "reasoning_gym" / "config.yaml"


def test_it_evaluates_pass_at_k_of_two_sets_and_keeps_the_best_of_the_main_one() -> None:
    config = load_config(["--config", str(CONFIG)], {})
    main, further = config.held_out_sets
    assert (main.name, main.sampling.samples_per_prompt, main.sampling.temperature) == ("main", 8, 0.8)
    assert (further.name, further.sampling.samples_per_prompt, further.sampling.temperature) == ("three_numbers", 1, 0)
    assert further.prompt_template == main.prompt_template == config.data.prompt_template
    assert (config.eval.best_set, config.checkpoint.keep_best, config.eval.patience) == ("main", True, 3)


def test_no_held_out_problem_is_trained() -> None:
    config = load_config(["--config", str(CONFIG)], {})
    train = {row.prompt for row in load_rows(config.data.train)}
    sets = load_held_out(config)
    assert {name: len(rows) for name, rows in sets.items()} == {"main": 64, "three_numbers": 64}
    for rows in sets.values():
        assert not train & {row.prompt for row in rows}
        assert {row.reward for row in rows} == {"reasoning_gym"}
    assert all(str(row.prompt).count(",") == 2 for row in sets["three_numbers"])
