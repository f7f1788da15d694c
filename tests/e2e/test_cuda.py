"""The same on a GPU: what the CPU finds, within rounding. Skipped where there is none."""

import pytest
import torch

from coterie import compress, evaluate, profile
from coterie.testing import CORE_FAMILIES, tiny_checkpoint, tiny_text

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_profile_compress_and_evaluate_on_a_gpu(tmp_path, model_type, inputs):
    model = tiny_checkpoint(tmp_path / "model", model_type)
    text = tiny_text(tmp_path / "text", documents=3)
    settings = {"text": text, "tokens": 512, "seq_len": 64}
    found = [profile(model, device=device, **settings) for device in ("cpu", "cuda")]
    for a, b in zip(*(each.statistics for each in found), strict=True):
        torch.testing.assert_close(a["reap"], b["reap"], rtol=1e-3, atol=1e-3)
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        result = compress(model, out, experts=4, recipe="reap", device=device, inputs=inputs, **settings)
        assert result.logits_error < 1e-4
    cards = [evaluate(tmp_path / "cuda", against=model, text=text, device=device)[0] for device in ("cpu", "cuda")]
    assert cards[0].overall["kl"] == pytest.approx(cards[1].overall["kl"], rel=1e-2)
