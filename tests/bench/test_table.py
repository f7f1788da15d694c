import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from coterie.bench import plot
from coterie.bench.summary import Original, Spread, gaps, summarize
from coterie.bench.table import damage, tables, with_spread
from coterie.evaluate.scorecard import Scorecard
from coterie.evaluate.sums import Sums


def cell(method, kl, *, removed=0.5, seed=0, num_bytes=1000, accuracy=0.5, status="done", model="m", seconds=1.0):
    recipe, _, form = method.partition(" (")
    entry = {
        "key": f"{model} {method} {removed} {seed}", "model": model, "method": method, "recipe": recipe,
        "router": form.removesuffix(")") or "plain", "removed": removed, "seed": seed, "status": status,
    }  # fmt: skip
    if status != "done":
        return entry | {"reason": "too few experts", "seconds": {}}
    return entry | {
        "kl": kl, "agreement": 0.9 - kl / 10, "accuracy": accuracy, "perplexity": 10 * math.exp(kl), "bytes": num_bytes,
        "loads_with": "coterie" if form else "transformers", "peak_bytes": 2**20,
        "seconds": {"compress": seconds, "evaluate": 2.0, "profile": 5.0},
        "domains": {"code": {"kl": kl * 2, "perplexity": 20.0}, "prose": {"kl": kl / 2, "perplexity": 5.0}},
    }  # fmt: skip


@pytest.fixture
def card():
    sums = Sums(nll=10 * math.log(10), tokens=10, correct=3, questions=4)
    scores = sums.scores(compared=False)
    return Scorecard(
        model="m", model_digest="d", base=None, base_digest=None, text_digest="t", seq_len=8, seed=0,
        domains={"code": scores, "prose": scores}, overall=scores, num_bytes=2000, bytes_ratio=None, memory_bytes=None,
        peak_memory_bytes=None, tokens_per_second=None, speed_ratio=None, environment={},
    )  # fmt: skip


@pytest.fixture
def cells():
    return [
        cell("good", 0.1, seed=0), cell("good", 0.2, seed=1), cell("good", 0.4, removed=0.75, num_bytes=500),
        cell("bad", 1.5, seed=0, seconds=0.5), cell("bad", 1.5, seed=1, seconds=0.5),
        cell("good (map)", 0.05, seed=0), cell("good (map)", 0.1, seed=1), cell("good (map)", 0.5, removed=0.75),
        cell("none", 0, removed=0.75, status="infeasible"),
    ]  # fmt: skip


def original(card):
    info = SimpleNamespace(num_elements=500)
    checkpoint = SimpleNamespace(config={"model_type": "kind"}, tensors={"a": info, "b": info})
    return Original.of(checkpoint, card)


def test_a_row_is_mean_and_deviation_over_draws(card, cells):
    rows = {(row.method, row.removed): row for row in summarize(cells, {"m": card})}
    good = rows["good", 0.5]
    assert good.seeds == (0, 1)
    assert good.kl == Spread(mean=pytest.approx(0.15), deviation=pytest.approx(statistics.stdev([0.1, 0.2])))
    assert good.perplexity_ratio.mean == pytest.approx((math.exp(0.1) + math.exp(0.2)) / 2)
    assert good.domain_kl["code"].mean == pytest.approx(0.3)
    assert rows["good", 0.75].kl.deviation is None
    assert rows["none", 0.75].kl is None
    assert rows["none", 0.75].reason == "infeasible: too few experts"
    assert not rows["good (map)", 0.5].stock
    assert good.stock


def test_the_table_orders_marks_and_says_what_is_left_out(card, cells):
    text = tables([original(card)], summarize(cells, {"m": card}), cells)
    lines = text.splitlines()
    half = lines.index("### 50 % of the expert parameters removed")
    names = [line.split(" |")[0].removeprefix("| ") for line in lines[half + 4 : half + 7]]
    assert names == ["good (map) †", "good", "bad"]
    assert "| good | **0.150 ± 0.071** | **88.5 ± 0.7 %** | **50.0 ± 0.0 %** | **1.163 ± 0.082** | 0.98 KiB |" in text
    assert (
        "| bad | 1.500 ± 0.000 | 75.0 ± 0.0 % | **50.0 ± 0.0 %** | 4.482 ± 0.000 | 0.98 KiB | **0.5 ± 0.0** |" in text
    )
    assert "| good (map) † | 0.075 ± 0.035 |" in text  # the best of all, but not in bold: it does not load everywhere
    assert "The original: 1.00 k parameters, 1.95 KiB, perplexity 10.00, 75.0 % exact answers." in text
    assert "- none, 75 % removed: infeasible: too few experts" in text
    assert "† stock loaders cannot load the result" in text
    assert text.startswith("## m (kind)\n")
    assert "<details><summary>By domain, 50 % removed</summary>\n\n| KL (nats) | code | prose |" in text
    assert "| the original | 10.00 | 10.00 |" in text
    short = tables([original(card)], summarize(cells, {"m": card}), cells, domains=False)
    assert short == re.sub(r"<details>.*?</details>\n\n", "", text, flags=re.DOTALL) != text


def test_an_overview_has_a_row_a_method_and_columns_for_all_sizes(card, cells):
    text = tables([original(card)], summarize(cells, {"m": card}), cells)
    overview = text[text.index("### All sizes") : text.index("### 50 %")].splitlines()
    assert overview[4:] == [
        "| method | KL, 50 % | KL, 75 % | exact, 50 % | exact, 75 % |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| good (map) † | 0.075 ± 0.035 | 0.500 | 50.0 ± 0.0 % | 50.0 % |",
        "| good | **0.150 ± 0.071** | 0.400 | **50.0 ± 0.0 %** | 50.0 % |",  # alone at 75 %
        "| bad | 1.500 ± 0.000 | – | **50.0 ± 0.0 %** | – |",
        "",
    ]
    assert "none" not in "".join(overview), "what was measured at no size has no row"
    one = [entry for entry in cells if entry["removed"] == 0.5]
    assert "All sizes" not in tables([original(card)], summarize(one, {"m": card}), one)


def test_the_gap_between_router_forms_is_taken_draw_by_draw(card, cells):
    rows = summarize(cells, {"m": card})
    found = gaps(rows, cells)
    assert found["m", "good"][0.5].mean == pytest.approx((0.05 + 0.1) / 2)
    assert found["m", "good"][0.5].deviation == pytest.approx(statistics.stdev([0.05, 0.1]))
    assert found["m", "good"][0.75].mean == pytest.approx(-0.1)
    assert "| good | 0.075 ± 0.035 | -0.100 |" in tables([original(card)], rows, cells)


def test_every_form_of_fewer_rows_has_its_gap(card, cells):
    more = [*cells, cell("good (mean)", 0.3, seed=0), cell("other (mean)", 0.3, seed=0)]
    found = gaps(summarize(more, {"m": card}), more)
    assert found["m", "good (mean)"] == {0.5: Spread(mean=pytest.approx(0.25), deviation=None)}
    assert set(found) == {("m", "good"), ("m", "good (mean)")}


def test_a_draw_without_its_counterpart_counts_in_no_gap(card, cells):
    alone = [entry for entry in cells if (entry["method"], entry["seed"]) != ("good", 1)]
    found = gaps(summarize(alone, {"m": card}), alone)
    assert found["m", "good"][0.5] == Spread(mean=pytest.approx(0.05), deviation=None)


def test_a_table_of_nothing_but_refusals_is_a_table(card):
    cells = [cell("none", 0, status="infeasible"), cell("other", 0, status="failed")]
    rows = summarize(cells, {"m": card})
    text = tables([original(card)], rows, cells)
    assert "| none | – | – | – | – | – | – | – |" in text
    assert "- other, 50 % removed: failed: too few experts" in text
    assert "nothing was measured" in plot.draw_svg([original(card)], rows)


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [(0.5, 0.01, "0.500 ± 0.010"), (0.0123, 0.001, "0.012 ± 0.001"), (0.00123, None, "0.0012"), (0, None, "0.000"),
     (-0.02, 0.5, "-0.020 ± 0.500"), (math.inf, None, "∞"), (3e-9, None, "0.00000000")],
)  # fmt: skip
def test_damage_is_written_with_the_digits_that_it_needs(mean, deviation, text):
    assert damage(Spread(mean=mean, deviation=deviation)) == text


def test_numbers_may_be_missing():
    assert damage(None) == with_spread(None, 2) == "–"


def test_the_plot_has_a_line_a_method_and_a_panel_a_model(card, cells):
    other = Original(
        name="n", family="n", digest="e", num_bytes=5, parameters=5, perplexity=1.0, accuracy=None, domains={}
    )
    more = [*cells, cell("good", 0.3, model="n"), cell("good", 0.1, model="n", removed=0.25, num_bytes=1500)]
    rows = summarize(more, {"m": card, "n": card})
    svg = plot.draw_svg([original(card), other], rows)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "m (kind), 1.95 KiB" in texts
    assert "n, 5 B" in texts
    assert [texts.count(name) for name in ("good", "bad", "good (map) †", "none")] == [1, 1, 1, 0]
    paths = [element for element in root.iter("{http://www.w3.org/2000/svg}path") if "join" in element.get("class")]
    titles = [element[0].text for element in paths]
    assert titles == ["good", "good (map) †", "good"]  # a method with one size is a point
    assert [("dashed" in element.get("class")) for element in paths] == [False, True, False]
    assert svg == plot.draw_svg([original(card), other], rows)


def test_lines_that_lie_near_each_other_look_different(card):
    """Colours come again after seven: the first and the eighth recipe must not be neighbours that share one."""
    kl = {"a": 0.010, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5, "f": 0.6, "g": 0.7, "h": 0.011}
    cells = [
        cell(name, value * factor, removed=removed, num_bytes=num_bytes)
        for name, value in kl.items()
        for factor, removed, num_bytes in ((1, 0.5, 1000), (2, 0.75, 500))
    ]
    root = ElementTree.fromstring(plot.draw_svg([original(card)], summarize(cells, {"m": card})))
    paths = [element for element in root.iter("{http://www.w3.org/2000/svg}path") if "join" in element.get("class")]
    colours = {element[0].text: element.get("class") for element in paths}
    assert len(colours) == len(kl)
    assert colours["a"] != colours["h"]


def test_points_lie_where_their_numbers_say(card):
    cells = [cell("a", 0.01, num_bytes=1000), cell("a", 0.1, removed=0.75, num_bytes=500), cell("b", 1.0)]
    root = ElementTree.fromstring(plot.draw_svg([original(card)], summarize(cells, {"m": card})))
    found = {}
    for element in root.iter():
        title = element.find("{http://www.w3.org/2000/svg}title")
        if title is not None and " nats, " in (title.text or "") and element.get("cx"):
            found[title.text] = float(element.get("cx")), float(element.get("cy"))
    (small, large) = found["a: 0.1 nats, 500 B"], found["a: 0.01 nats, 0.98 KiB"]
    assert small[0] < large[0]
    assert small[1] < large[1]  # more damage is higher up


def test_the_png_is_a_picture(card, cells, tmp_path):
    pytest.importorskip("matplotlib")
    rows = summarize(cells, {"m": card})
    assert plot.draw_png([original(card)], rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_png(card, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert not plot.draw_png([original(card)], summarize(cells, {"m": card}), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
