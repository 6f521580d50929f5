"""This process among the ranks of one trainer, from torchrun's environment. Read once, by `__main__`."""

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.errors import ConfigError

CPU_NICENESS = 5  # of every rank that computes on a CPU: an engine on the same cores goes first
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class RankInfo:
    """`rank` of `num_ranks`; `local_rank`: the index of its GPU on its host. The only rank: RankInfo(0, 1, 0)."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "RankInfo":
        """Without torchrun's variables the only rank; ConfigError if some are absent or no numbers."""
        seen = {name: environ[name] for name in VARIABLES if name in environ}
        if not seen:
            return cls()
        try:
            return cls(*(int(seen[name]) for name in VARIABLES))
        except (KeyError, ValueError):
            raise ConfigError(
                f"the environment holds {seen}: expected the numbers {', '.join(VARIABLES)} as torchrun sets them, "
                "or none of them for a trainer of one rank"
            ) from None

    @property
    def is_follower(self) -> bool:
        """Whether it carries out commands of rank 0, another process."""
        return self.rank > 0


def service_name(environ: Mapping[str, str]) -> str:
    """The name of this process in its log and its errors."""
    rank = environ.get("RANK", "0")
    return "trainer" if rank == "0" else f"trainer rank {rank}"
