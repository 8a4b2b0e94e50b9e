"""Exact machine unlearning for vision and language models: LMEraser (AISTATS 2025) on JAX.

    import lmeraser_jax as lm

    lm.train("runs/digits", {"tuning": {"epochs": 20}})
    erasure = lm.unlearn("runs/digits", records=["digit-0017"], requester="desk 3")
    assert lm.audit("runs/digits").ok

A workdir is a folder that holds one run, for these functions and the command line alike. Each function raises
`UserError`, with all that is wrong in one message, and imports what it needs when it is called.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmeraser_jax.config import Config, from_dict
from lmeraser_jax.config.paths import absolute, expand
from lmeraser_jax.errors import UserError, raise_all

if TYPE_CHECKING:
    import numpy as np

    from lmeraser_jax.evaluation import language
    from lmeraser_jax.evaluation.accuracy import Evaluation
    from lmeraser_jax.evaluation.predict import Predictions
    from lmeraser_jax.unlearning.audit import Verdict
    from lmeraser_jax.unlearning.build import BuildReport
    from lmeraser_jax.unlearning.erase import Erasure

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "answer", "audit", "evaluate", "predict", "rectify", "train", "unlearn"]


def train(workdir: str | Path, config: Config | Mapping[str, Any] | None = None) -> "BuildReport":
    """Imports the data, pretrains or converts the backbone, clusters the records and tunes every cluster.

    A second call on the same workdir resumes, or finds that nothing is to be done.

    Args:
        workdir: new, empty, or begun by an earlier call.
        config: a config, or nested settings such as `{"tuning": {"epochs": 20}}` with every other setting at its
            default; None: the workdir's own config, or the defaults (scikit-learn's digits) for a new workdir.
    """
    from lmeraser_jax.storage.workdir import Layout, read_config
    from lmeraser_jax.unlearning.build import build, repair
    from lmeraser_jax.unlearning.run import prepare_run

    if config is None:
        config = read_config(Layout(workdir)) or {}
    if not isinstance(config, Config):
        config = from_dict(config)
    with prepare_run(workdir, config) as (run, _):
        repair(run)
        return build(run)


def unlearn(
    workdir: str | Path,
    records: Iterable[str] = (),
    owners: Iterable[str] = (),
    *,
    request: str = "",
    requester: str = "",
    reason: str = "",
    signing_key: str | Path = "",
) -> "Erasure":
    """Erases records and brings the workdir to the state of never having had them, bit for bit.

    Args:
        workdir: a trained workdir.
        records: ids of records, each as it stands.
        owners: owners whose records are all erased. Live ones that only look like these are named in a warning.
        request: an id; a second request with the same id and records changes nothing.
        requester, reason: kept in the receipt for good.
        signing_key: file of a private key (`lmeraser keys`) that signs all receipts not signed yet; "": none.
    """
    from lmeraser_jax.storage import requests
    from lmeraser_jax.unlearning import signatures
    from lmeraser_jax.unlearning.erase import request_erasure
    from lmeraser_jax.unlearning.run import open_run

    records, owners = requests.name_list(records), requests.name_list(owners)  # an iterator can be read only once
    with open_run(workdir, write=True, signing_key=signatures.load_signing_key(absolute(signing_key))) as run:
        erasure = request_erasure(run, records, owners, request, requester, reason)
        for line in requests.still_live(run.catalog, records, owners):
            warnings.warn(line, stacklevel=2)
        return erasure


def rectify(
    workdir: str | Path,
    edits: str | Path | Iterable[Mapping[str, str]],
    *,
    request: str = "",
    requester: str = "",
    reason: str = "",
    signing_key: str | Path = "",
) -> "Erasure | None":
    """Replaces records and brings the workdir to the state of having had the corrected ones from the start.

    Args:
        workdir: a trained workdir.
        edits: a file of JSON lines, or such values: `{"id": "digit-0017", "label": "3", "image": "new.png"}`, of texts
            `{"id": "q1", "query": "...", "response": "..."}`. What an edit does not name stays as it is.
        request, requester, reason, signing_key: see `unlearn`.

    Returns:
        What was done; None where no edit changes anything.
    """
    from lmeraser_jax.unlearning import rectify, request_files, signatures
    from lmeraser_jax.unlearning.run import open_run

    is_file = isinstance(edits, str | Path)
    path = Path(expand(str(edits))) if is_file else Path("edits")
    lines = request_files.read_edits(str(path)) if is_file else [(f"edit {n}", e) for n, e in enumerate(edits, 1)]
    with open_run(workdir, write=True, signing_key=signatures.load_signing_key(absolute(signing_key))) as run:
        changes = rectify.changes_of(run.catalog, lines, path.parent, run.config.data.max_pixels)
        return rectify.request_rectification(run, changes, request, requester, reason)


def predict(workdir: str | Path, images: "np.ndarray | Sequence[str | Path]") -> "Predictions":
    """Predicts images: files, or uint8 [N, h, w, c] in the shape that the workdir keeps.

    A file that cannot be read stops no other: the answers' `unreadable` says why, {position: reason}; its label is -1,
    its probabilities are NaN. Every call loads the model; a process that stays alive uses
    `evaluation.serving.Predictor`.
    """
    import numpy as np

    from lmeraser_jax.evaluation import predict
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir) as run:
        if isinstance(images, str | Path):
            raise UserError(f"images must be a list of files or an array, not one file: {images}")
        if run.config.is_text:
            raise UserError(f"{workdir} has a language model, which answers queries: lm.answer")
        answer = functools.partial(predict.predict, predict.load_model(run))
        if not isinstance(images, np.ndarray):
            return predict.predict_files(run, [Path(expand(str(file))) for file in images], answer)
        shape = run.image_spec.height, run.image_spec.width, run.image_spec.channels
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            legal = ", ".join(map(str, shape))
            raise UserError(f"images: {images.dtype} {list(images.shape)}: must be uint8 [N, {legal}], or image files")
        return answer(images)


def answer(
    workdir: str | Path, queries: Sequence[str], max_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Answers queries by a workdir's language model, as `lmeraser predict --query` does: its rows of JSON, in order.

    Raises `UserError` with every query that has no answer.
    """
    if isinstance(queries, str) or not all(isinstance(text, str) and text.strip() for text in queries):
        raise UserError("queries must be a list of texts, none of them empty")
    if max_tokens < 1 or temperature < 0:
        raise UserError(f"max_tokens={max_tokens}: must be at least 1; temperature={temperature}: must be 0 or more")
    from lmeraser_jax.data.queries import Query
    from lmeraser_jax.evaluation import answers, language
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir) as run:
        if not run.config.is_text:
            raise UserError(f"{workdir} has no language model; its images are predicted by lm.predict")
        named = [Query(f"query {number}", text) for number, text in enumerate(queries, 1)]
        rows, failures = answers.answer(run, named, language.Sampling(max_tokens, temperature, seed))
    raise_all([f"{name}: {reason}" for name, reason in failures])
    return rows


def evaluate(workdir: str | Path, split: str = "test") -> "Evaluation | language.Evaluation":
    """Measures the accuracy on the test, holdout or train images, beside a linear head on the same features.

    Of a language model it measures the loss of the responses and the share of their tokens that are the likeliest.
    """
    from lmeraser_jax.evaluation import accuracy, language
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir) as run:
        return language.evaluate(run, split) if run.config.is_text else accuracy.evaluate(run, split)


def audit(workdir: str | Path, sample: int = 0) -> "Verdict":
    """Builds everything, or `sample` clusters drawn at random, again from the live records and compares every bit."""
    from lmeraser_jax.unlearning import audit
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir, write=True) as run:
        return audit.audit(run, sample)
