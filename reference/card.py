"""Measure a reference model and write its card: README.md and card.json in the model's folder.

    python reference/card.py                               # reference/model
    python reference/card.py --model reference/glm4_moe    # or reference/qwen3_moe

Every number in the card comes from this command, the training log (that of the run in reference/run, or the kept one
where there is none) or the model's weights and config.

Shape suffixes: N domains, L layers with experts, E experts, T tokens, K top_k.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import data
import fast
from coterie.evaluate.generation import count_correct, read_questions
from families import FAMILIES, find_log

HERE = Path(__file__).resolve().parent
ROWS = 16


def measure_domain(model: PreTrainedModel, windows: Tensor) -> tuple[float, float, Tensor]:
    """Mean loss (nats per token), share of tokens guessed right and routing counts [layers, E] over test windows."""
    routers = [block.gate for block in fast.moe_blocks(model)]
    counts_LE = torch.zeros(len(routers), routers[0].num_experts, dtype=torch.int64)

    def count(layer: int, index_TK: Tensor) -> None:
        counts_LE[layer] += torch.bincount(index_TK.reshape(-1).cpu(), minlength=counts_LE.shape[1])

    hooks = [
        router.register_forward_hook(lambda module, arguments, output, layer=layer: count(layer, output[2]))
        for layer, router in enumerate(routers)
    ]
    total, right, num_tokens = 0.0, 0, 0
    for part in windows.split(ROWS):
        inputs, labels = part[:, :-1].to(model.device), part[:, 1:].reshape(-1).to(model.device)
        logits = model(inputs, use_cache=False).logits.flatten(0, 1).float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        num_tokens += len(labels)
    for hook in hooks:
        hook.remove()
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
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
    model = model.to(device).eval()
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
    experts = [block.experts for block in fast.moe_blocks(model)]
    num_experts, hidden_width, expert_width = experts[0].down_proj.shape
    idle = len(experts) * (num_experts - config.num_experts_per_tok)
    result: dict[str, object] = {
        "parameters": parameters,
        "active_parameters": parameters - idle * 3 * hidden_width * expert_width,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "domains": domains,
        "mean_perplexity": math.exp(sum(d["loss"] for d in domains.values()) / len(domains)),
        "questions": len(questions),
        "exact_answers": right,
        "exact_answer_accuracy": right / len(questions),
        "layers": measure_routing(torch.stack(counts)),
    }
    result["config"] = {
        "model_type": config.model_type,
        "hidden_size": hidden_width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_moe_layers": len(experts),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_experts": num_experts,
        "num_shared_experts": getattr(config, "n_shared_experts", 0),
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": expert_width,
        "vocab_size": config.vocab_size,
        "norm_topk_prob": config.norm_topk_prob,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return result | {"training": read_training(find_log(FAMILIES[config.model_type]))}


def read_training(path: Path) -> dict[str, object]:
    """Tokens, steps, time and data of a run, from its log; empty without a log."""
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


def write_structure(config: dict[str, object]) -> str:
    """Layers, heads and experts, as an item of the card's list."""
    dense = config["num_hidden_layers"] - config["num_moe_layers"]
    first = f" (the first {f'{dense} ' if dense > 1 else ''}dense)" if dense else ""
    shared = config["num_shared_experts"]
    text = (
        f"- {config['num_hidden_layers']} layers{first}, hidden width "
        f"{config['hidden_size']}, {config['num_attention_heads']} heads ({config['num_key_value_heads']} of keys and "
        f"values); {config['num_experts']} experts of width {config['intermediate_size']} a layer"
        f"{f' and {shared} shared' if shared else ''}, top_k {config['num_experts_per_tok']}, weights of the chosen "
        f"experts normalised: {config['norm_topk_prob']}."
    )
    return textwrap.fill(text, 120, subsequent_indent="  ")


def write_card(result: dict[str, object]) -> str:
    """The model card in Markdown."""
    config, training = result["config"], result["training"]
    family = FAMILIES[config["model_type"]]
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
            str(i + config["num_hidden_layers"] - config["num_moe_layers"]),
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
    text = (
        f"{trained[0].upper() + trained[1:]}, sequences of 256 tokens and, in the last quarter, of {data.WINDOW}. "
        "Muon for the matrices, AdamW for embeddings, norms and routers, constant rate and then a linear decay over "
        f"the last quarter, {family.BALANCING}. Data: the ten domains below, from open-source packages and "
        "public-domain books; the mathematics is generated. Made by `reference/build_corpus.py`, trained by "
        f"`reference/train.py --model={config['model_type']}`."
    )
    domain_heads = ["domain", "share of training", "epochs", "test tokens", "perplexity", "next token right"]
    layer_heads = ["layer", "entropy", "least used", "most used", "unused", "information (bits)", "normalised"]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, {config["model_type"]}, coterie]
---

# {family.TITLE}

A small Mixture-of-Experts language model, made to try compression methods on: real routing, real domains, seconds to
load. It is a stock `{family.MODEL.__name__}` and no assistant: it is far too small to rely on for anything it says.

- {result["parameters"]:,} parameters, {result["active_parameters"]:,} active per token, {result["bytes"]:,} bytes
  (bfloat16), embeddings {"tied" if config["tie_word_embeddings"] else "and head apart"}.
{write_structure(config)}
- Byte-level BPE, {config["vocab_size"]} tokens, every digit its own token; `<|endoftext|>` begins a document.

## Training

{textwrap.fill(text, 120, break_on_hyphens=False)}

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
