"""When training groups were generated, and how many tokens they hold.

Owns the figures that the gap to ideal needs: the seconds in which at least one training request was running. A group is
counted when it arrives, so a second of generation counts for the step in which its group arrived; over several steps
the sum is exact. Pure.
"""

from penstock.contracts import RolloutGroup

KEPT_SECONDS = 3600.0  # no request runs for longer; older intervals cannot overlap with new ones


class GenerationTime:
    """Intervals of training requests as the rollout servers reported them."""

    def __init__(self) -> None:
        self._covered: list[tuple[float, float]] = []
        self._seconds = 0.0
        self._tokens = 0
        self.first_started_at: float | None = None

    def add(self, group: RolloutGroup) -> None:
        """Count one group."""
        self._tokens += sum(each.num_tokens for each in group.trajectories)
        self._cover(group.started_at, group.ended_at)
        if self.first_started_at is None or group.started_at < self.first_started_at:
            self.first_started_at = group.started_at

    def _cover(self, start: float, end: float) -> None:
        """Add [start, end] to the union, and the growth of its length to the seconds, which is never negative.

        The times are of the server's host, whose clock may have been set back in between.
        """
        end = max(start, end)
        touching = [each for each in self._covered if each[0] <= end and each[1] >= start]
        apart = [each for each in self._covered if each[1] < start or each[0] > end]
        merged = (min([start, *(low for low, _ in touching)]), max([end, *(high for _, high in touching)]))
        self._seconds += (merged[1] - merged[0]) - sum(high - low for low, high in touching)
        self._covered = [*(each for each in apart if each[1] > end - KEPT_SECONDS), merged]

    def take_busy_seconds(self) -> float:
        """Seconds in which a request was running, over all groups that arrived since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def take_tokens(self) -> int:
        """Tokens generated since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens
