"""The lines of `samples.jsonl`: what a person reads of a completion or an episode."""

import msgspec

from penstock.contracts import Completion, Node, PolicyIdentity, Score, VersionSpan, pack_float32, pack_int32
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.rollouts.samples import COMPLETION_CHARACTERS, TURN_CHARACTERS, SampleWriter
from tests.unit.trainer.data.chat_models import CHATML, characters
from tests.unit.trainer.episode_groups import context, episode, episode_group, sampled
from tests.unit.trainer.trainer_groups import scored_group

TOKENIZER = characters(CHATML)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def written(text: str, *, ended: bool = True) -> Completion:
    ids = [*ids_of(text), *[END] * ended]
    spans = (
        VersionSpan(PolicyIdentity(4, "0" * 16), 0, 1),
        VersionSpan(PolicyIdentity(5, "0" * 16), 1, len(ids)),
    )
    end = "stop" if ended else "length"
    return msgspec.structs.replace(
        Completion(pack_int32(ids), None, pack_float32([-1.0] * len(ids)), spans, "", "stop"), finish_reason=end
    )


def writer(most: int = 8, *, skip_special_tokens: bool = True) -> SampleWriter:
    return SampleWriter(TOKENIZER, (END,), most=most, skip_special_tokens=skip_special_tokens)


def test_a_line_has_what_was_recorded_of_the_completion() -> None:
    completions = [written("4"), written("five", ended=False), written("<s>6")]
    group = scored_group(12, [3], completions, [1.0, 0.0, None])
    ticket = msgspec.structs.replace(
        group.group.ticket, prompt="<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", answer="4"
    )
    scores = (
        Score(1.0, values=(1.0, 0.0)),
        Score(0.0, values=(0.0, 0.0)),
        Score(None, "judge: gone", values=(1.0, None)),
    )
    group = msgspec.structs.replace(
        group,
        group=msgspec.structs.replace(group.group, ticket=ticket),
        scores=scores,
        functions=("math", "judge"),
    )
    advantages = {CompletionIndex(0, 0): 1.5, CompletionIndex(0, 1): -1.5}
    lines = writer().lines(7, [group], advantages)
    assert [(line.step, line.ticket, line.index, line.version) for line in lines] == [
        (7, 12, index, 4) for index in (2, 0, 1)
    ]
    assert {(line.prompt, line.answer) for line in lines} == {("2 + 2?", "4")}
    assert [line.completion for line in lines] == ["6", "4", "five"]
    assert [(line.reward, line.failure, line.advantage) for line in lines] == [
        (None, "judge: gone", None),
        (1.0, "", 1.5),
        (0.0, "", -1.5),
    ]
    assert lines[0].rewards == {"math": 1.0, "judge": None}
    assert [(line.num_tokens, line.truncated) for line in lines] == [(3, False), (2, False), (4, True)]
    assert writer(skip_special_tokens=False).lines(7, [group], {})[0].completion == "<s>6"
    assert writer(most=0).lines(7, [group], advantages) == []


def test_a_completion_is_shown_up_to_the_string_that_ended_it() -> None:
    shown = SampleWriter(TOKENIZER, (END,), ("and", "e"), most=8, skip_special_tokens=True)
    texts = [shown.text(written(text, ended=False)) for text in ("five", "hand", "6")]
    assert texts == ["fiv", "h", "6"]


def test_a_long_text_is_cut_in_the_middle() -> None:
    group = scored_group(0, [3], [written("a" * 9000 + "answer"), written("b")], [1.0, 0.0])
    [line, _] = writer().lines(0, [group], {})
    assert len(line.completion) < COMPLETION_CHARACTERS + 40
    assert line.completion.startswith("aaa")
    assert line.completion.endswith("answer")
    assert line.num_tokens == 9007


def test_an_episode_is_its_turns_behind_the_first_prompt_without_the_layout_of_the_template() -> None:
    tree = [
        context(-1, ids_of("<|im_start|>user\nFind it.<|im_end|>\n<|im_start|>assistant\n")),
        turn(0, "look <b>"),
        context(1, ids_of("\n<|im_start|>tool\ntwo\nlines<|im_end|>\n<|im_start|>assistant\n"), "tool"),
        turn(2, "x" * 2 * TURN_CHARACTERS),
        context(3, ids_of("\n<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n")),
        turn(4, "7"),
        sampled(4, ids_of("a title"), auxiliary=True),
    ]
    [line] = writer().lines(3, [episode_group(0, [episode(tree, end="max_turns")], [1.0])], {})
    turns = line.completion.split("\n[")
    assert turns[0] == "[assistant] look <b>"
    assert turns[1] == "tool] two\nlines"
    assert len(turns[2]) < TURN_CHARACTERS + 60
    assert turns[3:] == ["user] assistant", "assistant] 7"]
    assert (line.prompt, line.truncated, line.advantage) == ("Guess 1-7", True, None)


def turn(parent: int, text: str) -> Node:
    return sampled(parent, [*ids_of(text), END])


def test_an_episode_in_which_nothing_was_sampled_has_no_text() -> None:
    [line] = writer().lines(3, [episode_group(0, [episode([], end="failure")], [None])], {})
    assert (line.completion, line.version, line.reward, line.failure) == ("", None, None, "the sandbox is gone")


def test_of_a_dropped_group_the_completions_without_a_reward_are_kept() -> None:
    group = scored_group(12, [3], [written("4"), written("5"), written("6")], [None, 1.0, None])
    lines = writer().dropped(7, group, "reward_failed")
    assert [(line.step, line.ticket, line.index, line.completion) for line in lines] == [
        (7, 12, 0, "4"),
        (7, 12, 2, "6"),
    ]
    assert {(line.dropped, line.reward, bool(line.failure)) for line in lines} == {("reward_failed", None, True)}
    assert len(writer(most=1).dropped(7, group, "reward_failed")) == 1
    assert writer(most=0).dropped(7, group, "reward_failed") == []
