"""Architecture: derived from the config alone, right for every family; and canonical experts, in and out of layouts."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint, Infeasible, NotACheckpoint, NotAMoE
from coterie.model.arch import layers as layers_module
from coterie.model.arch import probe as probe_module
from coterie.model.arch.experts import Experts, canonical_experts, is_experts, native_experts
from coterie.model.arch.layers import Architecture, find_router
from coterie.model.arch.meta import meta_model
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.quiet import quiet
from coterie.testing import CORE_FAMILIES, tiny_families

# What is known of each family from its code in transformers: the block of a layer, the config key, the layers that are
# MoE layers, the router, and the tensors that steer it with their expert axis.
KNOWN = {
    "olmoe": ("mlp", "num_experts", [0, 1], "gate", {"gate.weight": 0}),
    "qwen2_moe": ("mlp", "num_experts", [0, 1], "gate", {"gate.weight": 0}),
    "qwen3_moe": ("mlp", "num_local_experts", [0, 1], "gate", {"gate.weight": 0}),
    "mixtral": ("mlp", "num_local_experts", [0, 1], "gate", {"gate.weight": 0}),
    "deepseek_v3": ("mlp", "n_routed_experts", [1, 2], "gate", {"gate.weight": 0, "gate.e_score_correction_bias": 0}),
    "gpt_oss": ("mlp", "num_local_experts", [0, 1], "router", {"router.weight": 0, "router.bias": 0}),
    "ernie4_5_moe": (
        "mlp", "moe_num_experts", [1, 2], "gate", {"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
    ),
    "glm4_moe": ("mlp", "n_routed_experts", [1, 2], "gate", {"gate.weight": 0, "gate.e_score_correction_bias": 0}),
    "granitemoe": ("block_sparse_moe", "num_local_experts", [0, 1], "router", {"router.weight": 0}),
}  # fmt: skip

#: Tensors with one row more than there are experts: for a shared expert, or for "no expert".
SPARE_ROWS = {"inkling_text": ("gate.weight",), "zaya": ("gate.router_mlp.out_proj.weight", "gate.balancing_biases")}

OLMOE = {
    "model_type": "olmoe", "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip

NESTED = {
    "model_type": "qwen3_vl_moe",
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {
        "model_type": "qwen3_vl_moe_text", "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40, "moe_intermediate_size": 24,
        "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    },
    "vision_config": {
        "depth": 8, "hidden_size": 16, "intermediate_size": 8, "num_heads": 8, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    },
}  # fmt: skip


# --- what a checkpoint computes -----------------------------------------------------------------------------------


def test_every_core_family_is_known_here():
    assert set(KNOWN) == set(CORE_FAMILIES)


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_architecture_of_every_core_family(tiny, model_type):
    block, key, positions, router, router_tensors = KNOWN[model_type]
    architecture = Architecture.of(Checkpoint.open(tiny(model_type)))
    assert architecture.expert_key == (key,)
    assert [layer.block for layer in architecture.layers] == [f"model.layers.{i}.{block}" for i in positions]
    for index, layer in enumerate(architecture.layers):
        assert layer.index == index
        assert layer.experts == f"{layer.block}.experts"
        assert layer.router == f"{layer.block}.{router}"
        assert dict(layer.router_tensors) == {f"{layer.block}.{name}": axis for name, axis in router_tensors.items()}
        facts = (layer.num_experts, layer.top_k, layer.width, layer.hidden_size)
        assert facts == (8, 2, 24, 32)
        assert layer.num_groups == (2 if model_type == "deepseek_v3" else 1)
    assert all(tensor.is_meta for tensor in architecture.model.state_dict().values()), "nothing takes memory"


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in CORE_FAMILIES or name in SPARE_ROWS else pytest.param(name, marks=pytest.mark.families)
        for name in tiny_families()
    ],
)
def test_resizing_reaches_the_experts_and_the_router_tensors_and_nothing_else(tiny, model_type):
    architecture = Architecture.of(Checkpoint.open(tiny(model_type)))
    config = resized_config(architecture, 6)
    *outer, key = architecture.expert_key
    expected_config = copy.deepcopy(dict(architecture.config))
    holder = expected_config[outer[0]] if outer else expected_config
    assert holder[key] == 8
    holder[key] = 6
    assert config == expected_config
    before, after = architecture.model.state_dict(), meta_model(config).state_dict()
    assert before.keys() == after.keys()
    axes = dict(itertools.chain.from_iterable(layer.router_tensors for layer in architecture.layers))
    modules = {layer.experts for layer in architecture.layers}
    experts = {name for name in before if name.rpartition(".")[0] in modules}
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == experts | axes.keys()
    for name in changed:
        axis = axes.get(name, 0)
        expected = list(before[name].shape)
        assert expected[axis] == (9 if name.endswith(SPARE_ROWS.get(model_type, ("none",))) else 8)
        expected[axis] -= 2
        assert list(after[name].shape) == expected


def test_an_expert_count_in_a_nested_config():
    before = json.dumps(NESTED)
    architecture = Architecture.from_config(NESTED)
    assert architecture.expert_key == ("text_config", "num_experts")
    assert [layer.block for layer in architecture.layers] == [f"model.language_model.layers.{i}.mlp" for i in (0, 1)]
    resized = resized_config(architecture, 4)
    assert resized == NESTED | {"text_config": NESTED["text_config"] | {"num_experts": 4}}
    assert json.dumps(NESTED) == before, "the config that was given is as it was"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 8, "num_attention_heads": 8, "intermediate_size": 8},
        {"num_hidden_layers": 8, "num_key_value_heads": 8, "num_attention_heads": 8},
        {"num_experts_per_tok": 8},
        {"num_experts": 2},  # as many as are chosen, as layers and as heads
        {"some_number_of_experts_in_another_tool": 8, "max_position_embeddings": 8},
    ],
)
def test_numbers_that_happen_to_equal_the_expert_count_do_not_confuse(changes):
    config = OLMOE | changes
    architecture = Architecture.from_config(config)
    assert architecture.expert_key == ("num_experts",)
    for layer in architecture.layers:
        assert layer.num_experts == config["num_experts"]
        assert layer.top_k == config["num_experts_per_tok"]
        assert (layer.hidden_size, layer.width) == (config["hidden_size"], config["intermediate_size"])
        assert layer.router_tensors == ((f"{layer.block}.gate.weight", 0),), "also where E equals D"


def test_an_expert_count_that_the_config_leaves_to_the_default():
    config = {key: value for key, value in OLMOE.items() if key != "num_experts"} | {"hidden_size": 64}
    architecture = Architecture.from_config(config)
    assert architecture.layers[0].num_experts == 64, "the default of the family"
    assert resized_config(architecture, 6) == config | {"num_experts": 6}


def test_of_two_names_for_the_count_the_one_that_rules_is_found():
    # qwen3_moe reads both names; the one that comes last in the file decides.
    base = {key: value for key, value in OLMOE.items() if key != "num_experts"}
    base |= {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "head_dim": 16}
    for names in (("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")):
        architecture = Architecture.from_config(base | dict.fromkeys(names, 8))
        config = resized_config(architecture, 4)
        assert [config[name] for name in names] == [4] * len(names), "no name is left behind with the old count"
        for order in (config, dict(reversed(config.items()))):
            assert {layer.num_experts for layer in Architecture.from_config(order).layers} == {4}


def test_a_dense_model_is_refused(tmp_path, tiny):
    dense = {key: value for key, value in OLMOE.items() if "experts" not in key} | {"model_type": "llama"}
    with pytest.raises(NotAMoE, match=r"somewhere \(llama\) has no routed experts"):
        Architecture.from_config(dense, where="somewhere")
    shutil.copytree(tiny(), tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    with pytest.raises(NotAMoE, match="dense"):
        Architecture.of(Checkpoint.open(tmp_path / "dense"))


def test_experts_that_transformers_does_not_route_through_its_interface_are_refused():
    config = {
        "model_type": "llama4_text", "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "intermediate_size_mlp": 40,
        "num_local_experts": 8, "num_experts_per_tok": 1,
    }  # fmt: skip
    assert any("experts" in name for name, _ in meta_model(config).named_modules())
    with pytest.raises(NotAMoE, match=r"\(llama4_text\) .* does not route its experts through the common interface"):
        Architecture.from_config(config)


def test_an_unknown_model_type_is_refused():
    with pytest.raises(NotACheckpoint, match=r"model_type 'olmoe9', which transformers [\d.]+ does not know"):
        Architecture.from_config(OLMOE | {"model_type": "olmoe9"})


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"hidden_act": "nope"}, {"architectures": ["GPT2LMHeadModel"]}]
)
def test_a_config_that_builds_no_model_is_refused(changes):
    with pytest.raises(CorruptCheckpoint, match=r"here: no olmoe model can be built from its config\.json"):
        meta_model(OLMOE | changes, where="here")


def test_layers_with_different_expert_counts_are_refused(monkeypatch):
    def uneven(config, **options):
        model = meta_model(config, **options)
        next(module for module in model.modules() if is_experts(module)).num_experts = 5
        return model

    monkeypatch.setattr(layers_module, "meta_model", uneven)
    with pytest.raises(ArchitectureMismatch, match=r"different numbers of experts \(\[5, 8\]\)"):
        Architecture.from_config(OLMOE)


def test_a_count_that_no_key_explains_is_refused(monkeypatch):
    real = meta_model
    # A family whose number of experts does not follow from the config.
    monkeypatch.setattr(layers_module, "meta_model", lambda config, **options: real(OLMOE, **options))
    with pytest.raises(ArchitectureMismatch, match=r"key that counts the 8 experts is not clear.*num_experts"):
        Architecture.from_config(OLMOE)


def test_two_keys_that_both_explain_the_count_are_refused_and_named(monkeypatch):
    monkeypatch.setattr(layers_module, "_try_resize", lambda config, path, count, names: meta_model(config))
    message = r"key that counts the 8 experts is not clear: \['num_experts', 'num_experts_per_tok'\]"
    with pytest.raises(ArchitectureMismatch, match=message):
        Architecture.from_config(OLMOE | {"num_experts_per_tok": 8})


def test_a_block_whose_router_reshapes_more_than_one_axis_is_refused(monkeypatch):
    def odd(config, **options):
        model = meta_model(config, **options)
        for layer in model.model.layers:
            gate = layer.mlp.gate
            gate.square = nn.Parameter(torch.empty(gate.num_experts, gate.num_experts, device="meta"))
        return model

    monkeypatch.setattr(layers_module, "meta_model", odd)
    with pytest.raises(ArchitectureMismatch, match=r"model\.layers\.0\.mlp\.gate\.square: more than its expert axis"):
        Architecture.from_config(OLMOE)


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(ArchitectureMismatch, match=r"here: how many experts .* cannot be seen, .* does not run \(\w+"):
        Architecture.from_config(OLMOE | {"num_experts_per_tok": 99}, where="here")


def test_a_tensor_outside_all_blocks_that_depends_on_the_count_is_refused(monkeypatch):
    def odd(config, **options):
        model = meta_model(config, **options)
        model.model.balance = nn.Parameter(torch.empty(model.config.num_experts, device="meta"))
        return model

    monkeypatch.setattr(layers_module, "meta_model", odd)
    with pytest.raises(ArchitectureMismatch, match=r"model\.balance \[8\] depends .* but is in no MoE block"):
        Architecture.from_config(OLMOE)


def test_top_k_is_seen_where_a_block_does_not_run_by_itself(tiny, monkeypatch):
    # Here the block is the whole decoder layer: it wants positions too.
    checkpoint = Checkpoint.open(tiny("gemma4_text"))
    monkeypatch.setattr(probe_module, "_probed", {})
    with monkeypatch.context() as patch:
        patch.setattr(probe_module, "FakeTensorMode", None)
        with pytest.raises(ArchitectureMismatch, match="cannot be seen"):
            Architecture.of(checkpoint)
    assert [layer.top_k for layer in Architecture.of(checkpoint).layers] == [2, 2]
    assert len(probe_module._probed) == 1
    again, other = Architecture.of(checkpoint), Architecture.from_config(dict(checkpoint.config) | {"top_k_experts": 3})
    assert [layer.top_k for layer in (*again.layers, *other.layers)] == [2, 2, 3, 3]


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tiny):
    checkpoint = Checkpoint.open(tiny("nemotron_h"))
    assert checkpoint.config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    architecture = Architecture.of(checkpoint)
    assert architecture.model.config.time_step_limit[1] == float("inf")
    assert resized_config(architecture, 4)["time_step_limit"] == checkpoint.config["time_step_limit"]


def test_the_router_is_the_one_that_the_model_declares(tiny):
    model = Architecture.of(Checkpoint.open(tiny("deepseek_v3"))).model
    assert find_router(model, "model.layers.1.mlp") == ("model.layers.1.mlp.gate", 0)
    assert find_router(model, "model.layers.0.mlp") is None, "the first layer is dense"


# --- what can be routed -------------------------------------------------------------------------------------------

DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "first_k_dense_replace": 1, "intermediate_size": 40, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12,
    "v_head_dim": 16, "num_nextn_predict_layers": 0,
}  # fmt: skip


def grouped(experts, top_k, groups, chosen):
    routing = {"n_routed_experts": experts, "num_experts_per_tok": top_k, "n_group": groups, "topk_group": chosen}
    return Architecture.from_config(DEEPSEEK | routing)


def test_feasible_counts_without_groups():
    architecture = Architecture.from_config(OLMOE | {"num_experts_per_tok": 3})
    assert architecture.feasible_counts() == [3, 4, 5, 6, 7, 8]
    for count in (3, 5, 8):
        architecture.check_feasible(count)
    with pytest.raises(
        Infeasible, match=r"^2 experts a layer .*every token chooses 3 experts; nearest that can: 3, 4$"
    ):
        architecture.check_feasible(2)


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "chosen", "feasible"),
    [
        (8, 2, 2, 1, [4, 6, 8]),
        (8, 4, 2, 1, [8]),
        (12, 4, 4, 2, [8, 12]),
        (8, 2, 4, 4, [8]),  # 4 would leave one expert a group, and a group is scored by its two best
        (12, 4, 2, 2, [4, 6, 8, 10, 12]),
    ],
)
def test_feasible_counts_with_groups(experts, top_k, groups, chosen, feasible):
    architecture = grouped(experts, top_k, groups, chosen)
    assert architecture.layers[0].num_groups == groups
    assert architecture.feasible_counts() == feasible


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((12, 2, 4, 2), 10, r"router has 4 groups of equal size; nearest that can: 8, 12$"),
        ((8, 4, 2, 1), 6, r"1 of 2 groups hold 3 experts, 4 are chosen; nearest that can: 8$"),
        ((8, 2, 4, 4), 4, r"scores a group by its two best experts, 1 would be left; nearest that can: 8$"),
        ((8, 4, 2, 1), 2, r"every token chooses 4 experts"),
    ],
)
def test_what_cannot_be_routed_says_why_and_what_can(shape, count, message):
    with pytest.raises(Infeasible, match=message):
        grouped(*shape).check_feasible(count)


def test_the_counts_called_feasible_really_route():
    architecture = grouped(8, 2, 2, 1)
    name = architecture.layers[0].router
    for count in range(1, 9):
        router = meta_model(resized_config(architecture, count)).get_submodule(name).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*router.parameters(), *router.buffers()):
                tensor.normal_()

        def route(router=router):
            with torch.no_grad():
                return router(torch.randn(50, 32))[2]

        if count in architecture.feasible_counts():
            group = route() // (count // 2)
            assert (group[:, 0] == group[:, 1]).all(), "one group of two is chosen"
            assert all(len(set(row)) == 2 for row in route().tolist())
        elif count in (1, 2):
            with pytest.raises(RuntimeError):
                route()


# --- canonical experts --------------------------------------------------------------------------------------------


class FakeExperts(nn.Module):
    """An experts module as transformers marks it, in any layout."""

    def __init__(self, shape, *, gate, bias, transposed, concatenated, dtype=torch.float32):
        super().__init__()
        experts, width, hidden = shape
        self.num_experts = experts
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = gate, bias, transposed, concatenated
        rows = 2 * width if gate else width
        first = (experts, hidden, rows) if transposed else (experts, rows, hidden)
        second = (experts, width, hidden) if transposed else (experts, hidden, width)
        name = "gate_up_proj" if gate else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.randn(first).to(dtype)))
        self.down_proj = nn.Parameter(torch.randn(second).to(dtype))
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, rows).to(dtype)))
            self.down_proj_bias = nn.Parameter(torch.randn(experts, hidden).to(dtype))

    def act_fn(self, x):
        return x.tanh()

    def _apply_gate(self, fused):
        gate, up = fused.chunk(2, -1) if self.is_concatenated else (fused[..., 0::2], fused[..., 1::2])
        return gate.tanh() * (up + 3)


layouts = st.fixed_dictionaries(dict.fromkeys(("gate", "bias", "transposed", "concatenated"), st.booleans()))
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@given(shape=shapes, layout=layouts, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_canonical_and_back_is_bit_exact(shape, layout, dtype):
    module = FakeExperts(shape, dtype=dtype, **layout)
    experts = canonical_experts(module)
    assert (experts.num_experts, experts.width, experts.up_EFD.shape[2]) == shape
    native = native_experts(module, experts)
    assert native.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert native[name].dtype == parameter.dtype
        assert native[name].is_contiguous()
        assert torch.equal(native[name], parameter)


@given(shape=shapes, layout=layouts)
def test_every_number_is_where_the_layout_says(shape, layout):
    module = FakeExperts(shape, **layout)
    experts = canonical_experts(module)
    num_experts, width, hidden = shape
    fused = module.gate_up_proj if module.has_gate else module.up_proj
    bias = getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", None)

    def rows(f):
        """Return where gate and up of channel f lie."""
        if not module.has_gate:
            return None, f
        return (f, width + f) if module.is_concatenated else (2 * f, 2 * f + 1)

    for e, f in itertools.product(range(num_experts), range(width)):
        gate_row, up_row = rows(f)
        for d in range(hidden):
            at = (e, d, up_row) if module.is_transposed else (e, up_row, d)
            assert experts.up_EFD[e, f, d] == fused[at]
            if module.has_gate:
                at = (e, d, gate_row) if module.is_transposed else (e, gate_row, d)
                assert experts.gate_EFD[e, f, d] == fused[at]
            at = (e, f, d) if module.is_transposed else (e, d, f)
            assert experts.down_EDF[e, d, f] == module.down_proj[at]
        if module.has_bias:
            assert experts.up_bias_EF[e, f] == bias[e, up_row]
            assert not module.has_gate or experts.gate_bias_EF[e, f] == bias[e, gate_row]
    assert (experts.gate_EFD is None) == (not module.has_gate)
    assert (experts.up_bias_EF is None) == (experts.down_bias_ED is None) == (not module.has_bias)


@given(shape=shapes, layout=layouts)
def test_canonical_experts_compute_what_they_say(shape, layout):
    module = FakeExperts(shape, dtype=torch.float64, **layout)
    experts = canonical_experts(module)
    x_TD = torch.randn(3, shape[2], dtype=torch.float64)
    tensors = experts.tensors()
    zero = torch.zeros(shape[0], 1, dtype=torch.float64)
    for e in range(shape[0]):
        up = x_TD @ experts.up_EFD[e].T + tensors.get("up_bias_EF", zero)[e]
        if module.has_gate:
            gate = x_TD @ experts.gate_EFD[e].T + tensors.get("gate_bias_EF", zero)[e]
            hidden = gate.tanh() * (up + 3)
        else:
            hidden = up.tanh()
        output = hidden @ experts.down_EDF[e].T + tensors.get("down_bias_ED", zero)[e]
        torch.testing.assert_close(experts.hidden(e, x_TD), hidden)
        torch.testing.assert_close(experts.output(e, x_TD), output)


def test_canonical_tensors_are_views_without_gradients():
    module = FakeExperts((3, 4, 5), gate=True, bias=True, transposed=True, concatenated=False)
    experts = canonical_experts(module)
    owned = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    for tensor in experts.tensors().values():
        assert tensor.untyped_storage().data_ptr() in owned, "no copy of the weights is made"
        assert not tensor.requires_grad


def test_a_norm_after_each_expert_is_applied():
    module = FakeExperts((2, 3, 4), gate=True, bias=False, transposed=False, concatenated=True, dtype=torch.float64)
    module.has_post_expert_norm = True
    module.post_expert_norm = nn.LayerNorm(4, dtype=torch.float64)
    experts = canonical_experts(module)
    x_TD = torch.randn(5, 4, dtype=torch.float64)
    unnormed = experts.hidden(1, x_TD) @ module.down_proj[1].T
    with torch.no_grad():
        torch.testing.assert_close(experts.output(1, x_TD), module.post_expert_norm(unnormed))


def test_select_and_map_reach_every_tensor():
    module = FakeExperts((4, 3, 5), gate=True, bias=True, transposed=False, concatenated=True)
    experts = canonical_experts(module)
    index = torch.tensor([2, 0, 2])
    chosen = experts.select(index)
    assert chosen.num_experts == 3
    assert chosen.tensors().keys() == experts.tensors().keys()
    assert len(experts.tensors()) == 6
    for name, tensor in chosen.tensors().items():
        assert torch.equal(tensor, experts.tensors()[name][index])
    assert chosen.combine is experts.combine
    doubled = experts.map(lambda tensor: 2 * tensor)
    assert isinstance(doubled, Experts)
    assert all(torch.equal(doubled.tensors()[name], 2 * tensor) for name, tensor in experts.tensors().items())


def test_quiet_restores_what_was_set():
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    try:
        hf_logging.set_verbosity_info()
        hf_logging.enable_progress_bar()

        def fail():
            with quiet():
                assert hf_logging.get_verbosity() == hf_logging.ERROR
                assert not hf_logging.is_progress_bar_enabled()
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            fail()
        assert hf_logging.get_verbosity() == hf_logging.INFO
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.set_verbosity(before[0])
        (hf_logging.enable_progress_bar if before[1] else hf_logging.disable_progress_bar)()
