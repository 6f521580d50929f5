"""Reads what a finished run left, and checks how every ticket ended.

Shares no code with the trainer: it reads the formats (ledger records, step files, steps.jsonl) by itself, as plain JSON
and MessagePack, with plain Redis commands.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis
import xxhash

WORK_STREAMS = ("tickets", "rollouts", "scored")


@dataclass
class Findings:
    """The counts of a run; `problems` is empty if all checks pass.

    on_their_way: tickets in the streams of a run that was stopped.
    sampled_digest: of all that was trained: tokens, log-probabilities, versions and rewards, without times and names.
    episodes: trained ones; failed_episodes: masked ones in the same groups. repeated_attempts: at either of them.
    """

    issued: int = 0
    trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    on_their_way: int = 0
    trained_twice: int = 0
    staleness_max: int = 0
    steps: int = 0
    policy_digest: str = ""
    weights_sha256: str = ""
    sampled_digest: str = ""
    episodes: int = 0
    failed_episodes: int = 0
    turns: int = 0
    repeated_attempts: int = 0
    problems: list[str] = field(default_factory=list)

    def same(self) -> tuple[object, ...]:
        """What two runs have in common if they trained the same samples to the same weights, and dropped as many."""
        return (
            *(self.policy_digest, self.weights_sha256, self.sampled_digest),
            *(self.issued, self.trained, self.episodes, self.failed_episodes, self.turns),
            *sorted(self.dropped.items()),
        )


class RunReader:
    """One run: its keys in Redis and its folder."""

    def __init__(self, client: "redis.Redis", run: str, folder: Path) -> None:
        self._client: Any = client
        self._prefix = f"penstock:{{{run}}}:"
        self._folder = folder
        self._found = Findings()
        self._sampled = xxhash.xxh3_64()
        self._failing: Collection[str] = ()

    def read(
        self,
        *,
        num_tickets: int | None,
        batch_size: int,
        max_staleness: int,
        num_failing: int = 0,
        failing: Collection[str] = (),
    ) -> Findings:
        """Check the run against its configuration. failing: `fault` in the metadata of rows whose episodes all fail;
        num_failing: tickets of such rows. num_tickets: None for a run that was stopped before its end: a ticket that
        has not ended must then be in a stream, and there may be so many as may be outstanding.
        """
        self._failing = failing
        records = [json.loads(fields[b"r"]) for _, fields in self._client.xrange(self._prefix + "ledger")]
        steps = [each for each in records if each["record"] == "step"]
        weights = [each for each in records if each["record"] == "weights"]
        drops = [each for each in records if each["record"] == "drop"]
        is_stopped = num_tickets is None
        most_outstanding = (max_staleness + 1) * batch_size if is_stopped else 0
        self._check_tickets(steps, drops, num_tickets, most_outstanding)
        self._check_steps(steps, batch_size)
        self._check_tokens(steps, weights, max_staleness)
        num_failed = self._found.dropped.get("reward_failed", 0)
        self._expect(
            num_failed >= num_failing,
            f"{num_failed} tickets were dropped as reward_failed; expected at least {num_failing}",
        )
        self._found.sampled_digest = self._sampled.hexdigest()
        self._check_progress(steps)
        if not is_stopped:
            self._check_parts()
            self._check_end(weights)
        return self._found

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self._found.problems.append(problem)

    def _check_tickets(
        self, steps: list[Any], drops: list[Any], num_tickets: int | None, most_outstanding: int
    ) -> None:
        """Each of the issued tickets 0..n-1 ended exactly once, or is still in a stream."""
        found = self._found
        counters = {
            name.decode(): int(value) for name, value in self._client.hgetall(self._prefix + "counters").items()
        }
        trained = Counter(ticket for step in steps for ticket in step["tickets"])
        dropped = Counter(drop["ticket"] for drop in drops)
        ends = trained + dropped
        issued = set(range(counters.get("next", 0)))
        on_their_way = self._in_streams() - ends.keys() if most_outstanding else set()
        lost = sorted(issued - ends.keys() - on_their_way)
        twice = sorted(ticket for ticket, count in ends.items() if count > 1)
        found.issued, found.trained = len(issued), trained.total()
        found.dropped = dict(Counter(drop["reason"] for drop in drops))
        found.lost, found.on_their_way, found.trained_twice = len(lost), len(on_their_way), len(twice)
        self._expect(not lost, f"tickets {lost} were issued and never ended")
        self._expect(not twice, f"tickets {twice} ended more than once")
        self._expect(ends.keys() <= issued, f"tickets {sorted(ends.keys() - issued)} ended and were never issued")
        if num_tickets is not None:
            self._expect(len(issued) == num_tickets, f"{len(issued)} tickets were issued; the run has {num_tickets}")
        self._expect(counters.get("issued") == len(issued), f"the counters are {counters}; {len(issued)} were issued")
        num_trained = trained.total()
        self._expect(counters.get("trained") == num_trained, f"the counters are {counters}; {num_trained} were trained")
        live = self._client.hgetall(self._prefix + "live")
        self._expect(len(live) <= most_outstanding, f"{len(live)} are outstanding at the end, first {list(live)[:3]}")

    def _in_streams(self) -> set[int]:
        """The tickets of training that are in a stream of work."""
        entries = [fields for stage in WORK_STREAMS for _, fields in self._client.xrange(self._prefix + stage)]
        keys = [fields[b"t"] for fields in entries]
        return {int(key) for key in keys if key.isdigit()}

    def _check_steps(self, steps: list[Any], batch_size: int) -> None:
        """The steps are numbered 0, 1, ...; all but the last are full; tickets are trained in order."""
        self._found.steps = len(steps)
        self._expect([each["step"] for each in steps] == list(range(len(steps))), "steps are missing or out of order")
        sizes = [len(each["tickets"]) for each in steps]
        self._expect(all(size == batch_size for size in sizes[:-1]), f"batches of {sorted(set(sizes))} tickets")
        order = [ticket for step in steps for ticket in step["tickets"]]
        self._expect(order == sorted(order), "tickets were not trained in order")

    def _check_tokens(self, steps: list[Any], weights: list[Any], max_staleness: int) -> None:
        """Every trained token was sampled by recorded weights, at most max_staleness versions old."""
        policies = {each["policy"]["number"]: each["policy"]["digest"] for each in weights}
        version_before = {each["steps"]: each["policy"]["number"] for each in weights}
        for step in steps:
            number, path = step["step"], self._folder / "steps" / step["file"]
            if not path.exists():
                self._expect(False, f"step {number}: {path} is missing")
                continue
            data = path.read_bytes()
            self._expect(xxhash.xxh3_64_hexdigest(data) == step["digest"], f"step {number}: {path} has another digest")
            groups = msgspec.msgpack.decode(data)["groups"]
            tickets = [each["group"]["ticket"]["number"] for each in groups]
            self._expect(tickets == list(step["tickets"]), f"step {number}: file has {tickets}, ledger {step}")
            if number not in version_before:
                self._expect(False, f"step {number}: no weights are recorded before it")
                continue
            for group in groups:
                self._check_group(group, version_before[number], policies, max_staleness)

    def _check_group(self, group: Any, version: int, policies: dict[int, str], max_staleness: int) -> None:
        ticket, episodes = group["group"]["ticket"], group["group"].get("episodes") or []
        values = [each["value"] for each in group["scores"]]
        number, fault = ticket["number"], ticket.get("metadata", {}).get("fault")
        self._expect(fault not in self._failing, f"ticket {number}: trained, though its row has the fault {fault}")
        for episode, value in zip(episodes, values, strict=bool(episodes)):
            self._check_episode(number, episode, value)
        nodes = [node for episode in episodes for node in episode["nodes"]]
        sampled = [node for node in nodes if node["logprobs"] is not None]
        for each in [*group["group"]["completions"], *sampled]:
            self._check_spans(number, each, version, policies, max_staleness)
        trained = [
            (each.get("parent"), each["token_ids"], each["logprobs"], each["spans"])
            for each in [*group["group"]["completions"], *nodes]
        ]
        self._sampled.update(msgspec.msgpack.encode((number, values, trained)))

    def _check_spans(
        self, ticket: int, sampled: Any, version: int, policies: dict[int, str], max_staleness: int
    ) -> None:
        """Of a completion, or of a node that was sampled."""
        end = 0
        for span in sampled["spans"]:
            policy = span["policy"]
            self._expect(span["start"] == end, f"ticket {ticket}: spans {sampled['spans']}")
            end = span["end"]
            staleness = version - policy["number"]
            self._found.staleness_max = max(self._found.staleness_max, staleness)
            self._expect(0 <= staleness <= max_staleness, f"ticket {ticket}: a token of staleness {staleness}")
            known = policies.get(policy["number"])
            self._expect(known == policy["digest"], f"ticket {ticket}: sampled by {policy}, recorded is {known}")
        self._expect(end * 4 == len(sampled["token_ids"]), f"ticket {ticket}: spans end at {end}")

    def _check_episode(self, ticket: int, episode: Any, value: float | None) -> None:
        """The environment of these runs never goes back: each turn once, context and answer in turns, in one path. An
        episode without a score of its environment has none at all, and nothing that could be trained.
        """
        nodes, found = episode["nodes"], self._found
        found.repeated_attempts += episode["counts"]["num_attempts"] - 1
        if episode["score"]["value"] is None:
            found.failed_episodes += 1
            self._expect(value is None and not nodes, f"ticket {ticket}: a failed episode has the score {value}")
            return
        found.episodes += 1
        found.turns += len(nodes) // 2
        self._expect(value is not None, f"ticket {ticket}: an episode lost the score of its environment")
        is_path = [each["parent"] for each in nodes] == list(range(-1, len(nodes) - 1))
        in_turns = [each["logprobs"] is not None for each in nodes] == [False, True] * (len(nodes) // 2)
        self._expect(is_path and in_turns, f"ticket {ticket}: nodes of an episode are no path of turns")
        num_turns = episode["counts"]["num_turns"]
        self._expect(num_turns * 2 == len(nodes), f"ticket {ticket}: {len(nodes)} nodes of {num_turns} turns")

    def _check_progress(self, steps: list[Any]) -> None:
        """steps.jsonl has one line per step, with the tickets that the ledger has."""
        lines = [json.loads(line) for line in (self._folder / "steps.jsonl").read_text().splitlines()]
        tickets = {line["step"]: list(line["tickets"]) for line in lines}
        self._expect(len(tickets) == len(lines), "steps.jsonl has two lines for one step")
        missing = [each["step"] for each in steps if each["step"] not in tickets]
        self._expect(not missing, f"steps.jsonl lacks steps {missing}")
        differ = [each["step"] for each in steps if tickets.get(each["step"], each["tickets"]) != list(each["tickets"])]
        self._expect(not differ, f"steps.jsonl and ledger differ in the tickets of steps {differ}")
        self._expect(sorted(tickets) == [line["step"] for line in lines], "steps.jsonl is out of order")

    def _check_parts(self) -> None:
        """No group left parts or finished episodes behind. Only dead letters keep theirs; parts that no entry has named
        yet expire.
        """
        named = {fields.get(b"n") for _, fields in self._client.xrange(self._prefix + "dead")}
        keys = list(self._client.scan_iter(match=self._prefix + "part:*", count=500))
        left = [key for key in keys if key.split(b":")[-2] not in named and self._client.pttl(key) == -1]
        self._expect(not left, f"{len(left)} parts of groups are left, first {left[:1]}")
        kept = list(self._client.scan_iter(match=self._prefix + "episodes:*", count=500))
        self._expect(not kept, f"episodes of {len(kept)} tickets are left, first {kept[:1]}")

    def _check_end(self, weights: list[Any]) -> None:
        """The last step has weights, and `final` has a model."""
        final = sorted((self._folder / "final").glob("*.safetensors"))
        self._expect(bool(final), "there is no final model")
        last = max(weights, key=lambda each: (each["steps"], each["policy"]["number"]), default=None)
        self._expect(last is not None and last["steps"] == self._found.steps, "the last step has no weights")
        self._found.policy_digest = last["policy"]["digest"] if last else ""
        self._found.weights_sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in final)).hexdigest()
