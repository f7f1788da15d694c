"""What really comes into the matrices of a GGUF file in llama.cpp: its own graph, watched as ``llama-imatrix`` does.

The functions of the library in the package xllamacpp are called through ctypes. Places of fields are those of
llama.cpp's ``include/llama.h`` and ``ggml/include/ggml.h``; that they are right is checked by the defaults in them.
"""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest

#: Bytes of structures, more than they have, and places of fields in them.
_MODEL, _CONTEXT = 80, 168
_N_CTX, _N_BATCH, _N_UBATCH, _PER_SEQ, _THREADS, _FLASH, _CB_EVAL, _TYPES = 0, 4, 8, 24, 28, 52, 88, 104
_NUM_GPU_LAYERS, _EXTRA_BUFFERS = 16, 74

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def _bytes(count):
    return type(f"Bytes{count}", (ctypes.Structure,), {"_fields_": [("content", ctypes.c_uint8 * count)]})


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip

    def numbers(self, kind):
        """Return what it holds, with its axes the other way round: (ne3, ne2, ne1, ne0)."""
        size = 1 + sum((extent - 1) * stride for extent, stride in zip(self.ne, self.nb, strict=True))
        size += np.dtype(kind).itemsize - 1
        content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.data))
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        return np.lib.stride_tricks.as_strided(content[: size // 4 * 4].view(kind), shape, strides).copy()


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    )  # fmt: skip


def _library():
    pytest.importorskip("xllamacpp", reason="llama.cpp comes with xllamacpp, which is not installed")
    [place] = importlib.util.find_spec("xllamacpp").submodule_search_locations
    [file] = Path(place).glob("xllamacpp*.so")
    library, model, context = ctypes.CDLL(str(file)), _bytes(_MODEL), _bytes(_CONTEXT)
    for name, result, *arguments in (
        ("llama_model_default_params", model),
        ("llama_context_default_params", context),
        ("llama_model_load_from_file", ctypes.c_void_p, ctypes.c_char_p, model),
        ("llama_init_from_model", ctypes.c_void_p, ctypes.c_void_p, context),
        ("llama_batch_init", _Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_decode", ctypes.c_int32, ctypes.c_void_p, _Batch),
        ("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p),
        ("llama_memory_clear", None, ctypes.c_void_p, ctypes.c_bool),
        ("llama_free", None, ctypes.c_void_p),
        ("llama_batch_free", None, _Batch),
        ("llama_model_free", None, ctypes.c_void_p),
        ("ggml_op_name", ctypes.c_char_p, ctypes.c_int32),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _set(structure, place, value, kind=ctypes.c_int32):
    kind.from_address(ctypes.addressof(structure) + place).value = value


def _get(structure, place):
    return ctypes.c_int32.from_address(ctypes.addressof(structure) + place).value


def received(file, ids_NS):
    """Return {name: (sums of squares (N, C), counts (N))} of all that is multiplied while sequences are read."""
    library = _library()
    library.llama_backend_init()
    sums, problems = {}, []

    def see(address, ask, _):
        tensor = _Tensor.from_address(address)
        op = library.ggml_op_name(tensor.op).decode()
        if ask or op not in ("MUL_MAT", "MUL_MAT_ID"):
            return op in ("MUL_MAT", "MUL_MAT_ID")
        try:
            weight, inputs = (_Tensor.from_address(tensor.src[i]) for i in (0, 1))
            name = weight.name.decode()
            if not name.startswith("blk.") or inputs.type != 0:
                return True
            x = inputs.numbers(np.float32)[0].astype(np.float64)
            if op == "MUL_MAT_ID":
                ids_TK = _Tensor.from_address(tensor.src[2]).numbers(np.int32)[0, 0]
                x_TKC = np.broadcast_to(x, (*ids_TK.shape, x.shape[-1]))
                chosen = [x_TKC[ids_TK == expert] for expert in range(weight.ne[2])]
            else:
                chosen = list(x) if weight.ne[2] > 1 else [x.reshape(-1, x.shape[-1])]
            squares = np.stack([(each**2).sum(0) for each in chosen])
            counts = np.array([len(each) for each in chosen])
            before = sums.get(name, (0, 0))
            sums[name] = before[0] + squares, before[1] + counts
        except Exception as error:  # it would be lost in C
            problems.append(error)
        return True

    callback = _CALLBACK(see)
    settings = library.llama_model_default_params()
    assert _get(settings, _NUM_GPU_LAYERS) == -1
    _set(settings, _EXTRA_BUFFERS, 0, ctypes.c_bool)  # weights in another order are multiplied elsewhere
    model = library.llama_model_load_from_file(str(file).encode(), settings)
    assert model
    length = ids_NS.shape[1]
    settings = library.llama_context_default_params()
    assert [_get(settings, place) for place in (_N_CTX, _N_BATCH, _N_UBATCH, _FLASH)] == [512, 2048, 512, -1]
    assert [_get(settings, place) for place in (_TYPES, _TYPES + 4)] == [1, 1]  # F16
    for place, value in ((_N_CTX, length), (_N_BATCH, length), (_N_UBATCH, length), (_PER_SEQ, 0), (_FLASH, 0)):
        _set(settings, place, value)
    for place in (_THREADS, _THREADS + 4):
        _set(settings, place, 1)
    for place in (_TYPES, _TYPES + 4):
        _set(settings, place, 0)  # F32
    _set(settings, _CB_EVAL, ctypes.cast(callback, ctypes.c_void_p).value, ctypes.c_void_p)
    context = library.llama_init_from_model(model, settings)
    assert context
    batch = library.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    for row in ids_NS.tolist():
        library.llama_memory_clear(library.llama_get_memory(context), True)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, place, 1, 1
            batch.seq_id[place][0] = 0
        assert library.llama_decode(context, batch) == 0
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    assert not problems, problems[0]
    return sums
