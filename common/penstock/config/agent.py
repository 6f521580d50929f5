"""The section of the agent service: what makes an episode, and its limits."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from penstock.config.types import Count, Fraction, Port, Seconds, Section

CONNECTIONS_OF_AGENT = 4  # sub-agents, and answers that it asks for side by side


class AgentSection(Section):
    """The agent service, which makes episodes of several turns (docs/agents.md)."""

    environment: str = ""
    """`module:name` of an environment: a class with `step`, a class whose public methods are tools, or an async
    function; empty: none, and each completion is one answer to a prompt."""
    command: tuple[str, ...] = ()
    """Instead of `environment`: a program and its arguments, started for each episode, that speaks to the model as an
    OpenAI client."""
    modules_path: str = "."
    """Folder that is added to the import path for `environment`, and in which `command` runs."""
    host: str = "127.0.0.1"
    """Address that it listens on."""
    advertise_host: str = ""
    """Name or address that it registers; empty: `host`. With auto, or if it is empty and `host` is 0.0.0.0 or ::, this
    host's address on the route to `redis.url`."""
    port: Port = 0
    """First port; further services take the next ones. 0: free ones."""
    num_services: Count = 1
    """Agent services that the local launcher starts."""
    sessions: Count = 64
    """Episodes that one service runs at once."""
    max_turns: Count = 8
    """Calls of the model after which an episode ends."""
    max_tokens: Count = 4096
    """Longest path of an episode, in tokens: what one call is sent, plus its answer."""
    timeout_seconds: Seconds = 600
    """Longest time of one episode."""
    call_timeout_seconds: Seconds = 60
    """Longest time of one call of an environment's method; its process is killed then."""
    on_timeout: Literal["failure", "score"] = "failure"
    """An episode that takes longer than timeout_seconds is a failure, and is tried again; or it is scored as one that
    was cut at `max_turns`, so that a model which never ends can be punished."""
    cut_score: float = 0.0
    """Score of an episode that was cut at max_turns or max_tokens, if its environment has no `get_reward`."""
    max_attempts: Count = 3
    """Attempts at an episode whose infrastructure fails; then it has no score, and is not trained."""
    max_failure_share: Annotated[Fraction, Field(gt=0)] = 0.5
    """A larger share of failed episodes in the last 20 steps ends the run."""
    template: Literal["model", "plain"] = "model"
    """How messages become text: by the model's chat template, or plain: one text after the other."""
    tool_format: str = "auto"
    """Form in which the model writes tool calls (docs/agents-families.md); auto: that of the model's family."""
    history: Literal["exact", "template"] = "exact"
    """exact: later calls continue the tokens that the model sampled; template: where the chat template would render an
    earlier answer differently (it strips thinking, for example), follow the template and branch."""
    train_auxiliary: bool = False
    """Also train on calls outside of the conversation."""

    @property
    def enabled(self) -> bool:
        """Whether episodes are made, instead of completions."""
        return bool(self.environment or self.command)

    @property
    def num_connections(self) -> int:
        """Those that the agents of one service may hold, all waiting for answers."""
        return self.sessions * CONNECTIONS_OF_AGENT if self.enabled else 0

    @property
    def name(self) -> str:
        """What makes the episodes, as tickets name it."""
        return self.environment or " ".join(self.command)

    @field_validator("environment")
    @classmethod
    def _names_an_object(cls, value: str) -> str:
        module, separator, name = value.partition(":")
        if value and not (module and separator and name):
            raise ValueError("expected module:name, such as my_envs:Guess")
        return value

    @model_validator(mode="after")
    def _has_one_source(self) -> "AgentSection":
        if self.environment and self.command:
            raise ValueError("agent.environment and agent.command are both set: expected one of them")
        return self
