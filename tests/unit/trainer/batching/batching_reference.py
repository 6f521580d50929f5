"""A second implementation of a batch and its packs: lists and dictionaries, one token at a time; slow and plain."""

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.contracts import ScoredGroup, unpack_float32, unpack_int32

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One completion with a reward: its tokens, its loss mask, and the staleness of each token."""

    index: tuple[int, int]
    prompt_ids: Prefix
    token_ids: Prefix
    behaviour: tuple[float, ...]
    lags: tuple[int, ...]
    is_loss: tuple[bool, ...]
    is_trained: tuple[bool, ...]

    @property
    def path(self) -> Prefix:
        """The tokens that need a row."""
        last = max(t for t, is_trained in enumerate(self.is_trained) if is_trained)
        return self.prompt_ids + self.token_ids[:last]

    @property
    def prefixes(self) -> set[Prefix]:
        return {self.path[: length + 1] for length in range(len(self.path))}


def rows_of(groups: Sequence[ScoredGroup], version: int, max_lag: int | None) -> list[Row]:
    rows = []
    for b, scored in enumerate(groups):
        for g, (completion, score) in enumerate(zip(scored.group.completions, scored.scores, strict=True)):
            if score.value is None:
                continue
            lags = [version - span.policy.number for span in completion.spans for _ in range(span.start, span.end)]
            mask = [1] * len(lags) if completion.loss_mask is None else list(completion.loss_mask)
            rows.append(
                Row(
                    index=(b, g),
                    prompt_ids=tuple(unpack_int32(scored.group.ticket.prompt_ids)),
                    token_ids=tuple(unpack_int32(completion.token_ids)),
                    behaviour=tuple(unpack_float32(completion.logprobs)),
                    lags=tuple(lags),
                    is_loss=tuple(map(bool, mask)),
                    is_trained=tuple(
                        bool(m) and (max_lag is None or lag <= max_lag) for m, lag in zip(mask, lags, strict=True)
                    ),
                )
            )
    return rows


def parts_of(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows sorted by their tokens; a pack ends before a prompt, or else a completion, that would not fit."""
    rows = sorted((row for row in rows if any(row.is_trained)), key=lambda row: row.path)
    parts: list[list[Row]] = [[]]
    for number, row in enumerate(rows):
        is_first = number == 0 or rows[number - 1].prompt_ids != row.prompt_ids
        same_prompt = [row]
        while is_first and number + len(same_prompt) < len(rows):
            following = rows[number + len(same_prompt)]
            if following.prompt_ids != row.prompt_ids:
                break
            same_prompt.append(following)
        if parts[-1] and num_rows_of(parts[-1] + same_prompt) > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return [part for part in parts if part]


def num_rows_of(rows: Sequence[Row]) -> int:
    """Every prefix is computed once."""
    return len(set[Prefix]().union(*(row.prefixes for row in rows)))


@dataclass(frozen=True)
class Trie:
    """A pack: token, position and subtree end of each row; parent and token of each loss token."""

    token_ids: list[int]
    positions: list[int]
    subtree_end: list[int]
    parents: list[int]
    targets: list[int]


def trie_of(part: Sequence[Row]) -> Trie:
    """Sorted prefixes are in depth-first preorder; the subtree of a prefix is all prefixes that begin with it."""
    order = sorted(set[Prefix]().union(*(row.prefixes for row in part)))
    row_of = {prefix: row for row, prefix in enumerate(order)}
    loss = [(each, t) for each in part for t, is_trained in enumerate(each.is_trained) if is_trained]
    return Trie(
        token_ids=[prefix[-1] for prefix in order],
        positions=[len(prefix) - 1 for prefix in order],
        subtree_end=[1 + max(row_of[each] for each in order if each[: len(prefix)] == prefix) for prefix in order],
        parents=[row_of[each.prompt_ids + each.token_ids[:t]] for each, t in loss],
        targets=[each.token_ids[t] for each, t in loss],
    )
