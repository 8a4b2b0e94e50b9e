"""Names of records, owners and classes: which are legal, and which only look like another.

A name is text, never a path: "../x", quotes, commas and spaces are as good as any letter. What cannot be seen or
would break a line is refused, so that a name on a screen or in a list of erasures stands for one record only.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from lmeraser_jax.errors import shorten

LONGEST = 1024  # UTF-8 bytes of an id or owner
FAULTS = {  # Unicode categories of characters that no name may have
    "Cs": "not text in UTF-8",
    "Cc": "has a control character",
    "Cf": "has an invisible formatting character",
    "Zl": "has a line separator",
    "Zp": "has a line separator",
}
VISIBLE = tuple(category for category in FAULTS if category != "Cf")  # some scripts spell words with joiners


def as_name(value: object) -> str:
    """A name that a file holds as text, bytes or a number; bytes that are no UTF-8 become illegal characters."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def fault(name: str, refused: Iterable[str] = FAULTS) -> str:
    """What makes a name illegal, "" where nothing does; `refused` are categories of characters, of `FAULTS`."""
    if name.isprintable() and 4 * len(name) <= LONGEST:
        return ""
    if len(name) > LONGEST or len(name.encode(errors="replace")) > LONGEST:
        return f"longer than {LONGEST} bytes"
    categories = {unicodedata.category(character) for character in name}
    return next((FAULTS[category] for category in refused if category in categories), "")


def faults(names: Iterable[str], refused: Iterable[str] = FAULTS) -> list[str]:
    """A line for each different illegal name."""
    reasons = ((name, fault(name, refused)) for name in dict.fromkeys(names))
    return [f"{shorten(name)} ({reason})" for name, reason in reasons if reason]


def lookalikes(unknown: Iterable[str], known: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """{unknown name: known names, sorted, of which it is another Unicode form}, for names that have any.

    Two forms are equal under NFKC and case folding, apart from invisible formatting characters.
    """
    unknown = list(dict.fromkeys(unknown))
    forms = {_form(name) for name in unknown}
    by_form = defaultdict(set)
    for name in known if forms else ():
        if (form := _form(name)) in forms:
            by_form[form].add(name)
    others = {name: by_form[_form(name)] - {name} for name in unknown}
    return {name: tuple(sorted(names)) for name, names in others.items() if names}


def _form(name: str) -> str:
    """What names that look alike have in common."""
    if not name.isascii():
        name = "".join(character for character in name if unicodedata.category(character) != "Cf")
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return name.casefold()
