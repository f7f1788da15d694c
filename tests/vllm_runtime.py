"""A real vLLM, in an environment of its own beside .venv: what it predicts after every token of some windows."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"

needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason="vLLM is not installed, which has an environment of its own: make test-vllm"
)

#: One thread on whichever core is free, little room for keys and values, no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def run_vllm(model, windows, folder, experts="vllm"):
    """Return log-probabilities (N, T - 1, V) of windows (N, T), None where vLLM failed, and all that it printed.

    Args:
        model: folder of a model.
        windows: token ids.
        folder: where files may be left.
        experts: "vllm" for its kernels, or "emulated" for what this CPU has none for, see `vllm_program`.
    """
    asked, out = folder / "windows.json", folder / "log_probs.safetensors"
    asked.write_text(json.dumps(windows))
    out.unlink(missing_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_program.py"), model, asked, out, experts],
        env={**kept, **ENVIRONMENT}, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=900,
    )  # fmt: skip
    return load_file(out)["log_probs"].double() if done.returncode == 0 else None, done.stdout
