"""kill -9: whatever a command was doing, the old or the new state is there, and the same command again finishes it."""

import random
from collections import Counter

import pytest
from crash_scenarios import SCENARIOS
from crashes import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Servers, and what each scenario passes undisturbed: {name: {labels, seconds}}."""
    servers = Pool(tmp_path_factory.mktemp("crashes"))
    try:
        yield servers, servers.prepare(*SCENARIOS)
    finally:
        servers.close()


def kill(pool, capsys, tasks) -> None:
    """Kills, checks, and says what was done."""
    answers = pool.map(tasks)
    bad = [answer for answer in answers if answer["problems"]]
    states = Counter(answer.get("state", "?") for answer in answers if answer["hit"])
    late = sum(not answer["hit"] for answer in answers)
    searched = sum(answer.get("searched", 0) for answer in answers)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    with capsys.disabled():
        done = Counter(answer["scenario"] for answer in answers)
        print(f"\n{len(answers) - late} kills ({dict(done)}): {counts}; {late} came after the end;", end=" ")
        print(f"{searched / 1e6:.1f} MB searched, {len(bad)} with problems", end=" ")
    assert not bad, bad[:3]
    assert set(states) == {"old", "new"}, "kills on both sides of the publish transaction"


def moments(facts, count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    names = [list(SCENARIOS)[i % len(SCENARIOS)] for i in range(count)]
    return [{"scenario": name, "delay": draw.uniform(0, facts[name]["seconds"])} for name in names]


def points(facts) -> list[dict]:
    return [
        {"scenario": name, "point": k, "label": label}
        for name, one in facts.items()
        for k, label in enumerate(one["labels"])
    ]


def test_killed_at_every_kind_of_point(pool, capsys):
    """One point of each kind: before, halfway through and after every write, removal and transaction."""
    tasks = points(pool[1])
    random.Random(0).shuffle(tasks)
    kill(pool[0], capsys, list({task["label"]: task for task in tasks}.values()))


def test_killed_at_random_moments(pool, capsys):
    kill(pool[0], capsys, moments(pool[1], 15, seed=1))


@pytest.mark.slow
def test_killed_at_every_point(pool, capsys):
    kill(pool[0], capsys, points(pool[1]))


@pytest.mark.slow
def test_killed_at_200_random_moments(pool, capsys):
    kill(pool[0], capsys, moments(pool[1], 200, seed=2))
