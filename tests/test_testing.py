"""The test support itself: tiny checkpoints load as they are, are deterministic, and route in a varied way."""

import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from coterie.compress.apply import compress
from coterie.errors import ArchitectureMismatch, OutputExists, UnknownName
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.quiet import quiet
from coterie.profile.calibration import tokenize
from coterie.profile.documents import read_documents, text_files
from coterie.testing import CORE_FAMILIES, END_OF_TEXT_ID, UNSUPPORTED, tiny_checkpoint, tiny_families, tiny_text
from coterie.testing.families import TINY, installed_families

#: Families whose tokens choose one expert each; a few words do not reach all of them.
TOP_1 = ("zaya",)

core_families_first = pytest.mark.parametrize(
    "model_type",
    [
        name if name in (*CORE_FAMILIES, *TOP_1) else pytest.param(name, marks=pytest.mark.families)
        for name in tiny_families()
    ],
)


def load(path, **options):
    stock = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    with quiet():
        return stock.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text"))


@core_families_first
def test_family_loads_whole_and_routes_to_many_experts(tmp_path, text, model_type):
    path = tiny_checkpoint(tmp_path / "model", model_type)
    model, info = load(path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == model_type

    tokenizer = AutoTokenizer.from_pretrained(path)
    sequences = tokenize(tokenizer, text, seq_len=128, tokens=512).sequences
    usage: dict[int, torch.Tensor] = {}

    def count(module, hidden_TD, index_TK, weight_TK):
        seen = torch.bincount(index_TK.flatten(), minlength=module.num_experts)
        usage[id(module)] = usage.get(id(module), 0) + seen
        return routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)

    ids = torch.cat(list(sequences.values()))
    with torch.no_grad():
        stock = model(ids).logits
        with intercepted(model, count):
            observed = model(ids).logits
    torch.testing.assert_close(observed, stock, rtol=1e-4, atol=1e-4)
    layers = Architecture.of(Checkpoint.open(path)).layers
    assert len(usage) == len(layers) == 2
    for layer, counts in zip(layers, usage.values(), strict=True):
        axes = [layer.num_experts, layer.top_k, layer.width, layer.hidden_size, 272]
        assert len(set(axes)) == len(axes), "axes of equal length could be confused without a test noticing"
        share = counts / counts.sum()
        assert (share > 0.02).sum() >= 2 * layer.top_k
        assert share.max() < (0.6 if layer.top_k > 1 else 0.75)


@core_families_first
def test_every_expert_matters(tmp_path, model_type):
    model = load(tiny_checkpoint(tmp_path / "model", model_type))
    ids = torch.arange(128).view(1, -1)

    chosen = set()

    def without(dropped):
        def function(module, hidden_TD, index_TK, weight_TK):
            chosen.update(index_TK[weight_TK > 0].tolist())
            kept = weight_TK.masked_fill(index_TK == dropped, 0)
            return routed_output(canonical_experts(module), hidden_TD, index_TK, kept)

        return function

    with torch.no_grad():
        whole = model(ids).logits
        with intercepted(model, without(-1)):
            torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-4)
        assert len(chosen) == 8 or (model_type in TOP_1 and len(chosen) >= 6)
        for expert in sorted(chosen):
            with intercepted(model, without(expert)):
                assert (model(ids).logits - whole).abs().max() > 0.1


def test_every_installed_family_is_in_the_table():
    missing = {
        module: model_types
        for module, model_types in installed_families().items()
        if not TINY.keys() & set(model_types)
    }
    assert not missing, "new in transformers: give them a line in TINY, and in UNSUPPORTED when they cannot work"
    assert UNSUPPORTED.keys() <= TINY.keys()
    assert len(tiny_families()) == len(TINY) - len(UNSUPPORTED) >= 55


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deepseek_v4", r"layers\.0\.mlp\.gate\.tid2eid \[272, 2\] holds integers: .* a fixed table"),
        ("diffusion_gemma", r"decoder\.layers\.0\.experts and .* are one set of experts that runs in two places"),
        (
            "ernie4_5_vl_moe",
            r"text never reaches .*layers\.1\.mlp\.vision_moe\.experts, .* text_config\.moe_num_experts",
        ),
    ],
)
def test_a_family_that_cannot_work_is_refused_clearly(tmp_path, text, model_type, message):
    path = tiny_checkpoint(tmp_path / "model", model_type)
    assert not any(load(path, output_loading_info=True)[1].values()), "transformers itself loads it"
    with pytest.raises(ArchitectureMismatch, match=message):
        compress(path, tmp_path / "out", keep=0.5, text=text)
    assert not (tmp_path / "out").exists()


def test_every_family_that_cannot_work_has_its_refusal_tested():
    marks = test_a_family_that_cannot_work_is_refused_clearly.pytestmark
    assert {name for name, _ in marks[0].args[1]} == UNSUPPORTED.keys()


def test_equal_seed_gives_equal_bytes_and_another_seed_other_weights(tmp_path):
    torch.manual_seed(1)
    first = tiny_checkpoint(tmp_path / "a", "deepseek_v3", dtype=torch.bfloat16)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = tiny_checkpoint(tmp_path / "b", "deepseek_v3", dtype=torch.bfloat16)
    other = tiny_checkpoint(tmp_path / "c", "deepseek_v3", dtype=torch.bfloat16, seed=1)
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as if nothing had happened"


def test_tensors_out_of_reach_of_a_config_change_stay_equal(tmp_path):
    small = Checkpoint.open(tiny_checkpoint(tmp_path / "small", "mixtral"))
    large = Checkpoint.open(tiny_checkpoint(tmp_path / "large", "mixtral", num_hidden_layers=3))
    with small.reader() as a, large.reader() as b:
        assert all(torch.equal(a.read(name), b.read(name)) for name in small.tensors)
    assert len(large.tensors) > len(small.tensors)


def test_number_formats_are_those_of_the_family(tmp_path):
    tensors = Checkpoint.open(tiny_checkpoint(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)).tensors
    wide = {name for name, info in tensors.items() if info.dtype == "F32"}
    assert wide == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert {info.dtype for name, info in tensors.items() if name not in wide} == {"BF16"}


def test_all_that_comes_with_a_model_is_there(tmp_path):
    path = tiny_checkpoint(tmp_path / "model")
    names = {file.name for file in Checkpoint.open(path).other_files()}
    assert {"README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id == END_OF_TEXT_ID
    line = "naïve ☃\n<|endoftext|>"
    assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
    assert tokenizer("é")["input_ids"] != tokenizer("è")["input_ids"]
    assert len(tokenizer("ab\n")["input_ids"]) == 3
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "user: hello\n"


def test_wrong_wishes_are_refused(tmp_path):
    with pytest.raises(UnknownName, match="did you mean olmoe"):
        tiny_checkpoint(tmp_path / "model", "olmo")
    with pytest.raises(UnknownName, match="num_hidden_layers"):
        tiny_checkpoint(tmp_path / "model", num_hiden_layers=3)
    tiny_checkpoint(tmp_path / "model", num_experts=12)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_experts"] == 12
    with pytest.raises(OutputExists):
        tiny_checkpoint(tmp_path / "model")


def test_text_has_two_domains_and_questions_with_right_answers(tmp_path):
    first, again, other = tiny_text(tmp_path / "a"), tiny_text(tmp_path / "b"), tiny_text(tmp_path / "c", seed=1)
    files = text_files(first)
    assert list(files) == ["code", "prose"]
    for domain, file in files.items():
        assert 18_000 < file.stat().st_size < 24_000
        assert len(read_documents(file)) == 12
        assert file.read_bytes() == (again / f"{domain}.txt").read_bytes()
        assert file.read_bytes() != (other / f"{domain}.txt").read_bytes()
    code, prose = (set(file.read_text().split()) for file in files.values())
    assert len(code & prose) < 5
    questions = [json.loads(line) for line in (first / "prose.qa.jsonl").read_text().splitlines()]
    assert len(questions) == 6
    for entry in questions:
        left, right = entry["question"].removeprefix("Q: ").removesuffix(" = ?\nA:").split(" + ")
        assert entry["answer"] == f" {int(left) + int(right)}"


def test_text_of_other_domains(tmp_path):
    folder = tiny_text(tmp_path / "text", domains=("north", "south"), documents=2)
    north, south = (set((folder / f"{name}.txt").read_text().lower().split()) for name in ("north", "south"))
    assert len(north & south) < 0.2 * len(north)
    assert (folder / "north.qa.jsonl").is_file()
