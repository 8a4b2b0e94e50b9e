"""TALLRec and MovieLens as JSON lines: `lmeraser prepare --pack`."""

import gzip
import json

from commands import call, refused

from lmeraser_jax.data.text import read_lines

KEYS = "id,owner,query,response,split"
FILMS = [f'"Film {i:02d}, The (19{i % 10}{i // 10})"' for i in range(60)]


def prepared(capsys, pack, out, *paths):
    code, shown, _ = call(capsys, "prepare", f"--pack={pack}", *(f"--path={path}" for path in paths), f"--out={out}")
    assert code == 0 and "next: lmeraser train" in shown
    return [json.loads(line) for line in out.read_text().splitlines()], read_lines(out, KEYS)[0]


def movielens_folder(folder, users=("7", "8")):
    """Two users who watched the films 3 to 19 and 6 to 38, neither in the order of their ids; the second CSV zipped."""
    folder.mkdir()
    rows = [f"{i},{title},Drama" for i, title in enumerate(FILMS)]
    (folder / "movies.csv").write_text("\r\n".join(["movieId,title,genres", *rows, ""]))
    rated = [(user, (i + 1) * film) for i, user in enumerate(users) for film in range(3, 20)]
    rows = [f"{user},{film},4.0,{1000 - film}" for user, film in rated]
    (folder / "ratings.csv.gz").write_bytes(
        gzip.compress("\n".join(["userId,movieId,rating,timestamp", *rows]).encode())
    )
    return folder


def test_a_user_of_movielens_owns_the_films_that_followed_ten_others(tmp_path, capsys):
    lines, items = prepared(capsys, "movielens", tmp_path / "out.jsonl", movielens_folder(tmp_path / "both"))
    assert [(item.id, item.owner, item.split) for item in items[:5]] == [
        (f"7/{film}", "7", "test" if film == 3 else "train") for film in (7, 6, 5, 4, 3)
    ]
    assert len(items) == 10
    for line in lines:
        history, choice = line["query"].removeprefix("Films watched: ").split("\nThe next is one of: ")
        factor, film = int(line["owner"]) - 6, int(line["id"].partition("/")[2])
        titles = [f"Film {factor * each:02d}, The" for each in range(3, 20)]
        place = film // factor - 3
        assert history.split("; ") == titles[place + 10 : place : -1] and line["response"] == titles[place]
        assert choice.split("; ") == line["candidates"] and len(set(line["candidates"])) == 20
        assert set(line["candidates"]) & set(titles) == {line["response"]}
    assert len({line["candidates"].index(line["response"]) for line in lines}) > 3
    alone, _ = prepared(capsys, "movielens", tmp_path / "alone.jsonl", movielens_folder(tmp_path / "one", ("7",)))
    assert alone == lines[:5], "nobody else reaches a user's lines"


def test_tallrec_names_lines_after_their_file_and_tests_on_the_test_file(tmp_path, capsys):
    examples = [{"input": f"User Preference: {i}?", "output": "Yes." if i % 2 else "No."} for i in range(3)]
    valid, test = tmp_path / "book_valid.jsonl.gz", tmp_path / "test.json"
    valid.write_bytes(gzip.compress("\n".join(map(json.dumps, examples)).encode()))
    test.write_text(json.dumps(examples[:1], indent=2))
    lines, items = prepared(capsys, "tallrec", tmp_path / "new" / "out.jsonl", valid, test)
    assert [(line["query"], line["response"]) for line in lines[:3]] == [(e["input"], e["output"]) for e in examples]
    assert [(item.id, item.owner, item.split) for item in items] == [
        *((f"book_valid/{number}", "", "train") for number in (1, 2, 3)),
        ("test/1", "", "test"),
    ]


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path, capsys):
    folder, out = movielens_folder(tmp_path / "ml"), tmp_path / "out.jsonl"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"input": "a", "output": "b"}\n{"input": 3, "answer": "b"}\n')
    cases = [
        ((), "--path is missing for --pack"),
        ((f"--path={folder}", "--dataset=cifar10"), "--dataset=cifar10 does not go with --pack"),
        ((f"--path={tmp_path}",), "movies.csv.gz cannot be read"),
        ((f"--path={folder}", f"--path={folder}"), "must be one folder"),
    ]
    for flags, message in cases:
        assert message in refused(capsys, "prepare", "--pack=movielens", f"--out={out}", *flags)
    (folder / "ratings.csv").write_text("userId,movieId,timestamp\n1,2\n")
    assert "a rating is cut short" in refused(capsys, "prepare", "--pack=movielens", f"--path={folder}", f"--out={out}")
    (folder / "ratings.csv").write_text("userId,movieId\n1,2\n")
    assert "has no column timestamp" in refused(
        capsys, "prepare", "--pack=movielens", f"--path={folder}", f"--out={out}"
    )
    message = refused(capsys, "prepare", "--pack=tallrec", f"--path={broken}", f"--out={out}")
    assert "example 2 needs input and output as text; its keys: input, answer" in message
    assert not out.exists()
    message = refused(capsys, "prepare", "--pack=tallrec", f"--path={broken}", f"--out={broken}")
    assert "exists already" in message and broken.read_text().count("\n") == 2
