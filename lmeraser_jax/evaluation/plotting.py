"""Pictures drawn with matplotlib: one style for all of them, and their bytes.

pyplot and its global state are not used. Matplotlib is imported where it is used, so that nothing else needs it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours for all kinds of colour vision, without the yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE = "#555555", "#dddddd"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "text.parse_math": False,  # names are names, also with $ in them
    "svg.fonttype": "path",
    "svg.hashsalt": "lmeraser",
}
NO_DATES = {"png": {"Software": None}, "svg": {"Date": None}}


def required() -> None:
    """Raises `UserError` where matplotlib is missing: for commands, to refuse before the work and not at the end."""
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError as error:
        raise UserError(
            "figures need matplotlib; install it with: python -m pip install matplotlib (the extra plots)"
        ) from error


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with `STYLE`, whatever the user's settings are; also a decorator of what draws."""
    required()
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        yield


def blank(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that lays itself out. For functions in `style`."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def ticked(value: float, _: int | None = None) -> str:
    """A number at a tick: 0.5, 20, 3k, 40M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@style()
def picture(figure: "Figure", kind: str) -> bytes:
    """A figure as png or svg: the same bytes whenever it is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=NO_DATES[kind])
    return buffer.getvalue()
