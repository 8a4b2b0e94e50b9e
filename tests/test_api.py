"""The Python interface: `import lmeraser_jax as lm`, the README's example, and what it refuses."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lmeraser_jax as lm
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.workdir import Layout, read_config
from lmeraser_jax.unlearning import signatures
from lmeraser_jax.unlearning.verify import verify_copies

README = Path(__file__).resolve().parents[1] / "README.md"
FIRST = "digit-0017"  # the first private record of the digits


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)


def test_the_import_alone_loads_nothing_heavy():
    code = "import sys, lmeraser_jax; assert not {'jax', 'orbax', 'flax', 'numpy', 'absl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_call_each_from_a_trained_workdir_to_the_proof(trained_workdir, monkeypatch):
    assert lm.train(trained_workdir).retuned == 0, "without a config it is the workdir's own"
    assert lm.train(trained_workdir, read_config(Layout(trained_workdir))).retuned == 0
    erasure = lm.unlearn(trained_workdir, records=[FIRST], request="mine", requester="desk 3")
    assert erasure.records == 1 and erasure.outcome.retuned > 0 and erasure.receipt.is_file()
    monkeypatch.setattr(requests, "still_live", lambda catalog, records, owners: [f"{records} and {owners}"])
    with pytest.warns(UserWarning, match=re.escape(f"['{FIRST}'] and []")):
        again = lm.unlearn(trained_workdir, records=iter([FIRST]), request="mine")
    assert again.outcome is None and again.receipt == erasure.receipt
    assert lm.audit(trained_workdir).ok
    assert 0 < lm.evaluate(trained_workdir).accuracy <= 1


def test_a_key_signs_the_receipts_of_both_kinds_of_requests(trained_workdir, tmp_path):
    public, _ = signatures.make_keys(tmp_path / "key.pem")
    with pytest.raises(lm.UserError, match="--signing_key=.* is a public key"):
        lm.unlearn(trained_workdir, records=[FIRST], signing_key=public)
    erasure = lm.unlearn(trained_workdir, records=[FIRST], signing_key=tmp_path / "key.pem")
    edit = {"id": "digit-0018", "label": "3"}
    correction = lm.rectify(trained_workdir, [edit], signing_key=str(tmp_path / "key.pem"))
    keys = signatures.load_public_keys([public])
    assert all(each.ok for each in verify_copies([erasure.receipt, correction.receipt], keys))


def test_arrays_and_image_files_are_predicted_alike(trained_workdir, tmp_path):
    images = pictures(3)
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images):
        Image.fromarray(image[..., 0]).save(file)
    answers, same = lm.predict(trained_workdir, images), lm.predict(trained_workdir, files)
    assert answers.probabilities.shape == (3, 10) and set(answers.labels) <= set(range(10))
    np.testing.assert_array_equal(answers.probabilities, same.probabilities)
    files[1:2] = [tmp_path / "none.png", tmp_path]
    some = lm.predict(trained_workdir, files)
    assert some.unreadable.keys() == {1, 2} and some.labels.tolist() == [answers.labels[0], -1, -1, answers.labels[2]]
    assert np.isnan(some.probabilities[[1, 2]]).all() and (some.clusters[[1, 2]] == -1).all()
    np.testing.assert_array_equal(some.probabilities[[0, 3]], answers.probabilities[[0, 2]])


def test_what_is_refused_changes_nothing(trained_workdir, tmp_path):
    with pytest.raises(lm.UserError, match=r"float64 \[3, 8, 8, 1\]: must be uint8 \[N, 8, 8, 1\]"):
        lm.predict(trained_workdir, pictures(3).astype(float))
    with pytest.raises(lm.UserError, match="must be a list of files"):
        lm.predict(trained_workdir, "a.png")
    with pytest.raises(lm.UserError, match="must be uint8"):
        lm.predict(trained_workdir, pictures(3)[:, :7])
    with pytest.raises(lm.UserError, match="lists of names, not text"):
        lm.unlearn(trained_workdir, records=FIRST)
    with pytest.raises(lm.UserError, match="unknown records: nobody"):
        lm.unlearn(trained_workdir, records=[FIRST, "nobody"])
    assert lm.train(trained_workdir).retuned == 0, "nothing was erased"
    for config in ({"tuning": {"epoch": 3}}, {"tuning": {"epochs": 0}}):
        with pytest.raises(lm.UserError, match="tuning.epoch"):
            lm.train(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    with pytest.raises(lm.UserError, match="does not exist"):
        lm.audit(tmp_path / "none")


@pytest.mark.slow
def test_the_readme_s_example_runs_with_fewer_epochs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures(1)[0, ..., 0]).save("YOUR_DIGIT.png")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    settings = '"tuning": {"epochs": 2, "min_steps": 4}, "pretraining": {"epochs": 1}'
    quick = example.replace('"tuning": {"epochs": 20}', settings)
    assert quick != example and len(example.splitlines()) <= 16
    exec(compile(quick, str(README), "exec"), {})
    assert len(list(tmp_path.glob("runs/*/receipts/*.json"))) == 1
