import pytest

from coterie.amounts import format_bytes, format_count, parse_bytes, parse_count
from coterie.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30),
        ("12GB", 12 * 10**9),
        ("800MB", 800 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("0.1TB", 10**11),
        (" 3 kib ", 3072),
        ("512B", 512),
        ("12884901888", 12884901888),
        (4096, 4096),
    ],
)
def test_amounts_are_read_exactly(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("12G", "12GiB or 12GB"),
        ("2.5m", "2.5MiB or 2.5MB"),
        ("12 parsecs", "'parsecs'"),
        ("a lot", "12GiB"),
        ("", "12GiB"),
        ("1e9", "no amount"),
        ("12.5", "no unit"),
        ("0", "holds nothing"),
        ("-3GB", "holds nothing"),
        ("0.0001B", "holds nothing"),
        ("12GiB 4", "12GiB"),
        ("nan", "12GiB"),
    ],
)
def test_nonsense_is_refused_with_a_way_out(text, hint):
    with pytest.raises(InputError, match=r"no amount|two things|unknown unit|no unit|holds nothing") as caught:
        parse_bytes(text)
    assert hint in str(caught.value)
    assert "GiB" in str(caught.value) or "MiB" in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (832, "832 B"),
        (1023, "1.00 KiB"),
        (1024, "1.00 KiB"),
        (12 * 2**30, "12.0 GiB"),
        (999 * 2**20, "999 MiB"),
        (1000 * 2**20, "0.98 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes_are_written_with_three_digits(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(832, "832"), (393_216, "393 k"), (30_532_122_624, "30.5 B"), (9_996, "10.0 k"), (999_900, "1.00 M")],
)
def test_counts_are_written_with_three_digits(count, text):
    assert format_count(count) == text


def test_what_is_written_reads_back_near_enough():
    for size in (1, 999, 1500, 123_456_789, 61 * 10**9, 3 * 10**12):
        assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=5e-3)


@pytest.mark.parametrize(
    ("text", "count"), [("15B", 15 * 10**9), ("1.5 b", 15 * 10**8), ("350M", 350 * 10**6), ("12k", 12_000), (7, 7)]
)
def test_numbers_of_parameters_are_read_exactly(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["15GB", "many", "", "nan", "1e9", "0", "-3B", "0.1", "9" * 41])
def test_what_is_no_number_of_parameters_is_refused(text):
    with pytest.raises(InputError, match="write a number like 15B"):
        parse_count(text)
