"""Rules for all metrics: names, labels, and no values where nothing is known."""

import contextlib
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from penstock.broker import MemoryUse
from penstock.contracts import ServerState, ServiceKind
from penstock.runtime.metrics import SecondsCounter
from penstock_agent.metrics import AgentMetrics
from penstock_reward.metrics import RewardMetrics
from penstock_rollout.metrics import RolloutMetrics
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import EvalResult, StepLine

# The allowed labels. Each has few values, fixed by code or configuration; none is a ticket, group, process or host.
LABELS = {"stream", "state", "reason", "kind", "outcome", "part", "phase", "transport", "function", "tracker", "le"}
LABELS |= {"end", "waits_for", "code", "event", "sender", "set"}
NOT_BASE_UNITS = re.compile(r"_(ms|milliseconds|minutes|hours|kb|mb|gb|mib|gib|percent|pct)(_total)?$")
REGISTRIES = [each.registry for each in (RolloutMetrics(), AgentMetrics(), RewardMetrics(), TrainerMetrics())]

LAST = "penstock_trainer_last_event_timestamp_seconds"


def make_line(ended_at: float) -> StepLine:
    return StepLine(0, 1, 0.5, (1,), ended_at - 1.0, ended_at, {}, 0.0, 0, 0.75, 0, 0.0, {})


def names(registry: CollectorRegistry) -> list[str]:
    return [family.name for family in registry.collect()]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_names_begin_alike_and_are_in_base_units(registry: CollectorRegistry) -> None:
    assert [name for name in names(registry) if not name.startswith(("penstock_", "process_"))] == []
    assert [name for name in names(registry) if NOT_BASE_UNITS.search(name)] == []
    assert all(family.documentation for family in registry.collect())


@pytest.mark.parametrize("registry", REGISTRIES)
def test_nothing_is_labelled_by_id(registry: CollectorRegistry) -> None:
    used = {label for family in registry.collect() for sample in family.samples for label in sample.labels}
    assert used <= LABELS
    declared = {label for each in registry._collector_to_names for label in getattr(each, "_labelnames", ())}
    assert declared <= LABELS


def test_no_two_services_share_a_name() -> None:
    own = [{name for name in names(registry) if name.startswith("penstock_")} for registry in REGISTRIES]
    assert sum(map(len, own)) == len(set.union(*own))


def test_a_counter_of_seconds_moves_while_something_goes_on() -> None:
    now = 100.0
    registry = CollectorRegistry()
    counter = SecondsCounter("things_seconds", "Things.", registry=registry, clock=lambda: now)
    assert registry.get_sample_value("things_seconds_total") == 0
    with counter.counting():
        now += 2
        assert registry.get_sample_value("things_seconds_total") == 2
        with counter.counting():
            now += 3
        assert counter.seconds == 5
    now += 10
    assert registry.get_sample_value("things_seconds_total") == 5
    with contextlib.suppress(RuntimeError), counter.counting():
        now += 1
        raise RuntimeError
    now += 10
    assert counter.seconds == 6


def test_what_is_not_known_is_no_number(tmp_path: Path) -> None:
    metrics = TrainerMetrics()
    value = metrics.registry.get_sample_value
    for name in ("trainer_reward_mean", "trainer_entropy", "trainer_gap_to_ideal_ratio"):
        assert math.isnan(value(f"penstock_{name}") or 0.0), name
    main, hard = {"set": "main"}, {"set": "hard"}
    assert math.isnan(value("penstock_eval_accuracy_ratio", main) or 0.0)
    progress = Progress(tmp_path)
    for steps, accuracy in ((10, 0.0), (0, 0.25)):
        progress.add_eval(EvalResult(steps, accuracy, 0.0, 4, 3, 1, 0, 0, ()))
    progress.add_eval(EvalResult(10, 0.75, 0.0, 4, 4, 0, 0, 0, (), set="hard"))
    metrics.show_run(3, progress)
    assert value("penstock_eval_accuracy_ratio", main) == 0
    assert value("penstock_eval_first_accuracy_ratio", main) == 0.25
    assert value("penstock_eval_failed_prompts", main) == 1
    assert [value(f"penstock_eval_{name}", hard) for name in ("accuracy_ratio", "failed_prompts")] == [0.75, 0]
    assert value("penstock_trainer_run_steps") == 3
    assert math.isnan(value("penstock_trainer_gap_to_ideal_ratio") or 0.0)
    assert value(LAST, {"event": "step"}) is None


def test_events_show_when_they_were_last(tmp_path: Path) -> None:
    metrics, progress = TrainerMetrics(), Progress(tmp_path)
    value = metrics.registry.get_sample_value
    progress.add_step(make_line(14.0))
    metrics.show_run(1, progress)
    assert value(LAST, {"event": "step"}) == 14  # also of an earlier life
    metrics.observe_step(make_line(16.0), [], outcome="trained")
    assert value(LAST, {"event": "non_finite"}) is None
    metrics.observe_step(make_line(18.0), [], outcome="non_finite")
    assert value(LAST, {"event": "non_finite"}) == 18
    before = time.time()
    metrics.pushed(num_live=2, num_fenced=1, seconds=0.5, paused_seconds=0.25)
    metrics.checkpoint_written(3.0)
    for event in ("push", "checkpoint"):
        assert before <= (value(LAST, {"event": event}) or 0) <= time.time()
    assert value("penstock_trainer_weight_pushes_total", {"outcome": "live"}) == 2
    assert value("penstock_trainer_weight_pushes_total", {"outcome": "fenced"}) == 1
    assert value("penstock_trainer_weight_exposed_seconds_total", {"part": "generation"}) == 0.25
    assert value("penstock_trainer_checkpoint_duration_seconds_sum") == 3


def test_a_step_fills_what_it_knows() -> None:
    metrics = TrainerMetrics()
    seconds = {"wait": 1.0, "forward_backward": 2.0, "step": 4.0}
    statistics = {
        "entropy": 0.5,
        "no_signal_ratio": 0.75,
        "num_loss_tokens": 30.0,
        "masked_stale": 0.25,
        "num_packs": 1.0,
    }
    line = StepLine(3, 4, 0.5, (1, 2), 10.0, 14.0, seconds, 3.0, 50, 0.75, 1, 0.5, statistics)
    metrics.observe_step(line, [0, 1], outcome="trained")
    value = metrics.registry.get_sample_value
    assert value("penstock_trainer_steps_total", {"outcome": "trained"}) == 1
    assert value("penstock_trainer_steps_total", {"outcome": "non_finite"}) == 0
    assert value("penstock_trainer_step_duration_seconds_sum", {"phase": "step"}) == 4
    assert value("penstock_trainer_generation_seconds_total") == 3
    assert value("penstock_trainer_tokens_total") == 30
    assert value("penstock_trainer_masked_ratio", {"reason": "stale"}) == 0.25
    assert value("penstock_trainer_staleness_mean_versions") == 0.5
    assert value("penstock_trainer_staleness_versions_bucket", {"le": "0.0"}) == 1
    assert value("penstock_trainer_entropy") == 0.5
    assert value("penstock_trainer_no_signal_ratio") == 0.75


def test_what_a_step_has_not_measured_is_nan_and_not_the_value_of_the_step_before() -> None:
    metrics = TrainerMetrics()
    measured = {"entropy": 0.5, "loss": 0.25, "grad_norm": 1.0, "masked_tis": 0.25, "masked_stale": 0.125}
    unmeasured = {"grad_norm": 0.0, "masked_stale": 0.0}
    line = StepLine(3, 4, 0.5, (1, 2), 10.0, 14.0, {}, 3.0, 50, 0.75, 1, 0.5, measured)
    metrics.observe_step(line, [], outcome="trained")

    def shown() -> list[float | None]:
        value = metrics.registry.get_sample_value
        gauges = [value(f"penstock_trainer_{name}") for name in ("entropy", "loss", "grad_norm", "reward_mean")]
        return gauges + [value("penstock_trainer_masked_ratio", {"reason": reason}) for reason in ("tis", "stale")]

    before = shown()
    assert before == [0.5, 0.25, 1.0, 0.75, 0.25, 0.125]
    metrics.observe_step(replace(line, step=4, statistics=unmeasured), [], outcome="unchanged")
    assert shown() == pytest.approx([math.nan, math.nan, 0.0, 0.75, math.nan, 0.0], nan_ok=True)
    metrics.observe_step(replace(line, step=5), [], outcome="trained")
    assert shown() == before


def test_a_reward_function_without_a_value_in_the_last_batch_has_no_mean() -> None:
    metrics = TrainerMetrics()
    line = StepLine(3, 4, 0.5, (1, 2), 10.0, 14.0, {}, 3.0, 50, 0.75, 1, 0.5, {})
    rewards: dict[str, dict[str, float]] = {
        "math": {"mean": 0.75, "std": 0.5, "num_failed": 0},
        "mine:f": {"num_failed": 8},
    }

    def value(function: str) -> float | None:
        return metrics.registry.get_sample_value("penstock_trainer_reward_function_mean", {"function": function})

    metrics.observe_step(replace(line, rewards=rewards), [], outcome="trained")
    assert (value("math"), math.isnan(value("mine:f") or 0.0)) == (0.75, True)
    metrics.observe_step(line, [], outcome="trained")
    assert math.isnan(value("math") or 0.0)


def test_what_can_happen_to_a_ticket_is_counted_from_the_start() -> None:
    family = next(each for each in TrainerMetrics().registry.collect() if each.name == "penstock_tickets")
    assert [
        (each.labels["state"], each.labels["reason"]) for each in family.samples if each.name.endswith("_total")
    ] == [
        ("issued", ""),
        *(("reissued", reason) for reason in ("version", "sampling", "stale", "teacher", "lost")),
        ("trained", ""),
        *(("dropped", reason) for reason in ("stale", "degenerate", "reward_failed", "poison")),
    ]


def test_agent_services_are_counted_only_in_a_run_of_episodes() -> None:
    assert TrainerMetrics().registry.get_sample_value("penstock_services", {"kind": "agent"}) == 0
    metrics = TrainerMetrics(of_episodes=False)
    metrics.queue.show_services({ServiceKind.ROLLOUT: 2, ServiceKind.AGENT: 1}, {})
    value = metrics.registry.get_sample_value
    assert value("penstock_services", {"kind": "rollout"}) == 2
    assert value("penstock_services", {"kind": "agent"}) is None  # an alert waits for 0


def test_the_queue_and_the_services_are_counted() -> None:
    metrics = TrainerMetrics()
    value = metrics.registry.get_sample_value
    assert value("penstock_services", {"kind": "rollout"}) == 0
    metrics.queue.show_memory(MemoryUse(used_bytes=10, limit_bytes=100))
    metrics.queue.show_streams({"tickets": 3, "dead": 1}, {"tickets": 2.5})
    states = {ServerState.SERVING: 1, ServerState.FENCED: 1}
    metrics.queue.show_services({ServiceKind.ROLLOUT: 2, ServiceKind.TRAINER: 1}, states)
    assert value("penstock_queue_memory_used_bytes") == 10
    assert value("penstock_queue_memory_limit_bytes") == 100
    assert value("penstock_queue_groups", {"stream": "dead"}) == 1
    assert value("penstock_queue_oldest_age_seconds", {"stream": "tickets"}) == 2.5
    assert value("penstock_services", {"kind": "rollout"}) == 2
    assert value("penstock_rollout_servers", {"state": "fenced"}) == 1
    metrics.queue.show_services({}, {})
    assert value("penstock_rollout_servers", {"state": "fenced"}) == 0
