"""Files that say what to erase: every format, every error with its line, and nothing but `UserError`."""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.names import fault
from lmeraser_jax.data.source import Item, content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import resolve
from lmeraser_jax.unlearning import request_files
from lmeraser_jax.unlearning.request_files import Named, content_of, read


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_formats(tmp_path):
    for name, content, ids, owners in (
        ("a.txt", '# one\nb c\n\n  \n#\nb c\nd,e\n"f"', ("# one", "b c", "#", "d,e", '"f"'), ()),
        ("a", "\ufeffx\r\ny\r\n", ("x", "y"), ()),
        ("a.txt", "é\u3000x\n", ("é\u3000x",), ()),
        ("a.csv", "id\nx\n\ny\nx\n", ("x", "y"), ()),
        ("a.CSV", "Label, ID \n1,x\n , \n 2,y\n", ("x", "y"), ()),
        ("a.csv", '\ufefffile;Owner;n\n"a;b";ann;1\nc;"o ""b""";2\n', (), ("ann", 'o "b"')),
        ("a.csv", "id\towner\nx\t\n\tann\n", ("x",), ("ann",)),
        ("a.csv", "sep=|\r\nowner|id\r\nann|\r\n|x;y\r\n", ("x;y",), ("ann",)),
        ("a.csv", 'note,id\n"two\nlines",x\n', ("x",), ()),
        ("a.jsonl", '{"id": "x", "n": [1]}\n\n{"owner": "ann"}\n{"id": "x"}\n', ("x",), ("ann",)),
        ("a.JSONL", '\ufeff{"id": "\\u00e9"}', ("é",), ()),
        ("a.jsonl", '{"id": 17}\n{"id": "17"}\n{"owner": 3}\n', ("17",), ("3",)),
    ):
        assert read(written(tmp_path, name, content)) == Named(ids, owners), (name, content)


def test_edits_name_records_as_a_file_of_records_does(tmp_path):
    path = written(tmp_path, "edits.jsonl", '{"id": 17, "response": "x"}\n{"id": true}')
    refusal = "id must be text in quotes, or a whole number"
    assert request_files.read_edits(path) == [("line 1", {"id": "17", "response": "x"}), ("line 2", refusal)]


def test_problems_are_listed_at_once_with_their_lines(tmp_path):
    for name, content, *messages in (
        ("a.txt", "", "names nothing"),
        ("a.csv", "id\n", "names nothing"),
        ("a.txt", b"ok\nb\xff\n", "not UTF-8 text: invalid start byte in line 2"),
        ("a.txt", "a".encode("utf-16"), "not UTF-8 text: invalid start byte in line 1"),
        ("a.txt", "x\na\0b\ny\u2028\n", "line 2: 'a\\x00b' has a control", "line 3: 'y\\u2028' has a line separator"),
        ("a.txt", "x\n" + "y" * 5000, "line 2: yyy"),
        ("a.txt", "x\r\np3 \n", "line 2: 'p3 ' has white space at an end"),
        ("a.csv", "id,n\n p3,1\n", "line 2: ' p3' has white space at an end"),
        ("a.jsonl", '{"owner": "anna\\t"}', "line 1: 'anna\\t' has a control character"),
        ("a.csv", "file,label\nx,1\n", "line 1: must name one column id"),
        ("a.csv", "id,Id\nx,y\n", "line 1: must name one column id"),
        ("a.csv", "id,n\nx\ny,1\nz,1,2\n,3\n", "line 2: has 1 fields", "line 4: has 3 fields", "line 5: names neither"),
        ("a.csv", "id,owner\nx,ann\n", "line 2: names an id and an owner"),
        ("a.csv", 'id,n\nx,1\n"y,2\nz,3\n', "line 3: not CSV"),
        ("a.csv", "id,n\nx," + "1" * 200_000, "line 2: not CSV: field larger"),
        ("a.csv", "id\na\0b\n", "line 2: 'a\\x00b' has"),
        ("a.jsonl", '{"id": 1e3}\n[]\n{\n', "line 1: id must be text", "line 2: must be an object", "line 3: not JSON"),
        ("a.jsonl", '{"id": ""}\n{"id": "x"}\n', "line 1: names neither"),
        ("a.jsonl", '{"id": "x", "id": "y"}', "line 1: not JSON: a key occurs twice"),
        ("a.jsonl", '{"id": "x", "owner": "ann"}', "line 1: names an id and an owner"),
        ("a.jsonl", '{"id": "\\ud800"}\n{"id": ' + "9" * 5000 + "}\n", "line 1: not JSON", "line 2: not JSON"),
        ("a.jsonl", '{"id": "x"}\n' + "[" * 200_000, "line 2: not JSON: nested too deeply"),
    ):
        with pytest.raises(UserError) as caught:
            read(written(tmp_path, name, content))
        text = str(caught.value)
        assert all(message in text for message in ["--records_file=", *messages]), text
        assert text.count("line ") == sum(message.count("line ") for message in messages), text


def test_files_that_are_none_or_too_large(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no such file|is no file"):
            read(str(path))
    monkeypatch.setattr(request_files, "LARGEST", 10)
    assert read(written(tmp_path, "a", "x" * 10)).ids == ("x" * 10,)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        read(written(tmp_path, "a", "x" * 11))


pieces = st.sampled_from([b"id", b"owner", b",", b";", b'"', b"\n", b"\r", b"{", b"}", b'{"id":', b"[", b"\0", b"\xff"])


@settings(max_examples=100)
@given(st.sampled_from(["a.txt", "a.csv", "a.jsonl"]), st.one_of(st.binary(), st.lists(pieces).map(b"".join)))
def test_any_bytes_are_read_or_refused(tmp_path, name, content):
    try:
        named = read(written(tmp_path, name, content))
    except UserError:
        return
    assert named.ids or named.owners
    for names in named:
        assert all(names) and len(set(names)) == len(names)


names = st.text(max_size=20).filter(lambda name: not fault(name))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["id", "owner"]), names), min_size=1))
def test_what_is_written_is_read(tmp_path, wanted):
    """CSV and JSON lines carry any legal name, and both say the same; text carries ids."""
    ids, owners = (tuple(dict.fromkeys(name for kind, name in wanted if kind == k)) for k in ("id", "owner"))
    lines = "".join(json.dumps({kind: name}) + "\n" for kind, name in wanted)
    assert read(written(tmp_path, "a.jsonl", lines)) == Named(ids, owners)
    if ids:
        assert read(written(tmp_path, "a.txt", "\n".join(ids))).ids == ids
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("id", "owner"), *((n, "") if k == "id" else ("", n) for k, n in wanted)])
    assert read(written(tmp_path, "a.csv", table.getvalue())) == Named(ids, owners)


# images
def alike(catalog, path):
    """Live ids that an image file stands for."""
    return list(resolve(catalog, [], [], [content_of(catalog, Path(path), f"--like={path}")]).live)


def stored(tmp_path, source, shape, images):
    """A catalog of records with the given pixels: a, b, ..., the last one public."""
    catalog = Catalog(tmp_path / "catalog.db")
    catalog.set("dataset", {"settings": {"source": source}, "shape": list(shape)})
    items = [Item(chr(97 + i), "train", 0) for i in range(len(images))]
    items[-1] = items[-1]._replace(split="public")
    catalog.add_records(items, range(len(items)), [content_hash(image) for image in images])
    return catalog


def test_an_image_stands_for_the_records_it_was_imported_as(tmp_path, rng):
    """Files of another size and colour mode find the record that an import makes of them."""
    files = []
    for i, mode in enumerate(["RGB", "L", "RGB"]):
        pixels = rng.integers(0, 256, (30 + i, 41, 3), np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).convert(mode).save(files[-1])
    images = decode(files, 12, 12, 3).rows
    catalog = stored(tmp_path, "folder", (12, 12, 3), [images[0], images[1], images[0], images[2]])
    assert alike(catalog, files[0]) == ["a", "c"] and alike(catalog, files[1]) == ["b"]
    with pytest.raises(UserError, match="no live record has exactly these pixels"):
        alike(catalog, files[2])  # a public record's
    catalog.erase(["b"], "r")
    assert resolve(catalog, [], [], [content_of(catalog, files[1], "--like")]).pending == ("b",)
    catalog.forget(["r"])
    with pytest.raises(UserError, match="no live record"):
        alike(catalog, files[1])
    catalog.close()


def test_an_image_of_an_array_has_its_size(tmp_path, rng):
    images = rng.integers(0, 256, (3, 8, 9, 1), np.uint8)
    with contextlib.closing(stored(tmp_path, "npz", (8, 9, 1), images)) as catalog:
        Image.fromarray(images[0, ..., 0]).convert("RGB").save(tmp_path / "colour.png")
        Image.fromarray(images[0, ..., 0].repeat(2, 0).repeat(2, 1)).save(tmp_path / "twice.png")
        assert alike(catalog, tmp_path / "colour.png") == ["a"]
        with pytest.raises(UserError, match="has 16 x 18 pixels; must have 8 x 9"):
            alike(catalog, tmp_path / "twice.png")
        with pytest.raises(UserError, match="no such file"):
            alike(catalog, tmp_path / "none.png")
        with pytest.raises(UserError, match="bad.png cannot be read: not an image"):
            alike(catalog, written(tmp_path, "bad.png", "x"))
    with contextlib.closing(Catalog(tmp_path / "empty.db")) as catalog:
        with pytest.raises(UserError, match="has no records yet"):
            alike(catalog, tmp_path / "bad.png")
