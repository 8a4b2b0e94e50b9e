"""Names of records, owners and classes: which are legal, how messages show them, and which only look like another.

A name is text, never a path: "../x", quotes, commas and spaces inside it are as good as any letter, and nothing that
reads or writes a name changes it. What cannot be seen or would break a line is refused, so that a name on a screen or
in a list of erasures stands for one record only.
"""

import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any
from unicodedata import category, normalize

from lmeraser_jax.errors import join_limited, shorten

LONGEST = 1024  # UTF-8 bytes of an id or owner
FAULTS = {  # Unicode categories of characters that no name may have
    "Cs": "is not text in UTF-8",
    "Cc": "has a control character",
    "Cf": "has an invisible formatting character",
    "Zl": "has a line separator",
    "Zp": "has a line separator",
}
VISIBLE = tuple(kind for kind in FAULTS if kind != "Cf")  # some scripts spell words with joiners
WHOLE = re.compile(r"\+?(-?[0-9]+)(?:\.0*)?")  # a number, also as spreadsheets and pandas write it
LEADING_ZEROS = re.compile("(?<![0-9])0+(?=[0-9])")  # which spreadsheets drop
HINTS = 5  # look-alikes in a message


def as_name(value: object) -> str:
    """A name that a file holds as text, bytes or a number; bytes that are no UTF-8 become illegal characters."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def whole_as_text(value: Any) -> Any:
    """A whole number of a JSON file as text, as ids often are; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def fault(name: str) -> str:
    """What makes the name of a record or an owner illegal, "" where nothing does."""
    if not name:
        return "is empty"
    return class_fault(name, FAULTS) or ("has white space at an end" if name != name.strip() else "")


def class_fault(name: str, refused: Collection[str] = VISIBLE) -> str:
    """What makes the name of a class illegal, "" where nothing does; `refused` are categories, of `FAULTS`."""
    if name.isprintable() and 4 * len(name) <= LONGEST:
        return ""
    if len(name) > LONGEST or len(name.encode(errors="replace")) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    categories = set(map(category, name))
    return next((FAULTS[kind] for kind in refused if kind in categories), "")


def quoted(name: str, limit: int = 80) -> str:
    """A name as a POSIX shell reads it, for messages; a long one is cut, an illegal one that does not print escaped."""
    short = shorten(name, limit)
    if short != name and (len(name) > limit or fault(name)):
        return short
    text = shlex.quote(name)
    return f"'{text}'" if text == name and "," in name else text  # else it would look like two in a list


def list_names(names: Iterable[str], limit: int = 20) -> str:
    """Names in one line of a message, each as a shell reads it; a long list is cut and counted."""
    return join_limited(map(quoted, names), limit)


def list_lookalikes(names: Iterable[str], known: Iterable[str]) -> str:
    """The known names that look like one of `names`, and the differences, in one line; "" where there are none."""
    pairs = lookalikes(names, known)
    shown = [f"{quoted(b, LONGEST)} (differs from {quoted(a)} in {difference(a, b)})" for a, b in pairs[:HINTS]]
    return join_limited([*shown, *pairs[HINTS:]], HINTS)


def lookalikes(names: Iterable[str], known: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs, sorted, of one of `names` and a known name, none of them, that is equal to it apart from `FORMS`."""
    wanted, by_form = set(names), defaultdict(list)
    for name in wanted:
        by_form[_form(name, ALL_FORMS)].append(name)
    others = [other for other in known if other not in wanted] if wanted else []
    return sorted((name, other) for other in others for name in by_form.get(_form(other, ALL_FORMS), ()))


def similar(names: Iterable[str]) -> list[str]:
    """Groups of different names that look alike, with what the first and the last of a group differ in."""
    groups = defaultdict(list)
    for name in sorted(set(names)):
        groups[_form(name, ALL_FORMS)].append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    return [f"{' / '.join(map(quoted, group))} ({difference(group[0], group[-1])})" for group in alike]


def difference(name: str, other: str) -> str:
    """In what two names that look alike differ: the fewest of `FORMS` without which they are equal."""
    kinds = dict.fromkeys(kind for kind, _ in FORMS)
    for fewest in itertools.chain.from_iterable(itertools.combinations(kinds, size) for size in range(len(kinds) + 1)):
        changes = [change for kind, change in FORMS if kind in fewest]
        if _form(name, changes) == _form(other, changes):
            return " and ".join(fewest)
    raise AssertionError("the names do not look alike")


def _form(name: str, changes: Iterable[Callable[[str], str]]) -> str:
    for change in changes:
        name = change(name)
    return name


FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (  # differences that are easily overlooked, and what undoes them
    ("invisible formatting", lambda name: name if name.isascii() else "".join(c for c in name if category(c) != "Cf")),
    ("Unicode form", lambda name: normalize("NFKC", name)),
    ("case", str.casefold),
    ("Unicode form", lambda name: normalize("NFKC", name)),
    ("white space", lambda name: " ".join(name.split())),
    ("quotes", lambda name: name.strip("\"'")),
    ("number form", lambda name: match[1] if (match := WHOLE.fullmatch(name)) else name),
    ("leading zeros", lambda name: LEADING_ZEROS.sub("", name)),
)
ALL_FORMS = [change for _, change in FORMS]
