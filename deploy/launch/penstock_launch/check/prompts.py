"""The run's prompts as the model gets them: what the trainer makes of the rows when it starts, with its own functions.

Owns what is shown of them. Importing this imports transformers, which takes seconds.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from statistics import median

from penstock.config import Config
from penstock.engine_limits import longest_sequence
from penstock.errors import PenstockError
from penstock_launch.doctor.report import Line, ok, problem, warning
from penstock_trainer.data.chat import Chats
from penstock_trainer.data.datasets import load_training_rows
from penstock_trainer.data.held_out import load_held_out
from penstock_trainer.data.prompts import EncodedPrompt, encode_row, episode_row
from penstock_trainer.data.rows import Row, require_rewards
from penstock_trainer.data.run_prompts import encode_prompts
from penstock_trainer.data.tokenizer import Vocabulary, load_vocabulary

WHAT, LENGTHS = "prompts", "lengths"
NUM_SHOWN = 2
MOST_ROWS = 100_000  # of a training set: they take half of the time that there is
NUM_TIMED = 500  # rows, which show how long the others will take
ENCODE_SECONDS = 60.0
FewRows = Mapping[str, Sequence[Row]]
"""Rows by the key of their set."""
BEGIN_CHARACTERS, END_CHARACTERS = 400, 200  # of a long prompt; the end is what the model continues


def encoded(config: Config, sets: FewRows) -> dict[str, list[EncodedPrompt]]:
    """Rows of sets, training and held out, as the trainer makes prompts of them at its start, with its errors."""
    if config.agent.enabled:
        own = {each.key: each.system_prompt for each in config.held_out_sets}
        of_set = {each.key: config.data.system_prompt_of(each.name) for each in config.data.training_sets} | own
        return {key: [episode_row(row, of_set[key]) for row in rows] for key, rows in sets.items()}
    tokenizer = load_vocabulary(config.actor.path).tokenizer
    chats = Chats(tokenizer, config.data)
    chat_of = {each.key: chats.of(each.name) for each in config.data.training_sets}
    for each in config.held_out_sets:
        chat_of[each.key] = chats.of_held_out(each.system_prompt, each.prompt_template)
    return {key: [encode_row(row, tokenizer, chat_of[key]) for row in rows] for key, rows in sets.items()}


def prompt_lines(config: Config, seconds: float = ENCODE_SECONDS) -> list[Line]:
    """The prompts of a run, training and held out: whether a run could use them, two of them, and their lengths.

    seconds: for their tokens; of rows that take longer, evenly spaced ones are looked at.
    """
    of_episodes, data = config.agent.enabled, config.data
    step, note = 1, ""
    try:
        train = load_training_rows(data, of_episodes=of_episodes, first=MOST_ROWS)
        held_out = load_held_out(config)
        require_rewards(train, config.all_rewards.functions)
        num_rows = len(train) + sum(map(len, held_out.values()))
        vocabulary = load_vocabulary(config.actor.path)
        lines = list(_limits(config, vocabulary))
        if num_rows > NUM_TIMED and not of_episodes:
            step = every(num_rows, _seconds_each(config, train), seconds)
            step = max(1, min(step, len(train) // data.batch_size))
            note = f" Looked at: 1 row of {step}, since all would take too long here." if step > 1 else ""
        note += _first_only(config, train)
        prompts = encode_prompts(config, train[::step], {name: rows[::step] for name, rows in held_out.items()})
    except PenstockError as error:
        return [problem(WHAT, f"{error}{note and '.'}{note}", "Correct the row or the key that is named.")]
    first = enumerate(prompts.train[:NUM_SHOWN], start=1)
    shown = [ok(f"prompt {number}", view(prompt, vocabulary)) for number, prompt in first]
    for left_out in prompts.too_long:
        seen = f"{left_out} are longer than engines generate to the end, less the longest completion, and are left out"
        advice = "Lower sampling.max_new_tokens, or raise rollout.engine.context_length, to use them too."
        lines.append(warning("too long", seen, advice))
    for each in config.held_out_sets:
        if shared := prompts.shared[each.name]:
            seen = f"{len(shared)} of {len(prompts.held_out[each.name])} prompts of {each.key} are training prompts too"
            advice = (
                f"Give {each.key} another split, path or seed: accuracy on prompts that were trained proves little."
            )
            lines.append(warning(each.key, seen, advice))
    if of_episodes:
        return [*shown, *lines, ok(LENGTHS, f"{len(train)} rows; the agent service renders each turn")]
    held_out_prompts = (each for some in prompts.held_out.values() for each in some)
    return [*shown, *lines, lengths_line(config, [*prompts.train, *held_out_prompts], vocabulary, note)]


def _first_only(config: Config, rows: Sequence[Row]) -> str:
    """What is said of sets of which only the first rows are looked at."""
    counts = Counter(row.dataset for row in rows)
    large = [
        each.key
        for each in config.data.training_sets
        if counts[each.name] == MOST_ROWS and each.section.size != MOST_ROWS
    ]
    return f" Of {' and '.join(large)}: the first {MOST_ROWS} rows; the trainer looks at all." if large else ""


def _seconds_each(config: Config, rows: Sequence[Row]) -> float:
    few: dict[str, list[Row]] = {}
    for each in config.data.training_sets:
        few[each.key] = [row for row in rows[:NUM_TIMED] if row.dataset == each.name]
    began = time.perf_counter()
    encoded(config, few)
    return (time.perf_counter() - began) / min(NUM_TIMED, len(rows))


def every(num_rows: int, seconds_each: float, seconds: float) -> int:
    """n, if there is time for each n-th of the rows; 1: for all."""
    return max(1, ceil(num_rows * seconds_each / seconds))


def _limits(config: Config, vocabulary: Vocabulary) -> list[Line]:
    context, own = config.rollout.engine.context_length, vocabulary.context_length
    if context <= own:
        return []
    seen = (
        f"rollout.engine.context_length is {context}: expected at most {own}, the positions of the model in actor.path"
    )
    return [warning(LENGTHS, seen, "Lower rollout.engine.context_length, or set it to 0 for the model's own.")]


def view(prompt: EncodedPrompt, vocabulary: Vocabulary) -> str:
    """What the model reads, special tokens and line breaks visible."""
    text = repr(vocabulary.tokenizer.decode(list(prompt.token_ids)) if prompt.token_ids else prompt.text)
    left_out = len(text) - BEGIN_CHARACTERS - END_CHARACTERS
    if left_out > 0:
        text = f"{text[:BEGIN_CHARACTERS]} [... {left_out} characters ...] {text[-END_CHARACTERS:]}"
    return f"{text} ({len(prompt.token_ids)} tokens)" if prompt.token_ids else text


def lengths_line(config: Config, prompts: Sequence[EncodedPrompt], vocabulary: Vocabulary, note: str = "") -> Line:
    """Of prompts that fit. note: on rows that were not looked at."""
    engine, new = config.rollout.engine, config.sampling.max_new_tokens
    lengths = [len(prompt.token_ids) for prompt in prompts]
    limit = longest_sequence(engine.context_length or vocabulary.context_length, engine.max_total_tokens or None)
    return ok(
        LENGTHS,
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens (median {median(lengths):g}), and up to "
        f"{new} new ones (sampling.max_new_tokens): at most {max(lengths) + new} of {limit} that an engine takes"
        f"{note and '.'}{note}",
    )
