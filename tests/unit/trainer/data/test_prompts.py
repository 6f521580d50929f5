"""Rows as tokens, the order of draws and their seeds."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import DataError
from penstock.seeds import permutation, sampling_seed
from penstock_trainer.data.chat import Chat
from penstock_trainer.data.prompt_lengths import SetLengths, require_room
from penstock_trainer.data.prompts import (
    EncodedPrompt,
    digest,
    encode_row,
    require_batch,
    require_embedding,
)
from penstock_trainer.data.rows import Row
from penstock_trainer.data.shared_prompts import shared_prompts
from tests.unit.trainer.data.chat_models import CHATML, INST, NEVER_OPENS_AND_ENDS, characters

USER = [{"role": "user", "content": "hi"}]
BEGINS = "<s> $A"


def encode(row: Row, tokenizer: Any = None, system_prompt: str = "") -> EncodedPrompt:
    tokenizer = tokenizer or characters(CHATML, around=BEGINS)
    return encode_row(row, tokenizer, Chat(tokenizer, system_prompt))


def tokens(row: Row, tokenizer: Any = None) -> str:
    tokenizer = tokenizer or characters(CHATML, around=BEGINS)
    return "".join(tokenizer.convert_ids_to_tokens(encode(row, tokenizer).token_ids))


def test_plain_text_gets_the_tokenizers_special_tokens() -> None:
    row = Row("ab", "c", "numeric", {"k": 1})
    assert tokens(row) == "<s>ab"
    prompt = encode(row)
    assert (prompt.text, prompt.answer, prompt.reward, prompt.metadata) == ("ab", "c", "numeric", {"k": 1})


@pytest.mark.parametrize("around", [BEGINS, "<s> $A </s>", "$A </s>", "$A", "<s> <|im_start|> $A"])
def test_plain_text_begins_once_and_never_ends(around: str) -> None:
    """Whatever the tokenizer puts around a text, and also if the text brings it."""
    before = around.partition("$A")[0].replace(" ", "")
    assert tokens(Row("ab", ""), characters(around=around)) == f"{before}ab"
    assert tokens(Row(f"{before}ab", ""), characters(around=around)) == f"{before}ab"
    assert tokens(Row("<s>ab<s>", ""), characters(around=around)).endswith("<s>ab<s>")


def test_a_template_stands_around_plain_text_alone() -> None:
    tokenizer = characters(CHATML, around=BEGINS)
    rows = [Row("a{prompt}", ""), Row(USER, "")]
    template = Chat(tokenizer, prompt_template="1+1=2\n{prompt}=")
    plain, chat = (encode_row(row, tokenizer, template) for row in rows)
    assert (plain.text, plain.asked) == ("1+1=2\na{prompt}=", "a{prompt}")
    assert "".join(tokenizer.convert_ids_to_tokens(plain.token_ids)).startswith("<s>1")
    assert chat.text == Chat(tokenizer).text(rows[1])
    asked = Chat(tokenizer, "be good", prompt_template="Q: {prompt}").text(Row("hi", ""))
    assert asked == Chat(tokenizer, "be good").text(Row("Q: hi", ""))


def test_a_prompt_that_ends_a_text_is_refused() -> None:
    for around in (BEGINS, "$A </s>", "$A"):
        with pytest.raises(DataError, match=r"r line 4: the prompt ends with the model's end-of-text token"):
            encode(Row("ab</s>", "", place="r line 4"), characters(around=around))
    with pytest.raises(DataError, match=r"r line 4: the prompt ends with the model's end-of-text token"):
        encode(Row(USER, "", place="r line 4"), characters(NEVER_OPENS_AND_ENDS))
    assert tokens(Row("<s>", ""), characters(around="$A", eos="<s>")) == "<s>"  # it begins a text


def test_a_chat_gets_only_the_special_tokens_of_its_template() -> None:
    assert tokens(Row(USER, "")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens(Row(USER, ""), characters(INST, around=BEGINS)) == "<s>[INST] hi [/INST]"


def test_prompts_longer_than_the_context_are_counted_with_their_places_and_the_keys() -> None:
    rows = [Row("x" * length, "", place=f"rows.jsonl line {length}") for length in range(1, 21)]

    def counted(most: int) -> list[SetLengths]:
        sets = [SetLengths("data.train", most), SetLengths("data.eval", most)]
        for lengths, part in zip(sets, (rows, rows[:4]), strict=True):
            fitting = [row for row in part if lengths.add(row.place, len(encode(row).token_ids))]
            assert fitting == part[: most - 1]  # a token begins the text
        return sets

    require_room(counted(21))
    with pytest.raises(DataError) as caught:
        require_room(counted(4))
    message = str(caught.value)
    assert message.startswith("rows.jsonl line 4: the prompt has 5 tokens: expected at most 4 (")
    assert "17 of 20 in data.train (85.0%: rows.jsonl line 4, rows.jsonl line 5, " in message
    assert "rows.jsonl line 8, ...), 1 of 4 in data.eval (25.0%: rows.jsonl line 4); the longest has 21." in message
    assert "lower sampling.max_new_tokens, or raise rollout.engine.context_length" in message


def test_fewer_prompts_than_a_batch_names_both() -> None:
    require_batch(3, 3, "rows.jsonl (data.train.path)")
    with pytest.raises(DataError, match=r"holds 3 prompts and data\.batch_size is 4"):
        require_batch(3, 4, "rows.jsonl (data.train.path)")


def test_the_digest_depends_on_content_and_order() -> None:
    first, second = (encode(Row(text, "x", "", {"n": {1: 2}})) for text in "ab")
    digests = {digest(prompts) for prompts in ([], [first], [second], [first, second], [second, first])}
    assert len(digests) == 5
    assert digest([first, second]) == digest([encode(Row(text, "x", "", {"n": {1: 2}})) for text in "ab"])
    assert all(len(value) == 16 for value in digests)


@given(st.integers(0, 2**31 - 1), st.integers(0, 1000), st.integers(0, 200))
def test_a_permutation_holds_every_prompt_once(seed: int, epoch: int, length: int) -> None:
    assert sorted(permutation(seed, epoch, length)) == list(range(length))


def test_permutations_are_uniform_and_differ_by_epoch_and_seed() -> None:
    counts = Counter(tuple(permutation(0, epoch, 4)) for epoch in range(24_000))
    assert len(counts) == 24
    assert all(850 < count < 1150 for count in counts.values())
    assert permutation(0, 0, 50) != permutation(0, 1, 50)
    assert permutation(0, 1, 50) != permutation(1, 0, 50)


def test_order_and_seeds_never_change() -> None:
    """A run recorded by one release is resumed by the next: these values are part of the format."""
    assert permutation(0, 0, 10) == [1, 7, 6, 2, 0, 9, 8, 4, 5, 3]
    assert permutation(7, 3, 6) == [3, 2, 5, 4, 0, 1]
    assert [sampling_seed(0, ticket, index) for ticket in range(2) for index in range(2)] == [
        371309637,
        508173409,
        1555136245,
        816867156,
    ]


def test_a_token_without_an_embedding_names_its_row() -> None:
    rows = [Row("a", "", place="rows.jsonl line 1"), Row("az", "", place="rows.jsonl line 2")]
    tokenizer = characters()
    prompts = [encode_row(row, tokenizer, Chat(tokenizer)) for row in rows]
    highest = tokenizer.convert_tokens_to_ids("z")
    for row, prompt in zip(rows, prompts, strict=True):
        require_embedding(row, prompt, highest + 1)
    require_embedding(rows[0], prompts[0], highest)
    seen = rf"^rows\.jsonl line 2: the prompt has token id {highest}: expected ids below {highest}"
    with pytest.raises(DataError, match=seen):
        require_embedding(rows[1], prompts[1], highest)


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_sampling_seeds_of_a_group_are_31_bits_and_differ(seed: int, ticket: int) -> None:
    seeds = [sampling_seed(seed, ticket, index) for index in range(64)]
    assert len(set(seeds)) == 64
    assert all(0 <= value < 2**31 for value in seeds)


def test_sampling_seeds_are_scattered() -> None:
    seeds = [sampling_seed(0, ticket, index) for ticket in range(1000) for index in range(8)]
    assert len(set(seeds)) > 7990
    for bit in range(31):
        assert 0.45 < sum(seed >> bit & 1 for seed in seeds) / len(seeds) < 0.55


def test_held_out_prompts_that_are_trained_are_found_by_their_tokens() -> None:
    """The form of a row does not matter, nor what its answer is; nor a token that the tokenizer adds to a text."""
    train = [encode(Row("hi", "1"), system_prompt="be good"), encode(Row("ho", "2"))]
    chat = [{"role": "system", "content": "be good"}, *USER]
    other_turns = [*USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "ho"}]
    same = [
        *(encode(Row(chat, "other")), encode(Row("<s>ho", "2"))),  # the same tokens
        *(encode(Row("hi", "1")), encode(Row(USER, "1"))),  # without the system message, as text and as messages
        *(encode(Row(" ho\n", "2")), encode(Row("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", ""))),
    ]
    assert shared_prompts([encode(Row("h i", "1")), *same, encode(Row(other_turns, "2"))], train) == same
