"""What weights really say: plain transformers in a process of its own, for test_weights_sglang.

Reads requests, one JSON line each, and answers in kind. A request has a prompt, tokens, and for each run of tokens the
model that sampled it: [[folder, end], ...]. `keep_cache`: whether a model goes on with the keys and values that earlier
ones computed, or computes its own of all that came before. The answer holds log p of each token, at a `temperature`
where there is one.
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
    first_row = 0  # whose logits are not known yet: a token is sampled from the row before it
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
