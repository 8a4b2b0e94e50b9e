"""What a user did that cannot work: one exception type, raised once with everything that is wrong."""

from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Input that a user can mend. The command line prints the message alone and exits with code 2."""


def raise_all(problems: Sequence[str], heading: str = "") -> None:
    """Raises one `UserError` that lists every problem; does nothing when there is none."""
    if problems:
        heading = heading or ("several things are wrong:" if len(problems) > 1 else "")
        lines = [f"- {problem}" for problem in problems] if heading else list(problems)
        raise UserError("\n".join([heading, *lines] if heading else lines))


def join_limited(values: Iterable[object], limit: int = 10) -> str:
    """The values in one line; a long list is cut after `limit` and counted."""
    values = [str(value) for value in values]
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more
