"""A real llama.cpp, from the package xllamacpp: what it predicts after tokens, and how it reads text."""

import json
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from coterie.model.quiet import quiet


@contextmanager
def llama(file, context=512):
    """Yield a running server of a GGUF file; skip the test where the package is not installed."""
    runtime = pytest.importorskip("xllamacpp", reason="llama.cpp comes with xllamacpp, which is not installed")
    settings = runtime.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
    settings.warmup, settings.fit_params, settings.verbosity = False, False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    # Half precision in between would hide what is to be seen.
    settings.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
    server = runtime.Server(settings)
    try:
        yield server
    finally:
        del server


def predicted(server, ids, num_tokens):
    """Return log-probabilities (V) of the token after some."""
    asked = {"prompt": ids, "n_predict": 1, "n_probs": num_tokens, "temperature": 0, "cache_prompt": False}
    # Whatever is predicted, a letter is chosen: half a character would not be told.
    asked["logit_bias"] = [[33, 1000.0]]
    said = server.handle_completions(asked)
    said = json.loads(said) if isinstance(said, str | bytes) else said
    found = torch.full((num_tokens,), float("nan"), dtype=torch.float64)
    for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    return found


def token_ids(server, text):
    """Return the tokens of a text."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["tokens"]


def stock_predicted(model, ids, dtype=torch.float32):
    """Return log-probabilities (V) of the token after some, in transformers."""
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
    return after(loaded, ids)


def after(loaded, ids):
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def numbers(count, below=256, seed=1):
    """Return some token ids."""
    return torch.randint(1, below, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
