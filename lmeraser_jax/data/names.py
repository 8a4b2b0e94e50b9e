"""Names of records and owners: which are legal, how a message shows one, and which only look like another.

A name is text, never a path: "../x", quotes, commas and spaces are as good as any letter. What cannot be seen or
would break a line is refused, so that a name on a screen or in a list of erasures stands for one record only.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

LONGEST = 1024  # UTF-8 bytes of an id or owner
SHOWN = 80  # characters of a name in a message
FAULTS = {
    "Cs": "not text in UTF-8",
    "Cc": "a control character",
    "Cf": "an invisible formatting character",
    "Zl": "a line separator",
    "Zp": "a line separator",
}
VISIBLE = tuple(category for category in FAULTS if category != "Cf")  # some scripts spell words with joiners


def fault(text: str, refused: Iterable[str] = FAULTS) -> str:
    """What makes a name illegal, "" where nothing does.

    Args:
        text: an id, an owner or the name of a class.
        refused: Unicode categories of characters that it must not have, of `FAULTS`.
    """
    if text.isprintable() and 4 * len(text) <= LONGEST:
        return ""
    if len(text) > LONGEST or len(text.encode(errors="replace")) > LONGEST:
        return f"longer than {LONGEST} bytes"
    found = {unicodedata.category(character) for character in text} & set(refused)
    return "has " + FAULTS[min(found)] if found - {"Cs"} else FAULTS["Cs"] if found else ""


def shown(text: str) -> str:
    """A name for a message, whatever it holds: one line, cut where it is long."""
    if text.isprintable() and len(text) <= SHOWN:
        return text
    more = f"... ({len(text)} characters)" if len(text) > SHOWN else ""
    return ascii(text[:SHOWN]) + more


def faults(names: Iterable[str], refused: Iterable[str] = FAULTS) -> list[str]:
    """A line for each different illegal name."""
    wrong = ((name, fault(name, refused)) for name in dict.fromkeys(names))
    return [f"{shown(name)} ({why})" for name, why in wrong if why]


def lookalikes(unknown: Iterable[str], known: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Known names that unknown ones are another Unicode form of.

    Args:
        unknown: names that are not among the known ones.
        known: all there are.

    Returns:
        {unknown name: known names, sorted} for those that are equal under NFKC and case folding, apart from invisible
        formatting characters; names without any are left out.
    """
    wanted = defaultdict(list)
    for name in dict.fromkeys(unknown):
        wanted[_form(name)].append(name)
    found: dict[str, set[str]] = defaultdict(set)
    for name in known if wanted else ():
        for other in wanted.get(_form(name), ()):
            found[other].add(name)
    return {name: tuple(sorted(others - {name})) for name, others in found.items() if others - {name}}


def _form(name: str) -> str:
    """What names that look alike have in common."""
    if not name.isascii():
        name = "".join(character for character in name if unicodedata.category(character) != "Cf")
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return name.casefold()
