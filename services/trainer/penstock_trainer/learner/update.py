"""The arithmetic of one update in two halves, on one rank or many: a gradient, then the change.

Owns the order of the computation. Invariants: `begin` changes nothing but gradients; all ranks make the same batch,
and an optimizer step uses sums over all of them, added in the order of ranks; a step with a non-finite loss or gradient
changes nothing. Synchronous.

    begin    groups -> KL in rewards -> batch -> shares -> old log-probabilities -> first mini-batch: gradient
    finish   optimizer's step -> each further mini-batch: gradient, optimizer's step -> result

Shapes: N loss tokens of a pack, U distinct (parent row, token) pairs of it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import StepRecord
from penstock_trainer.batching.batch import Sample, make_batch, valid_samples
from penstock_trainer.batching.counts import BatchCounts, CompletionIndex
from penstock_trainer.batching.packing import Pack, draws
from penstock_trainer.batching.rank_shares import RankShare, share
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.grpo import (
    NO_COLUMNS,
    ExpertSums,
    Objective,
    Statistics,
    StepTokens,
    Sums,
    Tokens,
    log_ratio,
    micro_batch_loss,
)
from penstock_trainer.learner.log_ratios import NO_LOG_RATIOS, LogRatios, LogRatiosPart, RankLogRatios
from penstock_trainer.learner.moving_reference import MovingReference
from penstock_trainer.learner.optimizer import Optimizer, OptimizerStep
from penstock_trainer.learner.recipe import Recipe
from penstock_trainer.model.token_model import TokenModel


@dataclass(frozen=True)
class StepResult:
    """The result of one update.

    changed: False if loss or gradient was not finite in each mini-batch, or if no completion had a gradient.
    loss: mean over mini-batches; grad_norm: the largest, before clipping, nan if one was not finite; learning_rate: of
    the last.
    num_rows: rows of all packs, each one token computed. seconds: by phase: pack, forward_backward, optimizer.
    advantages: of the completions that have one. log_ratios: of the tokens that were computed, on rank 0.
    """

    changed: bool
    loss: float
    grad_norm: float
    learning_rate: float
    statistics: Statistics
    counts: BatchCounts
    num_packs: int
    num_rows: int
    seconds: dict[str, float]
    advantages: Mapping[CompletionIndex, float]
    log_ratios: LogRatios = NO_LOG_RATIOS

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.grad_norm, self.learning_rate)))


@dataclass(frozen=True)
class _Minibatch:
    """This rank's packs of a mini-batch, and for each the old and the teacher's log-probabilities that are needed.

    teacher_logprobs: by a teacher of the trainer's own; those of a server are in the packs.
    """

    work: RankShare
    old_logprobs: tuple[Tensor | None, ...]
    teacher_logprobs: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Gradient:
    """The gradient of an update's first mini-batch, and the inputs of the rest of the update.

    version: of the weights under training. first: its loss and sums; None if the batch has no mini-batch. log_ratios:
    of the mini-batches so far, on this rank.
    """

    version: int
    counts: BatchCounts
    advantages: Mapping[CompletionIndex, float]
    minibatches: Sequence[_Minibatch]
    first: tuple[float, Sums] | None
    seconds: dict[str, float]
    log_ratios: RankLogRatios


class PendingUpdate:
    """An update that has computed a gradient and changed nothing yet.

    If it is never finished, it leaves no trace: the next `Learner.begin` drops its gradients.
    """

    def __init__(self, finish: Callable[[], StepResult]) -> None:
        self._finish = finish

    def finish(self) -> StepResult:
        """Change the weights: the first optimizer step, then the further mini-batches. Once."""
        return self._finish()


@contextlib.contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Flush subnormal numbers to 0 in this thread: Adam's moments of rare tokens decay into them, and they are slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class Updater:
    """Updates one policy."""

    def __init__(
        self,
        policy: TokenModel,
        reference: TokenModel | None,
        optimizer: Optimizer,
        recipe: Recipe,
        *,
        max_tokens: int,
        device: torch.device,
        ranks: Ranks | None,
        moving: MovingReference | None = None,
        teacher: TokenModel | None = None,
    ) -> None:
        """`max_tokens`: rows of a pack. Packs are computed on `device`. `moving`: the reference, if it moves."""
        self._policy, self._reference = policy, reference
        self._optimizer = optimizer
        self._recipe = recipe
        self._max_tokens = max_tokens
        self._device = device
        self._ranks = ranks
        self._moving = moving
        self._teacher = teacher
        others = [model for model in (reference, teacher) if model is not None]
        self._shares_prefixes = all(model.shares_prefixes for model in (policy, *others))
        self._unfinished: Gradient | None = None

    def begin(self, groups: Sequence[ScoredGroup], version: int, max_lag: int | None = None) -> Gradient:
        """See `Learner.begin`."""
        self._optimizer.drop_gradients()  # of an update that never finished
        start = time.perf_counter()
        penalties = self._kl_penalties(groups, version)
        batch = make_batch(groups, self._recipe.rules, version=version, max_lag=max_lag, penalties=penalties)
        shares = [self._share(samples) for samples in batch.minibatches]
        packed = time.perf_counter()
        minibatches = [self._minibatch(work, is_first=number == 0) for number, work in enumerate(shares)]
        log_ratios = RankLogRatios()
        first = self._forward_backward(minibatches[0], log_ratios) if minibatches else None
        seconds = {"pack": packed - start, "forward_backward": time.perf_counter() - packed, "optimizer": 0.0}
        self._unfinished = Gradient(version, batch.counts, batch.advantages, minibatches, first, seconds, log_ratios)
        return self._unfinished

    def finish(self, gradient: Gradient) -> StepResult:
        """See `PendingUpdate.finish`."""
        if gradient is not self._unfinished:
            raise RuntimeError("an update is finished once, and before the next one begins")
        self._unfinished = None
        seconds = dict(gradient.seconds)
        total, losses = Sums(), []
        outcomes: list[OptimizerStep] = []
        first = gradient.first
        for minibatch in gradient.minibatches:
            start = time.perf_counter()
            loss, sums = first or self._forward_backward(minibatch, gradient.log_ratios)
            first = None
            computed = time.perf_counter()
            outcomes.append(self._optimizer_step(loss, sums, num_packs=minibatch.work.num_packs))
            if self._device.type == "cuda":  # its kernels still run: their time belongs to this phase
                torch.cuda.current_stream().synchronize()
            losses.append(loss)
            total += sums
            seconds["forward_backward"] += computed - start
            seconds["optimizer"] += time.perf_counter() - computed
        changed = any(outcome.changed for outcome in outcomes)
        if changed and self._moving is not None:
            self._moving.after_update(gradient.version + 1)
        return StepResult(
            changed=changed,
            loss=sum(losses) / max(1, len(losses)),
            grad_norm=_largest([outcome.grad_norm for outcome in outcomes]),
            learning_rate=outcomes[-1].learning_rate if outcomes else self._optimizer.learning_rate,
            statistics=Statistics.of(total, num_minibatches=max(1, len(losses))),
            counts=gradient.counts,
            num_packs=sum(each.work.num_packs for each in gradient.minibatches),
            num_rows=sum(each.work.num_rows for each in gradient.minibatches),
            seconds=seconds,
            advantages=gradient.advantages,
            log_ratios=self._collected(gradient.log_ratios),
        )

    def _collected(self, own: RankLogRatios) -> LogRatios:
        """Those of all ranks, on rank 0."""
        part = own.part()
        if self._ranks is None:
            return LogRatios((part,))
        gathered = self._ranks.collect(msgspec.msgpack.encode(part))
        return LogRatios(tuple(msgspec.msgpack.decode(data, type=LogRatiosPart) for data in gathered))

    def _share(self, samples: Sequence[Sample]) -> RankShare:
        info = self._ranks.info if self._ranks else None
        rank, num_ranks = (info.rank, info.num_ranks) if info else (0, 1)
        return share(samples, self._max_tokens, rank, num_ranks, shares_prefixes=self._shares_prefixes)

    def _packs(self, work: RankShare) -> Iterator[Pack]:
        """The packs of a share, on the device."""
        return (pack.to(self._device) for pack in work.packs.made_ahead())

    def _gather(self, message: object) -> list[bytes]:
        """The message of every rank, in the order of ranks."""
        data = msgspec.msgpack.encode(message)
        return self._ranks.gather(data) if self._ranks else [data]

    def _kl_penalties(self, groups: Sequence[ScoredGroup], version: int) -> dict[tuple[int, int], float]:
        """kl_ctl * sum_t (l_b - l_r) of each completion, if the KL term is part of the rewards: its k1 estimate.

        An episode's sum is over all its paths, each loss token once.
        """
        if not self._recipe.kl_in_reward:
            return {}
        own: list[tuple[int, int, float]] = []
        for pack in self._packs(self._share(valid_samples(groups, version=version))):
            behaviour_logprobs_N = pack.behaviour_logprobs_N
            is_usable_N = torch.isfinite(behaviour_logprobs_N)
            log_ratio_N = log_ratio(behaviour_logprobs_N, self._reference_logprobs(pack), is_usable_N)
            sum_S = torch.zeros(pack.num_sequences, dtype=torch.float64, device=log_ratio_N.device)
            sum_S = sum_S.index_add(0, pack.sequence_N, log_ratio_N.double())
            own += [(*index, kl) for index, kl in zip(pack.indices, sum_S.tolist(), strict=True)]
        gathered = [msgspec.msgpack.decode(data, type=list[tuple[int, int, float]]) for data in self._gather(own)]
        totals: dict[tuple[int, int], float] = {}
        for each in gathered:
            for b, g, kl in each:
                totals[b, g] = totals.get((b, g), 0.0) + kl
        return {index: self._recipe.kl_in_reward * kl for index, kl in totals.items()}

    def _reference_logprobs(self, pack: Pack) -> Tensor:
        assert self._reference is not None
        return _own_logprobs(self._reference, pack)

    def _minibatch(self, work: RankShare, *, is_first: bool) -> _Minibatch:
        """The share with its old log-probabilities, if it needs any: the first has them from its own pass.

        Those of the teacher are computed here once, though several passes may need them.
        """
        nothing = (None,) * len(work.packs)
        needs_old = self._recipe.objective.proximal == "recomputed" and not is_first
        old = tuple(_logprobs(self._policy, pack) for pack in self._packs(work)) if needs_old else nothing
        if self._teacher is None:
            return _Minibatch(work, old, nothing)
        return _Minibatch(work, old, tuple(_own_logprobs(self._teacher, pack) for pack in self._packs(work)))

    def _packs_with_logprobs(self, minibatch: _Minibatch) -> Iterator[tuple[Pack, Tensor | None, Tensor | None]]:
        """Each pack with the old and the teacher's log-probabilities of its loss tokens, if they are needed."""
        own = zip(self._packs(minibatch.work), minibatch.old_logprobs, minibatch.teacher_logprobs, strict=True)
        for pack, old, teacher in own:
            yield pack, old, pack.teacher_logprobs_N if teacher is None else teacher

    def _prepared(self, minibatch: _Minibatch) -> Objective:
        """The objective of one optimizer step: parts of it depend on all its tokens, by the weights as they are."""
        objective = self._recipe.objective
        if not objective.depends_on_step:
            return objective
        own: list[Tensor] = []
        for pack, old_logprobs_N, teacher_logprobs_N in self._packs_with_logprobs(minibatch):
            with torch.no_grad():
                logprobs_U, entropy_R = self._policy.token_logprobs(pack)
            tokens = replace(
                _tokens_of(pack, logprobs_U, entropy_R),
                old_logprobs_N=old_logprobs_N,
                teacher_logprobs_N=teacher_logprobs_N,
            )
            own.append(objective.step_tokens(tokens).columns())
        return objective.prepared(StepTokens.of_columns(self._gather_columns(own)))

    def _gather_columns(self, own: Sequence[Tensor]) -> list[Tensor]:
        """float32[C, M] of every rank, in the order of ranks."""
        columns = torch.cat([NO_COLUMNS, *(each.float().cpu() for each in own)], 1).numpy()
        gathered = [msgspec.msgpack.decode(each, type=bytes) for each in self._gather(columns.tobytes())]
        values = [np.frombuffer(each, dtype=np.float32).copy() for each in gathered]
        return [torch.from_numpy(each.reshape(len(columns), each.size // len(columns))) for each in values]

    def _forward_backward(self, minibatch: _Minibatch, log_ratios: RankLogRatios) -> tuple[float, Sums]:
        """Loss and statistics over all ranks; accumulates the gradient, summed over ranks, and notes log-ratios."""
        objective = self._prepared(minibatch)
        loss, sums = 0.0, Sums()
        for pack, old_logprobs_N, teacher_logprobs_N in self._packs_with_logprobs(minibatch):
            addend, own = self._pack_forward_backward(pack, old_logprobs_N, teacher_logprobs_N, objective, log_ratios)
            loss, sums = loss + addend, sums + own
        gathered = [msgspec.msgpack.decode(data, type=tuple[float, Sums]) for data in self._gather((loss, sums))]
        return math.fsum(each for each, _ in gathered), sum((each for _, each in gathered), Sums())

    def _pack_forward_backward(
        self,
        pack: Pack,
        old_logprobs_N: Tensor | None,
        teacher_logprobs_N: Tensor | None,
        objective: Objective,
        log_ratios: RankLogRatios,
    ) -> tuple[float, Sums]:
        """Also for a pack without loss tokens: its rank gathers weights and adds gradients together with the others."""
        reference_logprobs_N = self._reference_logprobs(pack) if objective.kl is not None else None
        logprobs_U, entropy_R = self._policy.token_logprobs(pack, entropy_gradient=objective.entropy_bonus > 0)
        tokens = replace(
            _tokens_of(pack, logprobs_U, entropy_R),
            old_logprobs_N=old_logprobs_N,
            reference_logprobs_N=reference_logprobs_N,
            teacher_logprobs_N=teacher_logprobs_N,
        )
        use = ExpertSums(self._policy.expert_use() if pack.num_sequences else ())
        loss, sums = micro_batch_loss(tokens, objective)
        sums = replace(sums, experts=use)
        loss.backward()
        value = loss.item()
        log_ratios.add(pack, tokens.logprobs_N if old_logprobs_N is None else old_logprobs_N)
        return value, sums

    def _optimizer_step(self, loss: float, sums: Sums, num_packs: int) -> OptimizerStep:
        """Without packs there is no gradient, and the moments must not move the weights on their own."""
        if num_packs and math.isfinite(loss):
            return self._optimizer.step(ess_ratio=sums.weights.effective_sample_size_ratio)
        self._optimizer.drop_gradients()
        norm = math.nan if num_packs else 0.0
        return OptimizerStep(grad_norm=norm, learning_rate=self._optimizer.learning_rate, changed=False)


def _logprobs(model: TokenModel, pack: Pack) -> Tensor:
    """float32[N]: of the pack's loss tokens, by the model's weights as they are now."""
    with torch.no_grad():
        return model.token_logprobs(pack)[0].index_select(0, pack.target_N)


def _own_logprobs(model: TokenModel, pack: Pack) -> Tensor:
    """float32[N], of another model than the policy. It routes for itself: a pack's experts are those of the sampler."""
    return _logprobs(model, replace(pack, experts_PW=None))


def _largest(norms: Sequence[float]) -> float:
    """0 without any; nan if one is not finite: `max` would lose a nan after a number."""
    return max(norms, default=0.0) if all(map(math.isfinite, norms)) else math.nan


def _tokens_of(pack: Pack, logprobs_U: Tensor, entropy_R: Tensor) -> Tokens:
    return Tokens(
        logprobs_N=logprobs_U.index_select(0, pack.target_N),
        entropy_N=entropy_R[pack.target_parent_U[pack.target_N]],
        draw_N=draws(pack),
        behaviour_logprobs_N=pack.behaviour_logprobs_N,
        advantage_N=pack.advantage_N,
        weight_N=pack.weight_N,
        sequence_N=pack.sequence_N,
        num_sequences=pack.num_sequences,
        lag_N=pack.lag_N,
    )


@dataclass(frozen=True)
class Replayed:
    """A step that was trained again, and the versions of the weights before and after it."""

    record: StepRecord
    groups: Sequence[ScoredGroup]
    result: StepResult
    versions: tuple[int, int]

    @property
    def step(self) -> int:
        """Its id."""
        return self.record.step
