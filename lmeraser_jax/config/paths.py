"""Paths as users write them: the one place where `~` and relative paths become absolute ones."""

import dataclasses
import os
import pwd
from typing import Any, cast

from lmeraser_jax.errors import UserError, shorten


def home(user: str = "") -> str:
    """The home folder of a user, by default of this process's; "" where none is known, as in many containers."""
    try:
        own = os.environ.get("HOME") if not user else ""
        folder = own or (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    except (KeyError, ValueError):  # ValueError: a null character
        return ""
    return folder if os.path.isabs(folder) else ""


def expand(text: str) -> str:
    """A path with `~` and `~user` expanded. Raises `UserError` where there is no such home folder."""
    if not text.startswith("~"):
        return text
    name, slash, rest = text.partition("/")
    folder = home(name[1:])
    if not folder:
        reason = f"there is no user {shorten(name[1:])}" if name[1:] else "no home folder is known, set HOME"
        raise UserError(f"{shorten(text)}: {reason} (a name that begins with ~ is written ./~)")
    return f"{folder}{slash}{rest}"


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path; "" stands for none and stays. Links are not followed: they may point elsewhere later."""
    text = os.fspath(path)
    return os.path.abspath(expand(text)) if text else text


def absolute_weights(text: str) -> str:
    """The same for what may also name a repository of the Hugging Face hub: `hub` or `hub:OWNER/NAME`."""
    return text if text == "hub" or text.startswith("hub:") else absolute(text)


def same(first: str, second: str) -> bool:
    """Whether two absolute paths, or names of repositories, mean the same place now."""
    return first == second or "" not in (first, second) and os.path.realpath(first) == os.path.realpath(second)


class WithPaths:
    """A frozen dataclass whose paths, the fields with a function `path`, become absolute when it is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(cast(Any, self)):
            if field.metadata["path"]:
                object.__setattr__(self, field.name, field.metadata["path"](getattr(self, field.name)))
