"""The sections on experts: what they do, from the profile, and what became of them, from the manifests.

Legend: L layers, E experts, G domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from coterie.model.disk.manifest import LayerEntry
from coterie.profile.profile import Profile
from coterie.report import measures
from coterie.report.draw import BLUES, VIRIDIS, heat_png
from coterie.report.gather import Entry, ReportedResult, ReportedRun
from coterie.report.layers import (
    chosen_text,
    counts_text,
    dropped_experts,
    expert_groups,
    expert_shares,
    experts_left,
    kind_of,
    layer_kind,
    mean_width,
    parts_left,
    share_left,
    size_text,
    widths_text,
)
from coterie.report.measures import Array
from coterie.report.plots import (
    FATES,
    colour_bar,
    fate_keys,
    fate_map,
    layer_bars,
    layer_lines,
    share_map,
    stack,
    usage_map,
)
from coterie.report.words import (
    MISSING,
    count_text,
    note_text,
    number_text,
    percent_text,
    range_text,
    ranges_text,
    times_text,
)

Section = dict[str, Any]

_USAGE = "share of routed tokens; 1 is an even share"
_SPECIALISTS = 10  # rows of the table
_MAP_LAYERS = 16  # layers whose similarity maps are shown; evenly spaced when there are more
_MAP_SIDE = 128  # pixels; larger maps are averaged down, or a page of them would weigh too much


def experts(run: ReportedRun) -> Section | None:
    """Return what the experts do on text, from the profile that most results were made from."""
    if not run.profiles:
        return None
    path, profile = _chosen_profile(run)
    if not profile.layers or any("usage" not in statistics for statistics in profile.statistics):
        return None
    counts = measures.usage_counts(profile)
    overall = [measures.even_share(counts_GE) for counts_GE in counts]
    return {
        "path": path,
        "others": [other for other, _ in run.profiles if other != path],
        "tokens": count_text(sum(profile.num_tokens), "token"),
        "usage": _usage(profile, counts, overall),
        "focus": _focus(profile, counts, overall),
        "specialists": _specialists(profile, counts),
        "similarity": _similarity(profile),
    }


def _chosen_profile(run: ReportedRun) -> tuple[str, Profile]:
    made_from = [(result.inputs.get("model"), result.inputs.get("text")) for result in run.results]
    return max(run.profiles, key=lambda entry: made_from.count((entry[1].model_digest, entry[1].text_digest)))


def _usage(profile: Profile, counts: Sequence[Array], overall: Sequence[Array]) -> Section:
    by_domain = [[measures.shares(counts_GE)[g] for counts_GE in counts] for g in range(len(profile.domains))]
    relative = np.concatenate([share_E * len(share_E) for share_E in overall])
    every = np.concatenate([share_E * len(share_E) for rows in by_domain for share_E in rows])
    high, domain_high = _high(relative), _high(every)
    unused = sum(int((counts_GE.sum(axis=0) == 0).sum()) for counts_GE in counts)
    maps = []
    if len(profile.domains) > 1:
        for domain, rows in zip(profile.domains, by_domain, strict=True):
            values = stack([share_E * len(share_E) for share_E in rows])
            maps.append({"name": domain, "uri": heat_png(values, 0.0, domain_high)})
    peak = int(relative.argmax())
    layer, expert = _where(overall, peak)
    return {
        "plot": usage_map(overall, high),
        "bar": colour_bar(0.0, high, _USAGE, over=bool(relative.max() > high)),
        "domain_bar": colour_bar(0.0, domain_high, _USAGE, over=bool(every.max() > domain_high)),
        "maps": maps,
        "height": round(min(max(9.0 * len(overall), 54.0), 190.0)),
        "unused": unused,
        "total": len(relative),
        "peak": f"expert {expert} of layer {layer} ({times_text(float(relative[peak]))} an even share)",
    }


def _where(rows: Sequence[Array], flat: int) -> tuple[int, int]:
    """Return row and column of a place in the concatenated rows."""
    for layer, row in enumerate(rows):
        if flat < len(row):
            return layer, flat
        flat -= len(row)
    raise AssertionError


def _high(relative: Array) -> float:
    """Return where the colours end: beyond 99 % of the values, rounded up to a half, from 4 on to a whole number."""
    value = max(float(np.percentile(relative, 99)), 1.0)
    return float(np.ceil(value * 2) / 2) if value < 4 else float(np.ceil(value))


def _focus(profile: Profile, counts: Sequence[Array], overall: Sequence[Array]) -> Section:
    """Return how evenly experts are used, and how much they tell about the domain, layer by layer."""
    lines = []
    if len(profile.domains) > 1:
        for index, domain in enumerate(profile.domains):
            row = [measures.normalised_entropy(measures.shares(counts_GE)[index]) for counts_GE in counts]
            lines.append((domain, row))
    main = [measures.normalised_entropy(share_E) for share_E in overall]
    focus: Section = {
        "entropy": layer_lines(lines, main, "Normalised entropy of expert usage by layer"),
        "domains": len(lines),
        "information": None,
    }
    if lines:
        values = [measures.mutual_information(counts_GE) for counts_GE in counts]
        chance = [measures.chance_information(counts_GE) for counts_GE in counts]
        focus["information"] = layer_bars(values, chance, "Mutual information of expert and domain by layer, in bits")
        focus["limit"] = number_text(float(np.log2(len(lines))))
        focus["chance"] = number_text(max(chance), 2)
    return focus


def _specialists(profile: Profile, counts: Sequence[Array]) -> list[dict[str, str]]:
    if len(profile.domains) < 2:
        return []
    return [
        {
            "layer": str(specialist.layer),
            "expert": str(specialist.expert),
            "domain": profile.domains[specialist.domain],
            "domain_share": percent_text(specialist.domain_share),
            "lift": times_text(specialist.lift),
            "share": percent_text(specialist.share, 1),
        }
        for specialist in measures.specialists(counts, _SPECIALISTS)
    ]


def _similarity(profile: Profile) -> Section | None:
    has_outputs = all({"mean_output", "tokens"} <= statistics.keys() for statistics in profile.statistics)
    has_logits = all({"logit_sum", "logit_product", "tokens"} <= statistics.keys() for statistics in profile.statistics)
    if not (has_outputs or has_logits):
        return None
    total = len(profile.layers)
    spaced = np.linspace(0, total - 1, min(total, _MAP_LAYERS)).round().astype(int).tolist()
    shown = [layer for layer in spaced if profile.layers[layer].num_experts > 1]
    if not shown:
        return None
    cosines = [measures.output_cosine(profile, layer) for layer in shown] if has_outputs else []
    logits = [measures.logit_correlation(profile, layer) for layer in shown] if has_logits else []
    orders = [measures.cluster_order(matrix) for matrix in (cosines or logits)]
    rows = []
    for title, caption, matrices in (
        ("Mean outputs", "cosine of mean outputs", cosines),
        ("Router scores", "correlation of router scores", logits),
    ):
        if not matrices:
            continue
        off = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices])
        low, high = _limits(off)
        maps = []
        for layer, matrix, order in zip(shown, matrices, orders, strict=True):
            first, second, similarity = measures.closest_pair(matrix)
            uri = heat_png(_averaged_down(matrix[np.ix_(order, order)]), low, high, VIRIDIS)
            maps.append(
                {"layer": layer, "uri": uri, "pair": f"{first} & {second}", "value": number_text(similarity, 2)}
            )
        bar = colour_bar(low, high, caption, over=bool(off.max() > high))
        rows.append({"title": title, "caption": caption, "maps": maps, "bar": bar})
    return {"rows": rows, "shown": len(shown), "total": total, "by_outputs": has_outputs}


def _limits(values: Array) -> tuple[float, float]:
    """Return limits that hold nearly all values, as short numbers, at least 0.1 apart."""
    low = float(np.floor(np.percentile(values, 1) * 20) / 20)
    high = float(np.ceil(np.percentile(values, 99.5) * 20) / 20)
    return max(-1.0, min(low, high - 0.1)), min(1.0, max(high, low + 0.1))


def _averaged_down(matrix: Array) -> Array:
    factor = -(-len(matrix) // _MAP_SIDE)
    if factor == 1:
        return matrix
    starts = np.arange(0, len(matrix), factor)
    sizes = np.diff(np.append(starts, len(matrix)))
    summed = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    return np.asarray(summed / np.outer(sizes, sizes), dtype=np.float64)


def changes(entries: Sequence[Entry]) -> list[Section]:
    """Return, for every compressed checkpoint, what became of every expert and what passes noted."""
    return [_change(entry.label, entry.result) for entry in entries if entry.result is not None]


def _change(label: str, result: ReportedResult) -> Section:
    layers = result.manifest.layers
    columns, noted = _notes(result)
    heads, rows = _table(layers)
    return {
        "label": label,
        "folder": result.folder,
        "summary": _summary(result),
        **_picture(label, layers),
        "heads": heads,
        "columns": [what for _, what in columns],
        "passes": [(name, len(list(group))) for name, group in groupby(columns, key=lambda column: column[0])],
        "rows": [
            {"index": layer.index, "block": layer.block, "facts": facts, "cells": cells, **_lists(layer)}
            for layer, facts, cells in zip(layers, rows, noted, strict=True)
        ],
        "sentences": [*_size_sentences(layers), *_refit_sentences(result)],
        "merges": any(len(members) > 1 for layer in layers for _, members in expert_groups(layer)),
        "listed": not _all_alike(layers),
    }


def _all_alike(layers: Sequence[LayerEntry]) -> bool:
    """Tell whether all experts became narrower by the same amount, so that there is nothing to say of a single one."""
    narrower = kind_of(layers) == "narrower"
    return narrower and all(layer.num_experts_after == layer.num_experts_before for layer in layers)


def _picture(label: str, layers: Sequence[LayerEntry]) -> Section:
    """Return the map of layers by experts with its legend: shares of neurons where they differ, else fates."""
    title = f"What became of every expert: {label}"
    if _all_alike(layers) or not any(layer.expert_map for layer in layers):
        return {"plot": None, "bar": None, "keys": []}
    if any(layer_kind(layer) in ("ragged", "cut") for layer in layers):
        shares = [expert_shares(layer) for layer in layers]
        nothing = sum(row.count(0.0) for row in shares)
        gone = _nothing_left(layers)
        key = {"colour": fate_keys()[-1][0], "label": f"{gone} ({nothing:,})"}
        bar = colour_bar(0.0, 100.0, "neurons of the expert that are left, in percent", stops=BLUES)
        return {"plot": share_map(shares, title), "bar": bar, "keys": [key] if nothing else []}
    fates = [_fates(layer) for layer in layers]
    counted = [sum(row.count(fate) for row in fates) for fate in range(len(FATES))]
    names = [(css, _alone(layers) if not fate else name) for fate, (css, name) in enumerate(fate_keys())]
    keys = [
        {"colour": css, "label": f"{name} ({count:,})"}
        for (css, name), count in zip(names, counted, strict=True)
        if count
    ]
    return {"plot": fate_map(fates, title), "bar": None, "keys": keys}


def _fates(layer: LayerEntry) -> list[int]:
    fates = [3] * len(layer.expert_map)
    for centre, members in expert_groups(layer):
        for expert in members:
            fates[expert] = 0 if len(members) == 1 else 1 if expert == centre else 2
    return fates


def _alone(layers: Sequence[LayerEntry]) -> str:
    """Return what experts are called that were neither merged nor dropped."""
    return "narrower" if any(layer_kind(layer) == "narrower" for layer in layers) else FATES[0]


def _nothing_left(layers: Sequence[LayerEntry]) -> str:
    """Return what experts are called of which nothing is left; a ragged result still has their router rows."""
    ragged = any(0 in (layer.widths_after or ()) for layer in layers)
    return "no neuron left" if ragged else FATES[-1]


def _summary(result: ReportedResult) -> str:
    layers = result.manifest.layers
    count = count_text(len(layers), "layer")
    if kind_of(layers) == "whole":
        before, after = (counts_text(layers, side=side) for side in ("before", "after"))
        return f"{before} → {after} experts in {count}, {result.manifest.router} router"
    return f"{size_text(layers, each=f' in each of {count}')}, {result.manifest.router} router"


def _size_sentences(layers: Sequence[LayerEntry]) -> list[str]:
    """Return what was done to the experts of a result that has other than whole ones."""
    kind = kind_of(layers)
    if kind == "narrower":
        new, old = (widths_text(layers, side=side) for side in ("after", "before"))
        every = "Every expert keeps" if _all_alike(layers) else "Experts that are left keep"
        return [f"{every} {new} of {old} neurons."]
    if kind == "ragged":
        return [
            f"Every expert has a width of its own: {widths_text(layers, side='after')} of "
            f"{widths_text(layers, side='before')} neurons, {mean_width(layers)} on average."
        ]
    if kind == "cut":
        cuts = range_text([layer.parts for layer in layers])
        before, after = (chosen_text(layers, side=side) for side in ("before", "after"))
        times = f"; a token chooses {after} parts, where it chose {before} experts" if before and after else ""
        return [
            f"Each expert was cut into {cuts} parts of {widths_text(layers, side='after')} neurons, and the best parts "
            f"of the layer stayed, however many of each expert{times}."
        ]
    return []


def _table(layers: Sequence[LayerEntry]) -> tuple[list[str], list[list[str]]]:
    """Return the columns that these layers need, and the cells of each layer."""
    kinds = {layer_kind(layer) for layer in layers}
    some = bool(kinds & {"ragged", "cut"})  # experts keep different shares
    merges = any(len(members) > 1 for layer in layers for _, members in expert_groups(layer))
    drops = any(dropped_experts(layer) for layer in layers)
    rows: list[dict[str, str]] = []
    for layer in layers:
        sizes = [len(members) for _, members in expert_groups(layer)]
        cells = {"Experts": f"{layer.num_experts_before} → {experts_left(layer)}"}
        if "cut" in kinds:
            cells["Parts"] = f"{layer.num_experts_before * layer.parts} → {layer.num_experts_after}"
        if kinds - {"whole", "cut"}:  # parts have one width, which stands above the table
            old, new = (widths_text([layer], side=side) for side in ("before", "after"))
            cells["Width"] = f"{old} → {new}"
        if "ragged" in kinds:
            cells["Mean width"] = mean_width([layer])
        if kinds != {"whole"}:
            cells["Neurons left"] = percent_text(share_left([layer]), 1)
        if merges:
            cells["Merged groups"] = str(sum(size > 1 for size in sizes))
            cells["Largest"] = str(max((size for size in sizes if size > 1), default=MISSING))
        if some:
            cells["Whole"] = str(expert_shares(layer).count(1.0))
            cells["In part"] = str(sum(0 < share < 1 for share in expert_shares(layer)))
            if any(0 in (each.widths_after or ()) for each in layers):
                cells["No neuron"] = str((layer.widths_after or ()).count(0))
        elif not _all_alike(layers):
            cells[_alone(layers).capitalize()] = str(sizes.count(1))
        if drops:
            cells["Dropped"] = str(len(dropped_experts(layer)))
        rows.append(cells)
    return list(rows[0]) if rows else [], [list(cells.values()) for cells in rows]


def _lists(layer: LayerEntry) -> Section:
    """Return the merged groups of a layer, and its other experts by what became of them."""
    groups = expert_groups(layer)
    merged = sorted((group for group in groups if len(group[1]) > 1), key=lambda group: (-len(group[1]), group[1]))
    chips = [
        {
            "centre": MISSING if centre is None else centre,
            "others": ranges_text([expert for expert in members if expert != centre]),
            "size": len(members),
        }
        for centre, members in merged
    ]
    lists = []
    if layer_kind(layer) == "cut":
        for count in range(layer.parts, 0, -1):
            numbers = [expert for expert, parts in enumerate(parts_left(layer)) if parts == count]
            lists.append(
                (
                    "Whole" if count == layer.parts else f"{count} of {layer.parts} parts",
                    ranges_text(numbers) if numbers else "",
                )
            )
    elif layer.widths_after is not None:
        widths = [(expert, layer.widths_after[new]) for expert, new in enumerate(layer.expert_map) if new >= 0]
        lists.append(("Expert (width)", ", ".join(f"{expert} ({width})" for expert, width in widths)))
    else:
        alone = sorted(members[0] for _, members in groups if len(members) == 1)
        lists.append((_alone([layer]).capitalize(), ranges_text(alone) if alone else ""))
    lists.append(("Dropped", ranges_text(dropped_experts(layer)) if dropped_experts(layer) else ""))
    return {"merged": chips, "lists": [(name, text) for name, text in lists if text]}


def _notes(result: ReportedResult) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Return (pass, what) of every column and, for each layer, the cells of what the passes noted."""
    flat: list[dict[tuple[str, str], str]] = []
    for layer in result.manifest.layers:
        cells: dict[tuple[str, str], str] = {}
        for name, noted in layer.notes.items():
            entries = noted.items() if isinstance(noted, dict) else [("", noted)]
            for key, value in entries:
                cells[name, str(key).replace("_", " ").replace("heldout", "held-out")] = note_text(value)
        flat.append(cells)
    noted_columns = dict.fromkeys(column for cells in flat for column in cells)
    passes = list(dict.fromkeys(name for name, _ in noted_columns))
    columns = sorted(noted_columns, key=lambda column: passes.index(column[0]))
    return columns, [[cells.get(column, MISSING) for column in columns] for cells in flat]


def _number(value: object) -> float | None:
    """Return what a note says if it is a number: notes are any content, and a pass of the user's own has its own."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _refit_sentences(result: ReportedResult) -> list[str]:
    """Return what the re-fit of down projections achieved over all layers, from the pass's own notes."""
    layers = result.manifest.layers
    noted = [layer.notes["refit-down"] for layer in layers if isinstance(layer.notes.get("refit-down"), dict)]
    pairs = [
        tuple(map(_number, (note.get("heldout_error_average"), note.get("heldout_error_refit")))) for note in noted
    ]
    measured = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not measured:
        return []
    before, after = (sum(values) / len(measured) for values in zip(*measured, strict=True))
    merged, fell_back = (int(sum(_number(note.get(key)) or 0 for note in noted)) for key in ("merged", "kept_average"))
    lists = [note["ridge"] for note in noted if isinstance(note.get("ridge"), list)]
    ridges = sorted(ridge for values in lists for ridge in map(_number, values) if ridge is not None)
    sentences = [
        f"Held-out error of the merged experts: {number_text(before)} with the average, {number_text(after)} with "
        f"re-fitted down projections "
        f"(share of the members' squared output; mean over {count_text(len(measured), 'layer')})."
    ]
    if ridges:
        middle = f"{ridges[len(ridges) // 2]:.3g}"
        span = f"{ridges[0]:.3g} to {ridges[-1]:.3g}"
        sentences.append(f"Chosen ridge: {middle} at the median, from {span} (multiples of the mean Gram diagonal).")
    sentences.append(
        f"{fell_back:,} of {count_text(merged, 'merged expert')} kept the plain average, because no ridge beat it."
    )
    return sentences
