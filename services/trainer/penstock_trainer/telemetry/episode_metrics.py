"""Metrics of the episodes of the last batch, in a run that has episodes.

Owns names and labels; `penstock_trainer.batching.episodes` owns what the figures mean. A label that one batch lacks
shows 0 until it comes again.
"""

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge

FIGURES = {
    "episode_turns": "Mean calls of the model in an episode of the last batch",
    "episode_turns_max": "Most calls of the model in an episode of the last batch",
    "episode_tool_calls": "Mean tool calls of an episode of the last batch",
    "episode_failed_tool_calls_ratio": "Share of the tool calls of the last batch that failed",
    "episode_auxiliary_calls": "Mean calls outside of the conversation in an episode of the last batch",
    "episode_sampled_tokens": "Mean tokens that the model sampled in an episode of the last batch",
    "episode_context_tokens": "Mean tokens of an episode of the last batch that the model only read",
    "episode_cached_tokens_ratio": "Share of the prompt tokens of the last batch that engines had in their caches",
    "episode_version_spread": "Mean difference of newest and oldest version in an episode of the last batch",
    "episode_version_spread_max": "Largest difference of newest and oldest version in an episode of the last batch",
    "episode_failed_ratio": "Share of the episodes of the last batch that failed",
    "episode_attempts": "Mean attempts at an episode of the last batch",
}
LABELLED = {
    "episode_branches": ("reason", "Mean calls in an episode of the last batch that could not continue the one before"),
    "episode_ended": ("end", "Share of the episodes of the last batch by how they ended"),
}


class EpisodeMetrics:
    """The figures of the last batch, on the trainer's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._figures = {
            name: Gauge(f"penstock_trainer_{name}", text, registry=registry) for name, text in FIGURES.items()
        }
        for gauge in self._figures.values():
            gauge.set(math.nan)
        self._labelled = {
            name: Gauge(f"penstock_trainer_{name}", text, (label,), registry=registry)
            for name, (label, text) in LABELLED.items()
        }
        self._seen: dict[str, set[str]] = {name: set() for name in LABELLED}

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Show the figures of a step."""
        for name, gauge in self._figures.items():
            if name in statistics:
                gauge.set(statistics[name])
        for name, gauge in self._labelled.items():
            prefix = f"{name}_"
            values = {key.removeprefix(prefix): value for key, value in statistics.items() if key.startswith(prefix)}
            self._seen[name] |= values.keys()
            for label in self._seen[name]:
                gauge.labels(label).set(values.get(label, 0.0))
