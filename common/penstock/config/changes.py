"""What a change of each key between two starts of a run does, and the values with which steps were trained.

Owns the class of every key, and the flat form of a configuration (`settings`) that is stored with the steps. Invariant:
every key has exactly one class, or its section has.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel, ValidationError

from penstock.config.keys import flat, known_keys, section_type
from penstock.config.shown import masked
from penstock.config.tree import Config
from penstock.errors import DataError

Settings = dict[str, Any]
"""Key -> value as in JSON, for each key that matters to training."""


class Change(Enum):
    """What happens if a key has another value when a run is started again."""

    FIXED = "It cannot change within a run, but for a path to the same content: the start is refused, with exit code 2."
    NEXT_STEP = "Recorded steps are trained again with their own value; the new one holds from the next step on."
    FREE = "The new value holds at once; recorded steps do not depend on it."
    IRRELEVANT = "It does not matter to training."


_FIXED, _NEXT, _FREE, _NONE = Change.FIXED, Change.NEXT_STEP, Change.FREE, Change.IRRELEVANT
_SERVICE = "host advertise_host port"
_COLUMNS = "prompt answer reward metadata"

# Section -> class -> its keys; a class alone is that of all keys of a section and of the sections in it.
CLASSES: dict[str, Change | dict[Change, str]] = {
    "": {_NEXT: "kl_ctl total_train_epochs", _NONE: "token"},
    "run": {_FIXED: "seed", _NEXT: "max_steps", _NONE: "name root stall_seconds existing"},
    "actor": {
        _FIXED: "path group_size",
        _NEXT: "dtype max_tokens_per_micro_batch gradient_checkpointing num_threads router_replay",
    },
    "actor.lora": {_FIXED: "rank alpha target_modules"},
    "ref": {_NEXT: "path sync_steps mixup_alpha"},
    "teacher": {_NEXT: "path urls kl_ctl reward_weight", _NONE: "max_running_requests timeout_seconds"},
    "optimizer": {
        _NEXT: "lr beta1 beta2 eps weight_decay warmup_steps schedule decay_steps min_lr_ratio ess_base max_grad_norm "
        "max_non_finite_steps",
    },
    "loss": {
        _NEXT: "surrogate eps_clip eps_clip_higher c_clip sapo_tau_positive sapo_tau_negative dppo_low dppo_high "
        "dppo_kl vespo_positive vespo_negative proximal sampler_kl aggregation norm_length entropy_bonus truncated "
        "truncated_penalty dynamic_sampling num_minibatches modules_path",
    },
    "loss.advantage": {_NEXT: "baseline scale eps function by_function tolerance whitening"},
    "loss.correction": {
        _NEXT: "weight low high normalized gates geometric_low geometric_high k3_high veto_low veto_high m2po_tau "
        "opsm_delta",
    },
    "loss.selection": {_NEXT: "entropy_share covariance covariance_share covariance_low covariance_high covariance_kl"},
    "loss.kl": {_NEXT: "estimator place importance_weighted"},
    "loss.overlong": {_NEXT: "buffer_tokens penalty"},
    "sampling": {_NEXT: "temperature max_new_tokens stop ignore_eos"},
    "data": {_FIXED: "train_sets shuffle too_long batch_size system_prompt prompt_template template_options"},
    "data.curriculum": {_FIXED: "priority uniform_share decay success delay_steps"},
    "data.train": {_FIXED: "kind path split size seed options"},
    "data.train.columns": {_FIXED: _COLUMNS},
    "data.eval": {_FREE: "kind path split size seed options"},
    "data.eval.columns": {_FREE: _COLUMNS},
    "eval": {
        _FREE: "every_steps temperature samples_per_prompt max_new_tokens stop top_p top_k min_p repetition_penalty "
        "success sets best_metric best_set patience min_delta",
        _NONE: "max_share num_shown",
    },
    "staleness": {
        _FREE: "max_staleness order on_stale max_deliveries",
        _NONE: "straggler_seconds claim_idle_seconds heartbeat_seconds",
    },
    "rollout": {_FREE: "num_servers", _NONE: f"{_SERVICE} gpus"},
    "rollout.engine": {
        _FREE: "python device dtype max_running_requests max_total_tokens context_length request_timeout_seconds "
        "skip_special_tokens tensor_parallel_size extra_args",
        _NONE: "url port start_timeout_seconds start_attempts gpus_per_server memory_fraction num_threads",
    },
    "agent": {
        _FREE: "environment command modules_path max_turns max_tokens timeout_seconds call_timeout_seconds on_timeout "
        "cut_score max_attempts template tool_format history train_auxiliary",
        _NONE: f"{_SERVICE} num_services sessions max_failure_share",
    },
    "reward": {
        _NEXT: "scale clip",
        _FREE: "functions gates max_magnitude modules_path timeout_seconds max_attempts",
        _NONE: f"{_SERVICE} num_services num_workers retry_seconds retry_cap_seconds breaker_failures breaker_seconds",
    },
    "trainer": {_FREE: "num_ranks device", _NONE: f"{_SERVICE} standby gpus take_turns"},
    "weights": {
        _FREE: "rounding pause_mode",
        _NONE: "transport bucket_bytes rendezvous_port folder full_every relay_fan_out local_folder drain_seconds "
        "canary_tokens canary_tolerance checksums push_timeout_seconds",
    },
    "checkpoint": {_NONE: "every_steps keep keep_best keep_step_bytes"},
    "redis": _NONE,
    "log": _NONE,
    "tracking": _NONE,
    "slurm": _NONE,
    "ray": _NONE,
}


def change_of(key: str) -> Change:
    """The class of a key, for keys of an entry that of their mapping; KeyError if it has none."""
    section, _, name = key.rpartition(".")
    found = CLASSES.get(section)
    if isinstance(found, dict):
        return {each: change for change, names in found.items() for each in names.split()}[name]
    whole = found or CLASSES[section.partition(".")[0]]
    if isinstance(whole, dict):  # a key of an entry has the class of its mapping
        return change_of(section)
    if not isinstance(whole, Change):
        return change_of(section)
    return whole


def keys_of(*changes: Change) -> list[str]:
    """The keys of some classes, in the order of the tree."""
    sections = {key.rpartition(".")[0] for key in known_keys()}
    return [key for key in known_keys() if key not in sections and change_of(key) in changes]


def settings_of(config: Config) -> Settings:
    """The values of all keys that matter to training, secrets masked."""
    values = dict(flat(masked(config)))
    return {key: values[key] for key in keys_of(Change.FIXED, Change.NEXT_STEP, Change.FREE) if key in values}


def step_settings(config: Config) -> Settings:
    """The values of the keys that decide how a step of given groups changes given weights."""
    settings = settings_of(config)
    return {key: settings[key] for key in keys_of(Change.NEXT_STEP)}


def differences(before: Settings, now: Settings) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of each key that has changed; a key that one side lacks counts as unchanged."""
    for key, value in now.items():
        if before.get(key, value) != value:
            yield key, before[key], value


def with_step_settings(config: Config, recorded: Settings) -> Config:
    """`config` with the recorded values of the keys that decide a step; a key that was not recorded has its default.

    Rules between sections are not checked: they are about groups that are still to be generated. DataError if a value
    is none of this release.
    """
    tree = config.model_dump(mode="json")
    for key in keys_of(Change.NEXT_STEP):
        _set(tree, key, recorded[key] if key in recorded else _default(key))
    changed = {key.partition(".")[0] for key in keys_of(Change.NEXT_STEP)}
    values: dict[str, Any] = {}
    for name in sorted(changed):
        section = section_type(Config.model_fields[name].annotation)
        try:
            values[name] = tree[name] if section is None else section.model_validate(tree[name])
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join((name, *map(str, problem["loc"])))
            raise DataError(
                f"a step was trained with {key} {problem['input']!r} ({problem['msg']}): expected a value of this "
                "release; resume the run with the release that began it"
            ) from error
    return config.model_copy(update=values)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


def _default(key: str) -> Any:
    *sections, name = key.split(".")
    model: type[BaseModel] = Config
    for section in sections:
        inner = section_type(model.model_fields[section].annotation)
        assert inner is not None, f"{key}: {section} is a section"
        model = inner
    return model.model_fields[name].get_default(call_default_factory=True)
