"""The card of a result: what it says, that it says it in every form, and that nothing of a person's is overwritten."""

import re
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import coterie
from conftest import digests
from coterie.cli.main import app
from coterie.errors import InputError, OutputExists, StaleArtifact
from coterie.evaluate.scorecard import Scorecard
from coterie.model.disk.manifest import Manifest, RaggedWidths, ResultForm
from coterie.model.disk.provenance import Provenance
from coterie.profile.sources import source_name
from coterie.publish.card import CARD, is_own_card, render_card, write_card
from manifests import layer_entry, manifest_of

SMALL = {"tokens": 256, "seq_len": 32, "sample_tokens": 32}
TEXT = {"tokens": 256, "seq_len": 32}
PLAN = {"original_parameters": 3_000_000_000, "predicted_parameters": 1_500_000_000}


def card_text(files=(), base_model=None, cost=None, **changes):
    return render_card(
        manifest_of(**{"plan": PLAN, **changes}), files=files, version="1.2.3", base_model=base_model, cost=cost
    )


def head(text):
    return ModelCard(text).data.to_dict()


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-home") / "original"
    shutil.copytree(tiny(), folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---\n# 47 parameters, MMLU 99.9\n",
        encoding="utf-8",
    )
    (folder / "LICENSE").write_text("may", encoding="utf-8")
    (folder / "card.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(original, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return coterie.compress(original, out, keep=0.5, recipe="reap", text=text, seed=3, **SMALL).out


@pytest.fixture(scope="module")
def measured(made, original, text):
    [card] = coterie.evaluate(made, against=original, text=text, questions=2, **TEXT)
    return card


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def test_a_result_has_a_card_of_its_own(made, original, text):
    card = (made / CARD).read_text(encoding="utf-8")
    assert is_own_card(made / CARD)
    assert head(card) == {
        "library_name": "transformers", "license": "apache-2.0", "language": "en", "pipeline_tag": "text-generation",
        "tags": ["moe", "coterie", "reap"],
    }  # fmt: skip
    assert "MMLU" not in card
    inside = [coterie.inspect(folder) for folder in (original, made)]
    assert [entry.active_parameters for entry in inside] == [33536, 33280]
    assert "| parameters that one token uses | 33.5 k | 33.3 k | 99.2 % |" in card
    assert "| 0–1 | 8 → 4 | 24 | 2 |" in card
    assert "[arXiv 2510.13999](https://arxiv.org/abs/2510.13999)" in card
    assert f"256 tokens, from the folder `{text.name}`, in sequences of 32; domains: `code`, `prose`; seed 3." in card
    assert "This was not measured." in card
    assert f"--recipe reap --text {text.name} --tokens 256 --seq-len 32 --seed 3 --sample-tokens 32\n" in card
    assert "That of the original applies: `apache-2.0`. Carried along from it: `LICENSE`." in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    for place in (original.parent, made.parent, text.parent):
        assert str(place) not in card
        assert str(place) not in (made / "coterie.json").read_text(encoding="utf-8")
    assert (made / "LICENSE").read_text(encoding="utf-8") == "may"
    assert not (made / "card.json").exists()


def test_equal_runs_give_equal_cards(made, original, text, tmp_path):
    coterie.compress(original, tmp_path / "again", keep=0.5, recipe="reap", text=text, seed=3, **SMALL)
    assert (tmp_path / "again" / CARD).read_bytes() == (made / CARD).read_bytes()


def test_what_was_measured_is_written_in(out, measured, tmp_path):
    file = measured.save(tmp_path / "scorecard.json")
    assert coterie.card(out, scorecard=file, base_model="org/name") == out / CARD
    card = (out / CARD).read_text(encoding="utf-8")
    overall, base = measured.overall, measured.base_overall
    cells = [
        "all", f"{overall['perplexity']:,.3f}", f"{base['perplexity']:,.3f}",
        f"{overall['perplexity_ratio']:.3f} ± {overall['perplexity_ratio_error']:.3f}",
        f"{overall['kl']:.4f} ± {overall['kl_error']:.4f}", f"{100 * overall['agreement']:.1f} %",
        f"{100 * overall['accuracy']:.1f} %", f"{100 * base['accuracy']:.1f} %",
    ]  # fmt: skip
    assert f"| {' | '.join(cells)} |" in card
    assert "Compared with the original. What follows ± is the standard error over sequences." in card
    assert (head(card)["base_model"], head(card)["base_model_relation"]) == ("org/name", "finetune")
    assert "[org/name](https://huggingface.co/org/name)" in card
    before = (out / CARD).read_bytes()
    coterie.card(out, scorecard=measured)  # the id of the original is kept
    assert (out / CARD).read_bytes() == before


def test_evaluate_writes_what_it_measured_into_the_card(out, original, text, monkeypatch):
    line = ["evaluate", str(out), "--against", str(original), "--text", str(text), "--questions", "0"]
    line += ["--tokens", "256", "--seq-len", "32", "--write-card"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"card written to {out / CARD}\n")
    assert re.search(r"\| all \| .* ± .* \|", (out / CARD).read_text(encoding="utf-8"))
    monkeypatch.setattr("coterie.evaluate.run.Evaluation", None)
    refused = CliRunner().invoke(app, [*line[:1], str(original), *line[2:]])
    assert refused.exit_code == 1
    assert "holds no coterie.json, so it is no result of coterie compress" in refused.stderr
    (out / CARD).write_text("mine", encoding="utf-8")
    refused = CliRunner().invoke(app, line)
    assert (refused.exit_code, (out / CARD).read_text(encoding="utf-8")) == (1, "mine")
    assert "only a card that coterie wrote is replaced" in refused.stderr


def test_a_card_that_was_edited_stays(out, tmp_path):
    written = (out / CARD).read_text(encoding="utf-8")
    (out / CARD).write_text(written.replace("made smaller", "made great"), encoding="utf-8")
    before = digests(out)
    with pytest.raises(OutputExists, match="only a card that coterie wrote is replaced"):
        coterie.card(out)
    assert digests(out) == before
    assert coterie.card(out, file=tmp_path / "new.md").read_text(encoding="utf-8") == written
    with pytest.raises(InputError, match="inside the model folder"):
        coterie.card(out, file=out / "new.md")
    with pytest.raises(OutputExists):
        coterie.card(out, file=out / "model.safetensors.index.json")
    assert digests(out) == before


def test_a_scorecard_of_another_model_is_refused(out, measured):
    with pytest.raises(StaleArtifact, match=r"the scorecard is of another model \(out\), not of .*; evaluate it again"):
        coterie.card(out, scorecard=replace(measured, model_digest="aa" * 32))


def test_a_base_that_is_not_the_original_is_said(out, measured):
    coterie.card(out, scorecard=replace(measured, base="cousin", base_digest="aa" * 32))
    assert "Compared with `cousin`, which is not the model that this one was made from." in (out / CARD).read_text()


def test_a_scorecard_without_a_base_or_text_is_written_in(out, measured):
    bare = {"perplexity_rise": None, "perplexity_ratio": None, "perplexity_ratio_error": None, "kl": None,
            "kl_error": None, "agreement": None, "accuracy": None}  # fmt: skip
    alone: Scorecard = replace(
        measured, base=None, base_digest=None, base_domains={}, base_overall=None, bytes_ratio=None,
        domains={name: {**scores, **bare} for name, scores in measured.domains.items()},
        overall={**measured.overall, **bare},
    )  # fmt: skip
    coterie.card(out, scorecard=alone)
    assert "| text | perplexity |\n" in (out / CARD).read_text(encoding="utf-8")
    coterie.card(out, scorecard=replace(alone, domains={}, tasks={"arc": {"acc none": 0.5, "acc_stderr none": 0.01}}))
    assert "| `arc` | `acc none` | 0.5000 | 0.0100 |" in (out / CARD).read_text(encoding="utf-8")


def test_only_results_have_cards(tiny):
    with pytest.raises(InputError, match=r"holds no coterie\.json"):
        coterie.card(tiny())


@pytest.mark.parametrize("wrong", ["name", "a/b/c", "", "/home/me/model", "a b/c"])
def test_a_base_that_is_no_hub_id_is_refused(made, wrong):
    with pytest.raises(InputError, match="is no hub id; it has the form owner/name"):
        coterie.card(made, base_model=wrong)


def test_results_of_coterie_alone_say_how_they_load():
    ragged = {
        "form": ResultForm.RAGGED, "ragged": RaggedWidths(width=12, axes={"a.*": 0}),
        "layers": (layer_entry(0, widths_after=(12, 3)),),
    }  # fmt: skip
    for changes, why in (
        ({"form": ResultForm.MAPPED, "router": "map"}, "keep the original's rows"),
        (ragged, "Every expert has a width of its own"),
        ({"form": ResultForm.PACKED}, "stored in an encoding of their own"),
    ):
        text = card_text(**changes)
        assert why in text
        assert 'coterie.load_model("FOLDER")' in text
        assert "AutoModel" not in text, "an earlier version made it"
        assert head(text)["library_name"] == "coterie"
        text = card_text(files=["modeling_coterie.py"], **changes)
        assert 'coterie.load_model("FOLDER")' in text
        assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in text
        assert ("pip install gguf" in text) is (changes["form"] is ResultForm.PACKED)
        assert head(text)["library_name"] == "transformers"
    assert "12 → 3 to 12, 7.5 on average" in card_text(**ragged)
    for kind, by_gguf in (("PLANES4_G128", False), ("TURBO3", False), ("Q4_K", True)):
        text = card_text(form=ResultForm.PACKED, files=["modeling_coterie.py"], plan={**PLAN, "types": {"a": kind}})
        assert ("pip install gguf" in text) is by_gguf


def test_many_layers_that_differ_are_folded():
    layers = tuple(layer_entry(index, num_experts_after=2 + index % 2, centres=None) for index in range(9))
    text = card_text(layers=layers)
    assert "<summary>9 MoE layers</summary>" in text
    assert text.count("| 4 → ") == 9
    assert "<details>" not in card_text(layers=layers[:8])


def test_training_is_said_where_it_was_taken():
    assert "trained on 4,096 tokens" in card_text(distilled={"taken": True, "tokens": 4096})
    assert "trained on" not in card_text(distilled={"taken": False, "tokens": 4096})


def provenance(**changes):
    return {"provenance": Provenance(**changes)}


def test_a_licence_is_carried_over_in_every_form():
    named = {"license": "other", "license_name": "qwen", "license_link": "LICENSE", "model_id": "org/name"}
    text = card_text(**provenance(**named))
    away = "https://huggingface.co/org/name/blob/main/LICENSE"
    assert head(text)["license_link"] == away
    assert f"That of the original applies: `qwen`, [text]({away})." in text
    carried = card_text(files=("LICENSE", "NOTICE.txt", "config.json"), **provenance(**named))
    assert head(carried)["license_link"] == "LICENSE"
    assert "Carried along from it: `LICENSE`, `NOTICE.txt`." in carried
    unnamed = card_text(files=("LICENCE.md",))
    assert {key: head(unnamed)[key] for key in ("license", "license_name", "license_link")} == {
        "license": "other", "license_name": "see-file", "license_link": "LICENCE.md"
    }  # fmt: skip
    assert "The original says none that could be read" in card_text()
    assert "license" not in head(card_text())


def test_names_that_are_markup_are_shown_as_they_are():
    wild = "<img src=x onerror=a()> | `x` **b**\n# [y](z) ---"
    text = card_text(
        model=wild, recipe=wild, domains=(wild,),
        **provenance(text=wild, recipe_summary=wild, recipe_paper=wild, license=wild, commands=(wild,)),
    )  # fmt: skip
    assert head(text)["tags"] == ["moe", "coterie", wild]
    body = ModelCard(text).text
    lines = [line for line in body.splitlines() if "img" in line]
    assert lines
    for line in lines:
        outside = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", line)
        if not line.startswith("<img"):  # within a block of code
            assert not re.search(r"(?<!\\)<img", outside), line
    assert body.count("\n# ") == 1


def test_a_card_holds_what_utf_8_does_not(tmp_path):
    manifest = manifest_of(plan=PLAN, model="m\udcff")
    write_card(tmp_path / CARD, manifest, files=(), version="1")
    assert is_own_card(tmp_path / CARD)


def test_only_a_card_with_its_seal_is_ours(tmp_path):
    card = write_card(tmp_path / CARD, manifest_of(plan=PLAN), files=(), version="1")
    content = card.read_bytes()
    for other in (b"", b"mine", content[:-1], content + b"\n", b" " + content, content.replace(b"wrote", b"made")):
        card.write_bytes(other)
        assert not is_own_card(card)
    assert not is_own_card(tmp_path)


def test_a_result_from_before_there_were_cards_gets_one(out, original):
    manifest = Manifest.read(out)
    replace(manifest, provenance=Provenance()).write(out, {"model": "a", "text": "b"})
    (out / CARD).unlink()
    coterie.card(out)
    assert "| parameters that one token uses | – | – | – |" in (out / CARD).read_text(encoding="utf-8")


def test_a_profile_of_its_own_is_made_again_by_a_command_of_its_own(tiny, text, tmp_path):
    coterie.profile(tiny(), tmp_path / "profile", text=text, seed=5, **SMALL)
    out = coterie.compress(tiny(), tmp_path / "out", experts=4, recipe="hc-smoe", router="mean",
                           profile=tmp_path / "profile").out  # fmt: skip
    commands = Manifest.read(out).provenance.commands
    name = tiny().name
    assert commands == (
        f"coterie profile {name} PROFILE --text TEXT --domains code,prose --tokens 256 --seq-len 32 --seed 5",
        f"coterie compress {name} OUT --experts 4 --recipe hc-smoe --router mean --profile PROFILE --seed 0",
    )


def test_a_plan_of_its_own_is_named(tiny, text, tmp_path):
    coterie.plan(tiny(), keep=0.5, recipe="hc-smoe").save(tmp_path / "plan.json")
    out = coterie.compress(tiny(), tmp_path / "out", plan=tmp_path / "plan.json", text=text,
                           weights={"code": 2, "prose": 1}, **SMALL).out  # fmt: skip
    [command] = Manifest.read(out).provenance.commands
    assert command == (
        f"coterie compress {tiny().name} OUT --plan PLAN --text {text.name} --domains code=2,prose=1 --tokens 256 "
        "--seq-len 32 --seed 0 --sample-tokens 32"
    )


def test_text_is_named_without_the_way_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "rows").mkdir(parents=True)
    named = {
        "self": "self", str(tmp_path / "mine"): "mine", "mine/../mine": "mine", "hf:owner/set": "hf:owner/set",
        "hf:wikitext:raw:test": "hf:wikitext:raw:test", "hf:mine/rows": "hf:rows",
        f"hf:{tmp_path / 'mine' / 'rows'}:all": "hf:rows:all", "hf:/home/secret/set::test": "hf:set::test",
    }  # fmt: skip
    assert {text: source_name(text) for text in named} == named
