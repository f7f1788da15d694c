"""What tests look at in a checkpoint: its logits on fixed tokens, its tensors, the digests of its weight files."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from coterie.artifact import file_digest

IDS = torch.arange(256).view(4, 64)


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def weight_digests(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in folder.glob("*.safetensors")}
