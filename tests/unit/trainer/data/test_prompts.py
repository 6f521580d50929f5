"""Tokens, chat templates, the order of draws and their seeds."""

from collections import Counter
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import DataError
from penstock_trainer.data.datasets import Row
from penstock_trainer.data.prompts import EncodedPrompt, digest, encode_rows, require_batch, require_embeddings
from penstock_trainer.data.seeds import permutation, sampling_seed

BOS = 1
USER = [{"role": "user", "content": "hi"}]


class CharacterTokenizer:
    """One token per character, a beginning-of-text token, and a template that knows two roles."""

    def __init__(self, chat_template: str | None = "yes") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [ord(character) for character in text]

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        if any(message["role"] not in ("system", "user") for message in conversation):
            raise jinja2.TemplateError("unknown role")
        return "".join(f"<{message['role'][0]}>{message['content']}" for message in conversation) + "<a>"


def encode(row: Row, system_prompt: str = "", limit: int = 100, template: str | None = "yes") -> EncodedPrompt:
    return encode_rows([row], CharacterTokenizer(template), system_prompt, limit)[0]


def test_plain_text_gets_the_tokenizers_special_tokens() -> None:
    prompt = encode(Row("ab", "c", "numeric", {"k": 1}))
    assert prompt == EncodedPrompt("ab", (BOS, ord("a"), ord("b")), "c", "numeric", {"k": 1})


def test_a_chat_gets_only_those_of_its_template() -> None:
    prompt = encode(Row(USER, ""))
    assert prompt.text == "<u>hi<a>"
    assert prompt.token_ids == tuple(map(ord, prompt.text))


def test_a_system_prompt_makes_text_a_chat_and_gives_way_to_the_rows_own() -> None:
    assert encode(Row("hi", ""), "be good").text == "<s>be good<u>hi<a>"
    assert encode(Row(USER, ""), "be good").text == "<s>be good<u>hi<a>"
    own = [{"role": "system", "content": "be bad"}, *USER]
    assert encode(Row(own, ""), "be good").text == "<s>be bad<u>hi<a>"


def test_a_prompt_longer_than_the_context_names_its_place_and_the_keys() -> None:
    row = Row("x" * 9, "", place="rows.jsonl line 4")
    assert len(encode(row, limit=10).token_ids) == 10
    with pytest.raises(DataError, match=r"rows\.jsonl line 4: .* 10 tokens: expected at most 9 .*max_new_tokens"):
        encode(row, limit=9)


def test_templates_that_are_missing_or_refuse_are_one_clear_error() -> None:
    row = Row(USER, "", place="rows.jsonl line 4")
    with pytest.raises(DataError, match=r"line 4: .* no chat template: .*data\.system_prompt"):
        encode(row, template=None)
    with pytest.raises(DataError, match=r"line 4: .* refuses messages with roles tool \(unknown role\)"):
        encode(Row([{"role": "tool", "content": "x"}], "", place="rows.jsonl line 4"))


def test_fewer_prompts_than_a_batch_names_both() -> None:
    prompts = [encode(Row("a", ""))] * 3
    require_batch(prompts, 3, "rows.jsonl")
    with pytest.raises(DataError, match=r"holds 3 prompts and data\.batch_size is 4"):
        require_batch(prompts, 4, "rows.jsonl")


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
    prompts = encode_rows(rows, CharacterTokenizer(), "", 100)
    require_embeddings(rows, prompts, ord("z") + 1)
    with pytest.raises(DataError, match=r"^rows\.jsonl line 2: the prompt has token id 122: expected ids below 122"):
        require_embeddings(rows, prompts, ord("z"))


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
