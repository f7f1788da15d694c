"""Results that stock classes cannot load, by stock transformers where there is no Coterie: packed, mapped, ragged.

The reference is `coterie.load_model`, which has loaders of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import IDS, logits
from coterie.compress.apply import compress
from coterie.model.arch.load import load_model
from coterie.model.disk.beside import MODELING_FILE
from coterie.model.disk.manifest import ResultForm
from coterie.testing import tiny_checkpoint

#: The entry that says how wide experts are; 64, so that their matrices can be stored in blocks.
FAMILIES = {
    "qwen3_moe": "moe_intermediate_size", "olmoe": "intermediate_size", "mixtral": "intermediate_size",
    "deepseek_v3": "moe_intermediate_size", "gpt_oss": "intermediate_size", "glm4_moe": "moe_intermediate_size",
}  # fmt: skip
TARGETS = {
    ResultForm.PACKED: {"recipe": "nearest", "type": "Q4_0"},
    ResultForm.MAPPED: {"recipe": "hc-smoe", "keep": 0.5, "router": "map"},
    ResultForm.RAGGED: {"recipe": "heapr-ragged", "keep": 0.5},
}
TEXT = {"tokens": 512, "seq_len": 64}

#: What somebody does who has transformers and no Coterie. Prints nothing but what goes wrong.
STOCK = """
import json, sys
sys.modules["coterie"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.generate(ids[:1, :4], max_new_tokens=2, min_new_tokens=2)
    save_file(weights | {"the logits": logits.contiguous()}, folder + "/loaded.st")
    model.save_pretrained(folder + "/saved")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, text_folder):
    """Return a function that makes results and hands them to stock transformers: those of a form, by family."""
    folder = tmp_path_factory.mktemp("results")

    def make(forms, **changes):
        made = {}
        for form, family in forms:
            model = folder / f"{family}-{changes}"
            if not model.exists():
                tiny_checkpoint(model, family, hidden_size=64, **{FAMILIES[family]: 64}, **changes)
            made[form, family] = compress(model, folder / f"{form}-{family}", text=text_folder, **TEXT, **TARGETS[form])
        return made

    return make


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    from coterie.testing import tiny_text

    return tiny_text(tmp_path_factory.mktemp("words"))


def load_without_coterie(folders, tmp_path):
    """Load copies of results in a process of their own that has no Coterie; return the copies."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    line = [sys.executable, "-c", STOCK, json.dumps(IDS.tolist()), *map(str, copies)]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return copies


def check_same(out, copy):
    """Compare what stock transformers loaded with what Coterie loads: weights to the bit, and logits."""
    loaded, model = load_file(copy / "loaded.st"), load_model(out)
    found = loaded.pop("the logits")
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name].float(), weight.float()), name
    assert torch.equal(found.float(), logits(model))


def check(results, forms, tmp_path):
    made = results(forms)
    copies = load_without_coterie([result.out for result in made.values()], tmp_path)
    for (form, _), copy in zip(made, copies, strict=True):
        result = made[form, _]
        assert result.manifest.form is form
        check_same(result.out, copy)
        saved = copy / "saved"
        config = json.loads((saved / "config.json").read_text())
        assert not config.keys() & {"auto_map", "quantization_config"}
        assert not (saved / MODELING_FILE).exists()
        assert torch.equal(logits(load_model(saved)), logits(load_model(result.out)))


def test_it_loads_what_coterie_loads(results, tmp_path):
    check(
        results,
        [(ResultForm.PACKED, "qwen3_moe"), (ResultForm.MAPPED, "olmoe"), (ResultForm.RAGGED, "mixtral")],
        tmp_path,
    )


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_every_form_of_a_family(results, tmp_path, family):
    forms = [form for form in TARGETS if (form, family) != (ResultForm.RAGGED, "gpt_oss")]  # all experts in one tensor
    check(results, [(form, family) for form in forms], tmp_path)
