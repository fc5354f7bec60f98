"""What the demo shows is there: the fact in its table, and its reads in pictures whose scale recent keys do not set."""

import dataclasses

import pytest

from hashattn.lab.demo.contest import Contender
from hashattn.lab.demo.picture import SHADES, picture, save_plot, verdict
from hashattn.lab.demo.reads import Reads
from hashattn.lab.demo.run import Result
from hashattn.lab.demo.show import table

TOKENS, SINKS, RECENTS, FACT = 400, 4, 40, (200, 210)


def reads(fact_reads=6, recent_reads=1000, fact=FACT):
    """Layer 0 reads all keys; layer 1 each key twice and those of the fact more often; 5 tokens were written."""
    kept = [recent_reads if i < SINKS or i >= TOKENS - RECENTS else 2 for i in range(TOKENS + 5)]
    for i in range(*FACT):
        kept[i] = fact_reads
    return Reads([[9] * (TOKENS + 5), kept], TOKENS, fact, SINKS, RECENTS, (1,))


def line(told, layer):
    return next(line for line in told.splitlines() if line.startswith(f"{layer:>4} |")).split("|")


def test_the_facts_keys_are_read_against_the_average_of_the_others():
    found = reads()
    assert found.over_others == [1.0, 3.0] and found.over_others_searching == 3.0
    assert "10 keys were read 3.0 times as often" in verdict(found)
    told = picture(found, "dashkv")
    assert [line(told, layer)[2] for layer in (0, 1)] == [" 1.0", " 3.0"]


@pytest.mark.parametrize("fact", [None, (2, 12), (TOKENS - RECENTS - 5, TOKENS - RECENTS + 5)])
def test_nothing_is_said_of_a_fact_that_is_not_there_or_is_kept_for_its_position(fact):
    found = reads(fact=fact)
    assert found.over_others == [None, None] and verdict(found) is None
    assert line(picture(found, "dashkv"), 1)[2] == ""


def test_nothing_is_divided_by_what_was_never_read():
    never = Reads([[0] * TOKENS], TOKENS, FACT, SINKS, RECENTS, (0,))
    assert never.over_others == [None] and line(picture(never, "dashkv"), 0)[1] == " " * 72


def test_recent_keys_and_sinks_do_not_set_the_scale():
    few, many = (picture(reads(recent_reads=n), "dashkv") for n in (10, 1000))
    edge = (TOKENS - RECENTS) * 72 // TOKENS
    assert line(few, 1)[1][1:edge] == line(many, 1)[1][1:edge] and {*line(many, 1)[1][edge + 1 :]} == {"@"}
    assert few.splitlines()[1] == many.splitlines()[1]


def test_darker_is_more():
    shades = [line(picture(reads(fact_reads=n), "dashkv"), 1)[1][37] for n in (0, 1, 2, 3, 6)]
    places = [SHADES.index(shade) for shade in shades]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert shades[-1] == "@"  # nothing but keys that are kept for their position is read more


def test_the_mark_stands_below_the_fact_and_outside_the_picture():
    told = picture(reads(), "dashkv").splitlines()
    first, last = (position * 72 // TOKENS for position in (FACT[0], FACT[1] - 1))
    assert told[-1] == "      " + " " * first + "^" * (last - first + 1) + " the fact"
    assert "^" not in "".join(told[:-1])


def test_the_png_marks_the_fact_outside_the_axes_and_is_darker_where_more_is_read(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from hashattn.lab import report

    kept = []
    monkeypatch.setattr(report, "save", lambda figure, path: kept.append(figure))
    save_plot(reads(), "dashkv", tmp_path / "x.png")
    axes, colours, beside = kept[0].axes[0], kept[0].axes[-1], kept[0].axes[1]
    image = axes.images[0]
    red, green, blue, _ = image.cmap([0.0, 0.5, 1.0]).T
    assert all(channel[0] > channel[1] > channel[2] for channel in (red, green, blue))
    assert image.norm.vmax == pytest.approx(reads().darkest(reads().bins(400)))
    assert not axes.patches and not axes.lines  # nothing is drawn over the keys
    (mark,) = axes.texts
    assert mark.get_text() == "the fact" and mark.xy == (205.0, 1) and mark.xycoords == ("data", "axes fraction")
    assert [bar.get_width() for bar in beside.patches] == [1.0, 3.0]
    assert colours.get_ylabel() == "times the layer's average key"


ANSWERS = ["It is 7481.", "After a very long preamble, of which nobody knows why it is there, the number is 7481.", ""]


@pytest.mark.parametrize("answer", [*ANSWERS, f"{'x' * 60}7481 and more of it"])
def test_the_table_shows_the_whole_answer_and_so_the_fact(answer):
    one = Contender("stock", answer, "7481" in answer, 2.0, 3.0, 500.0, 0.5, 1.0, 0.25, 1.0, 1e6, 0, 2_000_000)
    others = [dataclasses.replace(one, name="full, our cache"), dataclasses.replace(one, name="a", code_bytes=5)]
    contenders = (one, *others)
    text = table(Result("m", "a", "c", 9, None, "q", 1.0, contenders, True, "", (), reads()))
    assert text.count("7481") == (3 if "7481" in answer else 0)
    shown = " ".join(row[26:56].strip() for row in text.splitlines()[2:] if len(answer) < 60)
    assert len(answer) > 60 or (answer or "(nothing)") in shown
    for row in ("ms a token, median        2.0", "ms a token, p99           3.0", "times full, our cache     0.50",
                "times stock               1.00", "tokens per second         500.0"):  # fmt: skip
        assert row in text
    assert [row.split()[-4:] for row in text.splitlines() if row.startswith("building")] == [
        ["none", "none", "0.25", "s"]
    ]
