"""The search for types: level switches within the bytes, and selection that never gets worse."""

import random

from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.allocators.knapsack import Option
from coterie.compress.search.evolve import OFFSPRING, SELECTION, Parent, next_generation, offspring, sample_sizes
from coterie.compress.search.levels import MOST_CHANGES, Ladder, bytes_of, ladder_of, switched

LEVELS = st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(
    lambda sizes: tuple(Option(name=f"{size} bytes", num_bytes=size, damage=1 / size) for size in sorted(sizes))
)


@st.composite
def problems(draw):
    """Ladders, types that are somewhere on them, and as much room as they take or a little more."""
    levels = draw(st.lists(LEVELS, min_size=1, max_size=8))
    ladders = [Ladder(pattern=f"matrix {number}", levels=each) for number, each in enumerate(levels)]
    types = {ladder.pattern: draw(st.sampled_from(ladder.levels)).name for ladder in ladders}
    return ladders, types, bytes_of(ladders, types) + draw(st.integers(0, 20))


@given(problems(), st.integers(0, 1000))
def test_a_switch_stays_within_the_bytes_and_moves_by_single_levels(problem, seed):
    ladders, types, room = problem
    after = switched(ladders, types, room, random.Random(seed))
    assert bytes_of(ladders, after) <= room
    assert after.keys() == types.keys()
    moves = [ladder.level_of(after[ladder.pattern]) - ladder.level_of(types[ladder.pattern]) for ladder in ladders]
    assert set(moves) <= {-1, 0, 1}
    assert len(moves) - moves.count(0) <= MOST_CHANGES
    assert after == switched(ladders, types, room, random.Random(seed))


@given(problems(), st.integers(0, 1000))
def test_after_a_switch_no_matrix_that_stayed_could_have_risen(problem, seed):
    ladders, types, room = problem
    after = switched(ladders, types, room, random.Random(seed))
    left = room - bytes_of(ladders, after)
    if after == types or sum(after[name] != types[name] for name in types) == MOST_CHANGES:
        return
    for ladder in ladders:
        level = ladder.level_of(after[ladder.pattern])
        if after[ladder.pattern] == types[ladder.pattern] and level + 1 < len(ladder.levels):
            assert ladder.levels[level + 1].num_bytes - ladder.levels[level].num_bytes > left


def options(**sizes_and_damages):
    return [Option(name=name, num_bytes=size, damage=cost) for name, (size, cost) in sizes_and_damages.items()]


def test_levels_are_the_types_that_no_smaller_one_is_as_good_as():
    types = options(large=(8, 1.0), wasteful=(7, 5.0), middle=(5, 3.0), small=(2, 6.0), worst=(2, 7.0))
    assert [level.name for level in ladder_of("m", types, "middle").levels] == ["small", "middle", "large"]
    assert [level.name for level in ladder_of("m", types, "wasteful").levels] == ["small", "wasteful", "large"]
    avoided = frozenset({"small", "worst"})
    assert [level.name for level in ladder_of("m", types, "middle", avoided).levels] == ["middle", "large"]
    assert [level.name for level in ladder_of("m", types, "small", avoided).levels] == ["small", "middle", "large"]


def alike(count, levels=4):
    """Matrices of one size, all in the second of their levels."""
    steps = tuple(Option(name=str(size), num_bytes=size, damage=1 / size) for size in range(1, levels + 1))
    ladders = [Ladder(pattern=f"m{number}", levels=steps) for number in range(count)]
    return ladders, {ladder.pattern: "2" for ladder in ladders}


def test_the_parent_is_kept_where_nothing_is_better():
    ladders, types = alike(6)
    parent = Parent(types=types, divergence=0.5)
    for value in (0.5, 0.6):
        kept = next_generation(
            parent, ladders, 12, 32, lambda some, rows, value=value: [value] * len(some), random.Random(0)
        )
        assert kept is parent
    better = next_generation(parent, ladders, 12, 32, lambda some, rows: [0.4] * len(some), random.Random(0))
    assert better.divergence == 0.4
    assert better.types != types


def test_selection_looks_at_all_on_few_sequences_and_at_few_on_all():
    ladders, types = alike(6)
    seen = []

    def divergence(some, rows):
        seen.append((len(some), len(rows)))
        # The best has its bytes in the last matrix, as far as one step goes.
        return [sum(abs(int(kind) - (3 if name == "m5" else 2)) for name, kind in each.items()) for each in some]

    parent = Parent(types=types, divergence=10.0)
    best = next_generation(parent, ladders, 12, 32, divergence, random.Random(0))
    assert seen == [(OFFSPRING, 2), (4, 8), (1, 32)]
    assert sample_sizes(32) == (2, 8, 32)
    assert [survivors for _, survivors in SELECTION] == [4, 1]
    assert best.types["m5"] == "3"
    assert best.divergence == 1.0


def test_offspring_differ_and_few_are_drawn_where_few_there_are():
    ladders, types = alike(6)
    drawn = offspring(types, ladders, 12, random.Random(0))
    assert len(drawn) == OFFSPRING
    assert all(each != types for each in drawn)
    assert all(one != other for number, one in enumerate(drawn) for other in drawn[:number])
    ladders, types = alike(2)
    assert 1 <= len(offspring(types, ladders, 4, random.Random(0))) <= 4
    ladders, types = alike(1, levels=2)
    assert offspring(types, ladders, 2, random.Random(0)) == [{"m0": "1"}]
    fixed = [Ladder(pattern="m", levels=(Option(name="only", num_bytes=1, damage=0.0),))]
    assert offspring({"m": "only"}, fixed, 1, random.Random(0)) == []
    parent = Parent(types={"m": "only"}, divergence=1.0)
    assert next_generation(parent, fixed, 1, 4, lambda some, rows: [0.0], random.Random(0)) is parent
