"""The operator's commands: unlearn, process, requests, verify, through the command line."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import call, refused
from PIL import Image

from lmeraser_jax.data import digits
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout, writer_lock


@pytest.fixture
def at(trained_workdir) -> str:
    return f"--workdir={trained_workdir}"


@contextlib.contextmanager
def catalog_of(workdir):
    with contextlib.closing(Catalog(Layout(workdir).catalog)) as catalog:
        yield catalog


def live(workdir) -> list[str]:
    with catalog_of(workdir) as catalog:
        return list(catalog.live("train").ids)


def picture(path, name, scale=1):
    """Writes a digit as an image file."""
    source = digits.load()
    position = [item.id for item in source.items].index(name)
    pixels = source.read(range(position, position + 1)).rows[0, ..., 0]
    Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)).save(path)
    return path


def test_the_operators_day(at, trained_workdir, capsys, tmp_path):
    """Requests arrive in every form, wait, are served together, and leave receipts that hold."""
    first, second, third, *_ = live(trained_workdir)
    with catalog_of(trained_workdir) as catalog:
        owned = len({second, *catalog.owned("hand-005")})
    (tmp_path / "ids.csv").write_text(f"note;id;owner\nx;{second};\ny;;hand-005\n")
    flags_of_first = [f"--records={first}", "--request=first", "--requester=desk 3", "--reason=" + "long " * 20]
    like = f"--like={picture(tmp_path / 'a.png', third)}"
    for flags in (flags_of_first, [f"--records_file={tmp_path}/ids.csv", "--quarantine"], [like]):
        code, out, err = call(capsys, "unlearn", at, "--defer", *flags)
        assert code == 0 and out.startswith("accepted: request "), (out, err)
    assert f"a.png has the pixels of: {third}" in err
    code, out, _ = call(capsys, "process", at, "--max_wait=3600", "--max_batch=5")
    when = r"the oldest is 0:\d\d:\d\d old; due in (0:59:\d\d|1:00:00) or when 2 more arrive"
    assert code == 0 and re.fullmatch(f"3 requests wait; {when}\n", out), out
    code, out, _ = call(capsys, "requests", at, "--open")
    assert code == 0 and out.count("accepted") == 3 and "long long ..." not in out and "long..." in out
    assert call(capsys, "unlearn", at, *flags_of_first, "--defer")[0] == 0, "the same request again"
    code, out, _ = call(capsys, "process", at, "--max_wait=3600", "--max_batch=3", "--json=-")
    values = json.loads(out)
    assert code == 0 and [r["request"] for r in values["served"]][0] == "first" and len(values["served"]) == 3
    assert values["outcome"]["version"] == 2 and values["due"]["waiting"] == 3
    rows = json.loads(call(capsys, "requests", at, "--json=-")[1])["requests"]
    assert [(row["state"], row["records"]) for row in rows] == [("purged", 1), ("purged", owned), ("purged", 1)]
    receipt = trained_workdir / "receipts" / "first.json"
    assert rows[0]["requester"] == "desk 3" and rows[0]["receipt"] == str(receipt)
    assert call(capsys, "requests", at, "--open") == (0, "no requests\n", "")
    assert call(capsys, "process", at, "--max_batch=1") == (0, "no request waits\n", "")
    assert {first, second, third}.isdisjoint(live(trained_workdir))
    code, out, _ = call(capsys, "verify", at, "--all")
    assert code == 0 and out.count("holds: ") == 4
    code, out, _ = call(capsys, "unlearn", at, *flags_of_first)
    assert code == 0 and "request first was served before" in out
    assert call(capsys, "audit", at, "--sample=2")[0] == 0


def test_one_command_from_request_to_receipt(at, trained_workdir, capsys):
    first, second, *_ = live(trained_workdir)
    assert call(capsys, "unlearn", at, f"--records={second}", "--defer")[0] == 0
    code, out, err = call(capsys, "unlearn", at, f"--records={first}", f"--records={second}", "--request=a")
    assert code == 0 and "accepted: request a" in err and "1 other requests wait" in err
    assert "erased 1 records (request a)" in out and "1 records are being erased by an earlier request" in out
    for flags, lines in (
        (["--defer"], ["0 records, 0 clusters to tune", "2 records were erased before", "nothing to erase: all that"]),
        (["--dry_run"], ["nothing to erase: all that", "would erase 0 records"]),
        ([], ["2 records were erased before", "nothing to erase: all that", "nothing to do: all", "receipt: "]),
    ):
        nothing = call(capsys, "unlearn", at, f"--records={first}", f"--records={second}", *flags)
        assert nothing[0] == 0 and all(line in nothing[1] for line in lines), nothing
    receipt = Path(out.strip().rpartition("receipt: ")[2])
    assert call(capsys, "verify", at, receipt) == (0, f"holds: {receipt} (request a, not signed)\n", "")
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"config": "0" * 64}))
    code, out, _ = call(capsys, "verify", at, receipt)
    assert code == 1 and "DOES NOT HOLD" in out and "was edited" in out
    code, out, _ = call(capsys, "verify", at, "--all", "--json=-")
    assert code == 1 and json.loads(out)["ok"] is False
    for flags in ([], ["--all", receipt]):
        assert "name receipts or give --all" in refused(capsys, "verify", at, *flags)
    assert "no such file" in refused(capsys, "verify", at, "none.json")


def test_a_request_is_accepted_while_another_process_writes(at, trained_workdir, capsys):
    first, *_ = live(trained_workdir)
    with writer_lock(Layout(trained_workdir)):
        message = refused(capsys, "unlearn", at, f"--records={first}", "--request=a")
        assert "is being written by process" in message and "request a is accepted all the same" in message
        assert "lmeraser process" in message and first not in live(trained_workdir)
        assert "is being written by process" in refused(capsys, "process", at, "--wait=0.2")
    assert call(capsys, "process", at, "--wait=5")[0] == 0
    assert (trained_workdir / "receipts" / "a.json").is_file()


def test_what_is_refused_and_a_dry_run_change_nothing(at, trained_workdir, capsys, tmp_path):
    first, second, *_ = live(trained_workdir)
    noise = tmp_path / "noise.png"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(noise)
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n[]\n')
    with catalog_of(trained_workdir) as catalog:
        before = [line for line in catalog.db.iterdump() if "INSERT" in line]
        for flags, message in (
            ([f"--records={first}", "--records=nobody", "--records=none"], "unknown records: nobody, none"),
            ([f"--records={first},{second}"], f"unknown records: '{first},{second}'; a flag or line is one name"),
            ([f"--records={first}", "--owner=nobody", "--owner=hand-005"], "--owner=nobody"),
            ([f"--records={first}", "--records_file=none", f"--records_file={tmp_path}/bad.jsonl"], "no such file"),
            ([f"--records_file={tmp_path}/bad.jsonl"], "line 2: must be an object"),
            ([f"--like={picture(tmp_path / 'ok.png', first)}", f"--like={noise}"], "no live record has exactly these"),
            ([f"--like={picture(tmp_path / 'big.png', first, 2)}"], "has 16 x 16 pixels; must have 8 x 8"),
            ([f"--records={first}", "--defer", "--dry_run"], "use one of them"),
            ([f"--records={first}", "--request=a b"], "--request=a b: must be"),
            ([f"--records={first}", "--wait=-1"], "--wait"),
            ([f"--records={first}", "--config.tuning.batch=0"], "tuning.batch"),
            (["--records=nobody", "--dry_run"], "unknown records"),
            (["--requester=me"], "say what to erase"),
            (["--dry_run"], "say what to erase"),
        ):
            assert message in refused(capsys, "unlearn", at, *flags), flags
        for flag in ("--max_wait=-1", "--max_batch=0"):
            assert "--max_" in refused(capsys, "process", at, flag)
        assert call(capsys, "unlearn", at, f"--records={first}", "--owner=hand-005", "--dry_run")[0] == 0
        assert [line for line in catalog.db.iterdump() if "INSERT" in line] == before
    assert "does not exist" in refused(capsys, "requests", f"--workdir={tmp_path}/none")
    assert not (tmp_path / "none").exists()
