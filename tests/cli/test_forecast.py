"""lmeraser forecast: an estimate read from a catalog, against sums over its records. Nothing is tuned here."""

import collections
import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import call, refused
from helpers import small_config

from lmeraser_jax import config as settings
from lmeraser_jax.data.source import Item
from lmeraser_jax.experiments import cost_model
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.storage.workdir import Layout, writer_lock

SIZES = {"a": 50, "b": 30, "c": 15, "d": 5}
EPOCHS, SPEED, SAMPLE = 3, 40.0, 12  # images a second
IMAGES = {key: EPOCHS * size for key, size in SIZES.items()}
CONFIG = {"clustering__sample_size": SAMPLE, "tuning__lanes": 1}
GOOD = ("--rate=3", "--window=2")


def make_workdir(folder, **overrides):
    """A catalog with records in published clusters, and a config; no images, backbone or checkpoints."""
    layout, config = Layout(folder), small_config(**(CONFIG | overrides))
    layout.prepare()
    write_json(layout.config, settings.to_dict(config))
    names = [(f"{key}{i:02d}", key) for key, size in SIZES.items() for i in range(size)]
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        items = [Item(name, "train", 0, f"owner-{name[:2]}") for name, _ in names] + [Item("t", "test", 0)]
        catalog.add_records(items, range(len(items)), [digest(item.id) for item in items])
        catalog.rank(config.seed)
        moved = [(row, key) for row, (_, key) in enumerate(names)]
        for key in SIZES:
            catalog.add_slice(slice_row(key * 64, key), [])
        catalog.add_slice(slice_row("e" * 64, "a")._replace(fingerprint="another", seconds=1e6), [])
        catalog.publish("tree", "cpu", "inputs", {key: key * 64 for key in SIZES}, moved)
    return layout


def slice_row(digest, key):
    seconds = IMAGES[key] / SPEED
    return SliceRow(digest, key, "params", SIZES[key], IMAGES[key], 9, 0.5, seconds, "cpu", time.time())


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A workdir that no test changes."""
    return make_workdir(tmp_path_factory.mktemp("forecast") / "run")


def catalog_of(layout):
    return contextlib.closing(Catalog(layout.catalog))


def forecast_of(capsys, layout, *flags, rate=3.0, window=2.0):
    """The JSON of a forecast."""
    flags = [*flags, f"--window={window}"] if window is not None else flags
    code, out, err = call(capsys, "forecast", f"--workdir={layout.root}", f"--rate={rate}", "--json=-", *flags)
    assert code == 0 and not err, err
    return json.loads(out)


def records_of(layout):
    """(cluster, sampled) of every live record, read from the tables."""
    with catalog_of(layout) as catalog:
        sampled, table = set(catalog.sample("train", SAMPLE).ids), catalog.live("train")
    assert len(sampled) == SAMPLE
    return [(key, name in sampled) for name, key in zip(table.ids, table.clusters, strict=True)]


def sampled_of(layout):
    return collections.Counter(key for key, sampled in records_of(layout) if sampled)


def test_one_request_at_once_costs_the_mean_over_the_records(capsys, layout):
    forecast, records = forecast_of(capsys, layout), records_of(layout)
    now, plain = forecast["policies"][0], [IMAGES[key] for key, _ in records]
    costs = [sum(IMAGES.values()) if sampled else IMAGES[key] for key, sampled in records]
    assert now["name"] == "at once" and now["requests"] == now["any"] == now["paper_clusters"] == 1
    assert now["images"] == pytest.approx(np.mean(costs)) and now["share"] == pytest.approx(np.mean(costs) / 300)
    columns = forecast["workload"]["clusters"]
    assert [sum(columns[name]) for name in ("members", "sampled", "images")] == [100, SAMPLE, 300]
    assert now["clusters"] == pytest.approx(np.mean([4 if sampled else 1 for _, sampled in records]))
    assert now["reclustering"] == pytest.approx(1 - np.mean(plain) / np.mean(costs))
    assert now["seconds"] == now["wait_seconds"] == pytest.approx(np.mean(costs) / SPEED)
    assert now["paper_seconds"] == pytest.approx(75 / SPEED)
    assert now["batches"] == 90 and now["busy"] == pytest.approx(90 * now["seconds"] / (30 * 86400))


def test_windows_are_batches_of_all_who_ask(capsys, layout):
    policies, sampled = forecast_of(capsys, layout)["policies"], sampled_of(layout)
    assert [policy["window_days"] for policy in policies] == [0, 1 / 24, 1, 2, 7]
    for p in policies[1:]:
        mean = 3 * p["window_days"]
        nonempty = 1 - np.exp(-mean)
        same = {key: np.exp(-mean * (SIZES[key] + SAMPLE - sampled[key]) / 100) for key in SIZES}
        assert p["any"] == pytest.approx(nonempty) and p["requests"] == pytest.approx(mean / nonempty)
        assert p["images"] == pytest.approx(sum(IMAGES[key] * (1 - same[key]) for key in SIZES) / nonempty)
        assert p["clusters"] == pytest.approx(sum(1 - same[key] for key in SIZES) / nonempty)
        assert p["paper_clusters"] == pytest.approx(sum(1 - np.exp(-mean * m / 100) for m in SIZES.values()) / nonempty)
        assert p["seconds"] == pytest.approx(p["images"] / SPEED), "one lane"
        assert p["batches"] == pytest.approx(30 / p["window_days"] * nonempty)
        assert p["month_seconds"] == pytest.approx(p["batches"] * p["seconds"])
    assert [p["name"] for p in forecast_of(capsys, layout, window=7)["policies"]] == list(cost_model.WINDOWS), "once"
    months = [policy["month_seconds"] for policy in policies]
    assert months == sorted(months, reverse=True), "collecting never costs more"
    assert policies[1]["images"] == pytest.approx(policies[0]["images"], rel=0.1), "an hour is about one request"


def test_so_many_requests_at_a_time(capsys, layout):
    """Against every record's chance to be among k drawn; nobody waits for requests that have already come."""
    sampled = sampled_of(layout)
    for count in (1, 2, 30):
        policies = forecast_of(capsys, layout, f"--requests={count}", window=None)["policies"]
        names = [policy["name"] for policy in policies]
        assert names.count("every 30") == (count == 30) and len(names) == len(cost_model.WINDOWS) + (count > 1)
        p = next(policy for policy in policies if policy["requests"] == count and policy["any"] == 1)
        chances = {key: 1 - (1 - (SIZES[key] + SAMPLE - sampled[key]) / 100) ** count for key in SIZES}
        assert p["images"] == pytest.approx(sum(IMAGES[key] * chance for key, chance in chances.items()))
        assert p["paper_clusters"] == pytest.approx(sum(1 - (1 - m / 100) ** count for m in SIZES.values()))
        assert p["batches"] == pytest.approx(90 / count) and p["window_days"] == pytest.approx((count - 1) / 3)
        assert p["wait_seconds"] == pytest.approx(p["window_days"] * 86400 / 2 + p["seconds"])


def test_the_table_says_that_it_is_an_estimate(capsys, layout, tmp_path):
    code, out, _ = call(capsys, "forecast", f"--workdir={layout.root}", *GOOD, f"--json={tmp_path}/values.json")
    values = json.loads((tmp_path / "values.json").read_text())
    assert code == 0 and "100 records (12 of them sampled) in 4 clusters; 3 requests a day" in out
    lines = {line[:28].strip(): line[28:].split() for line in out.splitlines()[1:]}
    assert lines["requests served"] == "at once an hour a day 2 days a week".split()
    assert lines["passes of a record"] == [f"{policy['images']:.0f}" for policy in values["policies"]]
    assert "12 h" in out and "by the paper (Eq. 19)" in lines
    estimates = out.split("all of this is an estimate:\n")[1]
    assert [f"- {line}" for line in values["estimates"]] == estimates.splitlines()
    for text in ("drawn uniformly", "40.0 passes a second (lanes: 1), as on this", "no request hit: the bound"):
        assert text in estimates


def test_only_slices_of_the_published_program_measure_the_speed(capsys, tmp_path):
    """Of a device; idle lanes do not make one cluster faster."""
    layout = make_workdir(tmp_path / "run", tuning__lanes=2, clustering__sample_from="public")
    forecast = forecast_of(capsys, layout, "--devices=4")
    assert forecast["workload"]["speed"] == pytest.approx(4 * SPEED) and forecast["workload"]["lanes"] == 8
    assert "160.0 passes a second (lanes: 8), as on this workdir's slices" in forecast["estimates"][1]
    own = np.mean([IMAGES[key] for key, size in SIZES.items() for _ in range(size)])
    assert forecast["policies"][0]["seconds"] == pytest.approx(own / (SPEED / 2))
    assert forecast["policies"][0]["paper_seconds"] == pytest.approx(75 / (SPEED / 2))


def test_without_a_private_sample_nothing_re_clusters(capsys, tmp_path):
    own = np.mean([IMAGES[key] for key, size in SIZES.items() for _ in range(size)])
    for overrides in ({"clustering__sample_from": "public"}, {"clustering__partition": "random"}):
        forecast = forecast_of(capsys, make_workdir(tmp_path / "-".join(overrides), **overrides))
        assert all(policy["reclustering"] == 0 for policy in forecast["policies"])
        assert forecast["policies"][0]["images"] == pytest.approx(own)
        assert not any("new clustering" in line for line in forecast["estimates"])


def test_the_share_of_a_re_clustering_is_measured_where_there_was_one(capsys, tmp_path):
    layout = make_workdir(tmp_path / "run")
    cases = [("build", True, *images) for images in ((50, 10), (250, 80), (0, 0), (5, 6))]  # two that count, two not
    cases += [("build", False, 300, 0), ("other", True, 300, 300)]
    names = ("kind", "reclustered", "images_spared", "images_changed")
    lines = [dict(zip(names, case)) for case in cases] + [["no object"], {"kind": "build", "reclustered": True}]
    bound = forecast_of(capsys, layout)
    layout.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "torn')
    forecast = forecast_of(capsys, layout)
    assert (forecast["workload"]["changed"], forecast["workload"]["reclusterings"]) == (pytest.approx(0.3), 2)
    assert "re-tunes 30% of the clusters that no request hit: the mean of 2 seen here" in forecast["estimates"][-1]
    assert bound["policies"][0]["images"] > forecast["policies"][0]["images"]
    assert "re-tunes 100% of the clusters that no request hit: the bound, none was" in bound["estimates"][-1]


def test_erased_records_and_empty_clusters_do_not_count(capsys, tmp_path):
    layout = make_workdir(tmp_path / "run")
    with catalog_of(layout) as catalog:
        requests.accept(catalog, [f"d{i:02d}" for i in range(5)] + ["a00"])
    columns = forecast_of(capsys, layout)["workload"]["clusters"]
    assert (columns["members"], sum(columns["sampled"])) == ([49, 30, 15], SAMPLE)
    with catalog_of(layout) as catalog:
        requests.accept(catalog, list(catalog.live("train").ids))
    code, _, err = call(capsys, "forecast", f"--workdir={layout.root}", *GOOD)
    assert code == 2 and "no live private record in a published cluster" in err


def test_requests_that_come_faster_than_they_are_served_are_named(capsys, layout):
    forecast = forecast_of(capsys, layout, rate=1e6)
    late = [policy["name"] for policy in forecast["policies"] if policy["busy"] >= 1]
    assert "at once" in late and "a week" not in late
    assert forecast["estimates"][-1] == f"requests arrive faster than they are served: {', '.join(late)}"


def test_each_bad_flag_is_named_with_its_legal_values(capsys, layout):
    numbers = "must be a number from 1e-09 to 1e+09"
    window = "--window=X is missing: days of collecting (or give --requests=K), a number above 0"
    for flags, message in (
        (["--rate=0", "--window=2"], f"--rate=0: requests a day, {numbers}"),
        (["--rate=inf", "--window=2"], f"--rate=inf: requests a day, {numbers}"),
        (["--rate=3", "--window=nan"], f"--window=nan: days of collecting (or give --requests=K), {numbers}"),
        ([*GOOD, "--devices=0"], "--devices=0: 0 is not a positive integer"),
        (["--rate=3", "--requests=0"], "--requests=0: 0 is not a positive integer"),
        (["--rate=3", "--requests=101"], "--requests=101: must be at most the 100 records"),
        (["--rate=3", "--requests=5", "--window=2"], "--requests=5 and --window=2: give one of them"),
        (["--rate=3"], window),
        (["--rate=3", "--requests=few"], "requests"),
        ([*GOOD, "--config.tuning.epochs=3"], "config"),  # the workdir's own counts
    ):
        code, out, err = call(capsys, "forecast", f"--workdir={layout.root}", *flags)
        assert code == 2 and not out and message in err and "several" not in err, (flags, err)


def test_everything_that_is_wrong_is_said_at_once(capsys, tmp_path):
    flags = ["--rate=0", "--window=-1"]
    code, _, err = call(capsys, "forecast", f"--workdir={tmp_path}/none", *flags)
    assert code == 2 and err.count("\n- ") == 3 and f"--workdir={tmp_path}/none does not exist" in err
    assert all(flag.partition("=")[0] in err for flag in flags)
    assert all(f"--{name}=" in refused(capsys, "forecast") for name in ("rate", "window", "workdir"))


def test_workdirs_without_anything_to_forecast_are_refused(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is no workdir" in call(capsys, "forecast", f"--workdir={tmp_path}/mine", *GOOD)[2]
    layout = make_workdir(tmp_path / "run")
    for statement, message in (
        ("UPDATE slices SET seconds=0", "has no slice of this program that was timed"),
        ("UPDATE slices SET images=0", "makes its slices by a formula"),
        ("DELETE FROM manifests", "has no published state; run: lmeraser train --workdir="),
    ):
        with catalog_of(layout) as catalog:
            catalog.db.execute(statement)
        assert message in call(capsys, "forecast", f"--workdir={layout.root}", *GOOD)[2]


def test_a_forecast_waits_for_no_lock_writes_nothing_and_needs_no_jax(capsys, layout):
    def content():
        with catalog_of(layout) as catalog:
            files = {path.name: path.read_bytes() for path in layout.root.iterdir() if "catalog" not in path.name}
            return files | {"lock": None}, list(catalog.db.iterdump())

    before = content()
    with writer_lock(layout):
        forecast_of(capsys, layout)
    assert content() == before
    code = "import sys; from lmeraser_jax.cli.main import main; assert main(sys.argv[1:]) == 0;"
    code += "assert not {'jax', 'flax', 'orbax', 'matplotlib', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    command = [sys.executable, "-c", code, "forecast", f"--workdir={layout.root}", *GOOD]
    subprocess.run(command, check=True, capture_output=True)
