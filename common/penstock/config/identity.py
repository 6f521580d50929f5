"""The keys that decide what a run computes. Its launcher and its trainers have the same values of all of them.

Owns the list of the other keys, which may differ between processes and hosts, and which keys decide what a rollout or
reward service does: it has the same values of these. Invariant: a key is identifying unless it is listed here, so that
a new key cannot let a stranger in.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import xxhash

from penstock.config.keys import flat
from penstock.config.tree import Config
from penstock.contracts import ServiceKind

SHOWN_CHARACTERS = 60
ABSENT = "not set"

NOT_IDENTIFYING = (
    # Whole sections: addresses and secrets, places of processes, and what only the trainer does beside training.
    *("redis", "token", "checkpoint", "tracking", "log", "slurm", "ray"),
    *("trainer.host", "trainer.advertise_host", "trainer.port", "trainer.standby", "trainer.num_ranks"),
    *("trainer.device", "trainer.gpus"),
    *("run.root", "run.existing", "run.stall_seconds", "agent.max_failure_share"),
    *("actor.max_tokens_per_micro_batch", "actor.gradient_checkpointing", "actor.num_threads"),
    *("staleness.straggler_seconds", "staleness.claim_idle_seconds", "staleness.heartbeat_seconds"),
    *("rollout.host", "rollout.advertise_host", "rollout.port", "rollout.num_servers"),
    *("rollout.gpus", "rollout.engine.tensor_parallel_size", "rollout.engine.gpus_per_server"),
    *("rollout.engine.python", "rollout.engine.url", "rollout.engine.port", "rollout.engine.device"),
    *("rollout.engine.max_running_requests", "rollout.engine.max_total_tokens", "rollout.engine.memory_fraction"),
    *("rollout.engine.num_threads",),
    *("rollout.engine.start_timeout_seconds", "rollout.engine.start_attempts"),
    *("rollout.engine.request_timeout_seconds", "rollout.engine.extra_args"),
    *("agent.host", "agent.advertise_host", "agent.port", "agent.num_services", "agent.sessions", "agent.modules_path"),
    *("reward.host", "reward.advertise_host", "reward.port", "reward.num_services", "reward.num_workers"),
    *("loss.modules_path", "reward.modules_path", "reward.retry_seconds", "reward.retry_cap_seconds"),
    *("reward.breaker_failures", "reward.breaker_seconds"),
    *("teacher.max_running_requests", "teacher.timeout_seconds"),
    *("weights.folder", "weights.local_folder", "weights.bucket_bytes", "weights.rendezvous_port"),
    *("weights.drain_seconds", "weights.checksums", "weights.push_timeout_seconds"),
)

READ_BY = {
    ServiceKind.ROLLOUT: (
        *("actor.path", "actor.router_replay", "rollout", "weights", "staleness.max_deliveries", "trainer.take_turns"),
        *("agent.environment", "agent.command"),
    ),
    ServiceKind.AGENT: ("actor.path", "agent", "staleness.max_deliveries"),
    ServiceKind.REWARD: ("reward", "eval.sets", "teacher", "staleness.max_deliveries"),
}
"""Keys and sections that decide what these services do; the trainer, and the launcher of all, read all."""

OF_THE_TRAINER = ("reward.scale", "reward.clip", "teacher.path", "teacher.kl_ctl", "teacher.reward_weight")
"""Keys in these sections that only the trainer reads."""


def identifying_keys(config: Config) -> dict[str, Any]:
    """Dotted key -> value, as JSON has it. No secret is among them."""
    return {key: value for key, value in flat(config.model_dump(mode="json")) if not _is_in(key, NOT_IDENTIFYING)}


def keys_of(kind: ServiceKind, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the identifying keys that decide what a service of a kind does."""
    read = READ_BY.get(kind)
    if read is None:
        return dict(keys)
    return {key: value for key, value in keys.items() if _is_in(key, read) and not _is_in(key, OF_THE_TRAINER)}


def digest_of(keys: Mapping[str, Any]) -> str:
    """xxh3 (16 hex digits) of the keys and their values."""
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(keys, order="deterministic"))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each key that differs, with both values: `run.seed is 1 there and 2 here`."""
    return [
        f"{key} is {_shown(there, key)} there and {_shown(here, key)} here"
        for key in sorted({*there, *here})
        if key not in there or key not in here or there[key] != here[key]
    ]


def _is_in(key: str, names: Iterable[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in names)


def _shown(keys: Mapping[str, Any], key: str) -> str:
    if key not in keys:
        return ABSENT
    text = repr(keys[key])
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
