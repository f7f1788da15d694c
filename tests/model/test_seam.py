"""The seam: canonical experts compute what every family's own loop computes, and interception leaves no trace."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import NotAMoE
from coterie.model.arch.experts import Experts, canonical_experts, is_experts
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import eager, install, installed, intercepted, routed_output, uninstall
from coterie.testing import CORE_FAMILIES


def experts_of(model):
    return [module for module in model.modules() if is_experts(module)]


def draw(num_experts, hidden, *, num_tokens=24, top_k=3, dtype=torch.float64):
    """Draw inputs, a routing without repetition and weights of both signs."""
    hidden_TD = torch.randn(num_tokens, hidden, dtype=dtype)
    index_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return hidden_TD, index_TK, torch.randn(num_tokens, top_k, dtype=dtype)


@pytest.fixture
def model(tiny):
    return load_model(tiny())


# --- routed_output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_routed_output_equals_the_familys_own_loop(tiny, model_type):
    model = load_model(tiny(model_type), dtype=torch.float64)
    for module in experts_of(model):
        hidden_TD, index_TK, weight_TK = draw(8, 32)
        with eager(module), torch.no_grad():
            own_TD = module(hidden_TD, index_TK, weight_TK)
        ours_TD = routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)
        assert own_TD.abs().max() > 0.1
        torch.testing.assert_close(ours_TD, own_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_no_expert_adds_nothing(tiny, model_type):
    model = load_model(tiny(model_type), dtype=torch.float64)
    module = experts_of(model)[0]
    hidden_TD, index_TK, weight_TK = draw(8, 32)
    nobody_TK = torch.rand(index_TK.shape) < 0.4
    nobody_TK[0] = True  # a token that nobody takes
    with eager(module), torch.no_grad():  # not every family's own loop knows "no expert", but all know a weight of 0
        own_TD = module(hidden_TD, index_TK, weight_TK.masked_fill(nobody_TK, 0))
    marked_TK = index_TK.masked_fill(nobody_TK, 8)
    marked_TK[1:3][nobody_TK[1:3]] = 11  # any number from E on
    ours_TD = routed_output(canonical_experts(module), hidden_TD, marked_TK, weight_TK)
    torch.testing.assert_close(ours_TD, own_TD, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours_TD[0], torch.zeros(32, dtype=torch.float64))


def simple(num_experts, width=3, hidden=4, dtype=torch.float64):
    return Experts(
        gate_EFD=torch.randn(num_experts, width, hidden).to(dtype),
        up_EFD=torch.randn(num_experts, width, hidden).to(dtype),
        down_EDF=torch.randn(num_experts, hidden, width).to(dtype),
        combine=lambda gate, up: torch.tanh(gate) * up,
    )


@given(seed=st.integers(0, 10**6), num_experts=st.integers(1, 6), num_tokens=st.integers(0, 9), data=st.data())
def test_routed_output_is_the_sum_over_choices(seed, num_experts, num_tokens, data):
    torch.manual_seed(seed)
    top_k = data.draw(st.integers(1, num_experts))
    experts = simple(num_experts)
    hidden_TD = torch.randn(num_tokens, 4, dtype=torch.float64)
    index_TK = torch.randint(0, num_experts + 2, (num_tokens, top_k))
    weight_TK = torch.randn(num_tokens, top_k, dtype=torch.float64)
    visited = {}

    def visit(expert, token_N, slot_N, hidden_NF, output_ND):
        torch.testing.assert_close(hidden_NF, experts.hidden(expert, hidden_TD[token_N]))
        for token, slot, output_D in zip(token_N.tolist(), slot_N.tolist(), output_ND, strict=True):
            assert (token, slot) not in visited
            visited[token, slot] = expert, output_D

    found_TD = routed_output(experts, hidden_TD, index_TK, weight_TK, visit=visit)
    expected_TD = torch.zeros(num_tokens, 4, dtype=torch.float64)
    for token in range(num_tokens):
        for slot in range(top_k):
            expert = int(index_TK[token, slot])
            if expert >= num_experts:
                assert (token, slot) not in visited
                continue
            x = hidden_TD[token]
            output = experts.down_EDF[expert] @ (
                torch.tanh(experts.gate_EFD[expert] @ x) * (experts.up_EFD[expert] @ x)
            )
            expected_TD[token] += weight_TK[token, slot] * output
            assert visited[token, slot][0] == expert
            torch.testing.assert_close(visited[token, slot][1], output)
    torch.testing.assert_close(found_TD, expected_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_wide_and_come_back_in_the_dtype_of_the_inputs(dtype):
    experts = simple(512, width=1, hidden=1, dtype=dtype)
    # Every expert returns 1/512 times its weight: a narrow running sum would stop growing long before 512 terms.
    experts = experts.map(lambda tensor: torch.ones_like(tensor))
    experts = Experts(**{**experts.tensors(), "combine": lambda gate, up: torch.ones_like(up)})
    output_TD = routed_output(
        experts, torch.ones(1, 1, dtype=dtype), torch.arange(512)[None], torch.full((1, 512), 1 / 512, dtype=dtype)
    )
    assert output_TD.dtype == dtype
    assert output_TD.item() == 1.0


# --- interception -------------------------------------------------------------------------------------------------

IDS = torch.arange(40).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def settings_of(model):
    return [module.config._experts_implementation for module in experts_of(model)]


def functions_of(model):
    return [installed(module) for module in experts_of(model)]


def silence(module, hidden_TD, index_TK, weight_TK):
    """No expert adds anything; a function of the module, so that it can be pickled."""
    return torch.zeros_like(hidden_TD)


def noting(name, calls):
    """Return a function that writes its name down and computes what the family does."""

    def function(module, hidden_TD, index_TK, weight_TK):
        calls.append(name)
        with eager(module):
            return module(hidden_TD, index_TK, weight_TK)

    return function


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_interception_sees_every_layer_and_leaves_no_trace(model, implementation):
    model.set_experts_implementation(implementation)
    before, plain = settings_of(model), logits(model)
    seen = []

    def function(module, hidden_TD, index_TK, weight_TK):
        assert hidden_TD.shape == (40, 32)
        assert index_TK.shape == weight_TK.shape == (40, 2)
        seen.append(module)
        return routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)

    with intercepted(model, function):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    assert seen == experts_of(model)
    assert settings_of(model) == before == [implementation] * 2
    assert torch.equal(logits(model), plain)
    assert len(seen) == 2
    assert functions_of(model) == [None] * 2


def test_what_the_function_returns_is_what_the_model_goes_on_with(model):
    plain = logits(model)
    with intercepted(model, lambda module, hidden_TD, index_TK, weight_TK: torch.zeros_like(hidden_TD)):
        silent = logits(model)
    assert (silent - plain).abs().max() > 0.1


def test_interception_ends_with_an_exception(model):
    before, plain = settings_of(model), logits(model)

    def fail(*_):
        raise ZeroDivisionError("within the layer")

    with pytest.raises(ZeroDivisionError), intercepted(model, fail):
        logits(model)
    assert settings_of(model) == before
    assert functions_of(model) == [None] * 2
    assert torch.equal(logits(model), plain)


def test_interceptions_can_be_nested(model):
    plain = logits(model)
    calls = []

    def named(name):
        def function(module, hidden_TD, index_TK, weight_TK):
            calls.append(name)
            with eager(module):
                return module(hidden_TD, index_TK, weight_TK)

        return function

    with intercepted(model, named("outer")):
        logits(model)
        with intercepted(model, named("inner")):
            inside = logits(model)
        logits(model)
    assert calls == ["outer", "outer", "inner", "inner", "outer", "outer"]
    torch.testing.assert_close(inside, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)
    assert functions_of(model) == [None] * 2


def test_a_failing_inner_interception_leaves_the_outer_one(model):
    calls = []

    def outer(module, hidden_TD, index_TK, weight_TK):
        calls.append("outer")
        return torch.zeros_like(hidden_TD)

    def inner(*_):
        raise ZeroDivisionError

    with intercepted(model, outer):
        with pytest.raises(ZeroDivisionError), intercepted(model, inner):
            logits(model)
        logits(model)
    assert calls == ["outer", "outer"]


def test_two_models_are_intercepted_apart(tiny, model):
    other = load_model(tiny())
    calls = []

    def named(name):
        def function(module, hidden_TD, index_TK, weight_TK):
            calls.append(name)
            return torch.zeros_like(hidden_TD)

        return function

    with intercepted(model, named("one")), intercepted(other, named("two")):
        logits(model)
        logits(other)
    assert calls == ["one", "one", "two", "two"]


def test_eager_is_undone_also_after_an_exception(model):
    model.set_experts_implementation("batched_mm")
    module = experts_of(model)[0]

    def fail():
        with eager(module):
            assert module.config._experts_implementation == "eager"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert settings_of(model) == ["batched_mm"] * 2


# --- for good -----------------------------------------------------------------------------------------------------


def test_a_function_is_installed_until_it_is_taken_out(model):
    plain, before = logits(model), settings_of(model)
    install(model, silence)
    assert functions_of(model) == [silence] * 2
    silent = logits(model)
    assert (silent - plain).abs().max() > 0.1
    uninstall(model)
    assert torch.equal(logits(model), plain)
    assert functions_of(model) == [None] * 2
    assert settings_of(model) == before


def test_what_is_installed_last_counts_and_goes_first(model):
    calls = []
    install(model, noting("first", calls))
    install(model, noting("second", calls))
    logits(model)
    with intercepted(model, noting("inner", calls)):
        logits(model)
    logits(model)
    uninstall(model)
    logits(model)
    uninstall(model)
    logits(model)
    assert calls == [name for name in ("second", "inner", "second", "first") for _ in range(2)]


def test_a_block_ends_as_it_began_whatever_was_installed_in_it(model):
    plain, calls = logits(model), []
    install(model, noting("outer", calls))
    with intercepted(model, noting("inner", calls)):
        install(model, noting("left behind", calls))
        install(model, noting("left behind too", calls))
    logits(model)
    assert calls == ["outer"] * 2
    uninstall(model)
    assert torch.equal(logits(model), plain)


def test_taking_out_what_is_not_there_is_an_error(model):
    with pytest.raises(ValueError, match=r"^no function is installed in OlmoeForCausalLM"):
        uninstall(model)


def test_installing_in_a_model_without_experts_is_an_error():
    with pytest.raises(NotAMoE, match=r"^Linear has no experts"):
        install(torch.nn.Linear(2, 2), silence)


def test_models_that_share_a_config_keep_their_own_functions(tiny, model):
    """Their lives overlap without one lying within the other."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    third = type(model)(model.config).eval()
    assert other.config is model.config
    plain, calls = logits(model), []
    install(model, noting("one", calls))
    install(other, noting("two", calls))
    logits(model)
    logits(other)
    logits(third)
    uninstall(model)
    logits(model)
    logits(other)
    uninstall(other)
    assert calls == ["one", "one", "two", "two", "two", "two"]
    assert torch.equal(logits(other), plain)
    assert settings_of(third) == settings_of(other) == settings_of(model)


def test_only_experts_are_changed_by_an_installed_function(model):
    state, config = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}, model.config
    names = [name for name, _ in model.named_modules()]
    settings = config.to_dict(), config._experts_implementation
    install(model, torch.nn.Identity())  # a module is a function too, and must not become a part of the model
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == state
    assert [name for name, _ in model.named_modules()] == names
    assert (config.to_dict(), config._experts_implementation) == settings
    assert model.config is config


def test_an_installed_function_stays_through_a_change_of_format(model):
    install(model, silence)
    silent = logits(model)
    model.to(torch.float64).eval()
    torch.testing.assert_close(logits(model).float(), silent, rtol=1e-3, atol=1e-3)
    assert functions_of(model) == [silence] * 2


def test_a_copy_has_the_function_and_its_own_experts(model):
    seen = []

    def function(module, hidden_TD, index_TK, weight_TK):
        seen.append(module)
        return torch.zeros_like(hidden_TD)

    plain = logits(model)
    install(model, function)
    twin = copy.deepcopy(model)
    logits(twin)
    assert seen == experts_of(twin)
    assert not set(seen) & set(experts_of(model))
    uninstall(model)
    assert functions_of(twin) == [function] * 2
    uninstall(twin)
    assert torch.equal(logits(twin), plain)
    assert all(module.config is twin.config for module in experts_of(twin))
    assert twin.config is not model.config


def test_a_pickled_model_keeps_a_function_that_can_be_pickled(model):
    plain = logits(model)
    install(model, silence)
    silent = logits(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(loaded), silent)
    uninstall(loaded)
    assert torch.equal(logits(loaded), plain)


def test_a_pickled_model_does_not_lose_a_function_in_silence(model):
    install(model, noting("local", []))
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"noting\.<locals>\.function"):
        pickle.dumps(model)


def test_a_model_that_goes_leaves_nothing_behind(tiny):
    class Function:
        def __call__(self, module, hidden_TD, index_TK, weight_TK):
            return torch.zeros_like(hidden_TD)

    model, function = load_model(tiny()), Function()
    install(model, function)
    logits(model)
    gone = [weakref.ref(model), weakref.ref(function), *map(weakref.ref, experts_of(model))]
    del model, function
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_a_new_module_in_an_old_ones_place_in_memory_is_itself(model):
    """A module that goes without being taken out leaves its id to another one."""
    module, places = experts_of(model)[0], set()
    draws = draw(8, 32, dtype=torch.float32)
    for _ in range(20):
        old = type(module)(module.config)
        install(old, silence)
        assert not old(*draws).any()
        places.add(id(old))
        del old
    news = [type(module)(module.config) for _ in range(20)]
    reused = [new for new in news if id(new) in places]
    assert reused
    with torch.no_grad():
        expected_TD = module(*draws)
        for new in reused:
            assert installed(new) is None
            new.load_state_dict(module.state_dict())
            torch.testing.assert_close(new(*draws), expected_TD)


def test_threads_share_a_model(model):
    calls, failed = [], []
    plain = logits(model)

    def function(module, hidden_TD, index_TK, weight_TK):
        calls.append(threading.get_ident())
        return routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)

    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        failed.extend(not torch.allclose(logits(model), plain, rtol=1e-4, atol=1e-4) for _ in range(5))

    install(model, function)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [False] * 20
    assert len(calls) == 4 * 5 * 2
    assert len(set(calls)) == 4
