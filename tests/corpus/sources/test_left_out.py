"""What was not taken as text, counted. Oracle: counts by hand."""

from minigpt2.corpus.sources.left_out import (
    LeftOut,
    Tally,
    added_up,
    numbers_in_words,
    reasons_in_words,
)


def test_each_path_is_counted_once_by_its_suffix_and_reason():
    tally = Tally()
    for path in ("b.PNG", "a.png", "a.png", "x/c.txt.gz", "d", "x/.e"):
        tally.add(path, "r")
    tally.add("a.png", "another reason")
    tally.add("f.txt", "r", "pipe")
    assert tally.all() == (
        LeftOut(".png", "r", 2, "a.png"),
        LeftOut("without suffix", "r", 2, "d"),
        LeftOut(".txt.gz", "r", 1, "x/c.txt.gz"),
        LeftOut("pipe", "r", 1, "f.txt"),
    )
    assert tally.all(but={"a.png", "d", "f.txt"})[0] == LeftOut(".png", "r", 1, "b.PNG")
    other = Tally()
    other.add("a.png", "r")
    other.add("z.png", "r")
    tally.merge(other)
    assert tally.all()[0] == LeftOut(".png", "r", 3, "a.png")


def test_counts_of_several_texts_add_up():
    a, b = LeftOut(".a", "r", 2, "1.a"), LeftOut(".b", "r", 3, "1.b")
    assert added_up([a, b, a]) == (LeftOut(".a", "r", 4, "1.a"), b)


def test_counts_in_words():
    assert numbers_in_words({".md": 3, ".txt": 1200, "folder": 1}) == "1,200 .txt, 3 .md, 1 folder"
    many = {f".{n}": 30 - n for n in range(22)}
    assert numbers_in_words(many).endswith("11 .19, 19 of 2 other kinds")
    left = [
        LeftOut("folder", "hidden", 2, "a/.b"),
        LeftOut(".x", "r", 1, "a.x"),
        LeftOut(".y", "r", 1, "a.y"),
    ]
    assert reasons_in_words(left) == {"2 folders (hidden)": "a/.b", "1 .x, 1 .y (r)": "a.x"}
    assert reasons_in_words([]) == {}
