"""An environment for runs whose engine computes no model: two turns, and a score for early letters."""

from pathlib import Path

AGENT = {
    "environment": "tests.deploy.letters:Letters",
    "modules_path": str(Path(__file__).parents[2]),
    "template": "plain",
    "max_tokens": 64,
    "num_services": 2,
}
"""The section that makes episodes of it, in two services."""


class Letters:
    """Say letters, twice."""

    def reset(self, prompt: str, **row: object) -> None:
        self.said: list[str] = []

    def step(self, text: str) -> str | float:
        self.said.append(text)
        if len(self.said) == 1:
            return "+="
        return sum("a" <= each < "n" for text in self.said for each in text) / 10
