"""A CSV of labels: what a CSV writer wrote is read, each row finds its one image, and what does not fit is named."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeraser_jax.data import label_csv
from lmeraser_jax.errors import UserError

NAMES = ["train/a.png", "train/b.png", "train/x,y.png"]
TREE = ["train/cat/a.png", "train/cat/b.png", "train/dog/deep/d.bmp", "train/x/e.png.png", "train/train/cat/b.png"]
TREE += ["test/cat/e.png"]


def read(path, raw: bytes, names=NAMES, columns: str = "file,label,owner") -> dict[str, label_csv.Row] | str:
    """The rows, or the message of a refusal."""
    path.write_bytes(raw)
    try:
        return label_csv.read(str(path), columns, names, [name.partition("/")[0] for name in names])
    except UserError as error:
        assert len(str(error)) < 50_000
        return str(error)


CELLS = st.sampled_from(
    ["file", "label", "owner", "a.png", "train/a.png", "x,y.png", '"', "\0", "", "é", "1" * 200_000]
)
MARKS = st.sampled_from([",", ";", "\t", "\n", "\r\n", "\r", '"', "\ufeff", "\u2028"])


@given(
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"file,label,owner\n", b'"file";"label"\r\n', b"\xff\xfe"]),
    body=st.lists(CELLS | MARKS | st.text(max_size=4), max_size=14).map("".join) | st.binary(max_size=40),
)
@settings(max_examples=100)
def test_any_file_is_read_or_refused_in_few_words(tmp_path, start, body):
    rows = read(tmp_path / "a.csv", start + (body if isinstance(body, bytes) else body.encode(errors="surrogatepass")))
    assert isinstance(rows, str) or set(rows) <= set(NAMES)


@given(
    rows=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1),
    delimiter=st.sampled_from([",", ";", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_what_a_csv_writer_wrote_is_read(tmp_path, rows, delimiter, end, bom):
    """Python's writer as the reference: every cell comes back, whatever has to be quoted."""
    for name, row in rows.items():
        rows[name] = [cell.replace("\r", "").encode(errors="ignore").decode() for cell in row]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
    writer.writerows([["file", "label", "owner"], *([name, *row] for name, row in rows.items())])
    found = read(tmp_path / "a.csv", (b"\xef\xbb\xbf" if bom else b"") + buffer.getvalue().encode())
    assert found == {name: label_csv.Row(name, *row) for name, row in rows.items()}


def test_empty_rows_are_left_out_and_cells_count_as_they_stand(tmp_path):
    rows = read(tmp_path / "a.csv", "file,label\r\na.png,dög\r\n\r\n , \r\nb.png,x,, \r\n".encode())
    assert rows == {"train/a.png": ("a.png", "dög", ""), "train/b.png": ("b.png", "x", "")}
    names = ["train/a.png", "train/b\\c.png", "train/b/c.png", "train/ a.png"]
    rows = read(tmp_path / "a.csv", b"file,label\nb\\c.png,x\ntrain\\a.png,y\n", names)
    assert rows == {"train/b\\c.png": ("b\\c.png", "x", ""), "train/a.png": ("train\\a.png", "y", "")}
    rows = read(tmp_path / "a.csv", b"file,label,owner\n a.png,x ,ann\nb/c.png,x, ann\n", names)
    assert rows == {"train/ a.png": (" a.png", "x ", "ann"), "train/b/c.png": ("b/c.png", "x", " ann")}


def test_files_that_are_not_there_have_lookalikes(tmp_path):
    raw = "file,label\nA.PNG,x\ne\u0301.png,y\nnone.png,z\n".encode()
    message = read(tmp_path / "a.csv", raw, [*NAMES, "train/é.png"])
    for alike in ("a.png (differs from A.PNG in case)", "(differs from 'e\u0301.png' in Unicode form)"):
        assert alike in message, message
    assert "not there: A.PNG, 'e\u0301.png', none.png" in message


def test_a_row_names_a_file_in_one_of_four_ways(tmp_path):
    for text, name in (
        ("train/cat/a.png", "train/cat/a.png"),  # below the data folder
        ("./train//cat/a.png", "train/cat/a.png"),
        ("train\\cat\\a.png", "train/cat/a.png"),
        ("cat/a.png", "train/cat/a.png"),  # below a role's folder
        ("train/cat/b.png", "train/cat/b.png"),  # a path comes before a path below a role's folder
        ("e.png", "test/cat/e.png"),  # a file name, which comes before a stem
        ("d", "train/dog/deep/d.bmp"),  # a stem
    ):
        rows = read(tmp_path / "a.csv", f"file,label\n{text},wolf\n".encode(), TREE)
        assert isinstance(rows, dict) and list(rows) == [name], text


def test_rows_that_fit_nothing_or_too_much_are_all_named(tmp_path):
    names = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.PNG", "train/dog/b.png", "train/cat/e.gif"]
    names += ["test/cat/e.png", "test/dog/b.jpg", "test/cat/b.png"]
    rows = ("b.png", "b", "e", "cat/b.png", "train/x.png", "y", "other/cat/a.png", "", "a.png", "train/cat/a.png")
    text = "file,label\n" + "".join(f"{row},owl\n" for row in (*rows, "c", "c"))
    message = read(tmp_path / "a.csv", text.encode(), names)
    assert isinstance(message, str)
    several, missing, nameless, twice, same = (
        next(line for line in message.splitlines() if words in line)
        for words in ("could be several", "not there", "without a file name", "more than once", "several ways")
    )
    assert "cat/b.png (train/cat/b.png or test/cat/b.png)" in several
    assert "b.png (" in several and "b (" in several and "e (" in several and several.count("(") == 4
    assert "not there: other/cat/a.png, train/x.png, y" in missing and "row 8" in nameless
    assert twice.endswith(": c") and "train/cat/a.png (a.png, train/cat/a.png)" in same


def test_a_csv_that_cannot_be_used_is_refused(tmp_path):
    for raw, columns, reason in (
        (b"file,owner\n", "file,label,owner", "lacks the columns label; it has file, owner; name its columns"),
        (b"", "file,label,owner", "lacks the columns file, label; it has none"),
        (b"train/a.png,cat\n", "file,label,owner", "lacks the columns file, label"),
        (b"file,label\n", "file,label,lesion", "lacks the columns lesion; it has file, label"),
        (b"image;dx\n", "image,diagnosis", "(now image,diagnosis)"),
        (b"file,label,label\na.png,x,y\n", "file,label,owner", "several columns named label"),
        (b"file,label\na.png,cat\na.png,dog\n", "file,label,owner", "more than once: a.png"),
        (b'file,label\na.png,"x\nb.png,y\n', "file,label", "unexpected end of data"),  # else b.png would be gone
        (b"file,label\na.png," + b"x" * 200_000, "file,label", "field larger than field limit"),
        (b"file,label\n" + b"x" * 100_000 + b",1\n", "file,label", "names files that are not there"),
        ("file,label\n".encode("utf-16"), "file,label", "iconv -f UTF-16 -t UTF-8"),
        ("file,label\n".encode("utf-16-le"), "file,label", "perhaps it is UTF-16, Excel's Unicode text: save"),
        ("file,label\na.png,dög\n".encode("cp1252"), "file,label", "in line 2; perhaps it is Windows-1252"),
    ):
        message = read(tmp_path / "a.csv", raw, columns=columns)
        assert isinstance(message, str) and reason in message and len(message) < 1000, raw[:50]
    with pytest.raises(UserError, match="--config.data.labels=absent.csv: no such file"):
        label_csv.read("absent.csv", "file,label", NAMES, ["train"] * 3)


def test_what_a_spreadsheet_adds_and_absolute_paths_are_read(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for first, mark in (("sep=;\r\n", ";"), ('"sep=|"\n', "|"), ("SEP=\t\n", "\t"), ("", ",")):
        for folder in ("", f"{tmp_path}/", f"{tmp_path}/link/", f"{tmp_path}/x/../"):
            rows = [mark.join((f"{folder}{name}", "cat")) for name in NAMES[:2]]
            (tmp_path / "a.csv").write_text(first + "\n".join((f"file{mark}label", *rows)), newline="")
            root = str(tmp_path / "link") if "link" in folder else str(tmp_path)
            found = label_csv.read(str(tmp_path / "a.csv"), "file,label", NAMES[:2], ["train"] * 2, root)
            assert {name: row.label for name, row in found.items()} == dict.fromkeys(NAMES[:2], "cat"), (first, folder)
