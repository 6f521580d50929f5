"""What a run with many services has shown, and whether that is what was claimed.

Owns the claims: no ticket lost or trained twice, no token older than the bound, flat memory, and a group that costs the
queue hardly more with many services than with few. Invariant: a claim about tickets holds on any machine; the others
are measurements, which a busy machine or a short run may spoil, so both kinds are listed apart.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.chaos.reader import Findings
from benchmarks.scale.costs import Window, growth
from benchmarks.scale.plan import ScalePlan

MOST_RATIO = 1.3
FLAT = ("trainer", "queue, used")  # reward and queue processes are shown
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Verdict:
    """One run.

    disturbed: of many services, while hosts ended and returned; in the two other windows nothing happened to a service.
    memory: by process, seconds and bytes in the disturbed window. num_joined, num_killed, num_left: services
    that began, that were killed, that ended in order. num_refused: servers fenced at a push; num_late: results that
    came after their ticket had gone to another service, and were not published; both as the logs have them.
    """

    plan: ScalePlan
    found: Findings
    few: Window
    many: Window
    disturbed: Window
    memory: Mapping[str, Sequence[tuple[float, float]]]
    num_joined: int
    num_killed: int
    num_left: int
    num_versions: int
    num_refused: int
    num_late: int

    @property
    def ratio(self) -> float:
        """CPU time of the queue a group, with many services over with few, while none ended."""
        return self.many.us_per_group["queue"] / self.few.us_per_group["queue"]

    def broken_rules(self) -> list[str]:
        """What happened to a ticket or a token that may never happen; and what shows that the run was none."""
        found, bound = self.found, self.plan.max_staleness
        broken = [f"{found.lost} tickets were lost"] if found.lost else []
        broken += [f"{found.trained_twice} tickets ended twice"] if found.trained_twice else []
        broken += [f"a token of staleness {found.staleness_max} was trained"] if found.staleness_max > bound else []
        broken += [f"{found.dropped} were dropped"] if found.dropped else []
        broken += [f"{self.num_versions} versions for {found.steps} steps"] if self.num_versions < found.steps else []
        broken += found.problems[:SHOWN_PROBLEMS]
        return broken

    def missed_aims(self) -> list[str]:
        """What was measured and is not as it should be."""
        missed = []
        for name in FLAT:
            line = growth(self.memory[name])
            if line is None:
                missed.append(f"memory of {name}: too few samples to say that it is flat; raise --seconds")
            elif not line.is_flat:
                missed.append(
                    f"memory of {name} grew by {100 * line.share:.1f} %: {line.bytes_per_hour / 1e6:.0f} MB/h"
                )
        if self.ratio > MOST_RATIO:
            missed.append(
                f"a group costs the queue {self.ratio:.2f} times as much with {self.many.num_services} services as "
                f"with {self.few.num_services}; expected {MOST_RATIO:g}"
            )
        return missed

    def lines(self) -> list[str]:
        """For people."""
        found = self.found
        shown = [
            f"tickets: {found.issued} issued, {found.trained} trained in {found.steps} steps, {found.on_their_way} on "
            f"their way at the end; lost {found.lost}, twice {found.trained_twice}",
            f"staleness: {found.staleness_max} at most, bound {self.plan.max_staleness}",
            f"services: {self.num_joined} joined, {self.num_killed} killed, {self.num_left} left in order; "
            f"{self.num_versions} versions pushed, {self.num_refused} times a server was fenced, {self.num_late} late "
            "results refused",
        ]
        for each, what in ((self.few, ""), (self.many, ""), (self.disturbed, ", of which hosts ended and returned")):
            costs = ", ".join(f"{name} {us:.0f}" for name, us in each.us_per_group.items())
            shown.append(
                f"{each.num_services} services{what}: {each.groups_per_second:.1f} groups/s in {each.seconds:.0f} s "
                f"({each.num_steps} steps); us of CPU a group: {costs}"
            )
        for name, samples in self.memory.items():
            if (line := growth(samples)) is not None:
                shown.append(
                    f"memory of {name}: {line.mean_bytes / 1e6:.1f} MB, {100 * line.share:+.2f} % over the last two "
                    f"thirds, {line.bytes_per_hour / 1e6:+.1f} MB/h"
                )
        sizes = f"{self.many.num_services} services over {self.few.num_services}"
        return [*shown, f"us of the queue a group, {sizes}: {self.ratio:.2f}"]

    def write(self, path: Path) -> None:
        """All figures, as JSON."""
        found = asdict(self)
        broken, missed = self.broken_rules(), self.missed_aims()
        text = json.dumps({**found, "ratio": self.ratio, "broken": broken, "missed": missed}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
