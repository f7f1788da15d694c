"""Every artefact, with any one value in it changed and its digest made anew: it is read as what it says, or refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coterie.artifact import file_digest
from coterie.bench.store import Store
from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.patterns import Patterns
from coterie.compress.plan import Plan
from coterie.compress.prices import Prices
from coterie.errors import CorruptArtifact, StaleArtifact
from coterie.evaluate.scorecard import Scorecard
from coterie.evaluate.sums import Scores
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.manifest import LayerEntry, Manifest, ResultForm
from coterie.profile.profile import Profile, Sample, layer_file
from hostile import changed, places, values, write_digested

DIGESTS = {"model": "a" * 64, "text": "b" * 64}
SCORES = Scores(
    perplexity=12.5, perplexity_error=0.5, perplexity_rise=2.5, perplexity_rise_error=0.25, perplexity_ratio=1.25,
    perplexity_ratio_error=0.03, kl=0.25, kl_error=0.01, agreement=0.75, accuracy=None, tokens=10, sequences=2,
    questions=0,
)  # fmt: skip


def save_profile(folder: Path) -> Path:
    statistics, samples, layers = [], [], []
    for index in range(2):
        statistics.append(
            {
                "tokens": torch.tensor([3.0, 4.0], dtype=torch.float64),
                "usage": torch.rand(2, 4, dtype=torch.float64),
                "output_peak": torch.rand(2, 4, dtype=torch.float64),
                "hessian_hidden": torch.rand(4, 3, 3),
            }
        )
        samples.append(
            Sample(
                inputs_TD=torch.rand(6, 5), index_TK=torch.randint(5, (6, 2)), weight_TK=torch.rand(6, 2),
                logits_TE=torch.rand(6, 4), output_TD=torch.rand(6, 5), domain_T=torch.arange(6) % 2,
                priority_T=torch.randperm(6),
            )
        )  # fmt: skip
        block = f"model.layers.{index}.mlp"
        layers.append(
            MoELayer(
                index=index, block=block, experts=f"{block}.experts", router=None,
                router_tensors=((f"{block}.gate.weight", 0),), num_experts=4, top_k=2, width=3, hidden_size=5,
                num_groups=2,
            )
        )  # fmt: skip
    profile = Profile(
        model_digest=DIGESTS["model"], text_digest=DIGESTS["text"], domains=("code", "größe"), num_tokens=(3, 4),
        seq_len=7, seed=3, layers=tuple(layers), statistics=tuple(statistics), samples=tuple(samples),
        sample_counts=(4, 5), thin=2, asked=("tokens", "usage", "output_peak", "hessian_hidden"),
    )  # fmt: skip
    return profile.save(folder)


def read_profile(path: Path) -> None:
    """Read all of a profile: what its layers hold is read when it is asked for."""
    profile = Profile.load(path.parent)
    for index in range(len(profile.layers)):
        for name in profile.statistics[index]:
            assert profile.sum(index, name).isfinite().all()
        assert profile.samples[index].index_TK.max() <= profile.layers[index].num_experts
    assert profile.digest()


def save_plan(folder: Path) -> Path:
    layer = LayerPlan(num_experts=1, width=2, experts=(ExpertPlan(sources=(0, 2), width=2),), protected=(0,))
    plan = Plan(
        recipe="reap", router="plain", passes=(("select", {"score": "reap"}),), result_steps=(), layers=(layer,),
        untouched=("mtp",), original_bytes=100, predicted_bytes=60, original_parameters=50, predicted_parameters=30,
        seed=3, inputs=DIGESTS,
    )  # fmt: skip
    return plan.save(folder / "plan.json")


def save_manifest(folder: Path) -> Path:
    layer = LayerEntry(
        index=0, block="model.layers.0.mlp", num_experts_before=4, num_experts_after=2, top_k_before=2, top_k_after=2,
        width_before=3, width_after=3, widths_after=None, parts=1, expert_map=(0, -1, 1, -1), centres=(0, 2),
        notes={"select": {"score": "reap"}},
    )  # fmt: skip
    manifest = Manifest(
        form=ResultForm.PLAIN, recipe="reap", passes=(("select", {"score": "reap"}),), router="plain", plan={"a": 1},
        model="original", domains=("code",), calibration_tokens=10, calibration_inputs="original", seq_len=7, seed=3,
        logits_error=1e-6, ragged=None, distilled=None, layers=(layer,), bytes_before=100, bytes_after=60,
    )  # fmt: skip
    manifest.write(folder, DIGESTS)
    return folder / "coterie.json"


def save_scorecard(folder: Path) -> Path:
    card = Scorecard(
        model="small", model_digest="a" * 64, base="original", base_digest="b" * 64, text_digest="c" * 64, seq_len=7,
        seed=3, domains={"code": SCORES}, overall=SCORES, num_bytes=60, bytes_ratio=0.6, memory_bytes=None,
        peak_memory_bytes=3000, tokens_per_second=123.25, speed_ratio=None, environment={"torch": "2", "threads": 1},
        tasks={"sums": {"acc": 0.5, "acc_stderr": None}},
    )  # fmt: skip
    return card.save(folder / "scorecard.json")


def save_patterns(folder: Path) -> Path:
    kept = {"code": ((0, 2), (1, 3)), "prose": ((0, 1), (2, 3))}
    return Patterns(score="tcess", num_experts=2, kept=kept, inputs=DIGESTS).save(folder / "patterns.json")


def save_prices(folder: Path) -> Path:
    damages = {"model.embed_tokens.weight": {"Q8_0": 1e-6, "Q4_0": 1e-3}, "lm_head.weight": {"Q8_0": 0.0}}
    Prices(
        damages=damages, model_digest="a" * 64, text_digest="b" * 64, num_tokens=10, seq_len=7, seed=3, on="all"
    ).write(folder)
    return folder / "prices.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of artefact: how a whole one is written, and read in full."""

    save: Callable[[Path], Path]
    read: Callable[[Path], Any]


KINDS = {
    "profile": Kind(save=save_profile, read=read_profile),
    "plan": Kind(save=save_plan, read=Plan.load),
    "manifest": Kind(save=save_manifest, read=Manifest.read_file),
    "scorecard": Kind(save=save_scorecard, read=Scorecard.load),
    "patterns": Kind(save=save_patterns, read=Patterns.load),
    "prices": Kind(save=save_prices, read=Prices.load),
}


@pytest.fixture(scope="module", params=KINDS)
def artefact(request, tmp_path_factory) -> tuple[Kind, Path, dict[str, Any]]:
    """Return a kind, a path that may be written to, and the document of a whole artefact there."""
    kind = KINDS[request.param]
    path = kind.save(tmp_path_factory.mktemp(request.param))
    return kind, path, json.loads(path.read_text(encoding="utf-8"))


def read_or_refused(read: Callable[[Path], Any], path: Path) -> None:
    """Read an artefact; it may be refused in one line that names its file, and in no other way."""
    try:
        read(path)
    except (CorruptArtifact, StaleArtifact) as error:
        message = str(error)
        assert str(path.parent) in message
        assert message.isprintable(), message[:200]
        assert len(message) < 1000


def test_a_whole_artefact_is_read(artefact):
    kind, path, document = artefact
    write_digested(path, document)
    kind.read(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_one_value_may_be_anything(artefact, data):
    kind, path, document = artefact
    place = data.draw(st.sampled_from(list(places(document))), label="place")
    how = data.draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")), label="how")
    value = data.draw(values, label="value")
    write_digested(path, changed(document, place, value, how))
    read_or_refused(kind.read, path)


def test_each_value_of_another_type_is_refused_with_its_field(artefact):
    """Every text, number and list of the body becomes an object, which none of them is."""
    kind, path, document = artefact
    accepted, unnamed = [], []
    for place in places(document["body"]):
        inside: Any = document["body"]
        for key in place:
            inside = inside[key]
        if isinstance(inside, dict) or {"passes", "plan", "notes", "distilled"} & set(place):
            continue  # what a pass was told, and what was noted, may be anything
        write_digested(path, document | {"body": changed(document["body"], place, {"x": 1})})
        try:
            kind.read(path)
            accepted.append(place)
        except CorruptArtifact as error:
            name = next(key for key in reversed(place) if isinstance(key, str))
            unnamed += [] if name in str(error) else [place]
    assert (accepted, unnamed) == ([], [])


@pytest.fixture
def profile(tmp_path) -> Path:
    return save_profile(tmp_path / "profile")


def redigest(path: Path, name: str) -> None:
    """Make the digest of a layer's file anew in the JSON of a profile."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document["files"][name] = file_digest(path.with_name(name))
    write_digested(path, document)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", "cut", "{"])
def test_a_layers_file_that_is_junk_is_refused(profile, content):
    file = profile.with_name(layer_file(1))
    if isinstance(content, str):
        whole = file.read_bytes()
        content = whole[:-8] if content == "cut" else whole.replace(b"{", b"[", 1)
    file.write_bytes(content)
    redigest(profile, file.name)
    with pytest.raises(CorruptArtifact, match=rf"{file.name} holds no tensors .* make the profile again"):
        read_profile(profile)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits.usage", lambda value: value[..., :3], r"is F64 of shape \[3, 2, 3\]: .* \[3, 2, 4\];"),
        ("digits.usage", lambda value: value.float(), "digits.usage is F32"),
        ("digits.usage", lambda value: value * torch.nan, r"digits.usage\[0, 0, 0\] is nan, no number"),
        ("digits.usage", None, "place.usage is no sum by itself"),
        ("place.usage", lambda value: value + 200, "place.usage holds 2"),
        ("statistics.output_peak", lambda value: value * torch.inf, "is inf, no number"),
        ("statistics.hessian_hidden", lambda value: value.double(), "hessian_hidden is F64"),
        ("statistics.flavour", torch.zeros(2, 4, dtype=torch.float64), "statistics.flavour is no tensor of a profile"),
        ("stranger", torch.zeros(2), "stranger is no tensor of a profile"),
        ("sample.index_TK", lambda value: value + 5, "sample.index_TK holds"),
        ("sample.index_TK", lambda value: value - 9, "sample.index_TK holds -9"),
        ("sample.index_TK", lambda value: value.float(), "sample.index_TK is F32"),
        ("sample.weight_TK", lambda value: value[:, :1], "sample.weight_TK is F32 of shape"),
        ("sample.domain_T", lambda value: value + 2, "sample.domain_T holds 3: it should be from 0 to 1"),
        ("sample.domain_T", lambda value: value[:0], r"of shape \[6, 2\]: it should be of shape \[0, 2\]"),
        ("sample.inputs_TD", None, "sample.inputs_TD is missing"),
        ("sample.logits_TE", lambda value: value[:, :2], "sample.logits_TE"),
        ("sample.priority_T", lambda value: -1 - value, "sample.priority_T holds -6"),
    ],
)  # fmt: skip
def test_a_layers_file_that_does_not_fit_its_layer_names_the_tensor(profile, name, change, message):
    file = profile.with_name(layer_file(0))
    tensors = load_file(file)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change if isinstance(change, torch.Tensor) else change(tensors[name]).contiguous()
    save_file(tensors, file)
    redigest(profile, file.name)
    with pytest.raises(CorruptArtifact, match=message) as caught:
        read_profile(profile)
    assert file.name in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("num_tokens",), [3], "num_tokens is [3]: should have 2 entries, one for each domain"),
        (("sample_counts",), [1, 2, 3], "sample_counts is [1, 2, 3]: should have 2 entries"),
        (("domains",), ["code", "code"], "domains is ['code', 'code']: should be one name or more, each once"),
        (("domains",), [], "domains is []"),
        (("flavour",), 1, "flavour is 1: no such field is known"),
        (("statistics", 1), "flavour", "statistics[1] is 'flavour': no such statistic is known"),
        (("statistics", 1), "tokens", "statistics[1] is 'tokens': it is there twice"),
        (("thin",), 0, "thin is 0: should be a whole number from 1 on"),
        (("seed",), 2**64, "seed is 18446744073709551616: should be a whole number of at most 64 bits"),
        (("layers", 1, "index"), 0, "layers[1].index is 0: it should be 1"),
        (("layers", 1, "top_k"), 5, "layers[1].top_k is 5: there are 4 experts"),
        (("layers", 1, "num_groups"), 3, "layers[1].num_groups is 3: it should divide 4 experts"),
        (("layers", 1, "router_tensors", 0), ["a", -1], "layers[1].router_tensors[0] is ['a', -1]"),
        (("layers", 1, "width"), True, "layers[1].width is True"),
    ],
)
def test_a_profile_that_contradicts_itself_names_the_field(profile, place, value, message):
    document = json.loads(profile.read_text(encoding="utf-8"))
    write_digested(profile, document | {"body": changed(document["body"], place, value)})
    with pytest.raises(CorruptArtifact) as caught:
        Profile.load(profile.parent)
    assert f"{profile}: {message}" in str(caught.value)


def test_a_profile_that_says_less_layers_than_it_has_files_is_refused(profile):
    document = json.loads(profile.read_text(encoding="utf-8"))
    document["body"]["layers"].pop()
    write_digested(profile, document)
    with pytest.raises(CorruptArtifact, match="is the file of no layer"):
        Profile.load(profile.parent)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_line_of_a_bench_may_say_anything(tmp_path, data):
    scores = dict(SCORES)
    cell = {
        "key": "k", "method": "reap", "model": "m", "model_digest": "d", "recipe": "reap", "router": "plain",
        "removed": 0.5, "seed": 0, "status": "done", **scores, "bytes": 60, "bytes_ratio": 0.6, "num_experts": [2],
        "loads_with": "transformers", "logits_error": 0.0, "domains": {"code": scores}, "peak_bytes": None,
        "seconds": {"profile": 1.0, "compress": 2.0, "evaluate": 3.0, "stages": {"plan": 0.5}},
    }  # fmt: skip
    place = data.draw(st.sampled_from(list(places(cell))), label="place")
    how = data.draw(st.sampled_from(("replace", "remove", "add")), label="how")
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(changed(cell, place, data.draw(values, label="value"), how)) + "\n", encoding="utf-8")
    read_or_refused(Store, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"format": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 500 + "]" * 500, "no artefact of coterie"),
    ],
)
def test_a_file_that_is_no_document_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifact, match=message):
        Plan.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_half_a_surrogate_pair_is_refused(tmp_path, kind):
    path = KINDS[kind].save(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["body"][next(iter(document["body"]))] = "\ud800"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CorruptArtifact, match="half of a surrogate pair"):
        KINDS[kind].read(path)


def test_lists_within_lists_without_end_are_refused(tmp_path):
    path = save_plan(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["body"]["passes"] = [["select", {"x": json.loads("[" * 400 + "]" * 400)}]]
    write_digested(path, document)
    with pytest.raises(CorruptArtifact, match="more than 100 deep in each other"):
        Plan.load(path)


def test_a_document_with_entries_that_no_artefact_has_is_refused(tmp_path):
    path = save_plan(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    write_digested(path, document | {"flavour": 1})
    with pytest.raises(CorruptArtifact, match="flavour is 1: no such field is known"):
        Plan.load(path)
    write_digested(path, document | {"inputs": {"model": 1}})
    with pytest.raises(CorruptArtifact, match=r"inputs\.model is 1: should be a text"):
        Plan.load(path)
