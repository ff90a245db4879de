"""Which of the built numbers of rows a tick takes."""

from __future__ import annotations

from fullpipe.row_counts import RowCounts

BUILT = (2, 8, 16)


def learned(**seconds):
    """Row counts whose ticks were seen to cost that; the first tick of each is slow."""
    counts = RowCounts()
    for name, value in seconds.items():
        for seen in (100.0, value, 2 * value):
            counts.saw("shape", int(name.removeprefix("rows_")), seen)
    return counts


def test_before_anything_is_known_a_tick_is_at_least_three_quarters_full():
    counts = RowCounts()
    assert counts.choose("shape", 1, 16, BUILT) == 2
    assert counts.choose("shape", 5, 16, BUILT) == 2
    assert counts.choose("shape", 6, 16, BUILT) == 8
    assert counts.choose("shape", 12, 16, BUILT) == 16


def test_every_number_that_may_be_best_is_tried():
    counts, tried = RowCounts(), []
    for _ in range(6):
        tried.append(counts.choose("shape", 14, 16, BUILT))
        counts.saw("shape", tried[-1], 1.0)
    assert tried == [16, 16, 8, 8, 16, 16]  # 2 rows cannot be worth it when 14 wait
    assert counts.choose("another", 14, 16, BUILT) == 16


def test_the_number_that_does_most_in_a_second_is_taken():
    # Seven images with guidance: 14 rows. Full ticks of 8 do more than 16 rows with two empty.
    counts = learned(rows_2=0.031, rows_8=0.123, rows_16=0.233)
    assert counts.choose("shape", 14, 16, BUILT) == 8
    assert counts.choose("shape", 16, 16, BUILT) == 16
    assert counts.choose("shape", 2, 16, BUILT) == 2
    # Where many rows cost little more than few, even half empty ticks of many are better.
    counts = learned(rows_2=0.02, rows_8=0.021, rows_16=0.022)
    assert counts.choose("shape", 9, 16, BUILT) == 16
    assert counts.choose("shape", 4, 16, BUILT) == 8


def test_no_more_rows_than_allowed_unless_nothing_is_built_for_so_few():
    counts = learned(rows_2=0.02, rows_8=0.021, rows_16=0.022)
    assert counts.choose("shape", 16, 8, BUILT) == 8
    assert counts.choose("shape", 16, 1, (4, 8)) == 4
