"""Names of records: what is illegal is refused in few words, and look-alikes are found."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from imports import blank_source

from lmeraser_jax.data.names import FAULTS, LONGEST, class_fault, fault, list_lookalikes, lookalikes, similar
from lmeraser_jax.data.source import Item, Source, problems
from lmeraser_jax.errors import shorten

BIG = "x" * 10_000_000


def source_of(*items: Item, classes=("a", "b")) -> Source:
    good = [Item("good 1", "train", 0), Item("good 2", "train", 1)]
    return blank_source([*good, *items], classes)


def test_illegal_ids_and_owners_are_refused_in_one_short_line():
    for reason, names in {
        "a control character": ["a\0b", "a\nb", "a\x85b", "\x1b[2Jgone"],
        "an invisible formatting character": ["user\u202etxt.exe", "a\u200bb", "a\ufeff"],
        "a line separator": ["a\u2028b"],
        "not text in UTF-8": ["a\ud800"],
        "white space at an end": ["anna ", "\u3000anna", " "],
        "longer than 1024 bytes": ["ü" * 513, BIG, "\0" + BIG],
    }.items():
        for name in names:
            for item in (Item(name, "train", 0), Item("fine", "train", 0, name)):
                (line,) = problems(source_of(item))
                assert reason in line and shorten(name) in line and line.isprintable() and len(line) < 500


def test_empty_ids_are_refused_and_empty_owners_are_not():
    assert problems(source_of(Item("3", "train", 0, ""))) == []
    (line,) = problems(source_of(Item("", "train", 0)))
    assert "ids must not be empty" in line and "2 of train" in line


def test_every_other_line_of_the_message_is_short_too():
    lines = problems(source_of(Item(BIG, "train", 7), Item(BIG, "test", 0), classes=("a", "b\0", BIG)))
    assert len(lines) == 3 and sum(map(len, lines)) < 1500 and all(map(str.isprintable, lines))


def test_class_names_may_join_letters():
    assert problems(source_of(classes=("می\u200cخواهم", "b"))) == []
    assert "class 'b\\x07' (has a control character)" in problems(source_of(classes=("a", "b\x07")))[0]


@given(st.text(alphabet=st.characters(), max_size=400))
def test_a_name_is_legal_by_its_size_and_the_categories_of_its_characters(name):
    categories = {unicodedata.category(character) for character in name}
    legal = not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"} and len(name.encode(errors="replace")) <= LONGEST
    assert (class_fault(name, FAULTS) == "") == legal
    assert (fault(name) == "") == (legal and name.strip() == name != "")
    assert shorten(name).isprintable() and len(shorten(name)) < 1000


@given(st.text(min_size=1, max_size=20), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_lookalikes_are_equal_names_in_another_form(name, form):
    """Against the Unicode standard's own relation, for every name of `known` by itself."""
    known = [name, name.upper(), "quite another", unicodedata.normalize(form, name)]
    unknown = unicodedata.normalize(form, name + "\u212b")  # the Angstrom sign, whose NFKC is a letter
    found = dict.fromkeys(other for _, other in lookalikes([unknown], [*known, name + "Å", unknown]))
    assert unknown not in found and set(found) <= {*known, name + "Å"}
    assert (name + "Å" in found) == (unknown != name + "Å")


def test_similar_names_are_grouped_and_said_to_differ():
    names = ["cat", "Cat", "cat ", "1", "01", "1.0", "+1", "-1", "10", "1e1", "a b", "ab"]
    names += ["stra\u00dfe", "STRASSE", "caf\u00e9", "cafe\u0301"]
    assert similar(names) == [
        "+1 / 01 / 1 / 1.0 (number form)",
        "Cat / cat / 'cat ' (case and white space)",
        "STRASSE / 'stra\u00dfe' (case)",
        "'cafe\u0301' / 'caf\u00e9' (Unicode form)",
    ]
    assert similar(["a", "b", "1", "2"]) == similar([]) == []
    assert list_lookalikes(["ﬁle", "CAT", "none"], ["file", *names[:2]]) == (
        "Cat (differs from CAT in case), cat (differs from CAT in case), file (differs from 'ﬁle' in Unicode form)"
    )
    assert list_lookalikes([], names) == list_lookalikes(names, names) == list_lookalikes(names, []) == ""
