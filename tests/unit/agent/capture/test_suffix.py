"""What can be known of a template, with templates of several kinds."""

import pytest

from penstock_agent.capture.chat_template import ChatTemplate
from penstock_agent.capture.messages import Message
from penstock_agent.capture.suffix import Suffixes
from tests.unit.agent.capture.tokenizers import make_tokenizer

CHATML = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("m.content }}", "m.content | trim }}"),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|e|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "space before the end": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} <|e|>"
        "{% else %}<|s|>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "alternating": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
        "{% endif %}{% endfor %}" + CHATML
    ),
    "drops thinking": CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    ),
}
NO_ANSWERS = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no') }}{% endfor %}"
UNKNOWN = {
    "numbers its turns": CHATML.replace("{{ m.role }}", "{{ loop.index }} {{ m.role }}"),
    "no token ends a turn": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    "no answers": "{% for m in messages %}{% if m.role == 'user' %}<|s|>{{ m.content }}<|e|>{% endif %}{% endfor %}",
    "tells how long it is": CHATML + "{{ messages | length }}",
    "refuses answers": CHATML + NO_ANSWERS,
}
USER: Message = {"role": "user", "content": "Well?"}
ANSWER: Message = {"role": "assistant", "content": "Yes."}


def of(source: str) -> tuple[ChatTemplate, Suffixes]:
    tokenizer = make_tokenizer(["<|s|>", "<|e|>"], source)
    template = ChatTemplate(tokenizer)
    return template, Suffixes(template, tokenizer)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("new", [" 3\n", "x<|e|>y", ""])
@pytest.mark.parametrize("cut", [True, False])
def test_a_turn_is_continued_as_the_template_does(kind: str, new: str, cut: bool) -> None:
    template, suffixes = of(TEMPLATES[kind])
    assert suffixes.end_token_id is not None
    messages = [USER, ANSWER, {"role": "user", "content": new}]
    whole = template.encode(template.text(messages, ()))
    end = whole.index(suffixes.end_token_id, whole.index(template.encode("Yes.")[-1]))
    path = whole[:end] if cut else whole[: end + 1]
    if cut and kind == "space before the end":
        path = whole[: end - 1]
    assert suffixes.after(path, ANSWER, messages[2:], ()) == whole[len(path) :]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_nothing_is_guessed_of_a_template_that_does_not_show_it(kind: str) -> None:
    template, suffixes = of(UNKNOWN[kind])
    assert suffixes.end_token_id is None
    assert suffixes.after(template.encode("x<|e|>"), ANSWER, [USER], ()) is None


def test_an_answer_that_was_not_sampled_is_not_appended() -> None:
    template, suffixes = of(CHATML)
    assert suffixes.after(template.encode("x<|e|>"), ANSWER, [USER, ANSWER, USER], ()) is None


def test_messages_that_the_template_refuses_are_unknown() -> None:
    template, suffixes = of(TEMPLATES["alternating"])
    assert suffixes.after(template.encode("x<|e|>"), ANSWER, [USER, USER], ()) is None
