"""What vLLM predicts, as the other half of `vllm_runtime`: runs in vLLM's own environment, which has no Coterie.

    python vllm_program.py MODEL WINDOWS.json OUT.safetensors (vllm | emulated)

WINDOWS.json holds N lists of T token ids. OUT gets ``log_probs`` (N, T - 1, V): of the token after each but the last.

vLLM as it is computes four bits on CPUs with AMX. Emulated, packed matrices become plain numbers as they are loaded, on
any CPU: what config.json says of which matrix, where it is found and how it is unpacked stays vLLM's to know.
"""

import json
import os
import sys
from pathlib import Path

# One process: no worker to wait for, and what is put into place below is in place for all of vLLM.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe, int4_emulation_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kInt4Static,
    kInt8Static,
    unpack_quantized_values_into_int32,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types


class EmulatedExperts(cpu_moe.CPUUnquantizedExperts):
    """Experts of four bits on a CPU without AMX, and of eight bits, for which vLLM has no kernel on any.

    vLLM's emulation unpacks experts as it loads them and goes on with its kernel for plain numbers, but offers that on
    GPUs alone. Here its kernel for CPUs stands there.
    """

    prepacked = None

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key):
        return weight_key in (kInt4Static, kInt8Static) and activation_key is None

    def apply(self, output, hidden_states, w1, w2, *arguments, **options):
        if self.prepacked is None:
            plain = [weight.to(hidden_states.dtype) for weight in (w1, w2)]
            self.prepacked = [cpu_moe.cpu_prepack_moe_weight(weight, self.isa) for weight in plain]
        super().apply(output, hidden_states, *self.prepacked, *arguments, **options)


class EmulatedLinear(MPLinearKernel):
    """Linear modules of eight bits, unpacked as they are loaded."""

    @classmethod
    def get_min_capability(cls):
        return -1

    @classmethod
    def can_implement(cls, config):
        return config.weight_type == scalar_types.uint8b128 and not config.zero_points, None

    def process_weights_after_loading(self, layer):
        layer.plain = plain_numbers(getattr(layer, self.w_q_name), getattr(layer, self.w_s_name))

    def apply_weights(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)


def plain_numbers(packed, scales):
    """Return matrices of eight bits (..., outputs, inputs) as vLLM unpacks them, times their scales."""
    codes = unpack_quantized_values_into_int32(packed.data, scalar_types.uint8b128, packed.ndim - 1) - 128
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.data[..., None].float()).flatten(-2)


def emulate():
    """Put the emulations into their places, which are those of vLLM 0.32."""
    int4_emulation_moe.Int4EmulationTritonExperts = EmulatedExperts
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.EMULATION]
    register_linear_kernel(EmulatedLinear, current_platform._enum)
    of_four_bits = int_wna16._process_weights_emulation_gptq

    def unpacked(w13, w2, w13_scale, w2_scale, *zeros):
        if w2.shape[1] == 8 * w13.shape[2]:  # as many inputs as outputs of the other, eight in a word
            return of_four_bits(w13, w2, w13_scale, w2_scale, *zeros)
        unused = torch.ones(1)
        return plain_numbers(w13, w13_scale), plain_numbers(w2, w2_scale), unused, unused, *[None] * 6

    int_wna16._process_weights_emulation_gptq = unpacked


def main(model, windows, out, experts):
    if experts == "emulated":
        emulate()
    windows = json.loads(Path(windows).read_text())
    runtime = LLM(
        model, max_model_len=len(windows[0]) + 1, max_num_seqs=1, max_logprobs=-1, enforce_eager=True,
        gpu_memory_utilization=0.2,  # of the CPU's memory, in spite of the name
        # What vLLM multiplies with AMX is bfloat16; else eleven bits are better than eight for comparing.
        dtype="float16" if experts == "emulated" else "bfloat16",
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    answers = runtime.generate([{"prompt_token_ids": window} for window in windows], asked)
    num_tokens = runtime.llm_engine.model_config.get_vocab_size()
    log_probs = torch.full((len(windows), len(windows[0]) - 1, num_tokens), float("nan"))
    for row, answer in zip(log_probs, answers, strict=True):
        said = answer.prompt_logprobs
        for position in range(1, len(said)):  # nothing comes before the first token
            place = slice(said.start_indices[position], said.end_indices[position])
            row[position - 1, said.token_ids[place]] = torch.tensor(said.logprobs[place])
    assert not log_probs.isnan().any()
    save_file({"log_probs": log_probs}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
