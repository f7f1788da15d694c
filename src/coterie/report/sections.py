"""The sections on results: from the models of a run to what the template prints. A section without data is None.

Every function returns plain content (text, numbers, ready SVG); the template only arranges it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from coterie.model.disk.manifest import ResultForm
from coterie.report.columns import COLUMNS
from coterie.report.draw import CIVIDIS, colour, hex_colour, ink_on, key_mark
from coterie.report.gather import Entry, ReportedResult, ReportedRun, recipe_name
from coterie.report.layers import (
    before_after,
    chosen_text,
    counts_text,
    kept_text,
    layer_kind,
    plan_text,
    short_size,
    widths_text,
)
from coterie.report.plots import ByteRow, Point, byte_bars, domain_dots, time_bars, trade_off
from coterie.report.remarks import remarks
from coterie.report.words import (
    MISSING,
    bytes_text,
    count_text,
    error_text,
    number_text,
    percent_text,
    range_text,
    times_text,
)

Section = dict[str, Any]


def compressed(entries: Sequence[Entry]) -> list[Entry]:
    """Return the models that are not a base."""
    return [entry for entry in entries if not entry.is_base]


def best_of(entries: Sequence[Entry]) -> Entry | None:
    """Return the model that costs least: the lowest KL, else the lowest perplexity, else the first."""
    for key in ("kl", "perplexity"):
        scored = [(value, entry) for entry in entries if (value := entry.score(key)) is not None]
        if scored:
            return min(scored, key=lambda pair: (pair[0], pair[1].label))[1]
    return entries[0] if entries else None


def model_name(run: ReportedRun, entries: Sequence[Entry]) -> str:
    """Return the name of the original model: the base's, else the one that results were made from, else the run's."""
    names = [entry.card.model for entry in entries if entry.is_base and entry.card is not None]
    names = names or [entry.card.base for entry in entries if entry.card is not None and entry.card.base]
    names = names or [result.manifest.model for result in run.results]
    names = names or [entry.card.model for entry in entries if entry.card is not None]
    return Counter(names).most_common(1)[0][0] if names else run.name


def headline(run: ReportedRun, entries: Sequence[Entry]) -> Section:
    """Return which model, what was kept, what it weighs and what it cost."""
    results = compressed(entries)
    best = best_of(results)
    name = model_name(run, entries)
    facts = _facts(run, entries)
    if best is None:
        return {"model": name, "facts": facts, "cards": [], "lead": "", "best": "", "domains": "", "sizes": []}
    scored = best.score("kl") is not None or best.score("perplexity") is not None
    lead = f"{count_text(len(results), 'compressed result')} of {name}." if len(results) > 1 else ""
    return {
        "model": name,
        "facts": facts,
        "lead": lead,
        "best": best.label,
        "why": "costs least" if scored and len(results) > 1 else "",
        "cards": _cards(best),
        "domains": _hardest(best),
        "sizes": _best_by_size(results),
    }


def _facts(run: ReportedRun, entries: Sequence[Entry]) -> list[str]:
    facts = []
    if run.profiles:
        profile = run.profiles[0][1]
        layers = profile.layers
        facts.append(count_text(len(layers), "MoE layer"))
        facts.append(f"{range_text([layer.num_experts for layer in layers])} experts a layer")
        facts.append(f"width {range_text([layer.width for layer in layers])}")
        facts.append(f"top {range_text([layer.top_k for layer in layers])}")
    elif run.results:
        changes = run.results[0].manifest.layers
        facts.append(count_text(len(changes), "MoE layer"))
        facts.append(f"{counts_text(changes, side='before')} experts a layer")
        facts.append(f"width {widths_text(changes, side='before')}")
        facts.append(f"top {chosen_text(changes, side='before')}")
    cards = [entry.card for entry in entries if entry.card is not None]
    if cards:
        facts.append(f"scored on {count_text(cards[0].overall['tokens'], 'token')}")
        facts.append(count_text(len(cards[0].domains), "domain"))
    elif run.profiles:
        facts.append(f"profiled on {count_text(sum(run.profiles[0][1].num_tokens), 'token')}")
    return facts


def _cards(best: Entry) -> list[dict[str, str]]:
    cards: list[dict[str, str]] = []

    def add(title: str, value: str, note: str) -> None:
        cards.append({"title": title, "value": value, "note": note})

    result, base = best.result, best.base_card
    if result is not None and result.manifest.layers:
        add("Kept", *kept_text(result.manifest.layers))
    ratio = best.bytes_ratio
    note = f"{percent_text(ratio)} of {bytes_text(round(best.num_bytes / ratio))}" if ratio else "all tensors"
    add("Bytes", bytes_text(best.num_bytes), note)
    perplexity, times = best.score("perplexity"), best.score("perplexity_ratio")
    if perplexity is not None:
        before = number_text(base.overall["perplexity"]) if base is not None else ""
        value = times_text(times) if times is not None else number_text(perplexity)
        add("Perplexity", value, f"{before} → {number_text(perplexity)}" if times is not None else "test text")
    if (kl := best.score("kl")) is not None:
        error = error_text(best.error("kl"))
        add("KL", number_text(kl), f"{f'{error} ' if error else ''}nats a token, from the original")
    if (agreement := best.score("agreement")) is not None:
        add("Top-1 agreement", percent_text(agreement, 1), "same likeliest token")
    if (accuracy := best.score("accuracy")) is not None:
        original_accuracy = base.overall["accuracy"] if base is not None else None
        add(
            "Exact answers",
            percent_text(accuracy, 1),
            f"original {percent_text(original_accuracy, 1)}" if original_accuracy is not None else "",
        )
    return cards


def _hardest(best: Entry) -> str:
    if best.card is None:
        return ""
    scored = [(kl, domain) for domain in best.card.domains if (kl := best.score("kl", domain)) is not None]
    if len(scored) < 2:
        return ""
    low, high = min(scored), max(scored)
    return f"Hardest hit: {high[1]} (KL {number_text(high[0])}). Least: {low[1]} ({number_text(low[0])})."


def _best_by_size(results: Sequence[Entry]) -> list[dict[str, str]]:
    sizes = list(dict.fromkeys(entry.size for entry in results if entry.size))
    if len(sizes) < 2:
        return []
    rows = []
    for size in sizes:
        best = best_of([entry for entry in results if entry.size == size])
        assert best is not None
        rows.append(
            {
                "size": size,
                "label": best.label,
                "bytes": bytes_text(best.num_bytes),
                "ratio": percent_text(best.bytes_ratio),
                "kl": number_text(best.score("kl")),
                "perplexity": times_text(best.score("perplexity_ratio")),
            }
        )
    return rows


def results_table(entries: Sequence[Entry]) -> Section | None:
    """Return the table of all models, the base first and the best values marked, and size against cost."""
    results = compressed(entries)
    if not entries:
        return None
    columns = [column for column in COLUMNS if any(column.value(entry) is not None for entry in entries)]
    titles = {column.title for column in columns}
    sizes = Counter(entry.size for entry in results)
    apart = len(sizes) > 1 and max(sizes.values()) > 1
    best: dict[tuple[str, str], float] = {}
    for column in columns:
        for size in sizes:
            of_size = [entry for entry in results if not apart or entry.size == size]
            values = [value for entry in of_size if (value := column.value(entry)) is not None and math.isfinite(value)]
            if len(values) > 1 and column.better and max(values) > min(values):
                best[size, column.title] = min(values) if column.better == "low" else max(values)
    manifests = [entry.result.manifest for entry in results if entry.result is not None]
    kinds = {layer_kind(layer) for manifest in manifests for layer in manifest.layers}
    rows: list[Section] = []
    group: str | None = None
    for entry in entries:
        size = entry.size
        heading = (size or "unknown") if apart and not entry.is_base and size != group else ""
        group = size if not entry.is_base else None
        cells = []
        for column in columns:
            value = column.value(entry)
            chosen = not entry.is_base and value is not None and best.get((size, column.title)) == value
            cells.append({"text": column.text(value), "error": error_text(column.error(entry)), "best": chosen})
        result = entry.result
        counts, also = (MISSING, []) if result is None else before_after(result.manifest.layers)
        rows.append(
            {
                "heading": heading,
                "label": "original" if entry.is_base else entry.label,
                "name": entry.name,
                "is_base": entry.is_base,
                "router": MISSING if result is None else result.manifest.router,
                "experts": counts,
                "also": also,
                "kept": percent_text(entry.neuron_share),
                "cells": cells,
            }
        )
    return {
        "columns": columns,
        "rows": rows,
        "apart": apart,
        "any_best": bool(best),
        "errors": any(cell["error"] for row in rows for cell in row["cells"]),
        "any_base": any(entry.is_base for entry in entries),
        "order": next((word for key, word in (("KL", "KL"), ("Perplexity", "perplexity")) if key in titles), ""),
        "neurons": any(kind != "whole" for kind in kinds),
        "parts": "cut" in kinds,
        "ragged": "ragged" in kinds,
        "maps": any(manifest.form is ResultForm.MAPPED for manifest in manifests),
        "texts": len({entry.card.text_digest for entry in entries if entry.card is not None}),
        "remarks": remarks(results),
        "trade_off": _trade_off(results),
    }


def _trade_off(results: Sequence[Entry]) -> Section | None:
    """Return KL against bytes, one line a recipe and router, where sizes differ by two hundredths or more."""
    series: dict[str, list[Point]] = {}
    for entry in results:
        ratio, kl = entry.bytes_ratio, entry.score("kl")
        if ratio is not None and kl is not None and math.isfinite(kl):
            name = entry.label if entry.result is None else recipe_name(entry.result)
            series.setdefault(name, []).append(Point(name=entry.label, x=ratio, y=kl, error=entry.error("kl")))
    ratios = [point.x for points in series.values() for point in points]
    if len(ratios) < 2 or max(ratios) - min(ratios) < 0.02:
        return None
    joined = [sorted(points, key=lambda point: point.x) for points in series.values()]
    plot = trade_off(joined, "bytes, as a share of the original's", "KL from the original, nats a token")
    return {"plot": plot, "legend": _legend(list(series))}


def _legend(labels: Sequence[str]) -> list[dict[str, Any]]:
    return [{"mark": key_mark(number), "label": label} for number, label in enumerate(labels)]


def costs(entries: Sequence[Entry]) -> Section | None:
    """Return what compression cost in every domain: heat tables of KL, perplexity and answers; a dot plot of KL."""
    scored = [entry for entry in compressed(entries) if entry.card is not None]
    domains = list(dict.fromkeys(domain for entry in scored if entry.card is not None for domain in entry.card.domains))
    if not scored or not domains:
        return None
    tables = [
        table
        for table in (
            _heat_table(
                scored, domains, "kl", "KL from the original, nats a token", number_text,
                "Brighter cells cost more; 0 means that every prediction is the original's.", floor=0.0,
            ),
            _heat_table(
                scored, domains, "perplexity_ratio", "Perplexity, as a multiple of the original's", times_text,
                "Brighter cells cost more; 1× is no loss. The colours are on a logarithmic scale.", floor=1.0, log=True,
            ),
            _perplexity_table(scored, domains),
            _answers_table(scored, domains, entries),
        )
        if table is not None
    ]  # fmt: skip
    if not tables:
        return None
    series = [[_finite(entry.score("kl", domain)) for domain in domains] for entry in scored]
    plot: Markup | None = None
    if any(value is not None for row in series for value in row):
        errors = [[entry.error("kl", domain) for domain in domains] for entry in scored]
        plot = domain_dots(domains, series, "KL from the original, nats a token", 0.0, errors=errors)
    return {"tables": tables, "plot": plot, "legend": _legend([entry.label for entry in scored])}


def _heat_table(
    scored: Sequence[Entry],
    domains: Sequence[str],
    key: str,
    title: str,
    text: Callable[[float | None], str],
    caption: str,
    *,
    floor: float,
    log: bool = False,
) -> Section | None:
    columns = [None, *domains]
    values = [[entry.score(key, domain) for domain in columns] for entry in scored]
    finite = [value for row in values for value in row if value is not None and math.isfinite(value)]
    if not finite:
        return None
    high = max([*finite, floor])

    def place(value: float) -> float:
        if not math.isfinite(value):
            return 1.0
        if log:
            return math.log(max(value, floor) / floor) / math.log(high / floor) if high > floor else 0.0
        return (value - floor) / (high - floor) if high > floor else 0.0

    rows = []
    for entry, row in zip(scored, values, strict=True):
        cells = []
        for value in row:
            rgb = None if value is None else colour(CIVIDIS, place(value))
            style = "" if rgb is None else f"background:{hex_colour(rgb)};color:{ink_on(rgb)}"
            cells.append({"text": text(value), "style": style})
        rows.append({"label": entry.label, "cells": cells})
    return {"title": title, "caption": caption, "columns": ["all", *domains], "rows": rows}


def _perplexity_table(scored: Sequence[Entry], domains: Sequence[str]) -> Section | None:
    """Return perplexity by domain without colours, where there is no original to compare with."""
    if any(entry.score("perplexity_ratio") is not None for entry in scored):
        return None
    columns = [None, *domains]
    if all(entry.score("perplexity", domain) is None for entry in scored for domain in columns):
        return None
    rows = []
    for entry in scored:
        cells = [{"text": number_text(entry.score("perplexity", domain)), "style": ""} for domain in columns]
        rows.append({"label": entry.label, "cells": cells})
    caption = "Not compared with an original: none was scored on the same text."
    return {"title": "Perplexity", "caption": caption, "columns": ["all", *domains], "rows": rows}


def _answers_table(scored: Sequence[Entry], domains: Sequence[str], entries: Sequence[Entry]) -> Section | None:
    with_questions = [
        domain for domain in domains if any(entry.score("accuracy", domain) is not None for entry in scored)
    ]
    if len(with_questions) < 2:  # one domain of questions stands in the table of results
        return None
    base = [entry for entry in entries if entry.is_base and entry.card is not None]
    rows = []
    for entry in [*base, *scored]:
        cells = []
        for domain in (None, *with_questions):
            value = entry.score("accuracy", domain)
            rgb = None if value is None else colour(CIVIDIS, 1.0 - value)
            style = "" if rgb is None else f"background:{hex_colour(rgb)};color:{ink_on(rgb)}"
            cells.append({"text": percent_text(value), "style": style})
        rows.append({"label": "original" if entry.is_base else entry.label, "cells": cells})
    caption = "Share of questions answered exactly; brighter cells answer fewer."
    return {"title": "Exact answers", "caption": caption, "columns": ["all", *with_questions], "rows": rows}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sizes(run: ReportedRun, entries: Sequence[Entry]) -> Section | None:
    """Return bars of bytes before and after, and the plans that were not carried out."""
    results = [entry for entry in compressed(entries) if entry.bytes_ratio]
    executed_plans = [result.manifest.plan for result in run.results]
    open_plans = []
    for path, plan in run.plans:
        if not any(_carries_out(executed, plan.body()) for executed in executed_plans):
            ratio = plan.predicted_bytes / plan.original_bytes if plan.original_bytes else None
            open_plans.append(
                {
                    "path": path,
                    "recipe": plan.recipe,
                    "router": plan.router,
                    "experts": plan_text(plan.layers),
                    "layers": len(plan.layers),
                    "bytes": bytes_text(plan.predicted_bytes),
                    "original": bytes_text(plan.original_bytes),
                    "ratio": percent_text(ratio),
                }
            )
    if not results and not open_plans:
        return None
    plot = None
    apart = parts = False
    if results:
        first = results[0]
        original = round(first.num_bytes / (first.bytes_ratio or 1.0))
        rows = _byte_rows(results)
        reported = [entry.result for entry in results if entry.result is not None]
        fixed = next((result.fixed_bytes for result in reported if result.fixed_bytes is not None), None)
        rows.insert(0, ByteRow(name="original", total=original, experts=None if fixed is None else original - fixed))
        plot, apart = byte_bars(rows), any(row.experts is not None for row in rows)
        parts = any(layer_kind(layer) == "cut" for result in reported for layer in result.manifest.layers)
    return {"plot": plot, "apart": apart, "parts": parts, "plans": open_plans}


def _byte_rows(results: Sequence[Entry]) -> list[ByteRow]:
    """Return one bar for all results of one size; equal bars side by side say nothing."""
    alike: dict[tuple[int, int | None, str], list[Entry]] = {}
    for entry in results:
        result = entry.result
        expert_bytes, size = (None, "") if result is None else (result.expert_bytes, short_size(result.manifest.layers))
        alike.setdefault((entry.num_bytes, expert_bytes, size), []).append(entry)
    rows = []
    for (total, expert_bytes, size), group in alike.items():
        name = group[0].label
        if len(group) > 1 and group[0].result is not None:
            routers = list(dict.fromkeys(entry.result.manifest.router for entry in group if entry.result is not None))
            name = f"{size}, {routers[0]}" if len(routers) == 1 else size
        rows.append(
            ByteRow(name=name, total=total, experts=expert_bytes, title=", ".join(entry.label for entry in group))
        )
    return rows


def _carries_out(executed: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """Tell whether a plan, as it was executed, is what another says; that one need not name experts."""
    settings = {key: value for key, value in executed.items() if key != "layers"}
    if settings != {key: value for key, value in plan.items() if key != "layers"}:
        return False
    layers, planned = executed.get("layers"), plan["layers"]
    if not isinstance(layers, list) or len(layers) != len(planned):
        return False
    return all(
        isinstance(layer, dict)
        and {key: value for key, value in layer.items() if key in planned_layer or key != "experts"} == planned_layer
        for layer, planned_layer in zip(layers, planned, strict=True)
    )


def provenance(run: ReportedRun, entries: Sequence[Entry]) -> Section:
    """Return what everything was made from, how long it took, where it ran and how to load it."""
    results = [(entry.label, entry.result) for entry in entries if entry.result is not None]
    stages = list(dict.fromkeys(stage for _, result in results for stage in result.seconds))
    timed = [(label, list(result.seconds.items())) for label, result in results if result.seconds]
    return {
        "artefacts": _artefacts(run),
        "making": [_making(label, result) for label, result in results],
        "time": time_bars(timed, stages) if timed else None,
        "stages": [{"css": f"s{number % 7}", "name": stage} for number, stage in enumerate(stages)],
        "environment": _environment(run),
        "evaluation": _evaluation(entries),
        "left_out": run.left_out,
    }


def _artefacts(run: ReportedRun) -> list[dict[str, Any]]:
    rows: list[tuple[str, str, dict[str, str]]] = []
    for path, profile in run.profiles:
        rows.append((path, "profile", {"model": profile.model_digest, "text": profile.text_digest}))
    rows += [(result.path, "manifest", dict(result.inputs)) for result in run.results]
    for path, card in run.scorecards:
        digests = {"model": card.model_digest, "base": card.base_digest, "text": card.text_digest}
        rows.append((path, "scorecard", {name: digest for name, digest in digests.items() if digest is not None}))
    rows += [(path, "plan", dict(plan.inputs)) for path, plan in run.plans]
    return [
        {
            "path": path,
            "kind": kind,
            "version": run.versions.get(path, MISSING),
            "digests": [{"name": name, "short": digest[:12], "full": digest} for name, digest in digests.items()],
        }
        for path, kind, digests in rows
    ]


def _making(label: str, result: ReportedResult) -> dict[str, Any]:
    passes = []
    for name, options in result.manifest.passes:
        option_text = ", ".join(f"{key}={value}" for key, value in options.items())
        passes.append(f"{name} ({option_text})" if option_text else name)
    folder = result.path.removesuffix("coterie.json").rstrip("/") or "."
    return {
        "label": label,
        "folder": folder,
        "passes": " → ".join(passes),
        "tokens": f"{result.manifest.calibration_tokens:,}",
        "seq_len": result.manifest.seq_len,
        "domains": len(result.manifest.domains),
        "domain_names": ", ".join(result.manifest.domains),
        "seed": result.manifest.seed,
        "logits_error": number_text(result.manifest.logits_error, 2),
        "memory": bytes_text(result.peak_bytes),
        "how": result.manifest.how_to_load(folder),
        "loads_with": result.manifest.loads_with,
    }


def _environment(run: ReportedRun) -> list[dict[str, str]]:
    values_by_key: dict[str, dict[str, None]] = {}
    for _, card in run.scorecards:
        for key, value in card.environment.items():
            values_by_key.setdefault(key, {})[str(value)] = None
    return [{"key": key.replace("_", " "), "value": "; ".join(values)} for key, values in values_by_key.items()]


def _evaluation(entries: Sequence[Entry]) -> list[dict[str, str]]:
    rows: dict[tuple[str, ...], None] = {}
    for entry in entries:
        if entry.card is None:
            continue
        card = entry.card
        rows[
            f"{card.overall['tokens']:,}",
            f"{card.overall['questions']:,}",
            str(card.seq_len),
            str(card.seed),
            str(len(card.domains)),
            card.text_digest[:12],
        ] = None
    names = ("tokens", "questions", "seq_len", "seed", "domains", "text")
    return [dict(zip(names, row, strict=True)) for row in rows]
