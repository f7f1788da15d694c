"""What is inside a MoE checkpoint, what it weighs and what would fit: from its headers and config.json alone.

No weight is read and neither torch nor transformers is imported, so this takes well under a second for any size.

Legend: E experts, K chosen experts, F expert width, D model width. All names here are names on disk.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.amounts import parse_bytes
from coterie.errors import ArchitectureMismatch, NotAMoE
from coterie.model.arch.accounting import Accounting, LayerShape
from coterie.model.arch.routing import routing_problem
from coterie.model.arch.shapes import awkward_shapes
from coterie.model.arch.storage import Amount, Storage
from coterie.model.arch.structure import (
    Block,
    DottedName,
    Place,
    check_chosen,
    chosen_experts,
    expert_counts,
    find_blocks,
    integer_entries,
    nearest_entry,
    spare_rows,
    split_name,
)
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.filled import filled_up
from coterie.model.disk.gguf.folder import place_of
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import as_read
from coterie.model.disk.quantized_records import records_apart
from coterie.model.disk.tensors import TensorInfo, file_bytes

#: Parts of a model, in the order of printing. "shared" is everything in a MoE block but routed experts and router;
#: "attention" is any mixing of tokens; "unused" is what transformers does not run (multi-token prediction).
PARTS = ("experts", "shared", "router", "attention", "dense", "norms", "embeddings", "other", "unused")

#: Weights that share one scale and one zero point, 16 bits each, when experts are quantised.
QUANTISATION_GROUP = 128
_GROUP_OVERHEAD = 4  # bytes for each group

_ATTENTION = re.compile(r"attn|attention|mamba|conv|ssm")
_ATTENTION_TENSORS = frozenset(("q_proj", "qkv_proj", "conv1d", "A_log"))
_DENSE = re.compile(r"(^|_)(mlp|feed_forward|ffn|ff|moe)$|^mixer$")
_EMBEDDING = re.compile(r"embed_tokens|word_embeddings|\bwte\b|lm_head")
_INPUT = re.compile(r"embed|\bwte\b")
_GROUPS = re.compile(r"^n(um)?(_expert)?_group$")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEBlock:
    """One MoE block of the checkpoint.

    Attributes:
        layer: number of the decoder layer.
        block: name of the block, for example ``model.layers.3.mlp``.
        num_experts: E, as counted in the tensors.
        router_rows: experts that the router knows; more than E only where a map joins them (``--router map``).
        top_k: K.
        width: F.
        hidden_size: D, of what the experts receive.
        router_tensors: names of the router's tensors.
        experts: the routed experts, all E of them.
        shared: shared experts, and all else in the block that every token passes.
        router: the router.
        row_bytes: bytes of the router that belong to one expert and go with it.
    """

    layer: int
    block: str
    num_experts: int
    router_rows: int
    top_k: int
    width: int
    hidden_size: int
    router_tensors: tuple[str, ...]
    experts: Amount
    shared: Amount
    router: Amount
    row_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetFit:
    """What fits into a budget at the stored precision, with equally many experts in every layer.

    Attributes:
        limit: the budget, in bytes of tensors.
        experts: most experts a layer that fit, at most E; 0 when the rest of the model alone is too large.
        keep: that as a fraction of E.
        bytes: bytes of all tensors then.
        smallest: bytes of all tensors with as few experts as routing allows.
        smallest_experts: that number of experts.
        feasible: whether enough experts are left to choose top_k of them.
        bits: bits that a number may take where no expert goes and all matrices are stored in fewer bits.
    """

    limit: int
    experts: int
    keep: float
    bytes: int
    smallest: int
    smallest_experts: int
    feasible: bool
    bits: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What a MoE checkpoint holds.

    Attributes:
        path: the model folder.
        model_type: as config.json names it.
        layers: number of decoder layers, with and without experts.
        expert_key: path into config.json of the entry that counts experts; None when no entry does.
        moe_layers: the MoE blocks that the model runs, in order.
        prediction: names of the layers (or modules) that predict tokens further ahead (MTP), which are "unused" here.
        awkward: what other programs will not like about the shapes of experts, a sentence each.
        parts: every part of `PARTS`; their sum is the whole checkpoint.
        active_parameters: parameters that one token uses: K/E of each layer's experts and all else but "unused". Each
            embedding matrix counts once and in whole, and a matrix that is tied to the output is one matrix.
        tied_embeddings: whether input and output share one matrix.
        bytes_by_dtype: bytes of tensors by number format, largest first.
        file_bytes: size of the weight files on disk.
        estimates: bytes of all tensors but "unused", stored as "bf16" throughout, or with experts in "int8" or
            "int4" (groups of 128 with a 16-bit scale and a 16-bit zero point each) and the rest in bf16.
        budget: what fits, when a budget was given.
    """

    path: Path
    model_type: str
    layers: int
    expert_key: tuple[str, ...] | None
    moe_layers: tuple[MoEBlock, ...]
    prediction: tuple[str, ...]
    awkward: tuple[str, ...]
    parts: Mapping[str, Amount]
    active_parameters: int
    tied_embeddings: bool
    bytes_by_dtype: Mapping[str, int]
    file_bytes: int
    estimates: Mapping[str, int]
    budget: BudgetFit | None

    @property
    def total(self) -> Amount:
        """Everything in the checkpoint."""
        return sum(self.parts.values(), Amount())

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON content."""
        content = dataclasses.asdict(self)
        content["path"] = str(self.path)
        content["expert_key"] = None if self.expert_key is None else ".".join(self.expert_key)
        content["total"] = dataclasses.asdict(self.total)
        return content


def inspect(model: str | Path, *, budget: str | int | None = None) -> Inspection:
    """Look into a MoE checkpoint by its headers and config.json alone.

    Args:
        model: a model folder or a hub id.
        budget: bytes that all tensors may take, as a number or like ``"12GiB"``; asks what would fit.

    Raises:
        NotACheckpoint, CorruptCheckpoint: there is no whole checkpoint.
        NotAMoE: no tensors of routed experts.
        ArchitectureMismatch: config.json and tensors disagree, or do not say how many experts a token chooses.
        InputError: the budget is no amount of bytes.
    """
    return inspect_checkpoint(Checkpoint.open(model, fetch="headers"), budget=budget)


def inspect_checkpoint(checkpoint: Checkpoint, *, budget: str | int | None = None) -> Inspection:
    """Look into a MoE checkpoint that is open already; see `inspect`."""
    limit = None if budget is None else parse_bytes(budget)
    return inspect_headers(read_headers(checkpoint), limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Headers:
    """What the headers of a checkpoint say of its MoE layers and of every tensor, before it is added up.

    Attributes:
        checkpoint: whose they are.
        storage: counts weights in tensors.
        blocks: the MoE blocks that the model runs, in order.
        moe_layers: the same, described.
        places: where in the model each tensor is, by name; None where its name does not say.
        part_of: the part of `PARTS` that each tensor belongs to, by name.
        expert_key: path into config.json of the entry that counts experts; empty when no entry does.
        num_layers: decoder layers, with and without experts.
    """

    checkpoint: Checkpoint
    storage: Storage
    blocks: tuple[Block, ...]
    moe_layers: tuple[MoEBlock, ...]
    places: Mapping[str, Place | None]
    part_of: Mapping[str, str]
    expert_key: DottedName
    num_layers: int

    def accounting(self) -> Accounting:
        """Return what says how large results are."""
        return _accounting(self.checkpoint, self.blocks, self.moe_layers)

    def num_bytes(self, accounting: Accounting, experts: int) -> int:
        """Return the bytes of all tensors with so many experts in each layer, or all where a layer has fewer."""
        # A map needs all rows of the router.
        return accounting.num_bytes(
            [
                LayerShape(
                    num_experts=min(experts, layer.num_experts), keeps_rows=layer.router_rows != layer.num_experts
                )
                for layer in self.moe_layers
            ]
        )

    def routable(self) -> list[int]:
        """Return the numbers of experts in every layer that the routers can choose from, in order."""
        config = self.checkpoint.config
        most = max(layer.num_experts for layer in self.moe_layers)
        top_k = max(layer.top_k for layer in self.moe_layers)
        groups = nearest_entry(config, (), lambda key: _GROUPS.search(key) is not None) or 1
        chosen_groups = nearest_entry(config, (), lambda key: key == "topk_group") or 1
        counts = [
            experts
            for experts in range(1, most + 1)
            if not routing_problem(experts, top_k=top_k, num_groups=groups, num_chosen_groups=chosen_groups)
        ]
        return counts or [most]


def read_headers(checkpoint: Checkpoint) -> Headers:
    """Find the MoE layers of a checkpoint, and the part that each of its tensors belongs to.

    Raises:
        NotAMoE, ArchitectureMismatch: see `inspect`.
    """
    config = checkpoint.config
    check_chosen(config, str(checkpoint.path))
    storage, checkpoint = Storage(checkpoint), records_apart(checkpoint)
    places, counts = _places(checkpoint), expert_counts(config)
    described = _find_layers(checkpoint, places, counts, storage)
    running = [block for block, _ in described]
    depths = {block.stack: _depth(config, _expert_path(counts, block)) for block in running}
    part_of = _parts_of(checkpoint, places, running, depths)
    return Headers(
        checkpoint=checkpoint, storage=storage, blocks=tuple(running),
        moe_layers=tuple(layer for _, layer in described), places=places, part_of=part_of,
        expert_key=_expert_path(counts, running[0]), num_layers=_num_layers(places, part_of, set(depths)),
    )  # fmt: skip


def inspect_headers(headers: Headers, limit: int | None = None) -> Inspection:
    """Add up what headers say; see `inspect`.

    Args:
        headers: of the checkpoint.
        limit: bytes that all tensors may take; asks what would fit.
    """
    checkpoint, moe_layers, part_of = headers.checkpoint, headers.moe_layers, headers.part_of
    by_part: dict[str, list[TensorInfo]] = {part: [] for part in PARTS}
    dtypes = Counter[str]()
    for name, info in checkpoint.tensors.items():
        by_part[part_of[name]].append(info)
        dtypes[info.dtype] += info.num_bytes
    parts = {part: headers.storage.amount(infos) for part, infos in by_part.items()}
    total = sum(parts.values(), Amount())
    used = total.parameters - parts["unused"].parameters
    routed = parts["experts"].parameters
    active = sum(
        layer.experts.parameters * min(layer.top_k, layer.num_experts) // layer.num_experts for layer in moe_layers
    )
    return Inspection(
        path=place_of(checkpoint.path),
        model_type=str(checkpoint.config["model_type"]),
        layers=headers.num_layers,
        expert_key=headers.expert_key or None,
        moe_layers=moe_layers,
        prediction=_prediction(headers.places, part_of),
        awkward=tuple(
            dict.fromkeys(note for each in moe_layers for note in awkward_shapes(each.num_experts, each.width))
        ),
        parts=parts,
        active_parameters=active + used - routed,
        tied_embeddings=not any(part == "embeddings" and not _INPUT.search(name) for name, part in part_of.items()),
        bytes_by_dtype=dict(dtypes.most_common()),
        file_bytes=file_bytes(checkpoint.tensors.values()),
        estimates=_estimates(used, routed),
        budget=None if limit is None else _fit(limit, headers, _bits(limit, parts)),
    )


def _prediction(places: Mapping[str, Place | None], part_of: Mapping[str, str]) -> tuple[str, ...]:
    unused = [(name, places[name]) for name, part in part_of.items() if part == "unused"]
    layers = {(place[0], place[1]) for _, place in unused if place is not None}
    modules = {name.partition(".")[0] for name, place in unused if place is None}
    return (*(f"{stack}.{layer}" for stack, layer in sorted(layers)), *sorted(modules))


def accounting_of(checkpoint: Checkpoint) -> Accounting:
    """Return what says how large results of a checkpoint are, from its headers alone.

    Raises:
        NotAMoE: no tensors of routed experts.
        ArchitectureMismatch: config.json and tensors disagree.
    """
    described = _find_layers(checkpoint, _places(checkpoint), expert_counts(checkpoint.config), Storage(checkpoint))
    return _accounting(checkpoint, [block for block, _ in described], [layer for _, layer in described])


def _accounting(checkpoint: Checkpoint, blocks: Sequence[Block], layers: Sequence[MoEBlock]) -> Accounting:
    inner = [(layer.hidden_size, layer.width) for layer in layers]
    return Accounting.of_blocks(checkpoint.tensors, blocks, inner)


def _places(checkpoint: Checkpoint) -> dict[str, Place | None]:
    return {name: split_name(name) for name in checkpoint.tensors}


def _find_layers(
    checkpoint: Checkpoint, places: Mapping[str, Place | None], counts: Mapping[DottedName, int], storage: Storage
) -> list[tuple[Block, MoEBlock]]:
    """Find the MoE blocks that the model runs, in order, and describe each.

    Raises:
        NotAMoE: there are none.
    """
    config, manifest = checkpoint.config, Manifest.read(checkpoint.path)
    # Experts of a ragged checkpoint of ours are stored narrower than they are read.
    full_width = as_read(checkpoint) if manifest is None else filled_up(as_read(checkpoint), manifest.ragged)
    described = []
    for block in find_blocks(checkpoint.tensors, places, counts, _mapped_counts(manifest), spare_rows(config)):
        key = _expert_path(counts, block)
        depth = _depth(config, key)
        # Layers for multi-token prediction are stored, but transformers does not run them.
        if not _is_extra(block.name) and (depth is None or block.layer < depth):
            described.append((block, _describe(block, config, key, storage, full_width.tensors)))
    if not described:
        raise NotAMoE(_what_was_seen(checkpoint, places, counts))
    return described


def _mapped_counts(manifest: Manifest | None) -> list[int]:
    """Return the numbers of experts in a checkpoint of ours whose router knows more experts than there are."""
    if manifest is None or manifest.form is not ResultForm.MAPPED:
        return []
    return sorted({layer.num_experts_after for layer in manifest.layers})


def _expert_path(counts: Mapping[DottedName, int], block: Block) -> DottedName:
    """Return the config entry that counts a block's experts: of several the one whose path speaks of the same stack."""
    stack = block.stack.split(".")

    def rank(path: DottedName) -> tuple[bool, int]:
        kin = sum(component.removesuffix("_config") in stack for component in path[:-1])
        return counts[path] != block.num_experts, -kin

    return min(counts, key=rank, default=())


def _depth(config: Mapping[str, Any], path: DottedName) -> int | None:
    return nearest_entry(config, path, lambda key: key in ("num_hidden_layers", "num_layers", "n_layers"))


def _is_extra(name: str) -> bool:
    return any(component.startswith("mtp") for component in name.split("."))


def _describe(
    block: Block, config: Mapping[str, Any], path: DottedName, storage: Storage, tensors: Mapping[str, TensorInfo]
) -> MoEBlock:
    axes = {extent for info in block.router for extent in info.shape}
    rows = next(
        (value for entry, value in integer_entries(config) if entry == path and value in axes), block.num_experts
    )
    first = [tensors.get(info.name, info) for info in block.first_expert]  # factors are not read by themselves
    hidden_size, width = _expert_shape(block, first, config, path, storage)
    return MoEBlock(
        layer=block.layer,
        block=block.name,
        num_experts=block.num_experts,
        router_rows=rows,
        top_k=chosen_experts(config, path, rows),
        width=width,
        hidden_size=hidden_size,
        router_tensors=tuple(info.name for info in block.router),
        experts=storage.amount(block.experts),
        shared=storage.amount(block.shared),
        router=storage.amount(block.router),
        row_bytes=block.row_bytes,
    )


def _expert_shape(
    block: Block, first: list[TensorInfo], config: Mapping[str, Any], path: DottedName, storage: Storage
) -> tuple[int, int]:
    """Return D and F of a block's experts: D is the axis that all their matrices have, F * D the smallest matrix."""
    skip = 1 if block.fused else 0
    shapes: list[tuple[int, ...]] = []
    sizes: list[int] = []
    for info in first:
        shape = storage.shapes.get(info.name, info.shape)[skip:]
        if len(shape) >= 2 and min(shape) > 1 and not storage.is_companion(info):
            shapes.append(shape)
            sizes.append(storage.parameters(info) // (block.num_experts if block.fused else 1))
    if not shapes:
        raise ArchitectureMismatch(f"{block.name} has experts without matrices: {first[0].name}")
    common = set.intersection(*map(set, shapes))
    named = [nearest_entry(config, path, word.__eq__) for word in ("hidden_size", "d_model", "n_embd")]
    routed = [extent for info in block.router for extent in info.shape if extent != block.num_experts]
    latent = [nearest_entry(config, path, lambda key: "latent" in key)]
    candidates = [size for size in (*named, *routed, *latent) if size]
    # Packed matrices do not show their shape; then the model width that is named first has to do.
    visible = [size for size in candidates if size in common]
    hidden_size = (visible or ([] if not storage.quantised else candidates) or sorted(common) or [0])[0]
    if not hidden_size or any(size % hidden_size for size in sizes):
        listed = ", ".join(str(list(shape)) for shape in shapes)
        raise ArchitectureMismatch(
            f"{block.name}: the matrices of an expert ({listed}) share no axis of the model width"
        )
    return hidden_size, min(sizes) // hidden_size


def _parts_of(
    checkpoint: Checkpoint,
    places: Mapping[str, Place | None],
    running: list[Block],
    depths: Mapping[str, int | None],
) -> dict[str, str]:
    """Assign every tensor of a checkpoint to one of `PARTS`; `depths` are the layers that run, by stack."""
    part_of: dict[str, str] = {}
    for block in running:
        for part, infos in (("experts", block.experts), ("router", block.router), ("shared", block.shared)):
            part_of |= dict.fromkeys((info.name for info in infos), part)
    mixers = {
        (place[0], place[1], place[2][0])
        for place in places.values()
        if place is not None and not _ATTENTION_TENSORS.isdisjoint(place[2])
    }
    vocabulary = nearest_entry(checkpoint.config, (), lambda key: key == "vocab_size")
    for name, info in checkpoint.tensors.items():
        if name in part_of:
            continue
        place = places[name]
        if _is_extra(name):
            part_of[name] = "unused"
        elif place is None:
            is_matrix = len(info.shape) == 2 and vocabulary in info.shape
            part_of[name] = (
                "embeddings" if is_matrix or _EMBEDDING.search(name) else _part_by_name(tuple(name.split(".")), info)
            )
        elif place[0] not in depths:
            part_of[name] = "other"
        elif (depth := depths[place[0]]) is not None and place[1] >= depth:
            part_of[name] = "unused"
        else:
            part_of[name] = _part_by_name(place[2], info, mixes=(place[0], place[1], place[2][0]) in mixers)
    return part_of


def _part_by_name(components: DottedName, info: TensorInfo, *, mixes: bool = False) -> str:
    if len(info.shape) <= 1 and any(
        "norm" in component or re.fullmatch(r"ln_?\w{0,2}", component) for component in components
    ):
        return "norms"
    if mixes or any(_ATTENTION.search(component) for component in components):
        return "attention"
    return "dense" if any(_DENSE.search(component) for component in components) else "other"


def _num_layers(places: Mapping[str, Place | None], part_of: Mapping[str, str], stacks: set[str]) -> int:
    run = {place[:2] for name, place in places.items() if place is not None and part_of[name] != "unused"}
    return sum(stack in stacks for stack, _ in run)


def _estimates(parameters: int, routed: int) -> dict[str, int]:
    overhead = -(-routed // QUANTISATION_GROUP) * _GROUP_OVERHEAD
    unrouted = 2 * (parameters - routed)
    return {"bf16": 2 * parameters, "int8": unrouted + routed + overhead, "int4": unrouted + -(-routed // 2) + overhead}


def _fit(limit: int, headers: Headers, bits: float) -> BudgetFit:
    """Find the most experts a layer whose tensors fit into `limit` bytes; router rows go with their experts."""
    most = max(layer.num_experts for layer in headers.moe_layers)
    accounting, feasible = headers.accounting(), headers.routable()
    fitting = [experts for experts in feasible if headers.num_bytes(accounting, experts) <= limit]
    if fitting:
        experts = fitting[-1]
    else:
        every = range(1, most + 1)
        experts = max((experts for experts in every if headers.num_bytes(accounting, experts) <= limit), default=0)
    return BudgetFit(
        limit=limit,
        experts=experts,
        keep=experts / most,
        bytes=headers.num_bytes(accounting, experts),
        smallest=headers.num_bytes(accounting, feasible[0]),
        smallest_experts=feasible[0],
        feasible=bool(fitting),
        bits=bits,
    )


def _bits(limit: int, parts: Mapping[str, Amount]) -> float:
    """Return the bits that a number of a matrix may take; what is no matrix, and routers, stay as they are."""
    matrices = sum((parts[part] for part in ("experts", "shared", "attention", "dense", "embeddings")), Amount())
    rest = sum(amount.bytes for amount in parts.values()) - matrices.bytes
    return max(0.0, 8 * (limit - rest) / max(1, matrices.parameters))


def _what_was_seen(checkpoint: Checkpoint, places: Mapping[str, Place | None], counts: Mapping[DottedName, int]) -> str:
    counted = ", ".join(f"{'.'.join(path)} = {value}" for path, value in counts.items())
    entries = f"config.json says {counted}, but" if counted else "config.json has no entry that counts experts, and"
    layers = len({place[:2] for place in places.values() if place is not None})
    return (
        f"{checkpoint.path} ({checkpoint.config['model_type']}) has no routed experts: {entries} none of the "
        f"{len(checkpoint.tensors)} tensors in {layers} layers are experts (looked for experts.0 ... experts.E-1 and "
        "for stacked tensors whose first axis is E); Coterie works on Mixture-of-Experts models only"
    )
