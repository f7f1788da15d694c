"""Text and tables in few columns: no line is longer, nothing is lost, and pipes get one line a row."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coterie.cli import output
from coterie.cli.layout import table_lines, text_width, wrap
from coterie.cli.main import app

WIDTHS = (60, 80, 120)
SMALL = ("--tokens", "256", "--seq-len", "64")


def letters(text):
    """Return how often each letter stands in a text, without spaces and rules."""
    return Counter(letter for letter in text if not letter.isspace() and letter != "─")


def check_table(columns, rows, footer, width):
    lines = [line.text for line in table_lines(columns, rows, width=width, footer=footer)]
    shown = [*rows, *([] if footer is None else [footer])]
    assert max(map(text_width, lines), default=0) <= width
    headings = [column.removesuffix(":") for column in columns]
    expected = letters("".join(cell for row in shown for cell in row))
    is_table = any(set(line) == {"─"} for line in lines)
    for heading in headings if is_table else [heading for heading in headings[1:] for _ in shown]:
        expected += letters(heading)
    assert letters("".join(lines)) == expected
    if is_table:
        cells = [
            cell for row in shown for cell, column in list(zip(row, columns, strict=True))[1:] if column[-1:] != ":"
        ]
        numbers = [number for cell in cells for number in cell.split(" ± ")]  # an error may stand below its number
        assert all(any(cell in line for line in lines) for cell in numbers), "a number is broken"
    return is_table


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="─"), max_size=24)
cells = st.lists(names, max_size=3).map(lambda parts: " ".join(parts).strip())
tables = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from(("value", "long heading", "text:", "")), min_size=count, max_size=count),
        st.lists(st.lists(cells, min_size=count, max_size=count), min_size=1, max_size=3),
        st.none() | st.lists(cells, min_size=count, max_size=count),
    )
)  # fmt: skip


@given(table=tables, width=st.integers(20, 140))
def test_any_table_fits_and_loses_nothing(table, width):
    check_table(*table, width)


@given(text=cells, width=st.integers(20, 100), indent=st.integers(0, 30))
def test_any_text_is_wrapped_and_loses_nothing(text, width, indent):
    assert letters("".join(wrap(text, width, indent=indent, inside_words=True))) == letters(text)
    assert all(text_width(line) <= width for line in wrap(text, width, indent=indent, inside_words=True))
    whole = wrap(text, width, indent=indent)
    assert " ".join(" ".join(whole).split()) == " ".join(text.split())
    assert all(text_width(line) <= width or len(line.split()) == 1 for line in whole)


def test_what_fits_is_not_touched():
    assert wrap("a  b   c", 8) == ["a  b   c"]
    assert wrap("label    a value", 14, indent=7) == ["label    a", "       value"]
    assert table_lines(("name", "n"), [("a", "1")], width=None) == table_lines(("name", "n"), [("a", "1")], width=20)


def test_names_are_broken_after_marks_and_where_words_begin():
    assert wrap("models/some-name/DeepseekForCausalLM", 16, inside_words=True) == [
        "models/some-", "name/DeepseekFor", "CausalLM",
    ]  # fmt: skip
    assert wrap("y" * 25, 10, inside_words=True) == ["y" * 10, "y" * 10, "y" * 5]


def test_a_table_that_is_too_wide_becomes_paragraphs():
    rows = [("model", "1,234,567", "2,345,678")] * 2
    paragraph = ["model", "  one    1,234,567", "  other  2,345,678"]
    assert [line.text for line in table_lines(("", "one", "other"), rows, width=22)] == [*paragraph, "", *paragraph]


def invoke(*words, columns=None):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": columns})
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


@pytest.mark.parametrize("columns", ["60", "80", "120"])
@pytest.mark.parametrize(
    "words", [("inspect", "M", "--budget", "200KiB"), ("plan", "M", "--keep", "0.5"), ("recipes",), ("families",)]
)
def test_piped_output_follows_columns(tiny, words, columns):
    words = [tiny() if word == "M" else word for word in words]
    lines = invoke(*words, columns=columns).splitlines()
    assert max(len(line) for line in lines if len(line.split()) > 1) <= int(columns)
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("columns", [None, "", "0", "-5", "wide", "٣"])
def test_a_pipe_without_columns_has_one_line_a_row(columns):
    lines = invoke("families", columns=columns).splitlines()
    rows = lines[2 : lines.index("")]
    assert all(row.split()[-1] in ("works", "work") for row in rows)
    assert len({row.index("works") for row in rows if row.endswith("works")}) == 1
    assert max(map(len, rows)) > 120


@pytest.fixture(scope="module")
def printed(tiny, text, tmp_path_factory):
    """Return every table and text that commands which compute have printed, as it was before it was laid out."""
    folder = tmp_path_factory.mktemp("a-folder-with-a-name-that-is-long-and-has-words-in-it")
    tables, texts = [], []
    lay_out, fill = output.table_lines, output.wrap

    def keep_table(columns, rows, *, width, footer, rule):
        tables.append((columns, rows, footer))
        return lay_out(columns, rows, width=width, footer=footer, rule=rule)

    def keep_text(text, width, *, indent):
        texts.append((text, indent))
        return fill(text, width, indent=indent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "table_lines", keep_table)
        patch.setattr(output, "wrap", keep_text)
        model, out = tiny(), folder / "out"
        invoke("calibrate", model, "--text", text, *SMALL, columns="80")
        invoke("profile", model, folder / "profile", "--text", text, *SMALL, columns="80")
        invoke("compress", model, out, "--keep", 0.5, "--recipe", "reap", "--profile", folder / "profile", columns="80")
        invoke("evaluate", out, model, "--against", model, "--text", text, *SMALL, "--questions", 1, columns="80")
    return tables, texts


@pytest.mark.parametrize("width", WIDTHS)
def test_what_commands_print_fits_and_loses_nothing(printed, width):
    tables, texts = printed
    assert len(tables) >= 5
    for columns, rows, footer in tables:
        is_table = check_table(columns, rows, footer, width)
        # Numbers with their errors take more than 80 columns side by side, and become paragraphs.
        assert is_table or width < 80 or any(" ± " in cell for row in rows for cell in row)
    for text, indent in texts:
        for line in wrap(text, width, indent=indent):
            assert text_width(line) <= width or len(line.split()) == 1


def test_markdown_stays_markdown_in_a_pipe(capsys, monkeypatch):
    text = "## Model\n\nSome words.\n\n| method | KL |\n| --- | ---: |\n| reap | **0.125** |\n|  | 1 |\n\nend\n"
    monkeypatch.delenv("COLUMNS", raising=False)
    output.print_markdown(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    output.print_markdown(text)
    table = "method         KL\n─────────────────\nreap    **0.125**\n                1\n"
    assert capsys.readouterr().out == f"## Model\n\nSome words.\n\n{table}\nend\n\n\n"


@pytest.mark.parametrize("columns", WIDTHS)
def test_tables_of_a_bench_fit(columns, capsys, monkeypatch):
    text = (Path(__file__).parents[2] / "benchmarks" / "methods.md").read_text(encoding="utf-8")
    monkeypatch.setenv("COLUMNS", str(columns))
    output.print_markdown(text)
    shown = capsys.readouterr().out
    assert all(text_width(line) <= columns or len(line.split()) == 1 for line in shown.splitlines())
    assert all(word in shown for line in text.splitlines() for word in line.split() if word[0].isdigit())


def test_a_terminal_has_as_many_columns_as_it_has(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: type("Size", (), {"columns": 66})())
    assert output.width() == 66
    monkeypatch.setenv("COLUMNS", "100")
    assert output.width() == 100
