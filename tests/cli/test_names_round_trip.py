"""A name enters and leaves unchanged, whichever way it takes: every source, every flag, every file, every listing."""

import csv
import io
import json
import random
import shlex
import subprocess

import numpy as np
import pytest
from commands import call
from PIL import Image

from lmeraser_jax.cli import attack, common, unlearn
from lmeraser_jax.config import Config, Data
from lmeraser_jax.data import load
from lmeraser_jax.data.names import fault, quoted
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import import_source
from lmeraser_jax.storage.requests import accept

PIECES = [*",;\"'\\ -@=#$*~&|!aA0\u00a0", *"-- é e\u0301 ﬁ 🙂 07 nan true null 1e3".split(" ")]
FIXED = ["Roe, Jane", "Roe", "Jane", "Jane,Roe", "-x", "--records=a", "@file", "=1+1", "007", "7", "nan", "None", '"7"']
FIXED += ["../../canary", "/etc/passwd", "'; DROP TABLE records; --", "%s{0}"]
FIXED += ["x" * 1024, "'", '"', "a\\nb", "../a", "C:\\a", "é", "e\u0301", "$(id)", "#1", "a\u00a0b", "a b", "a  b"]
ILLEGAL = [" a", "a ", "\u00a0a", "a\n", "\ufeffa"]


def nasty(count: int, seed: int = 0, limit: int = 1024) -> list[str]:
    """Legal names of all sorts, the fixed ones first."""
    draw = random.Random(seed)
    drawn = ("".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(50 * count))
    return [name for name in dict.fromkeys([*FIXED, *drawn]) if not fault(name) and len(name) <= limit][:count]


def npz(path, names, owners, as_array=np.array) -> str:
    """A file of one image for each name."""
    numbers = np.arange(len(names))
    images = numbers.view(np.uint8).reshape(len(names), 2, 4)
    texts = {"train_ids": as_array(names), "train_owners": as_array(owners)}
    np.savez(path, train_images=images, train_labels=numbers % 2, **texts)
    return str(path)


def imported(workdir, **settings) -> dict[str, str]:
    """{id: owner} of the catalog after an import."""
    layout, catalog = workdir
    data = Data(**settings)
    import_source(layout, catalog, load.load(data, own_test=False), Config(data=data))
    records = catalog.live("train")
    return dict(zip(records.ids, records.owners, strict=True))


@pytest.mark.parametrize("as_array", [np.array, np.char.encode])
def test_an_npz_gives_its_names_as_they_are(new_workdir, tmp_path, as_array):
    names = nasty(200)
    path = npz(tmp_path / "a.npz", names, names[::-1], as_array)
    assert imported(new_workdir, source="npz", path=path) == dict(zip(names, names[::-1], strict=True))


def test_a_folder_and_its_csv_give_their_names_as_they_are(new_workdir, tmp_path):
    names = [name for name in nasty(100, limit=200) if "/" not in name and name[0] != "."]
    paths = [f"train/{'ab'[i % 2]}/{name}.png" for i, name in enumerate(names)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        rows = [("file", "label", "owner"), *((p, p[6], n) for p, n in zip(paths, names, strict=True))]
        csv.writer(file).writerows(rows)
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / path)
    settings = {"source": "folder", "path": str(tmp_path), "image_size": 4}
    records = imported(new_workdir, labels=str(tmp_path / "a.csv"), **settings)
    assert records == dict(zip(paths, names, strict=True))


def test_an_import_refuses_what_nobody_could_name_and_says_where(new_workdir, tmp_path):
    for name in ILLEGAL:
        for ids, owners in ((["a", name, "b"], ["", "", "o"]), (["a", "c", "b"], ["", name, name])):
            with pytest.raises(UserError, match="must be plain text") as caught:
                imported(new_workdir, source="npz", path=npz(tmp_path / "a.npz", ids, owners))
            assert str(caught.value).count(quoted(name)) == 1 and ("of c" in str(caught.value)) == (ids[1] == "c")


def test_a_flag_is_one_name_each_time():
    names = nasty(300)
    for module, flag in ((unlearn, "records"), (unlearn, "owner"), (attack, "records")):
        for given in ([f"--{flag}={name}" for name in names], [text for name in names for text in (f"--{flag}", name)]):
            if "--help" not in given:
                arguments = common.parse(module, ["lmeraser", *given])
                assert arguments is not None and arguments[flag] == names


def written(path, kind: str, name: str) -> list[str]:
    """The flag for a file that names one record or owner, in the format of the path's suffix."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("note", kind), ("x, y", name)])
    contents = {".txt": f"{name}\r\n", ".csv": text.getvalue(), ".jsonl": json.dumps({kind: name})}
    path.write_bytes(contents[path.suffix].encode())
    return [f"--records_file={path}"]


def test_each_way_of_asking_erases_the_named_record_alone(new_workdir, tmp_path, capsys):
    """Record ids never become paths either: no file is named after one, and none beside the workdir changes."""
    layout, catalog = new_workdir
    names = nasty(54, limit=1000)
    imported(new_workdir, source="npz", path=npz(tmp_path / "a.npz", names, [f"{name}'s" for name in names]))
    ways = {
        "flag": lambda name: [f"--records={name}"],
        "two words": lambda name: ["--records", name],
        "owner": lambda name: [f"--owner={name}'s"],
        "text": lambda name: written(tmp_path / "a.txt", "id", name),
        "csv": lambda name: written(tmp_path / "a.csv", "id", name),
        "csv owner": lambda name: written(tmp_path / "a.csv", "owner", f"{name}'s"),
        "jsonl": lambda name: written(tmp_path / "a.jsonl", "id", name),
        "jsonl owner": lambda name: written(tmp_path / "a.jsonl", "owner", f"{name}'s"),
    }
    for i, name in enumerate(names):
        way = list(ways)[(i + i // len(ways)) % len(ways)]
        flags = ["--workdir", layout.root, "--defer", f"--request=r{i}", *ways[way](name)]
        assert call(capsys, "unlearn", *flags)[0] == 0, (way, name)
        assert list(catalog.erased([f"r{i}"]).values()) == [name], way
    assert len(catalog.live("train")) == 0
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert not [path for path in files for name in names if len(name) > 4 and name in path], files


def test_what_is_listed_can_be_pasted_behind_a_flag(new_workdir, tmp_path, capsys):
    names = nasty(200)
    imported(new_workdir, source="npz", path=npz(tmp_path / "a.npz", names, names[::-1]))
    out = call(capsys, "inspect", f"--workdir={new_workdir[0].root}", "--records")[1]
    cells = [line.split("\t") for line in out.splitlines()]
    assert {tuple(shlex.split(f"{row[0]} {row[2]}")) for row in cells} == set(zip(names, names[::-1], strict=True))
    pasted = " ".join([*(row[0] for row in cells), *(quoted(name, 2000) for name in names)])
    shell = subprocess.run(["sh", "-c", f"printf '%s\\0' {pasted}"], capture_output=True, check=True)
    assert shell.stdout.decode().split("\0")[:-1] == [*sorted(names), *names]


@pytest.mark.parametrize("names", ["r1", b"r1", [1], [None], [b"r1"], ["r1", ""], [np.int64(1)], ["a\udcff"]])
def test_the_python_api_takes_lists_of_texts_only(new_workdir, names):
    for arguments in ({"ids": names}, {"owners": names}):
        with pytest.raises(UserError, match="must be (lists of names|text in UTF-8)"):
            accept(new_workdir[1], **arguments)
