"""Tokenizer, token cache and the seeded order of the training windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 8192
WINDOW = 512
SEED = 20240229


def read_documents(path: Path) -> list[str]:
    """Documents of a text file, separated by lines that hold only the end mark."""
    return [part for part in path.read_text(encoding="utf-8").split(f"{END}\n") if part.strip()]


def load_tokenizer(folder: Path, texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, first trained there on a balanced sample of `texts` (domain to documents)."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sample_evenly(texts, 1_000_000), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END,
            bos_token=END,
            pad_token=END,
            clean_up_tokenization_spaces=False,
            model_max_length=1024,
        )
        fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def sample_evenly(texts: dict[str, list[str]], num_characters: int) -> list[str]:
    """Documents of each domain, in a seeded order, until there are `num_characters` of each."""
    chosen = []
    for domain in sorted(texts):
        num_left = num_characters
        for i in np.random.default_rng(0).permutation(len(texts[domain])):
            chosen.append(texts[domain][i][:num_left])
            num_left -= len(chosen[-1])
            if num_left <= 0:
                break
    return chosen


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Token ids (uint16) of all documents, each preceded by the end mark."""
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 1000):
        for ids in tokenizer(documents[start : start + 1000], add_special_tokens=False)["input_ids"]:
            parts += [end, np.array(ids, dtype=np.uint16)]
    return np.concatenate(parts)


def load_tokens(path: Path, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Token ids of a domain, cached at `path`; documents in a seeded order."""
    if not path.exists():
        order = np.random.default_rng(0).permutation(len(documents))
        encode(tokenizer, [documents[i] for i in order]).tofile(path)
    return np.fromfile(path, dtype=np.uint16)


def choose_weights(sizes: dict[str, int], num_tokens: int, boost: dict[str, float]) -> dict[str, float]:
    """Share of each domain: size ** 0.3, `boost` shares as given, at most four epochs where others can fill in."""
    free = {domain: size**0.3 for domain, size in sizes.items() if domain not in boost}
    weights = {domain: boost[domain] for domain in sizes if domain in boost}
    free_share = 1 - sum(weights.values())
    while free:
        total = sum(free.values())
        capped = {
            d: 4 * sizes[d] / num_tokens for d in free if free_share * free[d] / total > 4 * sizes[d] / num_tokens
        }
        if not capped or len(capped) == len(free):
            weights |= {d: free_share * share / total for d, share in free.items()}
            break
        weights |= capped
        free_share -= sum(capped.values())
        free = {d: share for d, share in free.items() if d not in capped}
    return {domain: weights[domain] for domain in sorted(weights)}


class Windows:
    """Windows of WINDOW + 1 tokens from all domains in a fixed order; `drawn` (windows per domain) is all its state."""

    def __init__(self, tokens: dict[str, np.ndarray], weights: dict[str, float], seed: int) -> None:
        self.tokens, self.weights, self.seed = tokens, weights, seed
        self.drawn = dict.fromkeys(weights, 0)

    def draw_one(self) -> np.ndarray:
        """Next window, of the domain furthest behind its share."""
        total = sum(self.drawn.values()) + 1
        domain = max(self.weights, key=lambda d: self.weights[d] * total - self.drawn[d])
        tokens = self.tokens[domain]
        per_epoch = (len(tokens) - WINDOW) // WINDOW
        epoch, place = divmod(self.drawn[domain], per_epoch)
        self.drawn[domain] += 1
        rng = np.random.default_rng([self.seed, epoch, *domain.encode()])
        shift = int(rng.integers(0, len(tokens) - per_epoch * WINDOW))
        start = shift + WINDOW * int(rng.permutation(per_epoch)[place])
        return tokens[start : start + WINDOW + 1]

    def draw(self, num_windows: int) -> Tensor:
        """[num_windows, WINDOW + 1] token ids."""
        return torch.from_numpy(np.stack([self.draw_one() for _ in range(num_windows)]).astype(np.int64))


def split(windows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [windows * (WINDOW / length), length] of windows [windows, WINDOW + 1]."""
    return windows[:, :-1].reshape(-1, length), windows[:, 1:].reshape(-1, length)
