"""The state of a rollout server's weights: one value, with the fields of its situation only.

Owns the situations and the steps between them, so that illegal combinations cannot be expressed: at rest, only weights
that were loaded while generation was held are unproved, and only a failed update has a reason. Pure.

Unproved: loaded, and not yet verified by the canary.

    Waiting, Serving or Fenced
        |   update              pause, load                canary
        '------------> Preparing ----------> Replacing ------------> Serving
                           |                     |
              wrong bytes  |                     |  it fails, or is too late: the engine is restarted
                           v                     v
              Fenced, with the old weights   Fenced, with none

    Held, by a pause of any of them
        |   update                 load                                 resume             canary
        '------------> Preparing ----------> Replacing --> Held, unproved -----> Proving ----------> Serving
                           |                     |                                  |
                           v                     v                                  v
                       the same failures, under the hold: a resume goes back to Fenced

    A resume of Held with nothing unproved returns to the state that was held. A cancelled change returns to the state
    before it, without weights if the engine had to be given up. If the engine is started anew, every situation loses
    its weights, and none ends.
"""

from dataclasses import dataclass, replace

from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement


@dataclass(frozen=True)
class Waiting:
    """No weights are loaded, and no update has failed."""


@dataclass(frozen=True)
class Serving:
    """Requests are answered by exactly these weights."""

    identity: PolicyIdentity


@dataclass(frozen=True)
class Fenced:
    """The last update failed. `identity`: of the weights that are still there; None if the engine was given up."""

    why: str
    identity: PolicyIdentity | None
    needs_whole: bool
    """Deltas did not lead to the wanted version."""


Going = Waiting | Serving | Fenced


@dataclass(frozen=True)
class Held:
    """Generation is paused on request. `then`: the state after the resume.

    `unproved`: the version loaded during the pause; its canary is checked at the end, since a paused engine cannot.
    """

    then: Going
    unproved: Announcement | None = None


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
class Proving:
    """Generation resumes after a hold, and the canary checks the weights that were loaded in it."""

    loaded: Announcement
    before: Held


Change = Preparing | Replacing | Proving
State = Rest | Change


def name(state: State) -> ServerState:
    """As others see it, while the engine is up."""
    match state:
        case Waiting():
            return ServerState.WAITING
        case Serving():
            return ServerState.SERVING
        case Fenced():
            return ServerState.FENCED
        case Held():
            return ServerState.PAUSED
        case Preparing() | Replacing() | Proving():
            return ServerState.UPDATING


def identity(state: State) -> PolicyIdentity | None:
    """Of the weights that are served; None while it is not certain which they are."""
    match state:
        case Waiting() | Replacing():
            return None
        case Serving(served) | Fenced(identity=served):
            return served
        case Held(then):
            return identity(then)
        case Preparing() | Proving():
            return identity(state.before)


def is_loaded(state: State) -> bool:
    """Whether there are weights to serve; stays true while an update replaces them."""
    return identity(state.before if isinstance(state, Change) else state) is not None


def is_held(state: State) -> bool:
    """Whether generation is paused on request, or was when the change began."""
    return isinstance(state.before if isinstance(state, Change) else state, Held)


def unproved(state: State) -> Announcement | None:
    """The version that is loaded and not yet verified by the canary."""
    match state:
        case Waiting() | Serving() | Fenced():
            return None
        case Held():
            return state.unproved
        case Preparing():
            return unproved(state.before)
        case Replacing():
            return state.wanted
        case Proving():
            return state.loaded


def why_fenced(state: State) -> str:
    """Why the last update failed; empty if it did not."""
    failure = _failure(state)
    return "" if failure is None else failure.why


def needs_whole(state: State) -> bool:
    """Whether deltas did not lead to the version that was wanted last."""
    failure = _failure(state)
    return failure is not None and failure.needs_whole


def without_weights(state: State) -> State:
    """The engine was started anew, or is given up: it holds no known weights."""
    match state:
        case Preparing() | Replacing():
            return replace(state, before=_rest_without_weights(state.before))
        case Proving():
            return replace(state, before=_held_without_weights(state.before))
        case _:
            return _rest_without_weights(state)


def fenced(before: Rest, why: str, *, needs_whole: bool) -> Rest:
    """The update failed."""
    if isinstance(before, Held):
        return replace(before, then=Fenced(why, identity(before), needs_whole))
    return Fenced(why, identity(before), needs_whole)


def serving(before: Rest, wanted: Announcement) -> Rest:
    """The update succeeded; weights that were loaded while generation is held are still unproved."""
    now = Serving(wanted.identity)
    return Held(now, unproved=wanted) if isinstance(before, Held) else now


def kept(state: Rest, served: PolicyIdentity) -> Rest:
    """The wanted version is served already: no update is missing any more."""
    return replace(state, then=Serving(served)) if isinstance(state, Held) else Serving(served)


def held(state: Rest) -> Held:
    """Generation is stopped on request."""
    return state if isinstance(state, Held) else Held(state)


def resumed(state: State) -> State:
    """Generation resumes; unproved weights keep it held, since they are verified first."""
    match state:
        case Held(then, unproved=None):
            return then
        case Preparing(_, Held(then, unproved=None)) | Replacing(_, Held(then, unproved=None)):
            return replace(state, before=then)
        case _:
            return state


def _going_without_weights(state: Going) -> Going:
    return replace(state, identity=None) if isinstance(state, Fenced) else Waiting()


def _held_without_weights(state: Held) -> Held:
    return Held(_going_without_weights(state.then))


def _rest_without_weights(state: Rest) -> Rest:
    return _held_without_weights(state) if isinstance(state, Held) else _going_without_weights(state)


def _failure(state: State) -> Fenced | None:
    """Of the last update."""
    match state:
        case Waiting() | Serving():
            return None
        case Fenced():
            return state
        case Held(then):
            return _failure(then)
        case Preparing() | Replacing() | Proving():
            return _failure(state.before)
