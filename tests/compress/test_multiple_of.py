"""Numbers that other programs like: --multiple-of chooses near ones, and a plan says which ones they do not like."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.decide import plan
from coterie.compress.layer_plan import LayerPlan
from coterie.errors import Infeasible, InputError


@pytest.mark.parametrize(
    ("options", "step", "count"),
    [
        ({"experts": 5}, 4, 4), ({"experts": 7}, 4, 8), ({"keep": 0.4}, 4, 4), ({"experts": 6}, 4, 4),
        ({"experts": 5}, 1, 5), ({"experts": 3}, 8, 8),
    ],
)  # fmt: skip
def test_the_nearest_number_of_experts(tiny, options, step, count):
    layers = plan(tiny(), recipe="reap", multiple_of=step, **options).layers
    assert [layer.num_experts for layer in layers] == [count, count]


def test_the_largest_multiple_within_a_budget(tiny):
    seven = plan(tiny(), recipe="reap", experts=7).predicted_bytes
    chosen = plan(tiny(), recipe="reap", budget=seven, multiple_of=4)
    assert chosen.layers[0].num_experts == 4
    assert chosen.predicted_bytes <= seven
    parts = plan(tiny(), recipe="coterie", keep=0.5, multiple_of=4)
    assert parts.layers[0].num_experts % 4 == 0
    assert parts.predicted_bytes <= plan(tiny(), recipe="coterie", keep=0.5).predicted_bytes


def test_the_nearest_width(tiny):
    for wanted, width in ((8, 16), (16, 16), (24, 16)):
        assert plan(tiny(), recipe="easy-slim", width=wanted, multiple_of=16).layers[0].width == width


def test_multiples_that_cannot_be(tiny):
    with pytest.raises(Infeasible, match=r"--multiple-of 64: no number of experts .* possible are .*7, 8"):
        plan(tiny(), recipe="reap", keep=0.5, multiple_of=64)
    with pytest.raises(InputError, match="--multiple-of 0 is out of range"):
        plan(tiny(), recipe="reap", keep=0.5, multiple_of=0)
    with pytest.raises(InputError, match="--multiple-of is for one width or number of all"):
        plan(tiny(), recipe="heapr-ragged", width=8, multiple_of=8)


def test_a_plan_says_what_other_programs_will_not_like(tiny):
    decided = plan(tiny(), recipe="reap", experts=6)
    assert decided.awkward == ("6 experts cannot be shared out evenly among 4 or 8 devices",)

    def notes(num_experts: int, width: int | None) -> tuple[str, ...]:
        return replace(decided, layers=(LayerPlan(num_experts=num_experts, width=width),) * 2).awkward

    assert notes(8, None) == notes(64, 768) == ()
    assert notes(8, 384) == ("width 384 is no multiple of 256, as K-quants want it",)
    assert notes(8, 40)[0].endswith("nor of 32 and 128 as groups of 4-bit weights are")
    assert "2 or 4 or 8 devices" in notes(7, None)[0]


def test_the_command_prints_notes_and_takes_the_option(tiny):
    arguments = ["plan", str(tiny()), "--recipe", "reap", "--experts", "7"]
    said = CliRunner().invoke(app, arguments).stdout
    assert "note: 7 experts cannot be shared out evenly among 2 or 4 or 8 devices" in " ".join(said.split())
    result = CliRunner().invoke(app, [*arguments, "--multiple-of", "8", "--json"])
    assert [layer["num_experts"] for layer in json.loads(result.stdout)["layers"]] == [8, 8]
