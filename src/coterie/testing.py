"""Test support for Coterie and for whoever adds to it: tiny checkpoints, tiny text, conformance checks.

Everything here is random but seeded, and small enough for a laptop: a checkpoint has some 300 kB. The weights are drawn
wide enough that routing varies and that every expert matters, which the usual initialisation of 0.02 does not give.

    from coterie.testing import check_method, tiny_checkpoint, tiny_text

    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=16)
    text = tiny_text(tmp_path / "text")
    check_method("my-recipe")  # raises AssertionError, and says which promise is broken
    check_family("qwen3_moe")

This is the one file of Coterie with a table of families: their smallest sensible configs. The library itself has none.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coterie.artifact import file_digest
from coterie.compress.apply import Result, compress
from coterie.compress.recipes import get_recipe
from coterie.errors import Infeasible, OutputExists, UnknownName
from coterie.model.checkpoint import Checkpoint
from coterie.model.layers import Architecture, MoELayer, quiet
from coterie.model.load import load_model
from coterie.model.seam import intercepted
from coterie.profile.calibration import DOCUMENT_SEPARATOR
from coterie.profile.run import profile

#: Token id of the end of text in every tiny tokenizer; the ids before it are the 256 bytes.
END_OF_TEXT_ID = 256

# Experts 8, top_k 2, hidden 32, expert width 24, dense width 40, shared width 56, vocabulary 272: no two axes of one
# length, so no test can pass with two axes confused. Widths are multiples of 8, as grouped kernels want them.
_COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56,
        "num_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 16, "norm_topk_prob": True,
    },
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "num_key_value_heads": 2,
        "q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64,
        "max_position_embeddings": 131072,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3, "intermediate_size": 40, "moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "intermediate_size": 40,
        "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    "granitemoe": {
        "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 1.5,
    },
}  # fmt: skip

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_MODEL_CARD = "---\ntags: [test]\n---\n\n# A tiny random model\n\nMade by `coterie.testing`; it knows nothing.\n"


def tiny_families() -> tuple[str, ...]:
    """Return the model types that `tiny_checkpoint` can make."""
    return tuple(_FAMILIES)


def tiny_checkpoint(
    path: str | Path,
    model_type: str = "olmoe",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_changes: Any,
) -> Path:
    """Write a tiny random checkpoint in the layout that its family has on the hub, with all that comes with a model.

    Beside the weights there are a byte-level tokenizer (256 bytes and the end of text), a chat template, a generation
    config and a model card. A seed always gives the same bytes, and a tensor's values depend on seed, name and shape
    only: two checkpoints that differ in one config key have all tensors in common that the key does not reach.

    Args:
        path: the folder to write; made when missing, must be empty.
        model_type: one of `tiny_families`.
        seed: seed of the weights.
        dtype: number format of the weights on disk.
        **config_changes: config keys to set, for example ``num_hidden_layers=4``.

    Returns:
        The folder.

    Raises:
        UnknownName: a model type or config key that does not exist.
        OutputExists: the folder is not empty.
    """
    folder = Path(path)
    if model_type not in _FAMILIES:
        raise UnknownName("tiny family", model_type, _FAMILIES)
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputExists(f"{folder} is not empty; tiny_checkpoint writes a new folder")
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    for key in config_changes:
        if not hasattr(defaults, key):
            raise UnknownName(f"config key of {model_type}", key, defaults.to_dict())
    config = config_class(**(_COMMON | _FAMILIES[model_type] | config_changes))
    model_class: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    with quiet(), torch.random.fork_rng(devices=[]):
        model = model_class._from_config(config, dtype=torch.float32)
        draw_weights(model, seed)
        model.save_pretrained(folder)
        if dtype != torch.float32:
            # Loading decides which tensors a family keeps in float32.
            model = model_class.from_pretrained(folder, dtype=dtype)
            model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(_MODEL_CARD, encoding="utf-8")
    return folder


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw all saved tensors of a model anew, in place, such that routing varies and every expert matters.

    Matrices have a standard deviation of 0.3 (embeddings 0.5), norm weights are around 1, biases around 0 with 0.1.
    """
    drawn: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point() or tensor.data_ptr() in drawn:
            continue  # tied tensors are drawn once
        drawn.add(tensor.data_ptr())
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(_scaled(name, tensor, noise))


def _scaled(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    if "bias" in name or tensor.ndim < 2:
        is_norm = tensor.ndim == 1 and bool((tensor == 1).all())
        return 0.1 * noise + (1.0 if is_norm else 0.0)
    return (0.5 if "embed" in name else 0.3) * noise


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes and ``<|endoftext|>``."""
    # Ids in the order of the bytes' printable stand-ins; which byte gets which id does not matter.
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary[DOCUMENT_SEPARATOR] = END_OF_TEXT_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_SEPARATOR,
        eos_token=DOCUMENT_SEPARATOR,
        pad_token=DOCUMENT_SEPARATOR,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_text(
    path: str | Path, *, domains: tuple[str, ...] = ("prose", "code"), documents: int = 12, seed: int = 0
) -> Path:
    """Write a text folder: one ``*.txt`` file a domain, and a ``*.qa.jsonl`` file of sums beside the first.

    The domain "code" is pseudo-code; any other name is pseudo-prose in a vocabulary of its own. A document has some
    1.7 kB, and a seed always gives the same bytes.

    Args:
        path: the folder to write; made when missing.
        domains: names of the domains.
        documents: number of documents in each domain.
        seed: seed of the text.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        source = random.Random(f"{seed} {domain}")
        lines = _code_lines(source) if domain == "code" else _prose_lines(source)
        texts = (_document(lines, 1700) for _ in range(documents))
        content = f"\n{DOCUMENT_SEPARATOR}\n".join(texts)
        (folder / f"{domain}.txt").write_text(content + "\n", encoding="utf-8", newline="\n")
    source = random.Random(f"{seed} questions")
    with (folder / f"{domains[0]}.qa.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _ in range(6):
            a, b = source.randint(1, 49), source.randint(1, 49)
            file.write(json.dumps({"question": f"Q: {a} + {b} = ?\nA:", "answer": f" {a + b}"}) + "\n")
    return folder


def _document(lines: Iterator[str], length: int) -> str:
    text = ""
    while len(text) < length:
        text += next(lines) + "\n"
    return text.rstrip("\n")


def _words(source: random.Random, count: int) -> list[str]:
    onsets = source.sample(["b", "br", "d", "f", "g", "gl", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v"], 9)
    vowels = source.sample(["a", "e", "i", "o", "u", "ai", "ee", "ou"], 4)
    codas = ["", "", source.choice("lmnr"), source.choice("dkst")]

    def syllable() -> str:
        return source.choice(onsets) + source.choice(vowels) + source.choice(codas)

    return ["".join(syllable() for _ in range(source.choice((1, 2, 2, 3)))) for _ in range(count)]


def _prose_lines(source: random.Random) -> Iterator[str]:
    words = _words(source, 160)
    weights = [1 / (rank + 2) for rank in range(len(words))]  # Zipf: a few words do most of the work
    while True:
        sentences = []
        for _ in range(source.randint(2, 4)):
            chosen = source.choices(words, weights, k=source.randint(4, 11))
            comma = source.randrange(1, len(chosen))
            chosen[comma - 1] += "," if len(chosen) > 7 else ""
            sentences.append(" ".join(chosen).capitalize() + source.choice("...?!"))
        yield " ".join(sentences)


def _code_lines(source: random.Random) -> Iterator[str]:
    names = [f"{word}_{source.randrange(100):02d}" for word in _words(source, 24)]
    while True:
        function, a, b, result = (source.choice(names) for _ in range(4))
        yield f"def {function}({a}: int, {b}: int = {source.randrange(256)}) -> int:"
        for _ in range(source.randint(2, 5)):
            operator = source.choice(("+", "-", "*", "//", "%", "^", "&"))
            yield f"    {result} = ({a} {operator} {source.randrange(1, 4096):#06x}) << {source.randrange(8)}"
            yield f"    if {result} >= {b}[{source.randrange(16)}]:"
            yield f"        {a}, {b} = {b}, {{{source.randrange(64)}: {result}}}"
        yield f"    return {result};  # {source.randrange(10**6)}\n"


def check_method(recipe: str, *, model_type: str = "olmoe") -> None:
    """Check that a recipe keeps the promises that every method must keep, on tiny checkpoints and the real path.

    Full size is bit-identical; half size is a whole checkpoint with all that came with the model, in the predicted
    bytes, the same bytes every time, and independent of the order of the experts; experts that no token chose and that
    equal another one go without a trace; a wish that cannot be routed is refused and leaves nothing behind; the input
    is not written. Merging recipes are checked with both router forms. Takes some ten seconds.

    Args:
        recipe: name of the recipe.
        model_type: the tiny family for all checks but the one on unused experts.

    Raises:
        AssertionError: a promise is broken; the message says which, where and by how much.
        UnknownName: no such recipe or family.
    """
    routers = ("plain", "map") if get_recipe(recipe).merges else ("plain",)
    with _workshop() as shop:
        model = tiny_checkpoint(shop.folder / "model", model_type)
        permuted = shop.edited(model, _permute_experts)
        redundant = shop.edited(tiny_checkpoint(shop.folder / "glm4_moe", "glm4_moe"), _make_half_redundant)
        before = _digests(model)
        for router in routers:
            what = f"{recipe}, router {router}"
            shop.check_full_size(model, recipe, router)
            result = shop.compress(model, recipe, router, experts=4)
            check_result(model, result)
            again = shop.compress(model, recipe, router, experts=4, fresh_profile=True)
            digests = [_digests(each.out, "*.safetensors") for each in (result, again)]
            _require(digests[0] == digests[1], f"{what}: equal input, unequal bytes")
            other = shop.compress(permuted, recipe, router, experts=4)
            _require_close(shop.logits(other.out), shop.logits(result.out), f"{what}: another order of the experts")
            lean = shop.compress(redundant, recipe, router, experts=4)
            _require_close(shop.logits(lean.out), shop.logits(redundant), f"{what}: without unused copies of experts")
            shop.check_refusal(model, recipe, router)
        _require(_digests(model) == before, f"{recipe}: the model folder was written")


def check_family(model_type: str) -> None:
    """Check that a tiny family goes through profile and compress and that the results keep their promises.

    Full size is bit-identical, in bfloat16 too; dropping experts that a text never chooses leaves the logits on that
    text as they were; a merged half is whole in both router forms and independent of the order of the experts.

    Raises:
        AssertionError: a promise is broken.
        ArchitectureMismatch: a layer does not compute what its canonical experts compute.
        UnknownName: no such tiny family.
    """
    with _workshop() as shop:
        model = tiny_checkpoint(shop.folder / "model", model_type)
        _, info = _load_stock(model)
        _require(not any(info.values()), f"{model_type}: the stock class does not load it whole: {info}")
        narrow = tiny_checkpoint(shop.folder / "bfloat16", model_type, dtype=torch.bfloat16)
        permuted = shop.edited(model, _permute_experts)
        for router in ("plain", "map"):
            shop.check_full_size(narrow, "mergemoe", router)
            result = shop.compress(model, "mergemoe", router, experts=4)
            check_result(model, result)
            other = shop.compress(permuted, "mergemoe", router, experts=4)
            what = f"{model_type}, router {router}: another order of the experts"
            _require_close(shop.logits(other.out), shop.logits(result.out), what)
        shop.check_dropping_unused(model_type)


def check_result(model: str | Path, result: Result) -> None:
    """Check that a result is a whole checkpoint that says the truth about itself.

    Args:
        model: the checkpoint that the result was made from.
        result: what `coterie.compress` returned.

    Raises:
        AssertionError: a tensor or file is missing or changed that should not be, a map or a number is wrong.
    """
    source, made = Checkpoint.open(model), Checkpoint.open(result.out)
    layers = Architecture.of(source).layers
    mapped = result.plan.router == "map"
    _require(made.num_bytes == result.plan.predicted_bytes, f"{made.num_bytes} bytes, not as the plan predicted")
    for file in source.other_files():
        copy = result.out / file.name
        _require(copy.is_file() and copy.read_bytes() == file.read_bytes(), f"{file.name} was not carried along")
    if not mapped:
        new_model, info = _load_stock(result.out)
        _require(not any(info.values()), f"{result.out} does not load whole: {info}")
        counts = [layer.num_experts for layer in Architecture.of(made).layers]
        _require(counts == [size.num_experts for size in result.plan.sizes], f"{counts} experts, not as planned")
    else:
        new_model = load_model(result.out)
    old, new = load_model(model).state_dict(), new_model.state_dict()
    touched = tuple(name for layer in layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
    for name in old.keys() | new.keys():
        if not name.startswith(touched):
            _require(name in old and name in new and torch.equal(old[name], new[name]), f"{name} is not as it was")
    for layer, entry in zip(layers, result.manifest["layers"], strict=True):
        _check_map(layer, entry)


def _check_map(layer: MoELayer, entry: dict[str, Any]) -> None:
    expert_map, count = entry["expert_map"], entry["num_experts_after"]
    where = f"{layer.block}: expert_map {expert_map}"
    _require(len(expert_map) == layer.num_experts, f"{where} has not {layer.num_experts} entries")
    _require(set(expert_map) - {-1} == set(range(count)), f"{where} does not reach each of {count} experts")
    for new, centre in enumerate(entry["centres"] or ()):
        _require(centre is None or expert_map[centre] == new, f"{where} does not send centre {centre} to {new}")


class _Shop:
    """A folder of checkpoints under test, with the text and the profiles that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._text = tiny_text(folder / "text", documents=4)
        self._profiles: dict[Path, Any] = {}
        self._count = 0

    def new_path(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{self._count}-{name}"

    def compress(self, model: Path, recipe: str, router: Any, *, fresh_profile: bool = False, **wish: Any) -> Result:
        if fresh_profile or model not in self._profiles:
            self._profiles[model] = profile(model, text=self._text, tokens=2048, seq_len=64, sample_tokens=512)
        out = self.new_path(f"{recipe}-{router}")
        return compress(model, out, recipe=recipe, router=router, profile=self._profiles[model], **wish)

    def edited(self, model: Path, edit: Callable[[PreTrainedModel, tuple[MoELayer, ...]], None]) -> Path:
        """Copy a checkpoint with its weights changed in memory, through the stock classes."""
        loaded, out = load_model(model), self.new_path("edited")
        with quiet(), torch.no_grad():
            edit(loaded, Architecture.of(Checkpoint.open(model)).layers)
            loaded.save_pretrained(out)
        for file in Checkpoint.open(model).other_files():
            shutil.copyfile(file, out / file.name)
        return out

    def logits(self, model: Path, ids: Tensor | None = None) -> Tensor:
        """Return the logits on given or on seeded random tokens."""
        if ids is None:
            ids = torch.randint(END_OF_TEXT_ID, (4, 48), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return load_model(model)(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    def check_full_size(self, model: Path, recipe: str, router: str) -> None:
        result = self.compress(model, recipe, router, keep=1.0)
        source, made = Checkpoint.open(model), Checkpoint.open(result.out)
        what = f"{recipe}, router {router}, keep 1"
        _require(source.tensors.keys() == made.tensors.keys(), f"{what}: other tensors than before")
        with source.reader() as old, made.reader() as new:
            for name in source.tensors:
                a, b = old.read(name), new.read(name)
                _require(a.dtype == b.dtype and torch.equal(a, b), f"{what}: {name} is not bit-identical")

    def check_refusal(self, model: Path, recipe: str, router: str) -> None:
        wish = max(layer.top_k for layer in Architecture.of(Checkpoint.open(model)).layers) - 1
        there = set(self.folder.iterdir())
        try:
            self.compress(model, recipe, router, experts=wish)
        except Infeasible:
            left = sorted(path.name for path in set(self.folder.iterdir()) - there)
            _require(not left, f"{recipe}: the refusal of {wish} experts left {left} behind")
        else:
            raise AssertionError(f"{recipe}: {wish} experts a layer, fewer than top_k, were not refused")

    def check_dropping_unused(self, model_type: str) -> None:
        """Drop a quarter of the experts, none of which a two-letter text chooses: its logits must stay."""
        # Where weights are not renormalised after the choice, dropped experts leave the softmax and logits do change.
        renormalises = hasattr(CONFIG_MAPPING[model_type](), "norm_topk_prob")
        changes: dict[str, Any] = {"norm_topk_prob": True} if renormalises else {}
        model = tiny_checkpoint(self.new_path("renormalised"), model_type, **changes)
        layers = Architecture.of(Checkpoint.open(model)).layers
        loaded = load_model(model)
        for letters in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"):
            text = self.new_path("letters")
            text.mkdir()
            (text / "letters.txt").write_text(letters, encoding="utf-8")
            ids = torch.tensor(tiny_tokenizer()(letters)["input_ids"])[None]
            if all(_fits(layer, used) for layer, used in zip(layers, _used_experts(loaded, ids), strict=True)):
                held = profile(model, text=text, tokens=2, seq_len=2)
                result = compress(model, self.new_path("dropped"), experts=6, recipe="frequency", profile=held)
                what = f"{model_type}: dropping experts that {letters!r} never chooses"
                _require_close(self.logits(result.out, ids), self.logits(model, ids), what)
                return
        raise AssertionError(f"{model_type}: every text chooses so many experts that no quarter can be dropped")


@contextmanager
def _workshop() -> Iterator[_Shop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other on tensors this small
    try:
        with tempfile.TemporaryDirectory(prefix="coterie-check-") as folder:
            yield _Shop(Path(folder))
    finally:
        torch.set_num_threads(threads)


def _load_stock(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    stock: Any = transformers.AutoModelForCausalLM
    with quiet():
        loaded, info = stock.from_pretrained(path, output_loading_info=True)
    return loaded, info


def _used_experts(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return for each layer the experts that the tokens choose."""
    used: list[Tensor] = []

    def look(module: torch.nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        used.append(torch.unique(index_TK))
        return type(module).forward.__wrapped__(module, hidden_TD, index_TK, weight_TK)  # type: ignore[attr-defined,no-any-return]

    with intercepted(model, look), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return used


def _fits(layer: MoELayer, used: Tensor) -> bool:
    """Tell whether the used experts are within the three quarters of each router group that will be kept."""
    group_size = layer.num_experts // layer.num_groups
    return bool((torch.bincount(used // group_size) <= group_size * 3 // 4).all())


def _permute_experts(model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> None:
    """Put the experts of each router group in another order, and their router rows with them."""
    for layer in layers:
        generator = torch.Generator().manual_seed(layer.index + 7)
        size = layer.num_experts // layer.num_groups
        order = torch.cat(
            [torch.randperm(size, generator=generator) + group * size for group in range(layer.num_groups)]
        )
        _reorder(model, layer, order, order)


def _make_half_redundant(model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> None:
    """Turn half of the experts into copies of others, and make the router never choose them."""
    for layer in layers:
        source = torch.tensor([5, 1, 2, 2, 1, 5, 6, 6])  # 1, 2, 5 and 6 stay
        _reorder(model, layer, source, torch.arange(8))
        for name, _ in layer.router_tensors:
            if name.endswith("bias"):
                model.state_dict()[name][torch.tensor([0, 3, 4, 7])] = -1e4


def _reorder(model: PreTrainedModel, layer: MoELayer, experts: Tensor, rows: Tensor) -> None:
    state = model.state_dict()
    for name, _ in model.get_submodule(layer.experts).named_parameters():
        tensor = state[f"{layer.experts}.{name}"]
        tensor.copy_(tensor[experts].clone())
    for name, axis in layer.router_tensors:
        state[name].copy_(state[name].index_select(axis, rows).clone())


def _digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.glob(pattern))}


def _require(condition: bool, message: str) -> None:
    # Not the assert statement: these checks must hold under python -O too.
    if not condition:
        raise AssertionError(message)


def _require_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    _require(error <= tolerance, f"{what} changes the logits by {error:.1e} of the largest (limit {tolerance:.0e})")
