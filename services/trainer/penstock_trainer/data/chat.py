"""Chat messages as the text that the model continues, by the chat template of its tokenizer.

Invariant: the text ends where the answer begins. That is behind the header of an assistant's message, or inside the
last message if it is the assistant's: the model continues it. A template that would leave out a message, or open no
assistant's message, is an error: the run would train on another question, or on an answer at the wrong place.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from penstock.config import DataSection
from penstock.config.data import PROMPT_PLACE
from penstock.errors import ConfigError, DataError
from penstock_trainer.data.rows import Message, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
NOT_OPTIONS = ("messages", "add_generation_prompt", "continue_final_message")
PROBE = "PENSTOCK-PROBE"


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def get_chat_template(self, *, tools: Any = None) -> str: ...

    def apply_chat_template(self, conversation: list[Message], *, tokenize: bool, **kwargs: Any) -> str: ...


class Chat:
    """The chat template of a model, with the run's system prompt and template options.

    prompt_template: of the run, around each prompt that is plain text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        system_prompt: str = "",
        options: Mapping[str, Any] | None = None,
        prompt_template: str = "",
        *,
        key: str = "data",
    ) -> None:
        """key: the section whose options they are, for messages."""
        self._tokenizer = tokenizer
        self._key = key
        self._options = dict(options or {})
        self._source = ""
        self.is_used = False
        """Whether a prompt has gone through the template, now or when a table of prompts was made."""
        self._opens = False
        self._prompt_template = prompt_template
        self.system_prompt = system_prompt

    @classmethod
    def of_run(cls, tokenizer: Tokenizer, data: DataSection) -> "Chat":
        """The templates of a run."""
        return cls(tokenizer, data.system_prompt, data.template_options, data.prompt_template)

    def worded(self, prompt: str) -> str:
        """A plain prompt in the run's template, if there is one.

        >>> Chat(tokenizer=None, prompt_template="Q: {prompt}").worded("2 + 2?")
        'Q: 2 + 2?'
        """
        return self._prompt_template.replace(PROMPT_PLACE, prompt) if self._prompt_template else prompt

    def require_used(self) -> None:
        """ConfigError for options if no prompt went through the template."""
        if self._options and not self.is_used:
            raise ConfigError(
                f"{self._key}.template_options holds {', '.join(self._options)}, and every prompt is plain text, which "
                f"has no template: expected chat messages as prompts, {self._key}.system_prompt, or no options"
            )

    def text(self, row: Row) -> str:
        """The row's messages as text; DataError if the template cannot take them."""
        prompt = row.prompt
        messages = [{"role": "user", "content": self.worded(prompt)}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        self._read_template(row)
        self._require_roles(row, messages)
        if messages[-1]["role"] != "assistant":
            text = self._render(row, messages, add_generation_prompt=True)
            self._require_opening(row, messages, text)
        elif messages[-1]["content"].strip():
            text = self._render(row, messages, continue_final_message=True)
        else:
            raise DataError(
                f"{row.place}: the last message is the assistant's and empty: expected the beginning of an answer, "
                "which the model continues, or no such message"
            )
        self._require_all(row, messages, text)
        return text

    def _read_template(self, row: Row) -> None:
        """Find the template and check the options, once."""
        if self._source:
            return
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{row.place}: chat messages, but the tokenizer in actor.path has no chat template: expected one; "
                "use plain text as prompt and leave data.system_prompt empty"
            )
        try:
            source = self._tokenizer.get_chat_template(tools=self._options.get("tools"))
        except ValueError as error:  # several templates, and none is the default
            raise ConfigError(
                f"the tokenizer in actor.path has no default chat template ({' '.join(str(error).split())[:200]}): "
                "expected one"
            ) from error
        names = _variables(source) - set(NOT_OPTIONS)
        for name in self._options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise ConfigError(
                    f"{self._key}.template_options holds {name!r}, which the chat template in actor.path does not "
                    "read: expected names of its variables" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        self._source = source
        self.is_used = True

    def _render(self, row: Row, messages: list[Message], **how: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **how, **self._options)
        except Exception as error:  # a template is a program of its own, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"{row.place}: the chat template in actor.path refuses messages with roles {roles} ({reason}): "
                "expected messages that it accepts; correct the row, data.system_prompt or data.template_options"
            ) from error

    def _require_roles(self, row: Row, messages: list[Message]) -> None:
        for number, message in enumerate(messages):
            role = message["role"]
            if role not in ROLES and not re.search(rf"(['\"]){re.escape(role)}\1", self._source):
                near = difflib.get_close_matches(role, ROLES, n=1)
                raise DataError(
                    f"{row.place}: message {number} has the role {role!r}: expected {', '.join(ROLES)} or one that the "
                    "chat template in actor.path names" + (f"; did you mean {near[0]!r}?" if near else "")
                )

    def _require_opening(self, row: Row, messages: list[Message], text: str) -> None:
        """DataError if the template has a header for the assistant's message and does not end with it.

        Some templates need none: the answer follows the user's message at once. An answer that is rendered shows it.
        """
        if self._opens:
            return
        if self._render(row, messages, add_generation_prompt=False) == text:
            try:
                answered = self._render(row, [*messages, {"role": "assistant", "content": PROBE}])
            except DataError:  # it takes no answers, and so has no header
                answered = ""
            before, found, _ = answered.partition(PROBE)
            header = before[len(text) :] if found and before.startswith(text) else ""
            if header.strip():
                raise DataError(
                    f"{row.place}: the chat template in actor.path has no generation prompt: it puts {header!r} before "
                    "an answer, and a prompt ends without it: expected a template that reads add_generation_prompt"
                )
        self._opens = True

    def _require_all(self, row: Row, messages: list[Message], text: str) -> None:
        """DataError if the text lacks a message.

        Templates may change white space, quote the results of tools, and drop parts of earlier answers.
        """
        squeezed = _squeeze(text)
        for number, message in enumerate(messages):
            content = message["content"]
            forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
            if message["role"] != "assistant" and not any(_squeeze(form) in squeezed for form in forms):
                raise DataError(
                    f"{row.place}: the chat template in actor.path leaves out message {number}, of role "
                    f"{message['role']!r}: expected a role that it uses; correct the row or data.system_prompt"
                )


class Chats:
    """The templates of a run's prompts: those of `data`, and of each training set that has its own."""

    def __init__(self, tokenizer: Tokenizer, data: DataSection) -> None:
        self._tokenizer = tokenizer
        self._options = data.template_options
        self.of_run = Chat.of_run(tokenizer, data)
        self._of_sets: dict[str, Chat] = {}
        self._own: list[Chat] = []
        self._shared = [self.of_run]
        for each in data.training_sets:
            section = each.section
            if (section.system_prompt, section.template_options, section.prompt_template) == (None, None, None):
                continue
            has_options = section.template_options is not None
            chat = Chat(
                tokenizer,
                data.system_prompt if section.system_prompt is None else section.system_prompt,
                section.template_options if has_options else data.template_options,
                data.prompt_template if section.prompt_template is None else section.prompt_template,
                key=each.key if has_options else "data",
            )
            self._of_sets[each.name] = chat
            (self._own if has_options else self._shared).append(chat)

    def of_held_out(self, system_prompt: str, prompt_template: str) -> Chat:
        """That of a held-out set, which has the options of `data`."""
        chat = Chat(self._tokenizer, system_prompt, self._options, prompt_template)
        self._shared.append(chat)
        return chat

    def of(self, dataset: str) -> Chat:
        """That of a set, by its name; "" is the run's only set."""
        return self._of_sets.get(dataset, self.of_run)

    def require_used(self) -> None:
        """ConfigError for options that no prompt uses."""
        for each in self._own:
            each.require_used()
        if not any(each.is_used for each in self._shared):
            self.of_run.require_used()


def _variables(source: str) -> set[str]:
    """The names in the code of a Jinja template, those of variables among them."""
    code = " ".join(re.findall(r"\{[{%](.*?)[%}]\}", source, re.DOTALL))
    return set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", " ", code)))


def _squeeze(text: str) -> str:
    return "".join(text.split())
