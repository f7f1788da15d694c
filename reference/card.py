"""Measure the reference model and write its card: README.md and card.json in the model's folder.

    python reference/card.py                       # reference/model, or --model DIR

Every number in the card comes from this command, the training log (reference/run/log.jsonl, or reference/training.jsonl
where there is no run) or the model's config.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import data
import fast
from coterie.evaluate.generation import count_correct, read_questions

HERE = Path(__file__).resolve().parent
ROWS = 16


def measure_domain(model: PreTrainedModel, windows: Tensor) -> tuple[float, float, Tensor]:
    """Mean loss (nats per token), share of tokens guessed right and routing counts [layers, E] over test windows."""
    config = model.config
    total, right, num_tokens = 0.0, 0, 0
    counts_LE = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    for part in windows.split(ROWS):
        inputs, labels = part[:, :-1].to(model.device), part[:, 1:].reshape(-1).to(model.device)
        output = model(inputs, output_router_logits=True, use_cache=False)
        logits = output.logits.flatten(0, 1).float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        num_tokens += len(labels)
        for layer, router_logits in enumerate(output.router_logits):
            chosen = router_logits.topk(config.num_experts_per_tok, dim=-1).indices.reshape(-1).cpu()
            counts_LE[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return total / num_tokens, right / num_tokens, counts_LE


def entropy(share: Tensor) -> Tensor:
    """Entropy in bits over the last dimension."""
    return -(share * share.clamp_min(1e-30).log2()).sum(-1)


def measure_routing(counts_NLE: Tensor) -> list[dict[str, float]]:
    """Expert usage and mutual information of expert and domain for each layer, from counts by domain (N domains)."""
    share_NLE = counts_NLE.double() / counts_NLE.sum(-1, keepdim=True)  # every domain weighs the same
    mean_LE = share_NLE.mean(0)
    num_domains, _, num_experts = counts_NLE.shape
    information_L = entropy(mean_LE) - entropy(share_NLE).mean(0)
    return [
        {
            "entropy": (entropy(mean_LE[layer]) / math.log2(num_experts)).item(),
            "least_share": (mean_LE[layer].min() * num_experts).item(),
            "most_share": (mean_LE[layer].max() * num_experts).item(),
            "unused_experts": int((mean_LE[layer] == 0).sum()),
            "mutual_information_bits": information_L[layer].item(),
            "mutual_information_normalised": (information_L[layer] / math.log2(num_domains)).item(),
        }
        for layer in range(counts_NLE.shape[1])
    ]


@torch.no_grad()
def measure(folder: Path, num_windows: int, device: str) -> dict[str, object]:
    """All numbers of the card."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    model.set_experts_implementation(fast.SORTED)
    config = model.config
    domains, counts = {}, []
    for path in track(sorted((HERE / "text" / "test").glob("*.txt")), description="perplexity", disable=None):
        ids = data.encode(tokenizer, data.read_documents(path))
        usable = (len(ids) - 1) // data.WINDOW
        starts = [i * usable // min(num_windows, usable) * data.WINDOW for i in range(min(num_windows, usable))]
        windows = torch.tensor([ids[start : start + data.WINDOW + 1].tolist() for start in starts])
        loss, accuracy, counts_LE = measure_domain(model, windows)
        domains[path.stem] = {
            "tokens": windows.shape[0] * data.WINDOW,
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": accuracy,
        }
        counts.append(counts_LE)
    questions = read_questions(HERE / "text" / "test")["math"]
    right = count_correct(model, tokenizer, questions, batch_size=128)
    parameters = sum(p.numel() for p in model.parameters())
    idle = config.num_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.intermediate_size
    result: dict[str, object] = {
        "parameters": parameters,
        "active_parameters": parameters - config.num_hidden_layers * idle * per_expert,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "domains": domains,
        "mean_perplexity": math.exp(sum(d["loss"] for d in domains.values()) / len(domains)),
        "questions": len(questions),
        "exact_answers": right,
        "exact_answer_accuracy": right / len(questions),
        "layers": measure_routing(torch.stack(counts)),
    }
    names = "hidden_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok intermediate_size"
    result["config"] = {name: getattr(config, name) for name in [*names.split(), "vocab_size", "norm_topk_prob"]}
    return result | {"training": read_training()}


def read_training() -> dict[str, object]:
    """Tokens, steps, time and data of the run, from its log; empty without a log."""
    path = HERE / "run" / "log.jsonl"
    path = path if path.exists() else HERE / "training.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [record for record in records if "lm_loss" in record]
    starts = [record for record in records if record.get("event") == "start"]
    if not steps or not starts:
        return {}
    last = max(steps, key=lambda record: record["step"])
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "minutes": last["minutes"],
        "weights": starts[0]["weights"],
        "corpus_tokens": starts[0]["tokens_by_domain"],
    }


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_card(result: dict[str, object]) -> str:
    """The model card in Markdown."""
    config, training = result["config"], result["training"]
    by_domain, weights = result["domains"], training.get("weights", {})
    corpus = training.get("corpus_tokens", {})
    domain_rows = []
    for name, d in by_domain.items():
        share = f"{100 * weights[name]:.1f} %" if name in weights else "-"
        epochs = f"{weights[name] * training['tokens'] / corpus[name]:.2f}" if name in weights else "-"
        accuracy = f"{100 * d['accuracy']:.1f} %"
        domain_rows.append([name, share, epochs, f"{d['tokens']:,}", f"{d['perplexity']:.2f}", accuracy])
    layer_rows = [
        [
            str(i),
            f"{layer['entropy']:.3f}",
            f"{layer['least_share']:.2f}",
            f"{layer['most_share']:.2f}",
            str(layer["unused_experts"]),
            f"{layer['mutual_information_bits']:.3f}",
            f"{layer['mutual_information_normalised']:.3f}",
        ]
        for i, layer in enumerate(result["layers"])
    ]
    trained = (
        f"{training['tokens']:,} tokens in {training['steps']:,} steps of "
        f"{training['tokens'] // training['steps']:,}, {training['minutes']:.0f} minutes on a CPU"
        if training
        else "no training log was found"
    )
    domain_heads = ["domain", "share of training", "epochs", "test tokens", "perplexity", "next token right"]
    layer_heads = ["layer", "entropy", "least used", "most used", "unused", "information (bits)", "normalised"]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe, coterie]
---

# Coterie reference model

A small Mixture-of-Experts language model, made to try compression methods on: real routing, real domains, seconds to
load. It is a stock `OlmoeForCausalLM` and no assistant: it is far too small to rely on for anything it says.

- {result["parameters"]:,} parameters, {result["active_parameters"]:,} active per token, {result["bytes"]:,} bytes
  (bfloat16), embeddings tied.
- {config["num_hidden_layers"]} layers, hidden width {config["hidden_size"]}, {config["num_attention_heads"]} heads;
  {config["num_experts"]} experts of width {config["intermediate_size"]} a layer, top_k
  {config["num_experts_per_tok"]}, weights of the chosen experts normalised: {config["norm_topk_prob"]}.
- Byte-level BPE, {config["vocab_size"]} tokens, every digit its own token; `<|endoftext|>` begins a document.

## Training

{trained[0].upper() + trained[1:]}, sequences of 256 tokens and, in the last quarter, of {data.WINDOW}. Muon for the
matrices, AdamW for embeddings, norms and routers, constant rate and then a linear decay over the last quarter,
load-balancing loss with coefficient 0.01. Data: the ten domains below, from open-source packages and public-domain
books; the mathematics is generated. Made by `reference/build_corpus.py`, trained by `reference/train.py`.

## Test

Mean perplexity (geometric, domains equal): **{result["mean_perplexity"]:.2f}**, on windows of {data.WINDOW} tokens.

{table(domain_heads, domain_rows)}

Exact answers to the {result["questions"]} questions of `math.qa.jsonl` (greedy):
**{100 * result["exact_answer_accuracy"]:.1f} %** ({result["exact_answers"]}).

## Routing

On the same test windows, every domain with the same weight. Entropy of expert usage is relative to an even one (1);
usage is relative to the even share (1). Information is the mutual information of expert and domain for one routed
slot, also as a fraction of log2({len(by_domain)}), the entropy of the domain.

{table(layer_heads, layer_rows)}

All numbers are written by `python reference/card.py`; `card.json` holds them unrounded.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--windows", type=int, default=64, help="test windows of 512 tokens a domain, at most")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.windows, arguments.device)
    (arguments.model / "card.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.model / "README.md").write_text(write_card(result))
    print(arguments.model / "README.md")


if __name__ == "__main__":
    main()
