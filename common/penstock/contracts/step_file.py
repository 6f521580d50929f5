"""The content of a step file: the groups of one closed batch.

Owns its form, for the trainer that writes and trains it, and for whoever looks at what a step was trained on.
"""

from penstock.contracts.groups import ScoredGroup
from penstock.contracts.wire import Contract


class StepFile(Contract, frozen=True, tag_field="schema", tag="step-file/2"):
    """The inputs of one step, in the order in which they are trained."""

    step: int
    lease: int
    groups: tuple[ScoredGroup, ...]
