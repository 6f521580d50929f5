"""Chat templates, through the tokenizers of transformers: where a prompt ends, and what is refused."""

from typing import Any

import pytest

from penstock.errors import ConfigError, PenstockError
from penstock_trainer.data.chat import Chat
from penstock_trainer.data.rows import Row
from tests.unit.trainer.data import chat_models as templates
from tests.unit.trainer.data.chat_models import CHATML, INST, THINKING, characters

HI = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "The answer is"}
ANSWER = {"role": "assistant", "content": "yes"}


def text(template: str | None, *messages: dict[str, Any], system: str = "", **options: Any) -> str:
    return Chat(characters(template), system, options).text(Row(list(messages), "", place="r line 4"))


def refused(template: str | None, *messages: dict[str, Any], system: str = "", **options: Any) -> str:
    with pytest.raises(PenstockError) as caught:
        text(template, *messages, system=system, **options)
    message = str(caught.value)
    assert isinstance(caught.value, ConfigError) or message.startswith("r line 4: "), message
    assert "expected" in message
    assert caught.value.exit_code == 2
    return message


def test_a_prompt_ends_where_the_answer_begins() -> None:
    assert text(CHATML, HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text(INST, HI) == "<s>[INST] hi [/INST]"
    assert text(templates.ALWAYS_OPENS, HI) == text(CHATML, HI)


def test_a_system_prompt_makes_text_a_chat_and_gives_way_to_the_rows_own() -> None:
    system = "<|im_start|>system\nbe good<|im_end|>\n"
    assert Chat(characters(CHATML), "be good").text(Row("hi", "")) == system + text(CHATML, HI)
    assert text(CHATML, HI, system="be good") == system + text(CHATML, HI)
    own = {"role": "system", "content": "be bad"}
    assert text(CHATML, own, HI, system="be good") == system.replace("good", "bad") + text(CHATML, HI)


@pytest.mark.parametrize("begun", ["The answer is", "The answer is ", " 4", "<think>\nhm", "hi"])
def test_a_last_message_of_the_assistant_is_continued(begun: str) -> None:
    last = {"role": "assistant", "content": begun}
    assert text(CHATML, HI, last) == text(CHATML, HI) + begun
    assert text(INST, HI, last) == f"{text(INST, HI)} {begun.strip()}"
    assert text(CHATML, HI, ANSWER, HI, last) == text(CHATML, HI, ANSWER, HI) + begun
    assert text(templates.NEVER_OPENS, HI, last) == text(CHATML, HI) + begun


def test_an_empty_last_message_of_the_assistant_is_refused() -> None:
    for content in ("", " \n"):
        assert "the assistant's and empty" in refused(CHATML, HI, {"role": "assistant", "content": content})


def test_a_template_that_drops_the_beginning_of_an_answer_is_refused() -> None:
    message = refused(CHATML.replace("message['content']", "message['content'][:3]"), HI, BEGUN)
    assert "does not appear in the chat" in message


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_template_without_a_generation_prompt_is_refused(end: str) -> None:
    message = refused(templates.NEVER_OPENS.replace("<|im_end|>\n", f"<|im_end|>{end}"), HI)
    assert "no generation prompt: it puts '<|im_start|>assistant\\n' before an answer" in message


def test_options_reach_the_template_and_an_unknown_one_is_refused() -> None:
    assert text(THINKING, HI, enable_thinking=False) == text(THINKING, HI) + "<think>\n\n</think>\n\n"
    assert text(THINKING, HI, enable_thinking=True) == text(THINKING, HI)
    message = refused(THINKING, HI, enable_thinkin=False)
    assert "data.template_options holds 'enable_thinkin'" in message
    assert "did you mean 'enable_thinking'?" in message
    for name in ("messages", "add_generation_prompt", "think", "assistant", "chat_template", "tokenize"):
        assert f"data.template_options holds {name!r}" in refused(THINKING, HI, **{name: ""})


def test_options_without_a_chat_are_refused() -> None:
    chat = Chat(characters(THINKING), "", {"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"data\.template_options holds enable_thinking, and every prompt is plain"):
        chat.require_used()
    chat.text(Row([HI], ""))
    chat.require_used()
    Chat(characters(THINKING)).require_used()


def test_no_template_is_an_error_with_the_key() -> None:
    assert "no chat template" in refused(None, HI)
    assert "data.system_prompt" in refused(None, HI)


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = characters()
    tokenizer.chat_template = {"default": CHATML, "rag": INST}
    assert Chat(tokenizer).text(Row([HI], "")) == text(CHATML, HI)
    tokenizer.chat_template = {"rag": INST}
    with pytest.raises(ConfigError, match=r"actor\.path has no default chat template"):
        Chat(tokenizer).text(Row([HI], ""))


def test_what_a_template_raises_names_the_row() -> None:
    system = {"role": "system", "content": "x"}
    assert "refuses messages with roles system, user (TemplateError: no system role)" in refused(
        templates.REFUSING, system, HI
    )
    assert "(TypeError: 'NoneType' object is not iterable)" in refused(templates.FRAGILE, {**HI, "tool_calls": None})
    assert "(ZeroDivisionError" in refused("{{ 1 / 0 }}", HI)
    assert "(TemplateSyntaxError" in refused("{% if %}", HI)
    assert "(UndefinedError" in refused("{{ messages[0].name.first }}", HI)


def test_roles_that_mean_nothing_to_the_model_are_refused() -> None:
    assert "message 0 has the role 'human': expected system" in refused(CHATML, {"role": "human", "content": "hi"})
    assert "did you mean 'assistant'?" in refused(CHATML, HI, {"role": "asistant", "content": "x"}, HI)
    named = CHATML.replace("{% for", "{% if messages[0].role == 'ipython' %}{% endif %}{% for", 1)
    assert text(named, {"role": "ipython", "content": "1"}).startswith("<|im_start|>ipython\n1")


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    for role in ("system", "developer", "tool"):
        message = refused(INST, {"role": role, "content": "be good"}, HI)
        assert f"leaves out message 0, of role '{role}'" in message
    assert "leaves out message 0, of role 'system'" in refused(INST, HI, system="be good")


def test_a_template_may_change_white_space_quote_tools_and_drop_earlier_thinking() -> None:
    spaced = {"role": "user", "content": "  a\r\n\n b  "}
    assert "a b" in text(CHATML.replace("message['content']", "message['content'].split() | join(' ')"), spaced)
    quoting = CHATML.replace("message['content']", "message['content'] | tojson")
    assert r"1\"2" in text(quoting, HI, ANSWER, {"role": "tool", "content": '1"2'})
    thought = {"role": "assistant", "content": "<think>hm</think>yes"}
    assert "hm" not in text(THINKING, HI, thought, HI)
