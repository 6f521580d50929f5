"""Every exception that Penstock raises on purpose.

    PenstockError
    |- ConfigError        a key, a file or a combination that the user must change     exit 2
    |  '- StrangerError   the run of this name lives, with another configuration      exit 2
    |- DataError          a dataset row or prompt that cannot be used                  exit 2
    |- QueueError         Redis cannot be reached, or gave an invalid answer           exit 4
    |  |- LeaseLostError  another trainer holds the lease                              exit 5
    |  '- LostWritesError the queue or the lease went back in time: start again        exit 4
    |- EngineError        the inference engine failed
    |  |- EngineStartError   it did not start                                          exit 6
    |  |  '- TransientStartError  it did not start, and its next start may succeed
    |  |- EngineDiedError    it ended, or its connection broke, during a request
    |  |- EngineRejectedError  it refused the request (a fault of the request)
    |  |- EngineAbortedError   it ended the request before its end
    |  '- EngineBusyError      it takes no call now: other weights are needed, or too many calls wait
    |- WeightsError       weights that are missing, corrupt or not those requested
    |  |- WeightsConflictError   an older version or a lower lease
    |  |- WeightsMismatchError   an engine that serves other weights than it was given
    |  '- WeightsBusyError       another update runs
    |- RanksError         ranks of the trainer cannot connect, or one has ended        exit 7
    |- NonFiniteError     training has diverged: weights or gradients are not finite   exit 8
    |- CallRefusedError   an agent's call of the model that cannot be rendered
    |- RewardError        a reward function that cannot be loaded or used
    |  |- TransientRewardError     raised by a user's function: the call may succeed later
    |  '- RewardUnavailableError   its circuit breaker is open
    |- EpisodeFailedError raised by a user's environment: no fault of the model
    '- StallError         no progress, and none is possible                            exit 3

A message gives the value seen, the value expected and the key to change. A service's `__main__` ends with `exit_code`.
"""

from typing import ClassVar


class PenstockError(Exception):
    """Base of all errors raised on purpose; `kind` is the `error` of an HTTP answer."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1


class ConfigError(PenstockError):
    """A configuration that cannot be used."""

    kind = "config"
    exit_code = 2


class StrangerError(ConfigError):
    """The run lives, and is of another configuration or folder than this process's."""

    kind = "stranger"


class DataError(PenstockError):
    """A dataset, row or prompt that cannot be used."""

    kind = "data"
    exit_code = 2


class StallError(PenstockError):
    """No progress for too long; the message names the event that did not happen."""

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
    """The queue has lost writes that it had acknowledged, or the lease expired: start again from the ledger."""

    kind = "lost_writes"


class EngineError(PenstockError):
    """The inference engine failed."""

    kind = "engine"
    exit_code = 6


class EngineStartError(EngineError):
    """The engine did not become ready; the message carries the end of its log."""

    kind = "engine_start"


class TransientStartError(EngineStartError):
    """The engine did not become ready, for a reason that may pass: its process ended, or its port was taken."""


class EngineDiedError(EngineError):
    """The engine ended, or its connection broke, while a request was running."""

    kind = "engine_died"


class EngineRejectedError(EngineError):
    """The engine refused a request: repeating it cannot help."""

    kind = "engine_rejected"


class EngineAbortedError(EngineError):
    """The engine ended a request, and no update had told it to."""

    kind = "engine_aborted"


class EngineBusyError(EngineError):
    """This service can answer no such call now: retry later, or elsewhere."""

    kind = "engine_busy"


class WeightsError(PenstockError):
    """Weights that are missing, corrupt, or not the ones that were requested."""

    kind = "weights"


class WeightsConflictError(WeightsError):
    """A push with a lower lease or an older version than the served one: do not retry."""

    kind = "weights_conflict"


class WeightsMismatchError(WeightsError):
    """An engine whose answers do not match the weights that it reports as loaded."""

    kind = "weights_mismatch"


class WeightsBusyError(WeightsError):
    """Another push is running on this server: retry later."""

    kind = "weights_busy"


class RanksError(PenstockError):
    """The ranks of one trainer cannot work together: one never connected, or has ended."""

    kind = "ranks"
    exit_code = 7


class NonFiniteError(PenstockError):
    """Training has diverged: weights, their answers, or the gradients of several steps in a row are not finite."""

    kind = "non_finite"
    exit_code = 8


class CallRefusedError(PenstockError):
    """A call of an agent whose messages or tools the model's template cannot take: a fault of the call."""

    kind = "call_refused"


class RewardError(PenstockError):
    """A reward function that cannot be found, loaded or called."""

    kind = "reward"
    exit_code = 2


class TransientRewardError(RewardError):
    """For reward functions to raise: a service that they need has failed, and the same call may succeed later."""

    kind = "reward_transient"


class EpisodeFailedError(PenstockError):
    """For environments and their tools to raise: something that they need has failed, which is no fault of the model.

    The episode has no score, and is tried again.
    """

    kind = "episode"


class RewardUnavailableError(RewardError):
    """The circuit breaker of a reward function is open: retry later."""

    kind = "reward_unavailable"
