"""Signed receipts: what `cryptography` says of the files' bytes; edits, rotation, killed processes, bad keys."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from helpers import small_run
from test_receipts import catalog_of, edits_of, replaced, sealed, stored

from lmeraser_jax.cli import add, common, process, rectify, rollback, train, unlearn
from lmeraser_jax.cli.main import main
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import erase, receipts, signatures
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.signatures import NO_KEYS, UNSIGNED
from lmeraser_jax.unlearning.verify import verify_all, verify_copies

pytestmark = pytest.mark.usefixtures("fast_files")
OLD, NEW = "old.pem", "new.pem"


@pytest.fixture(scope="module")
def signed(tmp_path_factory, fast_files):
    """A folder with two keys and a workdir: two receipts and a head by the old key, later one more by the new key."""
    folder = tmp_path_factory.mktemp("signed")
    for name in (OLD, NEW):
        signatures.make_keys(folder / name)
    with small_run(folder / "run") as run:
        build(run)
        first, second, third = run.catalog.live("train").ids[:3]
        erase.request_erasure(run, [first], request="one")  # signed by the next command
        old, new = (dataclasses.replace(run, signing_key=key_of(folder, name)) for name in (OLD, NEW))
        erase.request_erasure(old, [second], request="two", reason="why: § 17")
        shutil.copy(run.layout.receipts_head, folder / "old_head.json")
        erase.request_erasure(new, [third], request="three")
    return folder


@pytest.fixture
def copied(signed, tmp_path):
    return shutil.copytree(signed, tmp_path / "signed")


def key_of(folder, name):
    return signatures.load_signing_key(str(folder / name))


def public(folder, *names):
    return signatures.load_public_keys([f"{folder / name}.pub" for name in names])


def findings(folder, keys=NO_KEYS):
    with catalog_of(Layout(folder / "run")) as catalog:
        verdicts = verify_all(Layout(folder / "run"), catalog, keys)
    return [f"{verdict.name.rpartition('/')[2]}: {line}" for verdict in verdicts for line in verdict.findings]


def unsign(folder, *names):
    layout = Layout(folder / "run")
    for name in names:
        write_json(layout.receipt(name), stored(layout, name) | {"signature": None})


@contextlib.contextmanager
def opened(folder, key):
    """The workdir as another process opens it."""
    with small_run(folder / "run") as run:
        yield dataclasses.replace(run, signing_key=key_of(folder, key) if key else None)


def test_cryptography_alone_confirms_every_file(signed):
    layout = Layout(signed / "run")
    signers = {layout.receipt("one"): OLD, layout.receipt("two"): OLD, layout.receipt("three"): NEW}
    for path, name in {**signers, layout.receipts_head: NEW, signed / "old_head.json": OLD}.items():
        values, pem = json.loads(path.read_bytes()), (signed / f"{name}.pub").read_bytes()
        signature = values.pop("signature")
        body = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        serialization.load_pem_public_key(pem).verify(bytes.fromhex(signature["value"]), body)
        assert signature["key"] == hashlib.sha256(base64.b64decode(pem.split(b"-----")[2])).hexdigest()
        assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(layout.receipts_head.read_text())["digest"] == sealed(stored(layout, "three"))["digest"]
    assert findings(signed) == findings(signed, public(signed, OLD, NEW)) == []


def test_every_edit_of_a_copy_is_refused(signed, tmp_path):
    """Also where the digest is made to fit, and for every part of a signature."""
    keys, copy = public(signed, OLD, NEW), tmp_path / "copy.json"
    for path in (Layout(signed / "run").receipt("two"), signed / "old_head.json"):
        whole = json.loads(path.read_text())
        assert verify_copies([path], keys)[0].ok
        for place, edited in edits_of(whole):
            copy.write_text(json.dumps(edited if path.stem == "old_head" else sealed(edited)))
            assert place == ("digest",) and path.stem == "two" or not verify_copies([copy], keys)[0].ok, place
        copy.write_text(json.dumps(replaced(whole, ("signature", "value"), "0" * 128)))
        assert "was edited after it was signed" in verify_copies([copy], keys)[0].findings[0]
    copy.write_text(json.dumps(stored(Layout(signed / "run"), "two") | {"signature": None}))
    assert verify_copies([copy], keys)[0].findings == (UNSIGNED,)


def test_rotated_keys_and_two_receipts_for_one_place(signed, tmp_path):
    other = public(signed, NEW)
    lines = findings(signed, other)
    assert [line.partition(":")[0] for line in lines] == ["one.json", "two.json"]
    assert all("not with one of those given" in line for line in lines)
    layout, keys = Layout(signed / "run"), public(signed, OLD, NEW)
    copies = [layout.receipts_head, *layout.receipts.iterdir(), signed / "old_head.json"]
    assert all(verdict.ok for verdict in verify_copies(copies, keys))
    forged = sealed(replaced(stored(layout, "two"), ("request", "reason"), "another"))  # by the operator
    write_json(tmp_path / "two.json", forged)
    assert [verdict.ok for verdict in verify_copies([tmp_path / "two.json", *copies], keys)] == [False] + [True] * 5
    write_json(tmp_path / "two.json", signatures.sign(forged, key_of(signed, OLD)))
    (alone,) = verify_copies([tmp_path / "two.json"], keys)
    *_, beside = verify_copies([*copies, tmp_path / "two.json"], keys)
    assert alone.ok and "another receipt at place 2" in beside.findings[0]


def test_without_a_key_nothing_is_signed_and_the_next_command_with_one_signs_all(copied):
    layout, names, keys = Layout(copied / "run"), ("one", "two", "three"), public(copied, NEW)
    unsign(copied, *names)
    layout.receipts_head.unlink()
    with opened(copied, "") as run:
        build(run)
    assert findings(copied) == [] and not layout.receipts_head.exists()
    missing, *unsigned = findings(copied, keys)
    assert "receipts_head.json: is missing" in missing
    assert unsigned == [f"{name}.json: {UNSIGNED}" for name in names] and "--signing_key=FILE" in UNSIGNED
    before = [stored(layout, name) for name in names]
    with opened(copied, NEW) as run:
        build(run)
    assert findings(copied, keys) == []
    assert [stored(layout, name) | {"signature": None} for name in names] == before


def test_a_signature_that_was_removed_stays_a_finding(copied):
    unsign(copied, "three")
    with opened(copied, NEW) as run:
        build(run)
    assert findings(copied, public(copied, OLD, NEW)) == [f"three.json: {UNSIGNED}"]


@pytest.mark.parametrize("owner, name", [(Catalog, "add_receipts"), (receipts, "sign"), (signatures, "sign")])
def test_a_receipt_is_signed_by_the_process_that_finishes_it(copied, owner, name):
    """Killed before the receipts are in the chain, before the first signature, and before the second."""
    layout, keys, real = Layout(copied / "run"), public(copied, OLD, NEW), getattr(owner, name)

    def kill(*arguments):
        if owner is signatures and arguments[0].get("request", {}).get("id") != "five":
            return real(*arguments)
        raise InterruptedError

    with opened(copied, NEW) as run, pytest.MonkeyPatch.context() as patch:
        four, five = run.catalog.live("train").ids[:2]
        erase.request_erasure(run, [four], request="four", defer=True)
        patch.setattr(owner, name, kill)
        with pytest.raises(InterruptedError):
            erase.request_erasure(run, [five], request="five")
    assert [stored(layout, name)["signature"] is None for name in ("four", "five")] == [owner is not signatures, True]
    with opened(copied, "") as run:
        build(run)
    assert findings(copied) == [] and f"five.json: {UNSIGNED}" in findings(copied, keys)
    with opened(copied, NEW) as run:
        build(run)
    assert findings(copied, keys) == []


def test_a_chain_that_was_cut_shows_by_its_head_and_goes_on_signed(copied, signed):
    layout, keys = Layout(copied / "run"), public(copied, OLD, NEW)
    with opened(copied, NEW) as run:
        erase.request_erasure(run, run.catalog.live("train").ids[:1], request="four")
    head = layout.receipts_head.read_bytes()
    shutil.rmtree(layout.root)
    shutil.copytree(signed / "run", layout.root)
    layout.receipts_head.write_bytes(head)
    assert ["names another receipt at place 4" in line for line in findings(copied)] == [True]
    with opened(copied, NEW) as run:
        erase.request_erasure(run, run.catalog.live("train").ids[1:2], request="five")
    assert findings(copied, keys) == []
    layout.receipts_head.write_bytes(head)
    assert ["names another receipt at place 4" in line for line in findings(copied)] == [True]


def test_commands_make_keys_sign_and_check(copied, capsys, monkeypatch):
    key, at, layout = copied / "made" / "key", f"--workdir={copied / 'run'}", Layout(copied / "run")
    assert main(["keys", f"--out={key}", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] in signatures.load_public_keys([f"{key}.pub"])
    assert [Path(f"{key}{end}").stat().st_mode & 0o777 for end in ("", ".pub")] == [0o600, 0o644]
    key.rename(copied / "key")
    for name in (copied / "key", key):  # of the second only the public key is there
        assert main(["keys", f"--out={name}"]) == 2 and "no key is overwritten" in capsys.readouterr().err
    assert not key.exists()
    signing = f"--signing_key={copied / 'key'}"
    request = ["unlearn", at, "--records=digit-0031", "--request=four", signing]
    with writer_lock(layout):
        assert main(request) == 2 and f"lmeraser process {at} {signing}\n" in capsys.readouterr().err
    assert main(request) == 0 and stored(layout, "four")["signature"] is not None
    unsign(copied, "four")
    layout.receipts_head.unlink()
    assert main(["process", at, f"{signing}.pub"]) == 2  # although no request waits
    assert main(["train", at, signing]) == 0
    copy = shutil.copy(layout.receipt("four"), copied)
    capsys.readouterr()
    check = ["verify", f"--receipt={copy}"]
    assert main([*check, f"--public_key={key}.pub"]) == 0
    assert capsys.readouterr().out.startswith(f"holds: {copy} (request four, signed with the key ")
    assert main([*check, f"--public_key={copied / NEW}.pub"]) == 1
    assert main(check) == 2 and "--public_key=FILE is missing" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert main(["keys", f"--out={copied / 'more'}"]) == 2 and "pip install" in capsys.readouterr().err
    assert all(common.SIGNING_KEY in module.FLAGS for module in (train, add, unlearn, rectify, process, rollback))


def test_key_files_that_are_refused_before_anything_is_accepted(copied, capsys):
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    elliptic, edwards = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    contents = {
        "junk": b"junk",
        "elliptic": elliptic.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        "elliptic.pub": elliptic.public_key().public_bytes(pem, spki),
        "password": edwards.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"x")),
        "loose": (copied / OLD).read_bytes(),
    }
    for name, content in contents.items():
        (copied / name).write_bytes(content)
        (copied / name).chmod(0o644 if name == "loose" else 0o600)
    signing = {"none": "No such file", "run": "Is a directory", "loose": "(mode 0644)", f"{OLD}.pub": "is a public key"}
    signing |= {"junk": "is no private key", "elliptic": "must be Ed25519", "password": "is no private key"}
    checking = {"none": "No such file", "junk": "is no public key", "elliptic.pub": "must be", OLD: "is a private key"}
    request = ["unlearn", f"--workdir={copied / 'run'}", "--records=digit-0031", "--defer"]
    check = ["verify", f"--receipt={copied / 'old_head.json'}"]
    for command, flag, refusals in ((request, "signing_key", signing), (check, "public_key", checking)):
        for name, message in refusals.items():
            assert main([*command, f"--{flag}={copied / name}"]) == 2, name
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: --{flag}={copied / name} ") and message in line, line
    with catalog_of(Layout(copied / "run")) as catalog:
        assert not requests.any_open(catalog)
