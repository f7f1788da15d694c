"""Conformance: the promises that every recipe and every family must keep, checked on the real path."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from coterie.artifact import file_digest
from coterie.compress.allocators import ALLOCATORS
from coterie.compress.apply import Result, compress
from coterie.compress.decide import plan
from coterie.compress.recipes import RECIPES, get_recipe
from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import LayerEntry, Manifest, ResultForm
from coterie.model.quiet import quiet
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.profile.statistics import needs_gradients
from coterie.publish.card import CARD, is_own_card
from coterie.testing.agreement import check_accounting, check_budget, check_inspection, require
from coterie.testing.families import END_OF_TEXT_ID, ONE_WIDTH, SOFTMAX_OVER_ALL, UNROUTABLE
from coterie.testing.tiny import tiny_checkpoint, tiny_text, tiny_tokenizer

#: The width that slimming recipes leave of the tiny families' experts.
NARROW = 8


def check_method(recipe: str, *, model_type: str = "olmoe") -> None:
    """Check that a recipe keeps the promises that every method must keep, on tiny checkpoints and the real path.

    Full size is bit-identical; a smaller one is a whole checkpoint with all that came with the model, in the predicted
    bytes, the same bytes every time, and independent of the order of the experts; experts that no token chose and that
    equal another one, or neurons that do nothing, go without a trace; a target that cannot be met is refused and leaves
    nothing behind; the input is not written. Merging recipes are checked with both router forms. Takes some ten
    seconds.

    Less is asked of a recipe that reads no data: whose passes' ``needs`` are empty, and whose result is the same with
    profiles that are wrong. It cannot know which experts are not chosen. If its result changes with the seed, as a
    random choice does, it may depend on the order of the experts too.

    Args:
        recipe: name of the recipe.
        model_type: the tiny family for all checks but the one on unused experts or neurons.

    Raises:
        AssertionError: a promise is broken; the message says which, where and by how much.
        UnknownName: no such recipe or family.
    """
    routers = ("plain", "map") if get_recipe(recipe).merges else ("plain",)
    with _workshop() as shop:
        model = tiny_checkpoint(shop.folder / "model", model_type)
        permuted = shop.edited(model, _permute_experts)
        edit, without = _make_half_redundant, "without unused copies of experts"
        if "experts" not in _targets(recipe):
            edit, without = _make_neurons_idle, "without neurons that do nothing"
        redundant = shop.edited(tiny_checkpoint(shop.folder / "glm4_moe", "glm4_moe"), edit)
        before = _digests(model)
        for router in routers:
            what = f"{recipe}, router {router}"
            shop.check_full_size(model, recipe, router)
            result = shop.smaller(model, recipe, router)
            check_result(model, result)
            again = shop.smaller(model, recipe, router, fresh_profile=True)
            require(_weights(result) == _weights(again), f"{what}: equal input, unequal bytes")
            reads = bool(get_recipe(recipe).needs) or shop.reads_profile(model, permuted, recipe, router, result)
            if reads or not shop.depends_on_seed(model, recipe, router, result):
                reordered = shop.smaller(permuted, recipe, router)
                _require_close(
                    shop.logits(reordered.out), shop.logits(result.out), f"{what}: another order of the experts"
                )
            if reads:
                lean = shop.smaller(redundant, recipe, router)
                _require_close(shop.logits(lean.out), shop.logits(redundant), f"{what}: {without}")
            shop.check_refusal(model, recipe, router)
        require(_digests(model) == before, f"{recipe}: the model folder was written")


def check_family(model_type: str, *, thorough: bool = True) -> None:
    """Check that a tiny family goes all the way: inspect, profile, prune, merge, save, load by the stock class.

    The inspection of the files agrees with the model; full size is bit-identical; pruned and merged halves are whole,
    load by the stock class and give the logits that were computed in flight; a merged half does not depend on the order
    of the experts; dropping experts that a text never chooses leaves the logits on that text as they were, unless the
    family weights by a softmax over all experts. Takes two or three seconds; thorough, with slimmed experts whose
    dropped neurons did nothing, five times that.

    Args:
        model_type: one of `tiny_families`.
        thorough: also with the router form "map", in bfloat16, and with every recipe that there is.

    Raises:
        AssertionError: a promise is broken.
        ArchitectureMismatch: a layer does not compute what its canonical experts compute.
        UnknownName: no such tiny family.
    """
    with _workshop(tokens=2048 if thorough else 512) as shop:
        model = tiny_checkpoint(shop.folder / model_type, model_type)
        _, info = _load_stock(model)
        require(not any(info.values()), f"{model_type}: the stock class does not load it whole: {info}")
        architecture = Architecture.of(Checkpoint.open(model))
        check_inspection(model, architecture)
        permuted = shop.edited(model, _permute_experts)
        recipes = _applicable_recipes(architecture)
        merging = "mergemoe" if "mergemoe" in recipes else "hc-smoe"
        shop.check_full_size(model, merging, "plain")
        result = shop.compress(model, "frequency", "plain", experts=4)
        check_result(model, result)
        check_budget(model, Checkpoint.open(result.out).num_bytes, experts=4)
        for router in ("plain", "map") if thorough else ("plain",):
            result = shop.compress(model, merging, router, experts=4)
            check_result(model, result)
            reordered = shop.compress(permuted, merging, router, experts=4)
            what = f"{model_type}, router {router}: another order of the experts"
            _require_close(shop.logits(reordered.out), shop.logits(result.out), what)
        if thorough:
            narrow = tiny_checkpoint(shop.folder / "bfloat16" / model_type, model_type, dtype=torch.bfloat16)
            shop.check_full_size(narrow, merging, "map")
            for recipe in recipes:
                shop.check_small(narrow, recipe)
            shop.check_idle_neurons(model, architecture)
        shop.check_dropping_unused(model, architecture.layers)


def _applicable_recipes(architecture: Architecture) -> list[str]:
    """Return the recipes that can work on a model.

    Experts that end in a norm cannot be re-fitted; where one entry of the config sizes experts and other parts, they
    cannot be slimmed alone; experts that are stored in one tensor cannot have widths of their own (that is checked
    apart); a model that predicts no next token has no loss to send back; and what is stored in fewer bits is not what
    it was even where all is kept.
    """
    modules = [architecture.model.get_submodule(layer.experts) for layer in architecture.layers]
    solvable = all(canonical_experts(module).finish is None for module in modules)
    model: Any = architecture.model
    predicts = model.get_output_embeddings() is not None
    return [
        name
        for name, recipe in RECIPES.items()
        if recipe.quantiser is None
        and (solvable or all(step != "refit-down" for step, _ in recipe.passes))
        and not (
            "width" in _targets(name)
            and (recipe.allocator == "ragged" or architecture.config["model_type"] in ONE_WIDTH)
        )
        and (predicts or not needs_gradients(recipe.needs))
    ]


def _targets(recipe: str) -> tuple[str, ...]:
    """Return the targets that a recipe understands."""
    return ALLOCATORS[get_recipe(recipe).allocator].targets


def check_result(model: str | Path, result: Result) -> None:
    """Check that a result is a whole checkpoint that says the truth about itself.

    Args:
        model: the checkpoint that the result was made from.
        result: what `coterie.compress` returned.

    Raises:
        AssertionError: a tensor or file is missing or changed that should not be, a map or a number is wrong.
    """
    source, compressed = Checkpoint.open(model), Checkpoint.open(result.out)
    layers = Architecture.of(source).layers
    check_accounting(source, compressed, result)
    require(
        compressed.num_bytes == result.plan.predicted_bytes, f"{compressed.num_bytes} bytes, not as the plan predicted"
    )
    manifest = Manifest.read(result.out)
    require(manifest is not None and manifest.content() == result.manifest.content(), "another manifest on disk")
    for file in source.other_files():
        place = file.relative_to(source.path)
        if place == Path(CARD):  # which is of the original alone
            continue
        copy = result.out / place
        require(copy.is_file() and copy.read_bytes() == file.read_bytes(), f"{place} was not carried along")
    require(is_own_card(result.out / CARD), "no model card of its own")
    if result.manifest.form is ResultForm.PLAIN:
        new_model, info = _load_stock(result.out)
        require(not any(info.values()), f"{result.out} does not load whole: {info}")
        actual = [(layer.num_experts, layer.width, layer.top_k) for layer in Architecture.of(compressed).layers]
        sizes = zip(layers, result.plan.layers, strict=True)
        planned = [(size.num_experts, size.width or layer.width, size.top_k or layer.top_k) for layer, size in sizes]
        require(actual == planned, f"{actual} experts, their width and how many are chosen, not {planned} as planned")
    else:
        new_model = load_model(result.out)
    old, new = load_model(model).state_dict(), new_model.state_dict()
    touched = tuple(name for layer in layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
    for name in old.keys() | new.keys():
        if not name.startswith(touched):
            require(name in old and name in new and torch.equal(old[name], new[name]), f"{name} is not as it was")
    for layer, size, entry in zip(layers, result.plan.layers, result.manifest.layers, strict=True):
        require((entry.parts > 1) == (size.top_k is not None), f"{layer.block}: {entry.parts} parts, not as planned")
        _check_map(layer, entry)


def _check_map(layer: MoELayer, entry: LayerEntry) -> None:
    expert_map, count = list(entry.expert_map), entry.num_experts_after
    where = f"{layer.block}: expert_map {expert_map}"
    require(len(expert_map) == layer.num_experts, f"{where} has not {layer.num_experts} entries")
    if entry.parts > 1:  # each expert is sent to its first one
        owners = list(entry.centres or ())
        first = [owners.index(expert) if expert in owners else -1 for expert in range(layer.num_experts)]
        require(len(owners) == count and owners == sorted(owners), f"{layer.block}: parts of {owners}, not {count}")
        require(expert_map == first, f"{where} does not name the first parts {first}")
        return
    require(set(expert_map) - {-1} == set(range(count)), f"{where} does not reach each of {count} experts")
    for new, centre in enumerate(entry.centres or ()):
        require(expert_map[centre] == new, f"{where} does not send centre {centre} to {new}")


class _Shop:
    """A folder of checkpoints under test, with the text and the profiles that they share."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder = folder
        self._tokens = tokens
        self._text = tiny_text(folder / "text", documents=4)
        self._profiles: dict[tuple[Path, bool], Profile] = {}
        self._count = 0

    def new_path(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{self._count}-{name}"

    def compress(
        self,
        model: Path,
        recipe: str,
        router: Any,
        *,
        fresh_profile: bool = False,
        measured: Profile | None = None,
        **target: Any,
    ) -> Result:
        measured = measured or self.profile(model, recipe, fresh=fresh_profile)
        out = self.new_path(f"{recipe}-{router}")
        if get_recipe(recipe).trains:
            target |= {"text": self._text, "tokens": self._tokens, "seq_len": 64, "train_tokens": self._tokens}
        return compress(model, out, recipe=recipe, router=router, profile=measured, **target)

    def profile(self, model: Path, recipe: str, *, fresh: bool = False) -> Profile:
        """Return a profile that holds what a recipe needs, made once for a model."""
        gradients = needs_gradients(get_recipe(recipe).needs)
        key = (model, gradients)
        if fresh or key not in self._profiles:
            self._profiles[key] = profile(
                model, text=self._text, tokens=self._tokens, seq_len=64, sample_tokens=512, gradients=gradients
            )
        return self._profiles[key]

    def check_small(self, model: Path, recipe: str) -> None:
        """Check a smaller result; a recipe that cannot work on this model must say so."""
        measured = self.profile(model, recipe).statistics[0].keys()
        chosen = get_recipe(recipe)
        asks = not {name for name, _ in chosen.passes}.isdisjoint(("leave-one-out", "subset-search"))
        missing = {name for name in chosen.needs if name not in measured}
        if not missing and not (asks and model.name in UNROUTABLE):
            check_result(model, self.smaller(model, recipe, "plain"))
            return
        try:
            self.smaller(model, recipe, "plain")
        except ArchitectureMismatch:
            return
        raise AssertionError(f"{model}: {recipe} is possible, though {missing or 'its router'} cannot be measured")

    def reads_profile(self, model: Path, permuted: Path, recipe: str, router: str, result: Result) -> bool:
        """Tell whether a result is another one with profiles that are wrong.

        Their statistics and choices are those of a model that has the experts in another order, and the entries of
        what its layers received and gave are shuffled.
        """
        digest = Checkpoint.open(model).digest
        for seed in (1, 2):
            wrong = replace(_shuffled(self.profile(permuted, recipe), seed), model_digest=digest)
            try:
                from_wrong = self.smaller(model, recipe, router, measured=wrong)
            except Exception:  # whatever a method raises on such data, it has read them
                return True
            if _weights(from_wrong) != _weights(result):
                return True
        return False

    def depends_on_seed(self, model: Path, recipe: str, router: str, result: Result) -> bool:
        """Tell whether a result, which was made with seed 0, is another one with some other seed."""
        return any(_weights(self.smaller(model, recipe, router, seed=seed)) != _weights(result) for seed in (1, 2, 3))

    def smaller(self, model: Path, recipe: str, router: Any, **settings: Any) -> Result:
        """Keep half of the experts, or a third of their width; where they are cut into parts, three eighths of all."""
        targets: dict[str, dict[str, Any]] = {"experts": {"experts": 4}, "width": {"width": NARROW}}
        target = next((targets[name] for name in targets if name in _targets(recipe)), {"keep": 0.375})
        return self.compress(model, recipe, router, **target, **settings)

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
        source, compressed = Checkpoint.open(model), Checkpoint.open(result.out)
        what = f"{recipe}, router {router}, keep 1"
        require(source.tensors.keys() == compressed.tensors.keys(), f"{what}: other tensors than before")
        with source.reader() as old, compressed.reader() as new:
            for name in source.tensors:
                a, b = old.read(name), new.read(name)
                require(a.dtype == b.dtype and torch.equal(a, b), f"{what}: {name} is not bit-identical")

    def check_refusal(self, model: Path, recipe: str, router: str) -> None:
        layers = Architecture.of(Checkpoint.open(model)).layers
        target: dict[str, Any] = {"experts": max(layer.top_k for layer in layers) - 1}  # too few for the router
        if "experts" not in _targets(recipe):
            target = {"width": layers[0].width + 1} if "width" in _targets(recipe) else {"budget": "1KiB"}
        before = set(self.folder.iterdir())
        try:
            self.compress(model, recipe, router, **target)
        except Infeasible:
            leftovers = sorted(path.name for path in set(self.folder.iterdir()) - before)
            require(not leftovers, f"{recipe}: the refusal of {target} left {leftovers} behind")
        else:
            raise AssertionError(f"{recipe}: {target}, which cannot be, was not refused")

    def check_idle_neurons(self, model: Path, architecture: Architecture) -> None:
        """Make two thirds of the neurons of each expert do nothing, and slim them away: the logits must stay.

        The folder's name is the family's. Uniform widths must be refused for the families of `ONE_WIDTH`, widths that
        differ for those that store experts in one tensor.
        """
        idle = self.edited(model, _make_neurons_idle)
        expected, listed = self.logits(idle), model.name in ONE_WIDTH
        places = {name.split(".experts.")[-1].split(".")[0] for name in Checkpoint.open(model).tensors}
        fused = len(places & set(map(str, range(architecture.layers[0].num_experts)))) < 2
        for recipe, impossible in (("easy-slim", listed), ("heapr-ragged", fused)):
            if impossible:
                try:
                    plan(idle, recipe=recipe, width=NARROW)
                except Infeasible:
                    continue
                raise AssertionError(f"{model.name}: {recipe} is possible, against the list")
            result = self.smaller(idle, recipe, "plain")
            check_result(idle, result)
            _require_close(
                self.logits(result.out), expected, f"{model.name}, {recipe}: without neurons that do nothing"
            )

    def check_dropping_unused(self, model: Path, layers: tuple[MoELayer, ...]) -> None:
        """Drop a quarter of the experts, none of which a two-letter text chooses: its logits must stay.

        The folder's name is the family's. Where the weights depend on all experts, only that is checked.
        """
        loaded = load_model(model)
        for letters in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"):
            text = self.new_path("letters")
            text.mkdir()
            (text / "letters.txt").write_text(letters, encoding="utf-8")
            ids = torch.tensor(tiny_tokenizer()(letters)["input_ids"])[None]
            used = _used_experts(loaded, ids)
            if all(_fits(layer, each) for layer, each in zip(layers, used, strict=True)):
                depends = not _ignores_unused(loaded, layers, used, ids)
                listed = model.name in SOFTMAX_OVER_ALL
                require(depends == listed, f"{model.name}: weights depend on unchosen experts: {depends}, not {listed}")
                if depends:
                    return
                measured = profile(model, text=text, tokens=2, seq_len=2)
                result = compress(model, self.new_path("dropped"), experts=6, recipe="frequency", profile=measured)
                what = f"{model.name}: dropping experts that {letters!r} never chooses"
                with torch.no_grad():
                    expected = loaded(input_ids=ids, use_cache=False).logits
                _require_close(self.logits(result.out, ids), expected, what)
                return
        raise AssertionError(f"{model.name}: every text chooses so many experts that no quarter can be dropped")


@contextmanager
def _workshop(tokens: int = 2048) -> Iterator[_Shop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other on tensors this small
    try:
        with tempfile.TemporaryDirectory(prefix="coterie-check-") as folder:
            yield _Shop(Path(folder), tokens)
    finally:
        torch.set_num_threads(threads)


def _load_stock(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint with the stock class that its config names, without any code of Coterie."""
    stock = getattr(transformers, json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    with quiet():
        loaded, info = stock.from_pretrained(path, output_loading_info=True, trust_remote_code=False)
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


def _ignores_unused(model: PreTrainedModel, layers: tuple[MoELayer, ...], used: list[Tensor], ids: Tensor) -> bool:
    """Tell whether the routing weights of chosen experts depend on them alone.

    A softmax over all experts that is not renormalised after the choice gives other weights when experts go,
    and should. The model itself tells: the router rows of unused experts are changed a little, too little for another
    choice.
    """
    state, before = model.state_dict(), {}
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for layer, chosen in zip(layers, used, strict=True):
            unused = [expert for expert in range(layer.num_experts) if expert not in chosen]
            for name, axis in layer.router_tensors:
                before[name] = state[name].clone()
                rows = state[name].index_select(axis, torch.tensor(unused))
                state[name].index_copy_(axis, torch.tensor(unused), rows - 1e-3 * rows.abs())
        changed = model(input_ids=ids, use_cache=False).logits
        for name, tensor in before.items():
            state[name].copy_(tensor)
    # Rounding, where a softmax over all is renormalised, is some 1e-7; a real dependence is 4e-5 and more.
    return float((changed - expected).abs().max() / expected.abs().max()) <= 5e-6


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


def _make_neurons_idle(model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> None:
    """Set the down projection of all but `NARROW` neurons of each expert to zero; other ones in each expert."""
    for layer in layers:
        module = model.get_submodule(layer.experts)
        down_EDF = canonical_experts(module).down_EDF
        for expert in range(layer.num_experts):
            idle = torch.randperm(layer.width, generator=torch.Generator().manual_seed(expert))[NARROW:]
            down_EDF[expert, :, idle] = 0


def _reorder(model: PreTrainedModel, layer: MoELayer, experts: Tensor, rows: Tensor) -> None:
    state = model.state_dict()
    for name, _ in model.get_submodule(layer.experts).named_parameters(recurse=False):
        tensor = state[f"{layer.experts}.{name}"]
        tensor.copy_(tensor[experts].clone())
    for name, axis in layer.router_tensors:
        others = torch.arange(layer.num_experts, state[name].shape[axis])  # rows that are no routed expert's
        state[name].copy_(state[name].index_select(axis, torch.cat((rows, others))).clone())


def _digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.glob(pattern))}


def _weights(result: Result) -> dict[str, str]:
    return _digests(result.out, "*.safetensors")


def _shuffled(measured: Profile, seed: int) -> Profile:
    """Return a profile with the entries of each tensor of real numbers in its samples in another order."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for sample in measured.samples:
        tensors = {
            name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)
            for name, tensor in sample.tensors().items()
            if tensor.is_floating_point()
        }
        samples.append(replace(sample, **tensors))
    return replace(measured, samples=tuple(samples))


def _require_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    require(error <= tolerance, f"{what} changes the logits by {error:.1e} of the largest (limit {tolerance:.0e})")
