"""A full or a failing disk: one message, exit code 2, the old or the new state; with space again it is finished."""

import random
import subprocess
from collections import Counter

import pytest
from crash_scenarios import SCENARIOS
from crashes import Pool

pytest.importorskip("ml_collections", reason="the command line needs ml_collections")


@pytest.fixture(scope="module")
def mounting(tmp_path_factory) -> str:
    """Why no file system can be mounted here; empty if one can."""
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path_factory.mktemp("mount"))]
    try:
        subprocess.run(trial, check=True, capture_output=True)
        return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, mounting):
    servers = Pool(tmp_path_factory.mktemp("faults"), mounting=not mounting)
    try:
        yield servers, servers.prepare(*SCENARIOS)
    finally:
        servers.close()


def fail(pool, capsys, what: str, tasks) -> list[dict]:
    """Runs the commands, checks, and says what was done."""
    answers = pool.map([{"do": "fault", **task} for task in tasks])
    bad = [answer for answer in answers if answer["problems"]]
    states = Counter(answer.get("state", "?") for answer in answers if answer["hit"])
    hit = sum(answer["hit"] for answer in answers)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    with capsys.disabled():
        done = dict(Counter(answer["scenario"] for answer in answers))
        print(f"\n{what}, {len(answers)} commands {done}: {hit} failed ({counts}), {len(bad)} with problems", end=" ")
    assert not bad, bad[:3]
    return answers


def points(facts, seed: int, every: bool) -> list[dict]:
    draw, found = random.Random(seed), []
    for name, one in facts.items():
        for k, label in enumerate(one["labels"]):
            error, lasting = draw.choice(["ENOSPC", "EIO"]), draw.random() < 0.5
            found.append({"scenario": name, "point": k, "label": label, "error": error, "lasting": lasting})
    draw.shuffle(found)
    return found if every else list({task["label"]: task for task in found}.values())


def test_an_error_at_every_kind_of_point(pool, capsys):
    """One point of each kind fails with ENOSPC or EIO, once or from then on."""
    answers = fail(pool[0], capsys, "ENOSPC and EIO", points(pool[1], 0, every=False))
    assert sum(answer["hit"] for answer in answers) > len(answers) / 2


@pytest.mark.slow
def test_an_error_at_a_third_of_all_points(pool, capsys):
    fail(pool[0], capsys, "ENOSPC and EIO", points(pool[1], 1, every=True)[::3])


@pytest.mark.parametrize("pages", [0, 1])
def test_a_catalog_that_cannot_grow(pool, capsys, pages):
    fail(pool[0], capsys, "full catalog", [{"scenario": name, "pages": pages} for name in SCENARIOS])


def test_a_full_file_system(pool, mounting, capsys):
    """A real one: a small tmpfs with so many bytes of room."""
    if mounting:
        pytest.skip(f"file systems cannot be mounted here: {mounting}")
    names, rooms = ["train", "unlearn", "process", "purge"], [0, 1 << 13, 1 << 15, 1 << 17]
    tasks = [{"scenario": name, "room": room} for name in names for room in rooms]
    answers = fail(pool[0], capsys, "full tmpfs", tasks)
    assert {answer["scenario"] for answer in answers if answer["hit"]} == set(names)
