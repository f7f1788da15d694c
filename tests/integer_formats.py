"""Matrices in integers as other tools store them, made and read number by number: slow, obvious, nothing of ours."""

import json

import torch
from safetensors.torch import save_file

from coterie.model.disk.checkpoint import Checkpoint

#: Columns of a word of AWQ's, from its lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Matrix:
    """Codes, zeros and scales of a matrix, as lists; `values` are what they stand for, in float32.

    Numbers are 0 to 2^bits - 1; the zero is that which stands for 0. `group_of` is the group of each column.
    """

    def __init__(self, weight, bits, group_of, *, symmetric=False, scale_dtype=torch.float16):
        rows, self.bits, self.group_of = weight.double().tolist(), bits, list(group_of)
        top, half = 2**bits - 1, 2 ** (bits - 1)
        self.codes, self.zeros, scales = [], [], []
        for row in rows:
            zeros_of_row, scales_of_row = [], []
            for group in range(max(self.group_of) + 1):
                part = [number for number, place in zip(row, self.group_of, strict=True) if place == group] or [1.0]
                low, high = min(0.0, *part, 0.0), max(0.0, *part, 0.0)
                scale = max(-low, high) / (half - 1) if symmetric else (high - low) / top
                scale = float(torch.tensor(scale or 1.0, dtype=torch.float64).to(scale_dtype))
                zeros_of_row.append(half if symmetric else min(top, round(-low / scale)))
                scales_of_row.append(scale)
            self.zeros.append(zeros_of_row)
            scales.append(scales_of_row)
            self.codes.append([
                min(top, max(0, round(number / scales_of_row[group]) + zeros_of_row[group]))
                for number, group in zip(row, self.group_of, strict=True)
            ])  # fmt: skip
        self.scales = torch.tensor(scales, dtype=torch.float64).to(scale_dtype)

    def values(self):
        scales = self.scales.double().tolist()
        found = []
        for row, codes in enumerate(self.codes):
            found.append([
                (code - self.zeros[row][group]) * scales[row][group]
                for code, group in zip(codes, self.group_of, strict=True)
            ])  # fmt: skip
        return torch.tensor(found, dtype=torch.float64).float()


def word(codes, bits):
    """Return the signed 32-bit word of a few codes, the first in its lowest bits."""
    found = 0
    for place, code in enumerate(codes):
        assert 0 <= code < 2**bits
        found += code << bits * place
    return found - 2**32 if found >= 2**31 else found


def words(codes, bits):
    """Return the words of a list of codes; the last one may have room left."""
    size = 32 // bits
    return [word(codes[start : start + size], bits) for start in range(0, len(codes), size)]


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def int32(rows):
    return torch.tensor(rows, dtype=torch.int32)


def compressed_words(matrix, *, zeros=False, index=False):
    """Return what compressed-tensors stores of a matrix in words, by what follows the name of its module."""
    stored = {
        "weight_packed": int32([words(row, matrix.bits) for row in matrix.codes]),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor([len(matrix.codes), len(matrix.codes[0])]),
    }
    if zeros:
        stored["weight_zero_point"] = int32(transposed([words(c, matrix.bits) for c in transposed(matrix.zeros)]))
    if index:
        stored["weight_g_idx"] = int32(matrix.group_of)
    return stored


def compressed_bytes(matrix, *, zeros=False):
    """Return what compressed-tensors stores of a matrix in 8-bit integers."""
    codes = torch.tensor([[code - 128 for code in row] for row in matrix.codes], dtype=torch.int8)
    stored = {"weight": codes, "weight_scale": matrix.scales}
    if zeros:
        stored["weight_zero_point"] = torch.tensor([[z - 128 for z in row] for row in matrix.zeros], dtype=torch.int8)
    return stored


def compressed_config(form="pack-quantized", *, targets=("Linear",), ignore=("lm_head",), **weights):
    """Return a quantization_config of compressed-tensors with one group."""
    described = {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": None, "strategy": "channel",
        "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    } | weights  # fmt: skip
    group = {"targets": list(targets), "weights": described, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": list(ignore), "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


def gptq(matrix, *, index=True, offset=1):
    """Return what GPTQ's tools store of a matrix, by what follows the name of its module."""
    zeros = [[zero - offset for zero in row] for row in matrix.zeros]
    stored = {
        "qweight": int32(transposed([words(row, matrix.bits) for row in matrix.codes])),
        "qzeros": int32([words(zeros_of_group, matrix.bits) for zeros_of_group in transposed(zeros)]),
        "scales": matrix.scales.T,
    }
    return stored | ({"g_idx": int32(matrix.group_of)} if index else {})


def gptq_config(**changes):
    return {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01,
        "static_groups": False, "true_sequential": True, "lm_head": False, "checkpoint_format": "gptq", "meta": {},
    } | changes  # fmt: skip


def awq_words(codes):
    """Return the words of a list of codes, each eight of them in AWQ's order."""
    return words([codes[start + place] for start in range(0, len(codes), 8) for place in AWQ_ORDER], 4)


def awq(matrix):
    """Return what AWQ's tools store of a matrix, by what follows the name of its module."""
    return {
        "qweight": int32([awq_words(column) for column in transposed(matrix.codes)]),
        "qzeros": int32([awq_words(zeros_of_group) for zeros_of_group in transposed(matrix.zeros)]),
        "scales": matrix.scales.T,
    }


def awq_config(**changes):
    return {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["gate"],
    } | changes  # fmt: skip


def hand_made(folder, tensors, settings, **config):
    """Write and open a checkpoint of some tensors, with a quantization_config."""
    folder.mkdir(parents=True)
    described = {"model_type": "olmoe", "dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": settings}))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def read_all(checkpoint):
    """Return all tensors of a checkpoint."""
    with checkpoint.reader() as reader:
        return {name: reader.read(name) for name in checkpoint.tensors}


def under(module, stored):
    """Return what is stored of a matrix by its names in a checkpoint."""
    return {f"{module}.{leaf}": tensor for leaf, tensor in stored.items()}
