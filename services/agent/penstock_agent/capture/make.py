"""The rendering of a run: what its configuration and the model's folder make of it.

Owns loading the tokenizer. A model that cannot do what the configuration asks for is a ConfigError at start.
"""

import difflib
from typing import Any

from penstock.config.agent import AgentSection
from penstock.errors import CallRefusedError, ConfigError
from penstock.model_path import check_model_path
from penstock_agent.capture import families
from penstock_agent.capture.chat_template import ChatTemplate
from penstock_agent.capture.families import Family
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.model import ModelRendering, Parts
from penstock_agent.capture.plain import PlainRendering
from penstock_agent.capture.rendering import Rendering
from penstock_agent.capture.suffix import Suffixes
from penstock_agent.capture.tool_calls import FORMATS, ToolCall, ToolFormat

PROBE = "penstockprobetool"
TOOL: Tool = {
    "type": "function",
    "function": {"name": PROBE, "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}
ARGUMENTS = {"penstockkey": "penstockvalue"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": PROBE, "arguments": ARGUMENTS}}],
}
QUESTION: Message = {"role": "user", "content": "Well?"}
RESULT: Message = {"role": "tool", "tool_call_id": "call_0", "name": PROBE, "content": "penstockresult"}


def make_rendering(section: AgentSection, model_path: str) -> Rendering:
    """What turns messages into tokens and back, for the model in `model_path` (actor.path); ConfigError if nothing can.

    Takes some seconds: it loads the tokenizer and probes the chat template.
    """
    check_model_path(model_path, "actor.path")
    tokenizer, stop_token_ids = _load(model_path)
    return rendering_of(section, tokenizer, stop_token_ids)


def rendering_of(section: AgentSection, tokenizer: Any, stop_token_ids: tuple[int, ...] = ()) -> Rendering:
    """As `make_rendering`, for a tokenizer. stop_token_ids: those of the model's configuration."""
    if section.template == "plain":
        if section.history == "template":
            raise ConfigError(
                "agent.history is template and agent.template is plain, which has no template: expected agent.history "
                "exact, or agent.template model"
            )
        return PlainRendering(tokenizer)
    named = _named(section.tool_format)
    if not tokenizer.chat_template and not isinstance(named, str):
        raise ConfigError(
            "agent.template is model, and the tokenizer in actor.path has no chat template: expected one; use "
            "agent.template plain, or name the model's family in agent.tool_format: "
            + ", ".join(families.family_names())
        )
    keeps_thinking = section.history == "exact"
    if not tokenizer.chat_template:
        assert isinstance(named, str)
        only = _family(named, tokenizer, keeps_thinking)
        return ModelRendering(Parts(tokenizer, only, only, None, only, True, stop_token_ids))
    template = ChatTemplate(tokenizer)
    found = families.detect(tokenizer, template)
    family = Family(found, tokenizer, keeps_thinking=keeps_thinking) if found else None
    suffixes = None if family and family.continues else Suffixes(template, tokenizer)
    reader: Family | ToolFormat | None
    if isinstance(named, str):
        reader = _family(named, tokenizer, keeps_thinking)
    else:
        reader = named or family or _read_by(template, suffixes.end if suffixes else "")
    return ModelRendering(Parts(tokenizer, template, family, suffixes, reader, _shows_tools(template), stop_token_ids))


def _named(tool_format: str) -> "ToolFormat | str | None":
    """What agent.tool_format names: a format, the name of a family, or nothing."""
    if tool_format == "auto":
        return None
    if tool_format in FORMATS:
        return FORMATS[tool_format]
    known = families.family_names()
    if tool_format not in known:
        near = difflib.get_close_matches(tool_format, [*FORMATS, *known], n=1)
        raise ConfigError(
            f"agent.tool_format is {tool_format!r}: expected auto, {', '.join([*FORMATS, *known])}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return tool_format


def _family(name: str, tokenizer: Any, keeps_thinking: bool) -> Family:
    try:
        return Family(name, tokenizer, keeps_thinking=keeps_thinking)
    except Exception as error:  # of a library; most often, the tokenizer lacks a token of the family
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"agent.tool_format is {name!r}, which the tokenizer in actor.path does not fit ({reason}): expected the "
            "family of this model, hermes, llama3 or auto"
        ) from error


def _shows_tools(template: ChatTemplate) -> bool:
    """Whether the template writes tools, calls and results into a prompt."""
    try:
        return (
            PROBE in template.text([QUESTION], (TOOL,))
            and PROBE in template.text([QUESTION, CALL, RESULT], ())
            and RESULT["content"] in template.text([QUESTION, CALL, RESULT], ())
        )
    except CallRefusedError:
        return False


def _read_by(template: ChatTemplate, end: str) -> ToolFormat | None:
    """The format that reads the calls which the template writes. end: what it writes behind a turn; "" if unknown."""
    try:
        text = template.text([QUESTION, CALL, RESULT], (TOOL,))
        head = template.text([QUESTION], (TOOL,))
    except CallRefusedError:
        return None
    turn = text.removeprefix(head).partition(RESULT["content"])[0]
    if end:
        turn = turn.partition(end)[0]
    for tool_format in FORMATS.values():
        if text.startswith(head) and tool_format.read(turn).calls == (ToolCall(PROBE, ARGUMENTS),):
            return tool_format
    return None


def _load(path: str) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer, and the tokens that end a text by the model's configuration."""
    from transformers import AutoTokenizer, GenerationConfig  # here: it takes seconds, and imports torch if it is there

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of any library that reads a part of the folder: a reason why it cannot be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"actor.path is {path!r}: expected a model folder with a tokenizer; {reason}") from error
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        ids = None
    if ids is None:
        ids = tokenizer.eos_token_id
    return tokenizer, tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)
