"""The matrices that can be stored in fewer bits, as headers alone tell them: what `find_weights` finds, without torch.

Names on disk say what a matrix belongs to, and shapes along which axis it is summed. Where both leave a doubt, such as
of a tower that sees or of a convolution, the matrix is left out, and what is counted with it is a little too large.
"""

from __future__ import annotations

from collections.abc import Iterator

from coterie.compress.target import Reader
from coterie.compress.weights import Weight, read_by
from coterie.model.arch.accounting import Accounting, LayerAccount, SizedTensor
from coterie.model.arch.inspect import Headers
from coterie.model.disk.tensors import bytes_of

#: Parts of a model that hold matrices, beside experts.
_PARTS = frozenset(("shared", "attention", "dense", "embeddings"))


def weights_of_headers(headers: Headers, accounting: Accounting, target: Reader = "gguf") -> tuple[Weight, ...]:
    """Return the matrices of a model that can be stored in blocks.

    Args:
        headers: of a checkpoint of plain numbers.
        accounting: of the same.
        target: who is to read matrices in blocks, see `coterie.compress.target.Target.reader`.
    """
    weights = [
        weight
        for index, (layer, described) in enumerate(zip(accounting.layers, headers.moe_layers, strict=True))
        for weight in _of_experts(layer, index, described.hidden_size)
    ]
    embeddings = {name for name, part in headers.part_of.items() if part == "embeddings"}
    outputs = {name for name in embeddings if "head" in name or "output" in name}  # none in a tied model
    stacks = tuple(f"{block.stack}." for block in headers.blocks)
    for name, info in headers.checkpoint.tensors.items():
        part = headers.part_of[name]
        if part not in _PARTS or len(info.shape) != 2 or info.shape[0] == 1 or not name.endswith(".weight"):
            continue
        if part == "embeddings" or name.startswith(stacks):
            kind, head = "embedding" if name in embeddings - outputs else "linear", name in (outputs or embeddings)
            weights.append(
                Weight(
                    pattern=name, names=(name,), shape=info.shape, axis=-1, layer=None, kind=kind,
                    plain_bytes=info.num_bytes, head=head, can_wrap=True,
                )
            )  # fmt: skip
    return read_by(target, weights)


def _of_experts(layer: LayerAccount, index: int, hidden_size: int) -> Iterator[Weight]:
    for tensor in layer.tensors:
        single = tensor.expert_axis is None
        if tensor.router or len(tensor.shape) != (2 if single else 3) or tensor.name.endswith("bias"):
            continue
        names = tuple(tensor.name.replace("*", str(number)) for number in range(layer.num_experts if single else 1))
        axis = -2 if not single and _is_transposed(layer, hidden_size) else -1
        yield Weight(
            pattern=tensor.name, names=names, shape=tensor.shape, axis=axis, layer=index, kind="expert",
            plain_bytes=len(names) * bytes_of(tensor.dtype, tensor.shape),
            # Where experts lie transposed, gate and up take turns, along twice the width; down is by itself.
            can_wrap=axis == -1 or 2 * (layer.width or 0) not in tensor.shape,
        )  # fmt: skip


def _is_transposed(layer: LayerAccount, hidden_size: int) -> bool:
    """Tell whether all experts in one tensor lie with the axis that is summed over before the other.

    Gate and up in one tensor are twice as long along the axis of their output, which tells it.
    """

    def both(tensor: SizedTensor) -> bool:
        return layer.width is not None and 2 * layer.width in tensor.shape[1:]

    wide = [tensor for tensor in layer.tensors if tensor.expert_axis == 0 and len(tensor.shape) == 3 and both(tensor)]
    return any(tensor.shape[1] == hidden_size and tensor.shape[2] != hidden_size for tensor in wide)
