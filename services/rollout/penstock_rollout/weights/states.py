"""The state of a rollout server's weights: one value, which has only the fields that its state needs.

Owns the states and the transitions between them, so illegal combinations cannot be expressed. At rest, only weights
that were loaded while generation was held can be unverified (loaded, but not yet checked by the canary), and only a
failed update has a reason. Pure.

    Waiting, Serving or Fenced
        |   update              pause, load                canary
        '------------> Preparing ----------> Replacing ------------> Serving
                           |                     |
              wrong bytes  |                     |  it fails, or is too late: the engine is restarted
                           v                     v
              Fenced, with the old weights   Fenced, with none

    Held, by a pause of any of them
        |   update                 load                                   resume               canary
        '------------> Preparing ----------> Replacing --> Held, unverified -----> Verifying ----------> Serving
                           |                     |                                     |
                           v                     v                                     v
                       the same failures, but generation stays held: a resume goes back to Fenced

    Any of them, at the trainer's turn on the GPU -> FallingAsleep -> the same, without weights

    If nothing is unverified, a resume of Held returns to the state that was held. A cancelled change returns to the
    state before it, without weights if the engine had to be given up. If the engine is started anew, every state loses
    its weights; a hold or a running change goes on.
"""

from dataclasses import dataclass, replace

from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement


@dataclass(frozen=True)
class Waiting:
    """No weights are loaded, and no update has failed."""


@dataclass(frozen=True)
class Serving:
    """The engine answers requests with exactly these weights."""

    identity: PolicyIdentity


@dataclass(frozen=True)
class Fenced:
    """The last update failed. `identity`: of the weights still served; None if the engine was given up."""

    why: str
    identity: PolicyIdentity | None
    needs_full: bool
    """Whether the next update needs full files: the deltas did not lead to the wanted version."""


Going = Waiting | Serving | Fenced


@dataclass(frozen=True)
class Held:
    """Generation is paused on request. `then`: the state after the resume.

    `unverified`: the version loaded during the pause; a paused engine cannot answer, so the resume checks its canary.
    """

    then: Going
    unverified: Announcement | None = None


Rest = Going | Held


@dataclass(frozen=True)
class Preparing:
    """An update has begun; the earlier weights are still served."""

    wanted: Announcement
    before: Rest


@dataclass(frozen=True)
class Replacing:
    """The engine holds neither all of the old weights nor, for certain, all of the wanted ones."""

    wanted: Announcement
    before: Rest


@dataclass(frozen=True)
class Verifying:
    """Generation resumes after a hold, and the canary checks the weights that were loaded meanwhile."""

    loaded: Announcement
    before: Held


@dataclass(frozen=True)
class FallingAsleep:
    """Running requests end, and the engine gives up its memory, with the weights in it."""

    before: Rest


Change = Preparing | Replacing | Verifying | FallingAsleep
State = Rest | Change


def name(state: State) -> ServerState:
    """The state's name for other services, while the engine is up."""
    match state:
        case Waiting():
            return ServerState.WAITING
        case Serving():
            return ServerState.SERVING
        case Fenced():
            return ServerState.FENCED
        case Held():
            return ServerState.PAUSED
        case Preparing() | Replacing() | Verifying() | FallingAsleep():
            return ServerState.UPDATING


def identity(state: State) -> PolicyIdentity | None:
    """The identity of the served weights; None while it is not certain which they are."""
    match state:
        case Waiting() | Replacing() | FallingAsleep():
            return None
        case Serving(served) | Fenced(identity=served):
            return served
        case Held(then):
            return identity(then)
        case Preparing() | Verifying():
            return identity(state.before)


def is_loaded(state: State) -> bool:
    """Whether there are weights to serve; stays true while an update replaces them."""
    return identity(state.before if isinstance(state, Change) else state) is not None


def is_held(state: State) -> bool:
    """Whether generation is paused on request, or was when the change began."""
    return isinstance(state.before if isinstance(state, Change) else state, Held)


def unverified(state: State) -> Announcement | None:
    """The version that is loaded and not yet verified by the canary."""
    match state:
        case Waiting() | Serving() | Fenced():
            return None
        case Held():
            return state.unverified
        case Preparing() | FallingAsleep():
            return unverified(state.before)
        case Replacing():
            return state.wanted
        case Verifying():
            return state.loaded


def why_fenced(state: State) -> str:
    """Why the last update failed; empty if it did not."""
    failure = _failure(state)
    return "" if failure is None else failure.why


def needs_full(state: State) -> bool:
    """Whether the next update needs full files, since deltas did not lead to the version that was wanted last."""
    failure = _failure(state)
    return failure is not None and failure.needs_full


def without_weights(state: State) -> State:
    """The engine was started anew, or is given up: it holds no known weights."""
    match state:
        case Preparing() | Replacing() | FallingAsleep():
            return replace(state, before=rest_without_weights(state.before))
        case Verifying():
            return replace(state, before=_held_without_weights(state.before))
        case _:
            return rest_without_weights(state)


def fenced(before: Rest, why: str, *, needs_full: bool) -> Rest:
    """The update failed."""
    if isinstance(before, Held):
        return replace(before, then=Fenced(why, identity(before), needs_full))
    return Fenced(why, identity(before), needs_full)


def serving(before: Rest, wanted: Announcement) -> Rest:
    """The update succeeded; weights that were loaded while generation is held are still unverified."""
    now = Serving(wanted.identity)
    return Held(now, unverified=wanted) if isinstance(before, Held) else now


def kept(state: Rest, served: PolicyIdentity) -> Rest:
    """The wanted version is served already: no update is missing any more."""
    return replace(state, then=Serving(served)) if isinstance(state, Held) else Serving(served)


def held(state: Rest) -> Held:
    """Generation is stopped on request."""
    return state if isinstance(state, Held) else Held(state)


def resumed(state: State) -> State:
    """Generation resumes; unverified weights keep it held, since they are verified first."""
    match state:
        case Held(then, unverified=None):
            return then
        case Preparing(_, Held(then, unverified=None)) | Replacing(_, Held(then, unverified=None)):
            return replace(state, before=then)
        case _:
            return state


def _going_without_weights(state: Going) -> Going:
    return replace(state, identity=None) if isinstance(state, Fenced) else Waiting()


def _held_without_weights(state: Held) -> Held:
    return Held(_going_without_weights(state.then))


def rest_without_weights(state: Rest) -> Rest:
    return _held_without_weights(state) if isinstance(state, Held) else _going_without_weights(state)


def _failure(state: State) -> Fenced | None:
    """The failure of the last update; None if it did not fail."""
    match state:
        case Waiting() | Serving():
            return None
        case Fenced():
            return state
        case Held(then):
            return _failure(then)
        case Preparing() | Replacing() | Verifying() | FallingAsleep():
            return _failure(state.before)
