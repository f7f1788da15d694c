"""A device that is not there is refused in one line, before anything is read."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from coterie import bench, calibrate, compress, evaluate, imatrix, load_model, profile, route
from coterie.cli.main import app
from coterie.errors import InputError
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.stream.stream import Stream
from coterie.profile.calibrate import generate

BAD = {
    "nonsense": r"^'nonsense' is no device \(.*device string: nonsense\); use cpu, cuda or cuda:1$",
    "": r"^'' is no device \(.*\); use cpu, cuda or cuda:1$",
    "cuda:-1": r"^'cuda:-1' is no device \(.*\); use cpu, cuda or cuda:1$",
    "cuda": r"^device cuda is not there: torch sees 0 CUDA devices; use cpu$",
    "cuda:99": r"^device cuda:99 is not there: torch sees 0 CUDA devices; use cpu$",
    "meta": r"^device meta holds no values, so nothing can be computed there; use cpu, cuda or cuda:1$",
    "xpu": r"^device xpu is not there \(.+\); use cpu, cuda or cuda:1$",
}
#: Every function that takes a device, on a model that does not exist: the device is looked at first.
FUNCTIONS = {
    "profile": lambda device: profile("nowhere", text="nowhere", device=device),
    "compress": lambda device: compress("nowhere", "out", keep=0.5, text="nowhere", device=device),
    "evaluate": lambda device: evaluate("nowhere", text="nowhere", device=device),
    "evaluate without text": lambda device: evaluate("nowhere", tasks=["piqa"], device=device),
    "calibrate": lambda device: calibrate("nowhere", text="nowhere", device=device),
    "generate": lambda device: generate("nowhere", "nowhere", device=device),
    "bench": lambda device: bench("nowhere", "out", text="nowhere", test="nowhere", device=device),
    "imatrix": lambda device: imatrix("nowhere", "out", text="nowhere", device=device),
    "route": lambda device: route("nowhere", "out.json", experts_per_token=2, profile="nowhere", device=device),
    "load_model": lambda device: load_model("nowhere", device=device),
}
COMMANDS = {
    "profile": ("nowhere", "out", "--text", "nowhere"),
    "price": ("nowhere", "out", "--text", "nowhere"),
    "compress": ("nowhere", "out", "--keep", "0.5"),
    "evaluate": ("nowhere", "--text", "nowhere"),
    "calibrate": ("nowhere", "--text", "nowhere"),
    "bench": ("nowhere", "out", "--text", "nowhere", "--test", "nowhere"),
    "imatrix": ("nowhere", "out", "--text", "nowhere"),
    "route": ("nowhere", "out.json", "--experts-per-token", "2", "--profile", "nowhere"),
}


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("device", BAD)
def test_what_is_not_there_is_refused_in_one_line(no_cuda, device):
    with pytest.raises(InputError, match=BAD[device]) as caught:
        check_device(device)
    assert "\n" not in str(caught.value)


def test_devices_that_are_there(monkeypatch):
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert check_device("cuda") == torch.device("cuda:1")
    assert check_device(torch.device("cuda", 0)) == torch.device("cuda:0")
    with pytest.raises(InputError, match=r"^device cuda:2 .* torch sees 2 CUDA devices; use cpu, cuda:0, cuda:1$"):
        check_device("cuda:2")


@pytest.mark.parametrize("device", ["nonsense", "cuda", "cuda:99"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_look_at_the_device_before_anything_else(no_cuda, tmp_path, monkeypatch, function, device):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=BAD[device]):
        FUNCTIONS[function](device)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_has_a_device_that_is_there(no_cuda, tiny):
    checkpoint = Checkpoint.open(tiny())
    with pytest.raises(InputError, match=BAD["cuda"]):
        Stream(checkpoint, device="cuda")


def test_the_listed_commands_are_those_that_take_a_device():
    taking = {
        command.callback.__name__ for command in app.registered_commands if "device" in command.callback.__annotations__
    }
    assert taking == set(COMMANDS)


@pytest.mark.parametrize("device", ["nonsense", "cuda", "cuda:99"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_in_one_line_and_end_with_1(no_cuda, tmp_path, monkeypatch, command, device):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--device", device])
    assert result.exit_code == 1
    assert result.stdout == ""
    with pytest.raises(InputError) as caught:
        check_device(device)
    assert result.stderr == f"error: {caught.value}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_refused_without_transformers():
    program = """
import sys
from coterie.cli.main import app
try:
    app(["profile", "m", "out", "--text", "t", "--device", "nonsense"])
except SystemExit as end:
    print(end.code, sorted({"transformers", "safetensors"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"
    assert done.stderr.count("\n") == 1
