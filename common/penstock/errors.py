"""Every exception that Penstock raises on purpose.

    PenstockError
    |- ConfigError        a key, a file or a combination that the user must change     exit 2
    |- DataError          a dataset row or prompt that cannot be used                  exit 2
    |- QueueError         Redis cannot be reached, or answered what it must not        exit 4
    |  |- LeaseLostError  another trainer holds the lease                              exit 5
    |  '- LostWritesError the queue or the lease went back in time: start again        exit 4
    |- EngineError        the inference engine failed
    |  |- EngineStartError   it did not start                                          exit 6
    |  |- EngineDiedError    it ended, or its connection broke, during a request
    |  '- EngineRejectedError  it refused the request (a fault of the request)
    |- WeightsError       weights that are missing, corrupt or not those asked for
    |  |- WeightsConflictError   an older version or a lower lease
    |  |- WeightsMismatchError   an engine that serves other weights than it was given
    |  '- WeightsBusyError       another update runs
    |- RanksError         ranks of the trainer that cannot meet, or one that has ended   exit 7
    |- RewardError        a reward function that cannot be loaded or used
    |  |- TransientRewardError     raised by a user's function: the call may succeed later
    |  '- RewardUnavailableError   its circuit breaker is open
    '- StallError         no progress, and none can come                               exit 3

A message says what was seen, what was expected and which key to change. `exit_code` is what a
service's `__main__` ends with.
"""

from typing import ClassVar


class PenstockError(Exception):
    """Base of all errors raised on purpose; `kind` goes into the HTTP answer."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class ConfigError(PenstockError):
    """A configuration that cannot be used."""

    kind = "config"
    exit_code = 2


class DataError(PenstockError):
    """A dataset, row or prompt that cannot be used."""

    kind = "data"
    exit_code = 2


class StallError(PenstockError):
    """No progress for too long; the message names what is waited for."""

    kind = "stall"
    exit_code = 3


class QueueError(PenstockError):
    """Redis cannot be reached or does not behave as a queue must."""

    kind = "queue"
    exit_code = 4


class LeaseLostError(QueueError):
    """The caller's lease is not the current one: another trainer has taken over."""

    kind = "fenced"
    exit_code = 5


class LostWritesError(QueueError):
    """The queue no longer has what it had acknowledged, or the lease expired: start again from the ledger."""

    kind = "lost_writes"


class EngineError(PenstockError):
    """The inference engine failed."""

    kind = "engine"
    exit_code = 6


class EngineStartError(EngineError):
    """The engine did not become ready; the message carries the end of its log."""

    kind = "engine_start"


class EngineDiedError(EngineError):
    """The engine ended, or its connection broke, while a request was running."""

    kind = "engine_died"


class EngineRejectedError(EngineError):
    """The engine refused a request: repeating it cannot help."""

    kind = "engine_rejected"


class WeightsError(PenstockError):
    """Weights that are missing, corrupt, or not the ones that were asked for."""

    kind = "weights"


class WeightsConflictError(WeightsError):
    """A push with a lower lease or an older version than the one that is served: do not retry."""

    kind = "weights_conflict"


class WeightsMismatchError(WeightsError):
    """An engine whose answers are not those of the weights that it says it has loaded."""

    kind = "weights_mismatch"


class WeightsBusyError(WeightsError):
    """Another push is running on this server: retry later."""

    kind = "weights_busy"


class RanksError(PenstockError):
    """The ranks of one trainer cannot work together: one never came, or has ended."""

    kind = "ranks"
    exit_code = 7


class RewardError(PenstockError):
    """A reward function that cannot be found, loaded or called."""

    kind = "reward"
    exit_code = 2


class TransientRewardError(RewardError):
    """For reward functions to raise: what they need is out of order, and the same call may succeed later."""

    kind = "reward_transient"


class RewardUnavailableError(RewardError):
    """The circuit breaker of a reward function is open: ask again later."""

    kind = "reward_unavailable"
