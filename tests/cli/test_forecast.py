"""lmeraser forecast: an estimate read from a catalog, against sums over its records. Nothing is tuned here."""

import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import small_config

from lmeraser_jax import config as settings
from lmeraser_jax.cli.main import main
from lmeraser_jax.data.source import Item
from lmeraser_jax.experiments import cost_model, policy
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.storage.workdir import Layout, writer_lock

SIZES = {"a": 50, "b": 30, "c": 15, "d": 5}
EPOCHS, SPEED, SAMPLE = 3, 40.0, 12  # images a second
CONFIG = {"clustering__sample_size": SAMPLE, "tuning__lanes": 1}


def made(folder, **overrides):
    """A catalog with records in published clusters, and a config; no images, backbone or checkpoints."""
    layout, config = Layout(folder), small_config(**(CONFIG | overrides))
    layout.prepare()
    write_json(layout.config, settings.to_dict(config))
    names = [(f"{key}{i:02d}", key) for key, size in SIZES.items() for i in range(size)]
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        items = [Item(name, "train", 0, f"owner-{name[:2]}") for name, _ in names] + [Item("t", "test", 0)]
        catalog.add_records(items, range(len(items)), [item.id for item in items])
        catalog.rank(config.seed)
        for key, size in SIZES.items():
            catalog.add_slice(slice_row(key * 64, key, size), [])
        catalog.add_slice(slice_row("e" * 64, "a", 50)._replace(fingerprint="another", seconds=1e6), [])
        catalog.publish("tree", "cpu", "inputs", {key: key * 64 for key in SIZES}, names)
    return layout


def slice_row(digest, key, size):
    images = EPOCHS * size
    return SliceRow(digest, key, "params", size, images, 9, 0.5, images / SPEED, "cpu", time.time())


@pytest.fixture
def layout(tmp_path):
    return made(tmp_path / "run")


def catalog_of(layout):
    return contextlib.closing(Catalog(layout.catalog))


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def planned(capsys, layout, *flags, rate=3.0, window=2.0):
    """The JSON of a plan."""
    flags = [*flags, f"--window={window}"] if window is not None else flags
    code, out, err = call(capsys, "forecast", f"--workdir={layout.root}", f"--rate={rate}", "--json=-", *flags)
    assert code == 0 and not err, err
    return json.loads(out)


def records_of(layout):
    """(cluster, sampled) of every live record, read from the tables."""
    with catalog_of(layout) as catalog:
        sampled = set(catalog.sample("train", SAMPLE).ids)
        table = catalog.live("train")
    assert len(sampled) == SAMPLE
    return [(key, name in sampled) for name, key in zip(table.ids, table.clusters, strict=True)]


def test_one_request_at_once_costs_the_mean_over_the_records(capsys, layout):
    found = planned(capsys, layout)
    now, records, images = found["policies"][0], records_of(layout), {k: EPOCHS * m for k, m in SIZES.items()}
    costs = [sum(images.values()) if sampled else images[key] for key, sampled in records]
    plain = [images[key] for key, _ in records]
    assert now["name"] == "at once" and now["requests"] == now["any"] == now["paper"]["clusters"] == 1
    assert now["images"] == pytest.approx(np.mean(costs)) and now["share"] == pytest.approx(np.mean(costs) / 300)
    assert now["clusters"] == pytest.approx(np.mean([4 if sampled else 1 for _, sampled in records]))
    assert now["reclustering"] == pytest.approx(1 - np.mean(plain) / np.mean(costs))
    assert found["size_biased_images"] == pytest.approx(np.mean(plain))
    assert now["seconds"] == now["wait_seconds"] == pytest.approx(np.mean(costs) / SPEED)
    assert now["paper"]["seconds"] == pytest.approx(75 / SPEED) and now["paper"]["gain"] == pytest.approx(4)
    assert now["gain"] == pytest.approx(300 / np.mean(costs))
    assert now["batches"] == 90 and now["busy"] == pytest.approx(90 * now["seconds"] / (30 * 86400))


def test_windows_are_batches_of_whoever_asks(capsys, layout):
    found = planned(capsys, layout)
    assert [p["window_days"] for p in found["policies"]] == [0, 1 / 24, 1, 2, 7]
    sampled = {key: sum(s for k, s in records_of(layout) if k == key) for key in SIZES}
    for p in found["policies"][1:]:
        mean, days = 3 * p["window_days"], p["window_days"]
        some = 1 - np.exp(-mean)
        kept = {k: np.exp(-mean * (SIZES[k] + SAMPLE - sampled[k]) / 100) for k in SIZES}  # neither hit nor moved
        assert p["any"] == pytest.approx(some) and p["requests"] == pytest.approx(mean / some)
        assert p["images"] == pytest.approx(sum(EPOCHS * SIZES[k] * (1 - kept[k]) for k in SIZES) / some)
        assert p["clusters"] == pytest.approx(sum(1 - kept[k] for k in SIZES) / some)
        assert p["paper"]["clusters"] == pytest.approx(sum(1 - np.exp(-mean * m / 100) for m in SIZES.values()) / some)
        assert p["seconds"] == pytest.approx(p["images"] / SPEED), "one lane"
        assert p["wait_seconds"] == pytest.approx(days * 86400 / 2 + p["seconds"])
        assert p["batches"] == pytest.approx(30 / days * some)
        assert p["month_seconds"] == pytest.approx(p["batches"] * p["seconds"])
        assert p["paper"]["month_seconds"] == pytest.approx(p["batches"] * 75 / SPEED)
    months = [p["month_images"] for p in found["policies"]]
    assert months == sorted(months, reverse=True), "collecting never costs more"
    hour, now = found["policies"][1], found["policies"][0]
    assert hour["images"] == pytest.approx(now["images"], rel=0.1), "short windows come to one request at a time"


def test_drawn_windows_agree_with_the_formulas(capsys, layout):
    found = planned(capsys, layout)
    p, drawn = found["policies"][3], found["simulated"]
    assert drawn["window_days"] == p["window_days"] == 2 and drawn["windows"] == 2000
    for name, wanted in (("retuned", p["clusters"]), ("images", p["images"]), ("seconds", p["seconds"])):
        assert abs(drawn[name]["mean"] - wanted * p["any"]) < 2 * drawn[name]["error"]
        assert drawn[name]["low"] <= drawn[name]["mean"] <= drawn[name]["high"] and drawn[name]["std"] > 0
    assert abs(drawn["affected"]["mean"] - p["paper"]["clusters"] * p["any"]) < 2 * drawn["affected"]["error"]


def test_the_table_says_what_is_an_estimate(capsys, layout):
    code, out, _ = call(
        capsys, "forecast", f"--workdir={layout.root}", "--rate=3", "--window=2", f"--json={layout.root}.j"
    )
    values = json.loads((layout.root.parent / "run.j").read_text())
    assert code == 0 and "100 records (12 of them sampled) in 4 clusters; 3 requests a day" in out
    header = next(line for line in out.splitlines() if line.startswith("requests served"))
    assert header.split("served")[1].split() == ["at", "once", "an", "hour", "a", "day", "2", "days", "a", "week"]
    row = next(line for line in out.splitlines() if line.startswith("  images")).split()[1:]
    assert row == [f"{p['images']:.0f}" for p in values["policies"]]
    told = out.split("all of this is an estimate:\n")[1].splitlines()
    assert [f"- {line}" for line in values["estimates"]] == told
    for part in (
        "drawn uniformly",
        "40.0 images a second on 1 lane, measured",
        "re-tunes 100% of what nobody named: the bound",
    ):
        assert part in "\n".join(told)
    assert "12 h" in out and "by the paper (Eq. 19)" in out and "95 % of them tune" in out


def test_speed_lanes_and_devices(capsys, tmp_path):
    """Only slices of the published program are a measure, of a device; idle lanes make one cluster no faster."""
    layout = made(tmp_path / "run", tuning__lanes=2, clustering__sample_from="public")
    found = planned(capsys, layout, "--devices=4")
    assert found["images_per_second"] == pytest.approx(4 * SPEED) and found["lanes"] == 8
    assert (
        "160.0 images a second on 8 lanes, measured on this workdir's slices, times 4 devices" in found["estimates"][1]
    )
    own = np.mean([EPOCHS * SIZES[key] for key in SIZES for _ in range(SIZES[key])])
    assert found["policies"][0]["seconds"] == pytest.approx(own / (SPEED / 2))
    assert found["policies"][0]["paper"]["seconds"] == pytest.approx(75 / (SPEED / 2))
    assert found["policies"][0]["gain"] == pytest.approx(300 / own / 8), "one lane of eight against all of them"
    assert found["policies"][0]["paper"]["gain"] == pytest.approx(300 / 75 / 8)
    given = planned(capsys, layout, "--devices=4", "--images_per_second=400")
    assert given["policies"][0]["seconds"] == pytest.approx(own / 50)
    assert "400.0 images a second on 8 lanes, as given" in given["estimates"][1]
    with catalog_of(layout) as catalog:
        catalog.db.execute("UPDATE slices SET seconds=0")
    code, _, err = call(capsys, "forecast", f"--workdir={layout.root}", "--rate=3", "--window=2")
    assert code == 2 and "--images_per_second=X is missing" in err and "no slice of this program was timed" in err
    assert planned(capsys, layout, "--images_per_second=400")["policies"][0]["seconds"] == pytest.approx(own / 200)


def test_more_devices_are_never_slower(capsys, tmp_path):
    """Measured on one device: the others bring as many lanes, each as fast."""
    layout = made(tmp_path / "run")
    found = [planned(capsys, layout, f"--devices={devices}") for devices in (1, 2, 3, 8)]
    for fewer, more in zip(found, found[1:]):
        for one, other in zip(fewer["policies"], more["policies"], strict=True):
            assert other["seconds"] <= one["seconds"] * (1 + 1e-9), one["name"]
        assert more["simulated"]["seconds"]["mean"] <= fewer["simulated"]["seconds"]["mean"] * (1 + 1e-9)
    weeks = [one["policies"][-1]["seconds"] for one in (found[0], found[-1])]
    assert weeks[1] < 0.7 * weeks[0], "a batch of many clusters gains"


@pytest.mark.parametrize("setting", [{"sample_from": "public"}, {"partition": "random"}, {"partition": "one"}], ids=str)
def test_without_a_private_sample_nothing_re_clusters(capsys, tmp_path, setting):
    found = planned(capsys, made(tmp_path / "run", **{f"clustering__{name}": value for name, value in setting.items()}))
    assert found["sampled"] == 0 and all(p["reclustering"] == 0 for p in found["policies"])
    assert found["policies"][0]["images"] == pytest.approx(found["size_biased_images"])
    assert not any("new clustering" in line for line in found["estimates"])


def test_the_share_of_a_re_clustering_is_measured_where_there_was_one(capsys, layout):
    lines = [
        {
            "kind": kind,
            "reclustered": again,
            "images": 290,
            "images_full": 300,
        }  # most of them in clusters that were hit
        | {"images_spared": spared, "images_changed": altered}
        for kind, again, spared, altered in (
            ("reconcile", False, 300, 0),
            ("reconcile", True, 50, 10),
            ("reconcile", True, 250, 80),
            ("reconcile", True, 0, 0),  # every cluster was hit, or nobody was erased
            ("reconcile", True, 5, 6),
            ("other", True, 300, 300),
        )
    ]
    lines += [["reconcile"], {"kind": "reconcile", "reclustered": True, "images": 290, "images_full": 300}]
    layout.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "reconcile", "recl')
    found = planned(capsys, layout)
    assert (found["reclustered_share"], found["reclusterings_seen"]) == (pytest.approx(0.3), 2)
    assert any("re-tunes 30% of what nobody named: the mean of 2 seen here" in line for line in found["estimates"])
    bound = planned(capsys, layout, "--reclustered=1")
    assert bound["policies"][0]["images"] > found["policies"][0]["images"]
    assert any("re-tunes 100% of what nobody named: as given" in line for line in bound["estimates"])
    none = planned(capsys, layout, "--reclustered=0")
    assert none["policies"][0]["images"] == pytest.approx(none["size_biased_images"])


def test_stages_and_earlier_epochs_count_with_what_they_started_from(capsys, tmp_path):
    layout = made(tmp_path / "run", tuning__slices=2)
    with catalog_of(layout) as catalog:
        catalog.add_slice(slice_row("f" * 64, "a", 25), [])
        catalog.db.execute("UPDATE slices SET parent=? WHERE digest=?", ("f" * 64, "a" * 64))
        catalog.db.execute("UPDATE entries SET slice=slice || '@4' WHERE cluster='a'")
    found = planned(capsys, layout)
    assert found["images_full"] == EPOCHS * (100 + 25) and found["stages"] == 2
    assert any("all its 2 stages" in line for line in found["estimates"])


def test_erased_records_and_empty_clusters_do_not_count(capsys, layout):
    with catalog_of(layout) as catalog:
        requests.accept(catalog, [f"d{i:02d}" for i in range(5)] + ["a00"])
    found = planned(capsys, layout)
    assert (found["records"], found["clusters"], found["sampled"]) == (94, 3, SAMPLE)
    with catalog_of(layout) as catalog:
        requests.accept(catalog, [name for name in catalog.live("train").ids])
    code, _, err = call(capsys, "forecast", f"--workdir={layout.root}", "--rate=3", "--window=2")
    assert code == 2 and "no live private record in a published cluster" in err


def test_requests_that_come_faster_than_they_are_served_are_told(capsys, layout):
    found = planned(capsys, layout, rate=1e6)
    late = [p["name"] for p in found["policies"] if p["busy"] >= 1]
    assert "at once" in late and "a week" not in late
    assert found["estimates"][-1] == f"requests arrive faster than they are served: {', '.join(late)}"
    assert not any("faster" in line for line in planned(capsys, layout)["estimates"])


def test_a_window_that_is_listed_anyway_is_not_listed_twice(capsys, layout):
    assert [p["name"] for p in planned(capsys, layout, window=7)["policies"]] == list(policy.WINDOWS)
    assert planned(capsys, layout, window=0.5)["policies"][2]["name"] == "0.5 days"


@pytest.mark.parametrize("count", [1, 2, 30])
def test_so_many_requests_at_a_time(capsys, layout, count):
    """Against every record's chance to be among k drawn; nobody waits for requests that have already come."""
    found = planned(capsys, layout, f"--requests={count}", window=None)
    names = [p["name"] for p in found["policies"]]
    assert names.count("every 30") == (count == 30) and len(names) == len(policy.WINDOWS) + (count > 1)
    p = next(p for p in found["policies"] if p["requests"] == count and p["any"] == 1)
    sampled = {key: sum(s for k, s in records_of(layout) if k == key) for key in SIZES}
    tuned = {k: 1 - (1 - (SIZES[k] + SAMPLE - sampled[k]) / 100) ** count for k in SIZES}
    assert p["images"] == pytest.approx(sum(EPOCHS * SIZES[k] * chance for k, chance in tuned.items()))
    assert p["paper"]["clusters"] == pytest.approx(sum(1 - (1 - m / 100) ** count for m in SIZES.values()))
    assert p["batches"] == pytest.approx(90 / count) and p["window_days"] == pytest.approx((count - 1) / 3)
    assert p["wait_seconds"] == pytest.approx(p["window_days"] * 86400 / 2 + p["seconds"])
    drawn = found["simulated"]
    assert abs(drawn["images"]["mean"] - p["images"]) < 2 * drawn["images"]["error"]
    out = call(capsys, "forecast", f"--workdir={layout.root}", "--rate=3", f"--requests={count}")[1]
    assert f"2000 batches of {count} requests drawn at random" in out and "days drawn" not in out


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--requests=0"], "--requests=0: must be at least 1"),
        (["--requests=-3"], "--requests=-3: must be at least 1"),
        (["--requests=101"], "--requests=101: must be at most the number of records, 100"),
        (["--requests=5", "--window=2"], "--requests=5 and --window=2: give one of them"),
        ([], "--window=X is missing: days in which requests are collected, a number above 0; or --requests=K"),
        (["--requests=few"], "requests"),
        (["--requests=2.5"], "requests"),
    ],
)
def test_requests_that_cannot_be_are_refused(capsys, layout, flags, told):
    code, out, err = call(capsys, "forecast", f"--workdir={layout.root}", "--rate=3", *flags)
    assert code == 2 and not out and told in err and "several" not in err and "Traceback" not in err


def test_clusters_that_share_a_slice_are_tuned_as_one(capsys, tmp_path):
    layout = made(tmp_path / "run", clustering__sample_from="public")
    with catalog_of(layout) as catalog:
        catalog.db.execute("UPDATE entries SET slice=?", ("a" * 64,))
        catalog.db.execute("UPDATE slices SET images=? WHERE digest=?", (EPOCHS * 100, "a" * 64))
    found = planned(capsys, layout)
    assert (found["records"], found["clusters"], found["images_full"]) == (100, 1, EPOCHS * 100)
    assert found["policies"][0]["share"] == pytest.approx(1)


def test_slices_that_are_formulas_need_no_plan(capsys, layout):
    with catalog_of(layout) as catalog:
        catalog.db.execute("UPDATE slices SET images=0")
    code, _, err = call(capsys, "forecast", f"--workdir={layout.root}", "--rate=3", "--window=2")
    assert code == 2 and "makes its slices by a formula" in err


BAD = {
    "--rate=0": "--rate=0: requests a day, must be a number from 1e-09 to 1e+09",
    "--rate=1e-200": "--rate=1e-200: requests a day, must be a number from 1e-09 to 1e+09",
    "--rate=inf": "--rate=inf: requests a day, must be a number from 1e-09 to 1e+09",
    "--window=-1": "--window=-1: days in which requests are collected, must be a number from 1e-09 to 1e+09",
    "--window=nan": "--window=nan: days in which requests are collected, must be a number from 1e-09 to 1e+09",
    "--images_per_second=0": "--images_per_second=0: images, must be a number from 1e-09 to 1e+09",
    "--devices=0": "--devices=0: must be at least 1",
    "--reclustered=1.5": "--reclustered=1.5: must be a share from 0 to 1",
    "--reclustered=nan": "--reclustered=nan: must be a share from 0 to 1",
    "--figure=picture.gif": "--figure=picture.gif: must end in one of .png, .svg, .pdf",
    "--figure=/proc/none/x.png": "--figure=/proc/none/x.png cannot be written",
}


@pytest.mark.parametrize("flag", BAD)
def test_each_bad_value_is_named_with_its_flag(capsys, layout, flag):
    good = [f for f in ("--rate=3", "--window=2") if f.partition("=")[0] != flag.partition("=")[0]]
    code, out, err = call(capsys, "forecast", f"--workdir={layout.root}", *good, flag)
    assert code == 2 and not out and BAD[flag] in err and "several" not in err


def test_everything_that_is_wrong_is_told_at_once(capsys, tmp_path):
    flags = ["--rate=0", "--window=-1", "--images_per_second=0", "--devices=0", "--reclustered=1.5", "--figure=x.gif"]
    code, _, err = call(capsys, "forecast", f"--workdir={tmp_path}/none", *flags)
    assert code == 2 and err.count("\n- ") == 7 and f"--workdir={tmp_path}/none does not exist" in err
    assert all(flag.partition("=")[0] in err for flag in flags)
    code, _, err = call(capsys, "forecast")
    assert code == 2 and all(f"--{name}=" in err for name in ("rate", "window", "workdir")) and "missing" in err
    code, _, err = call(capsys, "forecast", "--rate=often", "--window=2")
    assert code == 2 and "rate" in err
    code, _, err = call(
        capsys, "forecast", f"--workdir={tmp_path}", "--rate=1", "--window=2", "--config.tuning.epochs=3"
    )
    assert code == 2 and "config" in err, "the config is the workdir's"


def test_workdirs_without_a_published_state(capsys, tmp_path):
    flags = ["--rate=3", "--window=2"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is no workdir" in call(capsys, "forecast", f"--workdir={tmp_path}/mine", *flags)[2]
    layout = made(tmp_path / "run")
    with catalog_of(layout) as catalog:
        catalog.db.execute("DELETE FROM manifests")
    code, _, err = call(capsys, "forecast", f"--workdir={layout.root}", *flags)
    assert code == 2 and "has no published state; run: lmeraser train --workdir=" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_reading_waits_for_nobody_writes_nothing_and_needs_no_jax(capsys, layout):
    def content():
        return {path.name: path.read_bytes() for path in layout.root.iterdir() if "catalog" not in path.name}

    with catalog_of(layout) as catalog:
        before = content(), list(catalog.db.iterdump())
    with writer_lock(layout):
        planned(capsys, layout)
    with catalog_of(layout) as catalog:
        assert (content().keys() - {"lock"}, list(catalog.db.iterdump())) == (before[0].keys(), before[1])
    code = "import sys; from lmeraser_jax.cli.main import main; assert main(sys.argv[1:]) == 0;"
    code += "assert not {'jax', 'flax', 'orbax', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    flags = ["forecast", f"--workdir={layout.root}", "--rate=3", "--window=2"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, capture_output=True)


def test_the_picture(capsys, layout, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from lmeraser_jax.experiments import simulation

    monkeypatch.setattr(simulation, "WINDOWS", 100)
    drawn = []
    figure = simulation.figure
    monkeypatch.setattr(simulation, "figure", lambda *args: drawn.append(args) or figure(*args))
    planned(capsys, layout, f"--figure={tmp_path}/plan.png", "--devices=3", "--reclustered=0.5")
    _, clusters, expected, changed, machine = drawn[0]
    assert (min(expected), max(expected), changed) == (pytest.approx(3 / 24), pytest.approx(21), 0.5)
    assert machine == cost_model.Machine(3, 3 * SPEED) and clusters.members.tolist() == list(SIZES.values())
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 800 and len(picture.getcolors(1 << 24)) > 50


def test_without_matplotlib_the_rest_works(capsys, layout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = [f"--workdir={layout.root}", "--rate=3", "--window=2"]
    code, _, err = call(capsys, "forecast", *flags, f"--figure={tmp_path}/plan.png")
    assert code == 2 and "pip install matplotlib" in err and not (tmp_path / "plan.png").exists()
    assert call(capsys, "forecast", *flags)[0] == 0
