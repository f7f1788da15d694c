"""What types are expected to cost: Fisher diagonals against autograd token by token, prices against losses."""

import contextlib
from collections import defaultdict

import pytest
import torch
from torch import nn

import coterie.compress.damages as damages_module
from coterie.compress.damages import DamageMeter
from coterie.compress.projections import DOWN, GATE, UP
from coterie.compress.source import Source
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.encodings.ggml import get_type
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

TYPES = ("Q8_0", "Q5_0", "Q4_0")
IDS = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))

#: Plain experts; with biases; fused, the embedding multiplied; without gate; ending in a norm; a tied head; a hybrid.
FAMILIES = {
    "olmoe": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
    "granitemoe": {"intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32, "tie_word_embeddings": True},
    "nemotron_h": {"moe_intermediate_size": 32},
    "deepseek_v3": {"moe_intermediate_size": 32},
}


@contextlib.contextmanager
def matrices_of_their_own(model, names, layers, seen):
    """Within the block every token has a copy of each matrix; copies are kept in `seen` by what they are of."""

    def swap(name):
        def hook(module, args, output):
            x_TC = args[0].flatten(0, -2)
            copy_TRC = module.weight.detach().expand(len(x_TC), -1, -1).clone().requires_grad_()
            seen[name].append((copy_TRC, None))
            y_TR = torch.einsum("trc,tc->tr", copy_TRC, x_TC)
            return (y_TR if module.bias is None else y_TR + module.bias).view(output.shape)

        return hook

    def embed(module, args, output):
        copy = output.detach().clone().requires_grad_()
        seen["embedding"].append((copy, args[0]))
        return copy

    by_module = {id(model.get_submodule(layer.experts)): layer.index for layer in layers}

    def experts_of(module, hidden_TD, index_TK, weight_TK):
        experts, layer = canonical_experts(module), by_module[id(module)]
        total = torch.zeros_like(hidden_TD)
        for expert in range(experts.num_experts):
            token, slot = ((index_TK == expert) & (weight_TK != 0)).nonzero(as_tuple=True)
            if not len(token):
                continue

            def project(part, matrix, bias, x, expert=expert):
                copy = matrix[expert].detach().expand(len(x), -1, -1).clone().requires_grad_()
                seen[layer, expert, part].append((copy, None))
                y = torch.einsum("trc,tc->tr", copy, x)
                return y if bias is None else y + bias[expert]

            x = hidden_TD[token]
            gate = None if experts.gate_EFD is None else project(GATE, experts.gate_EFD, experts.gate_bias_EF, x)
            inner = experts.combine(gate, project(UP, experts.up_EFD, experts.up_bias_EF, x))
            out = project(DOWN, experts.down_EDF, experts.down_bias_ED, inner)
            out = out if experts.finish is None else experts.finish(out)
            total = total.index_add(0, token, out * weight_TK[token, slot, None])
        return total

    handles = [model.get_submodule(name).register_forward_hook(swap(name)) for name in names]
    handles.append(model.get_input_embeddings().register_forward_hook(embed))
    try:
        with intercepted(model, experts_of):
            yield
    finally:
        for handle in handles:
            handle.remove()


def slow_fisher(folder, source):
    """Return sums over tokens of squared gradients, each token with matrices of its own, in float64."""
    model = load_model(folder, dtype=torch.float32).double().requires_grad_(False)
    names = [
        source.conversion.memory_names[weight.names[0]].removesuffix(".weight")
        for weight in source.weights
        if weight.kind == "linear" and not weight.head
    ]
    fisher = {}
    for ids in IDS.split(2):
        seen = defaultdict(list)
        with matrices_of_their_own(model, names, source.architecture.layers, seen):
            logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        for key, copies in seen.items():
            for copy, where in copies:
                if copy.grad is None:
                    continue
                square = copy.grad.square()
                if key == "embedding":
                    rows = torch.zeros(model.get_input_embeddings().weight.shape).double()
                    square = rows.index_add_(0, where.flatten(), square.flatten(0, 1))
                else:
                    square = square.sum(dim=0)
                fisher[key] = fisher.get(key, 0) + square
    return fisher


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    """Return a factory of (folder, source, by pattern pairs of a matrix and what its elements weigh, prices)."""
    base, done = tmp_path_factory.mktemp("priced"), {}

    def make(family):
        if family not in done:
            folder = tiny_checkpoint(base / family, family, **FAMILIES[family])
            source, pairs = Source.open(folder), {}
            stream = Stream(source.checkpoint)
            real = DamageMeter._prices

            def keep(self, weight, given):
                pairs[weight.pattern] = [(matrix.clone(), fisher.clone()) for matrix, fisher in given]
                return real(self, weight, given)

            with pytest.MonkeyPatch.context() as patch, stream:
                patch.setattr(DamageMeter, "_prices", keep)
                meter = DamageMeter(
                    stream=stream, source=source, batches=list(IDS.split(2)), counts=[None] * 2, types=TYPES
                )
                prices = {}
                for _, some in meter.measure():
                    prices |= some
            done[family] = folder, source, pairs, prices
        return done[family]

    return make


def near(mine, theirs):
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=1e-6 * float(theirs.abs().max()) + 1e-12)


@pytest.mark.parametrize(
    "family", [f if f in ("olmoe", "gpt_oss") else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES]
)
def test_fisher_diagonals_are_those_of_autograd_token_by_token(family, priced):
    folder, source, pairs, _ = priced(family)
    slow = slow_fisher(folder, source)
    layers = source.architecture.layers
    checked = set()
    for weight in source.weights:
        if weight.kind == "linear" and not weight.head:
            name = source.conversion.memory_names[weight.names[0]].removesuffix(".weight")
            if name in slow:
                ((_, fisher),) = pairs[weight.pattern]
                near(fisher, slow[name])
                checked.add("linear")
            else:
                assert not pairs.get(weight.pattern), name
        elif weight.kind == "expert":
            found = [fisher for _, fisher in pairs[weight.pattern]]
            parts = (GATE, UP, DOWN)
            every = [
                slow[weight.layer, expert, part]
                for part in parts
                for expert in range(layers[weight.layer].num_experts)
                if (weight.layer, expert, part) in slow
            ]
            # In the order of projections, then of experts; each must be one of these.
            left = list(every)
            for fisher in found:
                (match,) = [
                    place
                    for place, each in enumerate(left)
                    if each.shape == fisher.shape and torch.allclose(fisher.double(), each, rtol=5e-3, atol=1e-9)
                ]
                del left[match]
            checked.add("expert")
            assert found
    embedding = next(weight for weight in source.weights if weight.kind == "embedding")
    if not embedding.head:
        ((_, fisher),) = pairs[embedding.pattern]
        rows = slow["embedding"].sum(dim=1) > 0
        near(fisher, slow["embedding"][rows])
    assert checked == {"linear", "expert"}


@pytest.mark.long
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_of_a_head_it_is_the_mean_over_all_labels(family, priced):
    folder, source, pairs, _ = priced(family)
    model = load_model(folder, dtype=torch.float32).double().requires_grad_(False)
    head = next(weight for weight in source.weights if weight.head)
    ((matrix, fisher),) = pairs[head.pattern]
    with in_float64(model):
        hidden = torch.cat([model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1) for ids in IDS.split(2)])
    weight = model.get_output_embeddings().weight.detach()
    torch.testing.assert_close(matrix.double(), weight)
    rows = torch.zeros_like(weight)
    for x in hidden:
        log_p = (weight @ x).log_softmax(-1)
        for label, p in enumerate(log_p.exp()):  # gradient of log p(label) by the logits, squared, by how likely it is
            by_logits = -log_p.exp()
            by_logits[label] += 1
            rows += p * torch.outer(by_logits.square(), x.square())
    near(fisher, rows)


def in_float64(model):
    """Within the block experts are computed in any number format; grouped kernels have none so wide."""
    return intercepted(
        model, lambda module, hidden, index, weight: routed_output(canonical_experts(module), hidden, index, weight)
    )


def summed_loss(model):
    with torch.no_grad(), in_float64(model):
        logits = model(input_ids=IDS, use_cache=False).logits
    return float(
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").double()
    )


def test_prices_are_a_half_of_fisher_times_the_square_of_the_error(priced, monkeypatch):
    """Where all rows of all matrices are rounded, the price is the sum itself."""
    monkeypatch.setattr(damages_module, "ROWS", 10**6)
    monkeypatch.setattr(damages_module, "MATRICES", 10**6)
    _, source, pairs, _ = priced("olmoe")
    meter = DamageMeter(stream=None, source=source, batches=[IDS], counts=[None], types=TYPES)
    meter._tokens = IDS.numel()
    for weight in source.weights[:6]:
        prices = meter._prices(weight, pairs[weight.pattern])
        for kind, price in prices.items():
            expected = 0.0
            for matrix, fisher in pairs[weight.pattern]:
                importance = fisher.mean(dim=0)
                importance = importance if float(importance.sum()) > 0 else torch.ones_like(importance)
                _, value = round_to_nearest(matrix[None].float(), importance[None], get_type(kind))
                expected += float(0.5 * (fisher.double() * (matrix - value[0]).double().square()).sum()) / IDS.numel()
            assert price == pytest.approx(expected, rel=1e-4)


def test_types_that_are_underrated_cost_as_many_times_as_much(priced, monkeypatch):
    _, source, pairs, _ = priced("olmoe")
    meter = DamageMeter(stream=None, source=source, batches=[IDS], counts=[None], types=TYPES)
    meter._tokens, weight = IDS.numel(), source.weights[0]
    monkeypatch.setattr(damages_module, "ROWS", 4 * 2**20)  # all of them, for every type
    before = meter._prices(weight, pairs[weight.pattern])
    monkeypatch.setattr(damages_module, "UNDERRATED", {"Q4_0": 3.0})
    after = meter._prices(weight, pairs[weight.pattern])
    assert {kind: after[kind] / before[kind] for kind in before} == pytest.approx(
        {kind: 3.0 if kind == "Q4_0" else 1.0 for kind in before}
    )


def test_fewer_bits_cost_more_and_some_rows_tell_what_all_do(priced, monkeypatch):
    _, source, pairs, prices = priced("olmoe")
    for pattern, by_type in prices.items():
        assert by_type["Q8_0"] < by_type["Q5_0"] < by_type["Q4_0"], pattern
    monkeypatch.setattr(damages_module, "ROWS", 8)
    monkeypatch.setattr(damages_module, "MATRICES", 4)
    meter = DamageMeter(stream=None, source=source, batches=[IDS], counts=[None], types=TYPES)
    meter._tokens = IDS.numel()
    for weight in source.weights:
        if weight.kind == "expert":
            few = meter._prices(weight, pairs[weight.pattern])
            assert few["Q4_0"] == pytest.approx(prices[weight.pattern]["Q4_0"], rel=0.7)


@pytest.mark.parametrize("family", ["olmoe", pytest.param("granitemoe", marks=pytest.mark.long)])
def test_a_price_is_about_what_the_loss_rises_by(family, priced):
    """The mean rise over errors of random sign and the size of the rounding's: to second order the price, roughly.

    Roughly, as the Fisher information stands for the Hessian only near a model's own distribution of text, which a
    random model is far from.
    """
    folder, source, _, prices = priced(family)
    model = load_model(folder, dtype=torch.float32).double()
    before, state = summed_loss(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total_price, total_rise = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    linear = [weight for weight in source.weights if weight.kind == "linear" and not weight.head]
    for weight in linear:
        name = source.conversion.memory_names[weight.names[0]]
        importance = torch.ones(1, weight.columns)
        matrix = state[name]
        _, value = round_to_nearest(matrix[None].float(), importance, get_type("Q4_0"))
        error = (value[0].double() - matrix).abs()
        total_price += prices[weight.pattern]["Q4_0"]
        rises = []
        for _ in range(4):
            sign = torch.randint(0, 2, matrix.shape, generator=generator).double() * 2 - 1
            for way in (1, -1):  # what is of first order cancels out
                model.state_dict()[name].copy_(matrix + way * sign * error)
                rises.append(summed_loss(model) - before)
        model.state_dict()[name].copy_(matrix)
        total_rise += sum(rises) / len(rises) / IDS.numel()
    assert 0.1 < total_price / abs(total_rise) < 10


def test_narrower_experts_cost_what_the_columns_weigh_that_go(tmp_path):
    """Against gradients token by token: the cheapest neurons of each expert go, down to none."""
    folder = tiny_checkpoint(tmp_path / "m", "olmoe", intermediate_size=96)
    source = Source.open(folder)
    with Stream(source.checkpoint) as stream:
        meter = DamageMeter(stream=stream, source=source, batches=list(IDS.split(2)), counts=[None] * 2, types=TYPES)
        found = {}
        for _ in meter.measure():
            found |= meter.widths
    slow, state = slow_fisher(folder, source), load_model(folder, dtype=torch.float64).state_dict()
    seen = {key[:2] for key in slow if isinstance(key, tuple) and key[2] == DOWN}
    assert found.keys() == {f"model.layers.{layer}.mlp.experts.{expert}" for layer, expert in seen}
    for layer, expert in seen:
        name = f"model.layers.{layer}.mlp.experts"
        weight = state[f"{name}.down_proj"][expert]
        costs = []
        for neuron in range(96):
            fisher = slow[layer, expert, DOWN][:, neuron]
            costs.append(sum(float(0.5 * f * w * w) for f, w in zip(fisher, weight[:, neuron], strict=True)))
        costs = sorted(cost / IDS.numel() for cost in costs)
        prices = found[f"{name}.{expert}"]
        assert list(prices) == ["0", "32", "64", "96"]
        for width, price in prices.items():
            assert price == pytest.approx(sum(costs[: 96 - int(width)]), rel=2e-3, abs=1e-12)


def test_experts_in_one_tensor_have_no_prices_of_widths(priced):
    _, source, _, _ = priced("granitemoe")
    with Stream(source.checkpoint) as stream:
        meter = DamageMeter(stream=stream, source=source, batches=[IDS[:2]], counts=[None], types=TYPES)
        assert not any(meter.widths for _ in meter.measure())
