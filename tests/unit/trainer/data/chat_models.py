"""Real tokenizers of characters with chat templates as models have them."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEVER_OPENS = CHATML.partition("{% if add_generation_prompt")[0]
NEVER_OPENS_AND_ENDS = NEVER_OPENS + "{{ eos_token }}"
ALWAYS_OPENS = NEVER_OPENS + "{{ '<|im_start|>assistant\n' }}"
# Needs no generation prompt, trims, and knows no system message.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# Drops earlier thinking, like Qwen3.
THINKING = (
    "{% for message in messages %}{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Fails in Python, not in Jinja, on tool calls that are null.
FRAGILE = (
    "{% for message in messages %}{% if message.tool_calls is defined %}"
    "{% for call in message.tool_calls %}{{ call.name }}{% endfor %}{% endif %}{% endfor %}" + CHATML
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def characters(template: str | None = None, *, around: str = "$A", eos: str = "</s>", bos: str = "<s>") -> Any:
    """A tokenizer of characters. around: what it puts around a plain text, such as `<s> $A </s>`."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *map(chr, range(10, 127))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    special = [(token, vocabulary[token]) for token in SPECIAL]
    raw.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer
