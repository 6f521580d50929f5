"""docs/rewards.md: its example runs, and it names every built-in reward and failure."""

import re
from collections import Counter
from pathlib import Path
from typing import get_args

from penstock.config import RewardSection
from penstock_reward.functions.registry import builtins, load
from penstock_reward.processes.messages import Call, FailureKind
from penstock_reward.processes.pool import open_pool
from penstock_reward.scoring.combine import combine

TEXT = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()


async def test_the_example_gives_what_the_page_says(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(example)
    weights = {"my_rewards:brevity": 1.0, "my_rewards:polite": 0.1}
    calls = [Call(name, index) for index in range(2) for name in weights]
    async with open_pool(RewardSection(functions=weights, modules_path=str(tmp_path))) as pool:
        outcomes = await pool.run("", ["12, please", "13"], "12", {"max_words": 5}, calls)
    by_call = dict(zip(calls, outcomes, strict=True))
    values = [
        combine(weights, {name: by_call[Call(name, index)] for name in weights}, 1e6).score.value for index in (0, 1)
    ]
    assert values == [1.1, 0.0]
    assert '{"scores":[{"value":1.1,"failure":""},{"value":0.0,"failure":""}]}' in TEXT


def test_every_builtin_and_every_kind_of_failure_is_named() -> None:
    for name in (*builtins(), *get_args(FailureKind)):
        assert f"`{name}`" in TEXT


def test_the_table_of_examples_is_what_the_code_does() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \| ([01]) \| .* \|$", TEXT, re.MULTILINE)
    assert min(Counter(name for name, *_ in rows).values()) >= 3
    assert {name for name, *_ in rows} == {"exact_match", "numeric", "gsm8k", "math"}
    for name, completion, answer, value in rows:
        text = completion.replace("\\n", "\n")
        got = load(name)(prompt="", completion=text, answer=answer, metadata={})
        assert got == int(value), (name, completion, answer)
