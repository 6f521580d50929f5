"""Carries out a plan against a running launch until the run has ended.

Owns the loop, the pace and the time line. Invariant: it returns, or raises ChaosError, before its deadline; the error
names seed, part, time line and logs. It thaws whatever it froze and brings back whatever it took down.

    draw a card -> is its victim running and rested? -> do it -> pause (seeded) -> ...   launcher ended: return
"""

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos.launch import Launch, listening_url
from benchmarks.chaos.own_queue import OwnQueue
from benchmarks.chaos.schedule import Disturbance, Plan, deck, pause_seconds
from benchmarks.chaos.storm import Storm

LOOK_SECONDS = 0.1
MAX_LOST_BYTES = 12000  # about what a busy second appends in these runs
SLOW_PACE_SECONDS = 0.3  # for one completion
HALT_PACE_SECONDS = 2.0  # well below reward.timeout_seconds; a step then takes longer than most victims rest
HALT_STEPS = 3
SHOWN_EVENTS = 40


class ChaosError(Exception):
    """The run did not survive, or a check failed; the text has the seed to repeat it with."""


@dataclass
class Record:
    """What was done to a part. `time_line`: seconds since its start, and the disturbance.

    num_refused: calls that storms saw refused with 503.
    """

    seed: int
    part: str
    kills: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    num_refused: int = 0
    time_line: list[tuple[float, str]] = field(default_factory=list)

    def explain(self, problem: str, logs: Path) -> str:
        events = "\n".join(f"  {at:7.1f} s  {what}" for at, what in self.time_line[-SHOWN_EVENTS:])
        return f"part {self.part}, SEED={self.seed}: {problem}\ntime line:\n{events}\nlogs: {logs}"


class Disturber:
    """Carries out one part's plan."""

    def __init__(
        self,
        launch: Launch,
        plan: Plan,
        record: Record,
        pace_file: Path,
        paced_steps: int,
        own_queue: OwnQueue | None,
        max_running: int,
    ) -> None:
        """`paced_steps`: the disturbances are spread over this many steps. `own_queue`: None if the launcher runs the
        queue; then no connection can be cut and no tail can be lost. `max_running`: completions of a rollout server.
        """
        self._launch = launch
        self._plan = plan
        self._record = record
        self._pace_file = pace_file
        self._paced_steps = paced_steps
        self._queue = own_queue
        self._storm = Storm(max_running)
        self._chooser = random.Random(record.seed)
        self._deck = deck(plan, self._chooser)
        self._num_cards = len(self._deck)
        self._rested: dict[str, float] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._frozen: set[str] = set()
        self._start = time.monotonic()
        self._paced = -1.0

    def run(self, deadline_seconds: float) -> None:
        """Disturb until the launcher has ended by itself; ChaosError if it fails or takes longer than the deadline."""
        next_at = time.monotonic()
        warmed_up = False
        while (code := self._launch.exit_code()) is None or self._later:
            now = time.monotonic()
            if now - self._start > deadline_seconds:
                raise self.error(f"not finished within {deadline_seconds:.0f} s ({len(self._deck)} cards left)")
            while self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[2]()
            self._set_pace()
            self._launch.below()
            warmed_up = warmed_up or self._launch.num_steps() > 0
            if code is None and warmed_up and self._deck and now >= next_at and self._draw():
                next_at = time.monotonic() + pause_seconds(self._plan, self._chooser)
            time.sleep(LOOK_SECONDS)
        if code != 0:
            raise self.error(f"the launcher ended with exit code {code}")
        if self._deck:
            raise self.error(f"training ended with {len(self._deck)} disturbances to come; make the run longer")

    def error(self, problem: str) -> ChaosError:
        return ChaosError(self._record.explain(problem, self._launch.run_folder / "logs") + "\n" + self._launch.tail())

    def give_back(self) -> None:
        """At the end: thaw what is still frozen, bring back what is still down, end storms."""
        while self._later:
            heapq.heappop(self._later)[2]()
        self._storm.stop()
        self._record.num_refused = self._storm.num_refused

    def _set_pace(self) -> None:
        """Slow the reward down if the steps are ahead of the disturbances, so that the run lasts until the last one."""
        allowed = self._paced_steps * (self._num_cards - len(self._deck) + 1) / (self._num_cards + 1)
        ahead = self._launch.num_steps() - allowed if self._deck else 0.0
        pace = HALT_PACE_SECONDS if ahead > HALT_STEPS else SLOW_PACE_SECONDS if ahead > 0 else 0.0
        if pace != self._paced:
            temporary = self._pace_file.with_suffix(".tmp")
            temporary.write_text(str(pace), encoding="ascii")
            temporary.replace(self._pace_file)
            self._paced = pace

    def _draw(self) -> bool:
        """Do the first card of the deck that can be done now."""
        for index, card in enumerate(self._deck):
            if self._do(card):
                del self._deck[index]
                return True
        return False

    def _do(self, card: Disturbance) -> bool:
        if card.action == "cut":
            return self._cut()
        if card.action == "storm":
            return self._begin_storm(card)
        if card.target == "launcher":
            return self._kill_launcher()
        if card.target == "queue" and self._queue is not None:
            return self._disturb_queue(card, self._queue)
        now = time.monotonic()
        rested = [
            (name, process)
            for name, process in sorted(self._launch.victims(card.target).items())
            if self._rested.get(name, 0.0) <= now and name not in self._frozen
        ]
        if not rested:
            return False
        name, victim = self._chooser.choice(rested)
        try:
            if card.action == "kill":
                victim.kill()
            else:
                self._freeze(name, victim.suspend, victim.resume)
        except psutil.NoSuchProcess:
            return False
        self._note(card, f"{name} pid {victim.pid}")
        self._rested[name] = now + self._plan.rest_seconds
        return True

    def _freeze(self, name: str, stop: Callable[[], None], go_on: Callable[[], None]) -> None:
        """Freeze for longer than the heartbeat, which is 3 s in these runs."""
        stop()
        self._frozen.add(name)

        def thaw() -> None:
            self._frozen.discard(name)
            try:
                go_on()
            except psutil.NoSuchProcess:
                return  # its launcher was killed meanwhile

        self._after(self._chooser.uniform(4.0, 7.0), thaw)

    def _disturb_queue(self, card: Disturbance, queue: OwnQueue) -> bool:
        now = time.monotonic()
        if "queue" in self._frozen or self._rested.get("queue", 0.0) > now:
            return False
        self._rested["queue"] = now + 6.0
        pid, lost = queue.pid, ""
        if card.action == "freeze":
            self._freeze("queue", queue.freeze, queue.thaw)
        else:
            queue.kill()
            if card.action == "lose_tail":
                lost = f", lost {queue.lose_tail(self._chooser.randint(200, MAX_LOST_BYTES))} bytes"
            self._frozen.add("queue")

            def restart() -> None:
                queue.restart()
                self._frozen.discard("queue")

            self._after(self._chooser.uniform(0.0, 3.0), restart)
        self._note(card, f"queue pid {pid}{lost}")
        return True

    def _kill_launcher(self) -> bool:
        now = time.monotonic()
        if self._rested.get("launcher", 0.0) > now or self._frozen:
            return False
        self._launch.below()
        pid = self._launch.kill()
        self._note(Disturbance("kill", "launcher"), f"launcher pid {pid}")
        time.sleep(self._chooser.uniform(0.0, 1.0))
        self._launch.start()
        self._rested = {"launcher": time.monotonic() + self._plan.rest_seconds}
        return True

    def _cut(self) -> bool:
        queue = self._queue
        if queue is None or "connections" in self._frozen:
            return False
        if self._chooser.random() < 0.3:
            queue.proxy.take_down()
            self._frozen.add("connections")

            def bring_up() -> None:
                queue.proxy.bring_up()
                self._frozen.discard("connections")

            self._after(self._chooser.uniform(0.5, 4.0), bring_up)
            self._note(Disturbance("cut", "connections"), "all for some time")
        else:
            count = queue.proxy.cut(self._chooser, self._chooser.uniform(0.2, 1.0))
            self._note(Disturbance("cut", "connections"), f"{count} of them")
        return True

    def _begin_storm(self, card: Disturbance) -> bool:
        """Fill all rollout servers, one of which at least listens."""
        found = [listening_url(process) for process in self._launch.victims(card.target).values()]
        urls = [url for url in found if url]
        if not urls or "calm" in self._frozen:
            return False
        seconds = self._chooser.uniform(4.0, 8.0)
        self._storm.start(urls, seconds)
        self._frozen.add("calm")
        self._after(seconds, lambda: self._frozen.discard("calm"))
        self._note(card, f"{len(urls)} servers for {seconds:.1f} s")
        return True

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), call))

    def _note(self, card: Disturbance, what: str) -> None:
        done = self._record.kills if card.is_kill else self._record.others
        key = card.target if card.is_kill else str(card)
        done[key] = done.get(key, 0) + 1
        self._record.time_line.append((round(time.monotonic() - self._start, 1), f"{card}: {what}"))
