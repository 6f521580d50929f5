"""The objectives that are compared, as keys of the section `loss`.

Owns their names. All have the group's mean as baseline and no division by its deviation, which would give the rare
right answer of a nearly hopeless prompt a weight that has nothing to do with staleness; and four mini-batches, without
which a decoupled objective has nothing to decouple.
"""

from collections.abc import Mapping
from typing import Any

COMMON: Mapping[str, Any] = {"advantage": {"baseline": "group", "scale": "none"}, "num_minibatches": 4}
TRUNCATED = {"weight": "tis", "high": 5.0}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "uncorrected": {"surrogate": "reinforce"},
    "ppo": {"surrogate": "ppo"},
    "decoupled, recomputed": {"surrogate": "ppo", "proximal": "recomputed", "correction": TRUNCATED},
    "decoupled, approximated": {"surrogate": "ppo", "proximal": "approximated", "correction": TRUNCATED},
    "tis": {"surrogate": "reinforce", "correction": {"weight": "tis", "high": 2.0}},
    "cispo": {"surrogate": "cispo", "eps_clip": 1.0, "eps_clip_higher": 4.0},
    "gspo": {"surrogate": "gspo", "eps_clip": 3.0e-4, "eps_clip_higher": 4.0e-4},
    "m2po": {"surrogate": "cispo", "eps_clip": 1.0, "eps_clip_higher": 1.0e6, "correction": {"gates": ["m2po"]}},
}
"""m2po: the weight of each token is its ratio, which nothing clips: the gate alone bounds it, as in the paper."""


def loss_keys(objective: str) -> dict[str, Any]:
    """The section `loss` of an objective."""
    return {**COMMON, **OBJECTIVES[objective]}
