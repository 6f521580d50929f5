"""Prompts and completions for people, of real layouts of chats."""

import pytest

from penstock.readable import cut, differing, last_line, question_of, without_end

LAYOUTS = {
    "chatml": "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] {} [/INST]",
    "deepseek": "<\uff5cbegin\u2581of\u2581sentence\uff5c>be good<\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c><think>\n",
    "phi": "<|user|>\n{}<|end|>\n<|assistant|>\n",
    "gpt-oss": "<|start|>user<|message|>{}<|end|><|start|>assistant",
    "granite": "<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_question_of_a_chat_is_its_last_user_message(layout: str) -> None:
    question = "Compare a < b | c > d with [x].\nWhat is 2 + 2?"
    assert question_of(layout.format(question)) == question
    assert question_of(layout.format("first") + "yes" + layout.format(question)) == question


def test_the_question_of_messages_and_of_text() -> None:
    user, assistant = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"}
    assert question_of([{"role": "user", "content": "1 + 1?"}, assistant, user, assistant]) == "2 + 2?"
    assert question_of([assistant]) == "It is"
    assert question_of([]) == ""
    for text in ("2+5=7\n9+6=", "user: 3\n<b>user</b> </s", ""):
        assert question_of(text) == text


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|im_end|>\n", "</s>", "<|eot_id|> <|end_of_text|>", "<end_of_turn>\n", "<eos>"]
)
def test_a_completion_is_shown_without_the_tokens_that_end_it(end: str) -> None:
    assert without_end("a <b> </s> 4" + end) == "a <b> </s> 4"
    assert without_end("4\n") == "4\n"


def test_a_long_text_says_how_much_of_it_is_left_out() -> None:
    assert last_line("2+5=7\n  9+6= \n \n") == "9+6="
    assert last_line(" \n") == ""
    text = "begin " + "x" * 2000 + " end"
    shown = cut(text, 20)
    assert shown == "begin xxxx [1,990 characters] xxxxxx end"
    assert cut(text, len(text)) == text


@pytest.mark.parametrize("most", [20, 72, 240])
def test_a_cut_makes_a_text_shorter_or_leaves_it_whole(most: int) -> None:
    for length in range(4 * most):
        text = "x" * length
        shown = cut(text, most)
        saved = length - len(shown)
        assert shown == text if saved == 0 else saved >= len(" [10 characters] ")
    assert len(cut("x" * 9 * most, most)) <= most + len(" [1,920 characters] ")


def test_what_differs_between_prompts_is_shown() -> None:
    assert differing(["1+1=2\n2+5=", "1+1=2\n3+3="]) == ["2+5=", "3+3="]
    assert differing(["Say the word.\nred\nNo more.", "Say the word.\nblue\nNo more."]) == ["red", "blue"]
    assert differing(["a\nb", "a\nb"]) == ["b", "b"]
    assert differing(["a\nb"]) == ["b"]
    assert differing([]) == []
    assert differing(["a\nb", "a\nb\nc"]) == ["b", "c"], "the first has nothing else"
    task = "Translate the following English word into French and answer with that word alone, please: "
    assert differing([f"{task}red", f"{task}dark blue"]) == ["red", "dark blue"]
