"""The log-probabilities that weights really give: plain transformers, in a process of its own.

Reads requests and writes answers, one JSON line each. A request has a prompt, tokens, and for each range of tokens the
model that sampled it: [[folder, end], ...]. `keep_cache`: whether a model continues with the keys and values that
earlier models computed, or computes its own for all tokens before. The answer has log p of each token, at `temperature`
if the request has one.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

MODELS: dict[str, Any] = {}


def model_of(folder: str) -> Any:
    if folder not in MODELS:
        MODELS[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return MODELS[folder]


def logprobs(request: dict[str, Any]) -> list[float]:
    prompt, tokens = request["prompt"], request["tokens"]
    ids = prompt + tokens
    found: list[float] = []
    cache = DynamicCache()
    first_row = 0  # the first row without logits; a token is sampled from the row before it
    for folder, end in request["runs"]:
        last_row = len(prompt) + end - 1
        if request["keep_cache"]:
            rows = ids[first_row:last_row]
            logits = model_of(folder)(torch.tensor([rows]), past_key_values=cache, use_cache=True).logits[0]
            start = len(prompt) - 1 - first_row if not found else 0
        else:
            logits = model_of(folder)(torch.tensor([ids[:last_row]])).logits[0]
            start = len(prompt) - 1 + len(found)
        said = torch.log_softmax(logits[start:].float() / request.get("temperature", 1.0), -1)
        found += said.gather(1, torch.tensor(tokens[len(found) : end])[:, None])[:, 0].tolist()
        first_row = last_row
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        print(json.dumps([logprobs(each) for each in json.loads(line)]), flush=True)
