"""Observations of small random layers, as a forward pass and a backward pass would give them.

Legend: E experts, D model width, F expert width, T tokens, K chosen experts.
"""

from dataclasses import replace

import torch

from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import MoELayer
from coterie.profile.observation import Observation


def draw(seed, *, num_experts=5, top_k=2, num_tokens=9, nobody=0.3, bias=True, finish=None):
    """Draw an observation as a layer with "no expert" entries would give it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width, hidden = 3, 4
    experts = Experts(
        gate_EFD=normal(num_experts, width, hidden),
        up_EFD=normal(num_experts, width, hidden),
        down_EDF=normal(num_experts, hidden, width),
        down_bias_ED=normal(num_experts, hidden) if bias else None,
        combine=lambda gate, up: gate.tanh() * up,
        finish=finish,
    )
    layer = MoELayer(
        index=0, block="b", experts="b.e", router=None, router_tensors=(), num_experts=num_experts, top_k=top_k,
        width=width, hidden_size=hidden,
    )  # fmt: skip
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    nobody_TK = torch.rand(num_tokens, top_k, generator=generator) < nobody
    index_TK = index_TK.masked_fill(nobody_TK, num_experts)
    x_TD = normal(num_tokens, hidden)
    norm_TK, peak_TK = torch.zeros(num_tokens, top_k), torch.zeros(num_tokens, top_k)
    for token in range(num_tokens):
        for slot in range(top_k):
            if index_TK[token, slot] < num_experts:
                output_D = experts.output(int(index_TK[token, slot]), x_TD[token : token + 1])[0]
                norm_TK[token, slot] = output_D.norm()
                peak_TK[token, slot] = output_D.abs().max()
    residual_TD, block_output_TD = normal(num_tokens, hidden), normal(num_tokens, hidden)
    return with_squares(Observation(
        layer=layer, experts=experts, hidden_TD=x_TD, index_TK=index_TK, weight_TK=normal(num_tokens, top_k).float(),
        logits_TE=normal(num_tokens, num_experts).float(), norm_TK=norm_TK, peak_TK=peak_TK,
        output_TD=normal(num_tokens, hidden), residual_TD=residual_TD, block_output_TD=block_output_TD,
        after_TD=residual_TD + 0.5 * block_output_TD,
        gradient_TD=normal(num_tokens, hidden),
    ))  # fmt: skip


def with_squares(observation):
    """Return the observation with its sums of squared activations, by slow loops."""
    shape = (observation.experts.num_experts, observation.experts.width)
    square, gated = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for x_D, index_K, weight_K in zip(
        observation.hidden_TD, observation.index_TK.tolist(), observation.weight_TK.tolist(), strict=True
    ):
        for expert, weight in zip(index_K, weight_K, strict=True):
            if expert < observation.layer.num_experts:
                for channel, value in enumerate(observation.experts.hidden(expert, x_D[None])[0].tolist()):
                    square[expert, channel] += value**2
                    gated[expert, channel] += (weight * value) ** 2
    return replace(observation, hidden_square_EF=square, gated_hidden_square_EF=gated)


def rows(observation, chosen):
    """Return the observation of some of the tokens."""
    names = (
        "hidden_TD", "index_TK", "weight_TK", "logits_TE", "norm_TK", "peak_TK", "output_TD", "gradient_TD",
        "residual_TD", "block_output_TD", "after_TD",
    )  # fmt: skip
    return with_squares(replace(observation, **{name: getattr(observation, name)[chosen] for name in names}))
