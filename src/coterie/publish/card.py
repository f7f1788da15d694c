"""The model card of a result: ``README.md`` beside its weights, made from its manifest and from what was measured.

The original's card is not carried along: it states parameters and scores that are no longer true. What the law asks for
is: its licence, in words at the head and as the files that came with it. Equal manifests and measurements give equal
bytes; no date and no path of the machine is in a card.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from coterie.amounts import format_bytes, format_count
from coterie.artifact import atomic_path
from coterie.model.disk.beside import MODELING_FILE
from coterie.model.disk.encodings.ggml import OWN_TYPES
from coterie.model.disk.encodings.plane_types import PLANES
from coterie.model.disk.files import is_hub_id
from coterie.model.disk.manifest import LayerEntry, Manifest, ResultForm
from coterie.outputs import claim_output
from coterie.publish.markdown import block, code, plain, table

CARD = "README.md"

_HOME = "https://github.com/coterie-moe/coterie"

#: Layers that differ, up to which their table is not folded.
_UNFOLDED = 8

_LEGAL = re.compile(r"(licen[sc]e|notice|copying|copyright|use[-_]?policy|acceptable[-_]use)", re.IGNORECASE)
_SEAL = re.compile(rb"<!-- coterie (\S+) wrote this card; sha256 of what is above: ([0-9a-f]{64}) -->\n\Z")

#: What stands for a number that is not known.
_MISSING = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class CostRow:
    """What was measured on one domain, or over all: the original's value and the result's; None where it was not.

    Attributes:
        name: the domain.
        perplexity, accuracy: (the original's, the result's).
        ratio, ratio_error: perplexity divided by the original's, and its standard error.
        kl, kl_error: mean divergence from the original in nats a token, and its standard error.
        agreement: share of tokens where both have the same likeliest one.
    """

    name: str
    perplexity: tuple[float | None, float | None]
    ratio: float | None
    ratio_error: float | None
    kl: float | None
    kl_error: float | None
    agreement: float | None
    accuracy: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCost:
    """What an evaluation measured.

    Attributes:
        base: name of the model that it was compared with; None for none.
        is_original: whether that is the model that the result was made from.
        rows: the domains, and what is over all as the last one; empty where no text was read.
        tokens, sequences, questions: how many there were.
        seq_len: tokens in a sequence.
        speed_ratio: tokens a second divided by the base's, or None.
        tasks: (task, metric, value, standard error) of the lm-evaluation-harness.
    """

    base: str | None
    is_original: bool
    rows: Sequence[CostRow]
    tokens: int
    sequences: int
    questions: int
    seq_len: int
    speed_ratio: float | None
    tasks: Sequence[tuple[str, str, float | None, float | None]]


def is_own_card(path: Path) -> bool:
    """Tell whether a file is a card that Coterie wrote and nobody changed."""
    if not path.is_file() or path.stat().st_size > 2**26:
        return False
    content = path.read_bytes()
    seal = _SEAL.search(content)
    return seal is not None and hashlib.sha256(content[: seal.start()]).hexdigest().encode() == seal[2]


def write_card(
    target: Path,
    manifest: Manifest,
    *,
    files: Sequence[str],
    version: str,
    base_model: str | None = None,
    cost: MeasuredCost | None = None,
) -> Path:
    """Write the card of a result; one that Coterie wrote is replaced, and said so, anything else refused.

    Args:
        target: the file.
        manifest: what the result is.
        files: names of the files in the result's folder.
        version: version of Coterie that made the result.
        base_model: hub id of the original, where the manifest does not say it.
        cost: what was measured.

    Raises:
        OutputExists: something else is there, such as a card that was edited.
    """
    claim_output(target, kind="card", accepts=is_own_card)
    text = render_card(manifest, files=files, version=version, base_model=base_model, cost=cost)
    content = text.encode("utf-8", "replace")  # names on disk may hold what UTF-8 cannot
    seal = (
        f"<!-- coterie {version} wrote this card; sha256 of what is above: {hashlib.sha256(content).hexdigest()} -->\n"
    )
    with atomic_path(target) as temporary:
        temporary.write_bytes(content + seal.encode())
    return target


def render_card(
    manifest: Manifest,
    *,
    files: Sequence[str],
    version: str,
    base_model: str | None = None,
    cost: MeasuredCost | None = None,
) -> str:
    """Return the text of a card, without the seal; see `write_card`."""
    model_id = base_model or manifest.provenance.model_id
    sections = [
        f"# {plain(_name(manifest, model_id))}, made smaller",
        *_what_it_is(manifest, model_id),
        "## What became of each layer\n",
        _layers(manifest),
        "## What it costs\n",
        *_measured(cost),
        "## How to load it\n",
        _loading(manifest, files),
        "## Calibration text\n",
        _calibration(manifest),
        "## How to make it again\n",
        *_making(manifest, version),
        "## Licence\n",
        _licence(manifest, files, model_id),
    ]
    body = "\n".join(f"{section.rstrip()}\n" for section in sections if section)
    return f"---\n{_head(manifest, files, model_id)}\n---\n\n{body}\n"


def _name(manifest: Manifest, model_id: str | None) -> str:
    return manifest.model if model_id is None else model_id.partition("/")[2] or model_id


def _head(manifest: Manifest, files: Sequence[str], model_id: str | None) -> str:
    """Return the YAML at the head of the card, which the hub reads.

    The relation to the original is "finetune", the one of the hub's four (adapter, finetune, merge, quantized) that
    means other weights made from those of one model; "merge" is for several models.
    """
    from huggingface_hub import ModelCardData

    origin = manifest.provenance
    languages = list(origin.languages)
    legal = _legal_files(files)
    license_word, license_name, license_link = origin.license, origin.license_name, origin.license_link
    if license_word is None and legal:
        license_word, license_name, license_link = "other", "see-file", legal[0]
    data = ModelCardData(
        language=languages[0] if len(languages) == 1 else languages or None,
        license=license_word,
        license_name=license_name,
        license_link=_absolute(license_link, files, model_id),
        library_name="transformers" if MODELING_FILE in files else manifest.loads_with,
        base_model=model_id,
        tags=["moe", "coterie", manifest.recipe],
        pipeline_tag=origin.pipeline_tag or "text-generation",
    )
    if model_id is not None:
        data["base_model_relation"] = "finetune"
    return str(data.to_yaml(original_order=["base_model", "base_model_relation"]))


def _absolute(link: str | None, files: Sequence[str], model_id: str | None) -> str | None:
    """Return a link to a licence as it is, but one to a file that was not carried along as one to the original's."""
    if link is None or "://" in link or link in files or model_id is None:
        return link
    return f"https://huggingface.co/{model_id}/blob/main/{link}"


def _original(manifest: Manifest, model_id: str | None) -> str:
    if model_id is not None and is_hub_id(model_id):
        return f"[{plain(model_id)}](https://huggingface.co/{model_id})"
    return code(manifest.model) if model_id is None else code(model_id)


def _what_it_is(manifest: Manifest, model_id: str | None) -> Iterator[str]:
    origin, plan = manifest.provenance, manifest.plan
    recipe = code(manifest.recipe)
    paper = origin.recipe_paper
    if paper is not None:
        arxiv = re.fullmatch(r"\d{4}\.\d{4,5}", paper)
        recipe += f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if arxiv else f" ({plain(paper)})"
    does = f": {plain(origin.recipe_summary)}" if origin.recipe_summary else ""
    router = "" if manifest.router == "plain" else f" The router has the form {code(manifest.router)}."
    yield (
        f"{_original(manifest, model_id)} with smaller Mixture-of-Experts layers, made by "
        f"[Coterie]({_HOME}) with the recipe {recipe}{does}.{router}"
    )
    if model_id is None:
        yield (
            f"The original was the local folder {code(manifest.model)}; its id on the hub is not known, so "
            "`base_model` is left out above. `coterie card FOLDER --base-model OWNER/NAME` adds it."
        )
    distilled = manifest.distilled or {}
    if distilled.get("taken"):
        tokens = distilled.get("tokens")
        amount = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
        yield f"After that it was trained{amount} towards the original's predictions."
    rows = [_before_after("bytes of weights", manifest.bytes_before, manifest.bytes_after, format_bytes)]
    total = plan.get("original_parameters"), plan.get("predicted_parameters")
    rows.append(_before_after("parameters", *total, format_count))
    active = origin.active_before, origin.active_after
    rows.append(_before_after("parameters that one token uses", *active, format_count))
    yield table(("", "original", "this model", "left"), rows)


def _before_after(name: str, before: object, after: object, text: object) -> tuple[str, str, str, str]:
    words = [text(value) if type(value) is int and callable(text) else _MISSING for value in (before, after)]
    share = f"{100 * after / before:.1f} %" if type(before) is int and type(after) is int and before else _MISSING
    return name, words[0], words[1], share


def _layers(manifest: Manifest) -> str:
    rows = []
    for cells, group in groupby(manifest.layers, key=_layer_cells):
        indices = [layer.index for layer in group]
        name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}–{indices[-1]}"
        rows.append((name, *cells))
    text = table(("MoE layer", "experts", "width of an expert", "experts a token uses"), rows)
    if len(rows) <= _UNFOLDED:
        return text
    return f"<details>\n<summary>{len(manifest.layers)} MoE layers</summary>\n\n{text}\n\n</details>"


def _layer_cells(layer: LayerEntry) -> tuple[str, str, str]:
    width = _change(layer.width_before, layer.width_after)
    if layer.widths_after is not None:
        mean = sum(layer.widths_after) / len(layer.widths_after)
        ends = f"{min(layer.widths_after):,} to {max(layer.widths_after):,}"
        width = f"{layer.width_before:,} → {ends}, {mean:,.1f} on average"
    experts = _change(layer.num_experts_before, layer.num_experts_after)
    return experts, width, _change(layer.top_k_before, layer.top_k_after)


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _measured(cost: MeasuredCost | None) -> Iterator[str]:
    if cost is None:
        yield "This was not measured. Scores in the original's card are those of the original, not of this model."
        return
    if cost.rows:
        yield from _measured_on_text(cost)
    if cost.tasks:
        yield table(
            ("task", "metric", "value", "standard error"),
            [
                (code(task), code(metric), _number(value, 4), _number(error, 4))
                for task, metric, value, error in cost.tasks
            ],
        )


def _measured_on_text(cost: MeasuredCost) -> Iterator[str]:
    what = f"{cost.tokens:,} tokens of test text in sequences of {cost.seq_len:,}"
    what += f" and {cost.questions:,} questions" if cost.questions else ""
    against = "" if cost.base is None else " Compared with the original."
    if cost.base is not None and not cost.is_original:
        against = f" Compared with {code(cost.base)}, which is not the model that this one was made from."
    spread = ""
    if any(row.kl_error is not None for row in cost.rows):
        spread = " What follows ± is the standard error over sequences."
    yield f"On {what}.{against}{spread}"
    columns: list[str] = ["text", "perplexity"]
    if cost.base is not None:
        columns += ["of the original", "ratio", "KL (nats a token)", "same likeliest token"]
    answered = any(value is not None for row in cost.rows for value in row.accuracy)
    if answered:
        columns += ["exact answers"] + (["of the original"] if cost.base is not None else [])
    rows = []
    for row in cost.rows:
        cells = [plain(row.name), _number(row.perplexity[1], 3)]
        if cost.base is not None:
            cells += [
                _number(row.perplexity[0], 3),
                _number(row.ratio, 3, row.ratio_error),
                _number(row.kl, 4, row.kl_error),
                _percent(row.agreement),
            ]
        if answered:
            cells += [_percent(row.accuracy[1])] + ([_percent(row.accuracy[0])] if cost.base is not None else [])
        rows.append(cells)
    yield table(columns, rows)
    if cost.speed_ratio is not None:
        yield f"It reads {cost.speed_ratio:.2f} times as many tokens a second as what it was compared with."


def _number(value: float | None, digits: int, error: float | None = None) -> str:
    text = _MISSING if value is None else f"{value:,.{digits}f}"
    return text if error is None else f"{text} ± {error:,.{digits}f}"


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f} %"


def _loading(manifest: Manifest, files: Sequence[str]) -> str:
    if manifest.form is ResultForm.COMPRESSED_TENSORS_BY_LAYER:
        lines = ("from vllm import LLM", "", 'model = LLM("FOLDER")  # or the id of this repository')
        return (
            "Its weights are integers as compressed-tensors stores them, in some layers' experts otherwise than in "
            "others'. vLLM loads that; transformers does not, and may load wrong numbers without a word.\n\n"
            f"{block(lines, 'python')}"
        )
    trust = "" if manifest.loads_with == "transformers" else ", trust_remote_code=True"
    stock = block(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "FOLDER"  # or the id of this repository',
            f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ),
        "python",
    )
    if manifest.form is ResultForm.PLAIN:
        return stock
    if manifest.form is ResultForm.COMPRESSED_TENSORS:
        return (
            "Its weights are integers as compressed-tensors stores them, which transformers loads with the package "
            f"`compressed-tensors`, and vLLM by itself.\n\n{stock}"
        )
    why = {
        ResultForm.MAPPED: "Its routers keep the original's rows and point them at the experts that are left",
        ResultForm.RAGGED: "Every expert has a width of its own",
        ResultForm.PACKED: "Its weights are stored in an encoding of their own",
    }[manifest.form]
    in_blocks = manifest.form is ResultForm.PACKED or bool(manifest.plan.get("types"))
    if in_blocks and manifest.form is ResultForm.RAGGED:
        why += ", and its weights are stored in an encoding of their own"
    lines = ("import coterie  # pip install coterie", "", 'model = coterie.load_model("FOLDER")')
    alone = f"{why}, which the classes of transformers cannot load."
    if MODELING_FILE not in files:  # an earlier version of Coterie made the result
        return f"{alone}\n\n{block(lines, 'python')}"
    types = set(manifest.plan.get("types", {}).values())
    by_gguf = in_blocks and not (types and types <= {*OWN_TYPES, *PLANES})
    packages = "transformers 5 and `pip install gguf`" if by_gguf else "transformers 5"
    return (
        f"{alone} The code in `{MODELING_FILE}` here does, and takes {packages}; what comes out is a model of the "
        f"family's own class.\n\n{stock}\n\nWithout code from this folder:\n\n{block(lines, 'python')}"
    )


def _calibration(manifest: Manifest) -> str:
    text = manifest.provenance.text
    source = "" if text is None else f", from the folder {code(text)}"
    if text == "self":
        source = ", which the model wrote itself"
    elif text is not None and text.startswith("hf:"):
        source = f", from the data set {code(text)}"
    domains = ", ".join(map(code, manifest.domains))
    measured = "" if manifest.calibration_inputs == "original" else " Each layer was measured behind compressed ones."
    return (
        f"{manifest.calibration_tokens:,} tokens{source}, in sequences of {manifest.seq_len:,}; "
        f"domains: {domains or _MISSING}; seed {manifest.seed}.{measured}"
    )


def _making(manifest: Manifest, version: str) -> Iterator[str]:
    yield f"With Coterie {plain(version)}:"
    commands = manifest.provenance.commands
    if commands:
        yield block(commands, "bash")
    yield "`coterie.json` holds the plan that was carried out, expert by expert, and the digests of model and text."


def _legal_files(files: Sequence[str]) -> list[str]:
    return sorted(name for name in files if _LEGAL.search(Path(name).name))


def _licence(manifest: Manifest, files: Sequence[str], model_id: str | None) -> str:
    origin, legal = manifest.provenance, _legal_files(files)
    names = [name for name in (origin.license_name, origin.license) if name is not None and name != "other"]
    link = _absolute(origin.license_link, files, model_id)
    said = f"{code(names[0])}" if names else ""
    if link is not None and re.fullmatch(r"[!-~]+", link) and not re.search(r"[()<>]", link):
        said += f"{', ' if said else ''}[text]({link})"
    of_original = f"That of the original applies{f': {said}' if said else ''}."
    if legal:
        of_original += f" Carried along from it: {', '.join(map(code, legal))}."
    elif not said:
        of_original += " The original says none that could be read; ask those who made it before you pass this on."
    return of_original
