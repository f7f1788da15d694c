"""What comes into matrices, against loops in float64 over single tokens."""

from dataclasses import replace

import pytest
import torch

import coterie.compress.pack as pack_module
from coterie.compress.apply import compress
from coterie.compress.moments import SHRINKAGE, Moments, Watch
from coterie.compress.quantisers.nearest import nearest
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint

D, F, E, T = 5, 6, 4, 40


def watches(state, *, biases=False):
    """Return what both lanes showed of a linear module and of a layer's experts, and these experts."""
    made = state(num_experts=E, width=F, hidden=D, tokens=T, top_k=2, biases=biases)
    inputs = made.sample.inputs_TD
    others = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    index = made.sample.index_TK.clone()
    index[::7, 1] = E  # no expert
    index[index == 3] = E  # and one that nobody chose
    index[0, 0] = 2
    seen = Watch(linear={"a": inputs}, experts={0: (made.experts, inputs, index, made.sample.weight_TK)})
    # What the original's router chose is no matter: experts get the tokens that they will get.
    original = Watch(linear={"a": others}, experts={0: (made.experts, others, index.flip(0), made.sample.weight_TK)})
    return made.experts, seen, original


def outer(x, y, weight=1.0):
    """Sum of x y^T over two vectors, element by element."""
    return torch.tensor([[weight * float(a) * float(b) for b in y] for a in x], dtype=torch.float64)


def loops(experts, seen, original, counts):
    """Return (Hessian, missed, tokens) of the linear module, all tokens, and each expert before and between."""

    def empty(columns):
        return [torch.zeros(columns, columns).double(), torch.zeros(columns, columns).double(), 0]

    def add(sums, x, o, weight=1.0):
        sums[0] += outer(x, x, weight)
        sums[1] += outer(o.double() - x.double(), x, weight)
        sums[2] += 1

    linear, into, between = empty(D), [empty(D) for _ in range(E)], [empty(F) for _ in range(E)]
    wide = experts.map(torch.Tensor.double)
    _, hidden, index, weight = seen.experts[0]
    for token in range(T):
        if counts is not None and not counts[token]:
            continue
        x, o = hidden[token].double(), original.experts[0][1][token].double()
        add(linear, x, o)
        for slot in range(2):
            expert = int(index[token, slot])
            if expert < E:
                squared = float(weight[token, slot]) ** 2
                add(into[expert], x, o, squared)
                add(between[expert], wide.hidden(expert, x[None])[0], wide.hidden(expert, o[None])[0], squared)
    return linear, into, between


def close(mine, theirs):
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_sums_are_those_of_loops_over_the_tokens_that_count(state, some, biases):
    experts, seen, original = watches(state, biases=biases)
    counts = torch.arange(T) % 3 > 0 if some else None
    moments = Moments(compares=True)
    moments.add(seen, original, counts)
    linear, into, between = loops(experts, seen, original, counts)
    for mine, theirs in [
        (moments.linear["a"], linear),
        (moments.experts[0].all_tokens, linear),
        *zip(moments.experts[0].into, into, strict=True),
        *zip(moments.experts[0].between, between, strict=True),
    ]:
        close(mine.hessian_CC, theirs[0])
        close(mine.missed_CC, theirs[1])
        assert mine.num_tokens == theirs[2]
    assert moments.experts[0].into[3].num_tokens == 0
    assert moments.experts[0].into[2].num_tokens > 0


def test_batches_add_up(state):
    _, seen, original = watches(state)
    once, twice = Moments(compares=True), Moments(compares=True)
    once.add(seen, original, None)
    for half in (slice(0, 13), slice(13, T)):
        experts, hidden, index, weight = seen.experts[0]
        part = Watch(
            linear={"a": seen.linear["a"][half]}, experts={0: (experts, hidden[half], index[half], weight[half])}
        )
        experts, hidden, index, weight = original.experts[0]
        other = Watch(
            linear={"a": original.linear["a"][half]}, experts={0: (experts, hidden[half], index[half], weight[half])}
        )
        twice.add(part, other, None)
    for between in (False, True):
        first, second = (each.expert_inputs(0, between=between) for each in (once, twice))
        close(first.hessian_NCC, second.hessian_NCC.double())
        close(first.missed_NCC, second.missed_NCC.double())
        assert first.num_tokens == second.num_tokens
    close(once.linear_inputs("a").hessian_NCC, twice.linear_inputs("a").hessian_NCC.double())


def test_without_a_second_lane_nothing_is_missed(state):
    _, seen, _ = watches(state)
    moments = Moments(compares=False)
    moments.add(seen, None, None)
    assert moments.linear_inputs("a").missed_NCC is None
    assert moments.expert_inputs(0, between=False).missed_NCC is None


@pytest.mark.parametrize("shrinkage", [0.0, 7.0, SHRINKAGE])
def test_rare_experts_borrow_from_the_layer(state, shrinkage):
    """(n H + s c H_all) / (n + s) by mean products, c so that the layer's has the size of the expert's own."""
    experts, seen, original = watches(state)
    moments = Moments(compares=True)
    moments.add(seen, original, None)
    linear, into, between = loops(experts, seen, original, None)
    mine = moments.expert_inputs(0, between=False, shrinkage=shrinkage)
    inner = moments.expert_inputs(0, between=True, shrinkage=shrinkage)
    layer = linear[0] / T
    for expert in range(3):
        for found, (own, missed, count), rest in (
            (mine, into[expert], layer),
            (inner, between[expert], torch.eye(F).double()),
        ):
            rest = rest * own.diagonal().mean() / rest.diagonal().mean()
            close(found.hessian_NCC[expert], (count * own + shrinkage * rest) / (count + shrinkage))
            close(found.missed_NCC[expert], missed * count / (count + shrinkage))
            assert found.num_tokens[expert] == count
    close(mine.hessian_NCC[3], layer)  # one without tokens has the layer's, and nothing between
    assert not inner.hessian_NCC[3].any()
    assert not mine.missed_NCC[3].any()


@pytest.fixture(scope="module")
def coarse(tmp_path_factory, text_folder):
    """Return a model, its result in four bits, the matrices and inputs that the quantiser got, and the batches."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("coarse")
    model = tiny_checkpoint(folder / "model", "olmoe", **sizes)
    given = []

    def spy(weight_NRC, inputs, kind, **options):
        given.append((weight_NRC.clone(), inputs))
        return nearest(weight_NRC, inputs, kind)

    batches = []
    real = pack_module.Packer.with_text

    def keep(self, lanes):
        batches.extend(ids for _, ids in lanes.batches)
        return real(self, lanes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "load_quantiser", lambda name: spy)
        patch.setattr(pack_module.Packer, "with_text", keep)
        result = compress(model, folder / "out", recipe="gptaq", type="Q4_0", text=text_folder, tokens=192, seq_len=32)
    return model, result.out, given, batches


def received(model, layer, names, batches):
    """Return what modules of a layer, and its experts, received, and how tokens were routed, in float64."""
    found = {name: [] for name in names}
    routed = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]

    def watch(module, hidden, index, weight):
        from coterie.model.arch.experts import canonical_experts

        experts = canonical_experts(module)
        if module is model.get_submodule(layer.experts):
            routed.append((experts, hidden, index, weight))
        return routed_output(experts, hidden, index, weight)

    with torch.no_grad(), intercepted(model, watch):
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}, routed


def test_matrices_get_what_the_quantised_layers_before_them_put_out(coarse):
    """Fails where the lanes are swapped: what is missed is what the original received, less what comes in now."""
    folder, out, given, batches = coarse
    layer = Architecture.of(open_checkpoint(folder)).layers[1]
    original, mixed = (load_model(folder, dtype=torch.float32).double() for _ in range(2))
    packed = load_model(out, dtype=torch.float32).state_dict()
    # What is quantised before the second layer: the embedding and the first.
    mixed.load_state_dict(
        {
            name: packed[name].double() if "layers.0" in name or "embed" in name else tensor
            for name, tensor in original.state_dict().items()
        }
    )
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    now, routed = received(mixed, layer, names, batches)
    before, routed_before = received(original, layer, names, batches)
    for name in names[:2]:
        weight = original.get_submodule(name).weight
        (inputs,) = [each for matrix, each in given if torch.equal(matrix[0].double(), weight)]
        x, o = now[name], before[name]
        torch.testing.assert_close(inputs.hessian_NCC[0].double(), x.T @ x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(inputs.missed_NCC[0].double(), (o - x).T @ x, rtol=1e-3, atol=1e-3)
        assert float((o - x).abs().max()) > 0.01
    experts = routed[0][0]
    (inner,) = [each for matrix, each in given if torch.equal(matrix.double(), experts.down_EDF)]
    outer = torch.cat((experts.gate_EFD, experts.up_EFD), dim=1)  # of one type: rounded together
    (outer_inputs,) = [each for matrix, each in given if torch.equal(matrix.double(), outer)]
    for expert in range(4):
        own = torch.zeros(32, 32).double()
        missed, missed_between, count = torch.zeros(32, 32).double(), torch.zeros(32, 32).double(), 0
        for (_, hidden, index, weight), (_, other, _, _) in zip(routed, routed_before, strict=True):
            token, slot = (index == expert).nonzero(as_tuple=True)
            squared = weight[token, slot, None].square()
            x, o = hidden[token], other[token]
            own += (squared * x).T @ x
            missed += (o - x).T @ (squared * x)
            h, p = experts.hidden(expert, x), experts.hidden(expert, o)
            missed_between += (p - h).T @ (squared * h)
            count += len(token)
        share = count / (count + SHRINKAGE)
        torch.testing.assert_close(outer_inputs.missed_NCC[expert].double(), share * missed, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(inner.missed_NCC[expert].double(), share * missed_between, rtol=2e-3, atol=2e-3)
        assert outer_inputs.num_tokens[expert] == inner.num_tokens[expert] == count
        size = outer_inputs.hessian_NCC[expert].diagonal().mean().double()
        torch.testing.assert_close(size, own.diagonal().mean(), rtol=1e-3, atol=1e-3)


def test_the_head_gets_what_the_quantised_model_puts_out(coarse):
    folder, out, given, batches = coarse
    model = load_model(out, dtype=torch.float32).double()
    head = load_model(folder, dtype=torch.float32).lm_head.weight
    layer = Architecture.of(open_checkpoint(folder)).layers[1]
    now, _ = received(model, layer, ["lm_head"], batches)
    (inputs,) = [each for matrix, each in given if torch.equal(matrix[0], head)]
    torch.testing.assert_close(inputs.hessian_NCC[0].double(), now["lm_head"].T @ now["lm_head"], rtol=1e-3, atol=1e-3)
    assert inputs.missed_NCC is None
    assert replace(inputs).num_tokens == (sum(ids.numel() for ids in batches),)
