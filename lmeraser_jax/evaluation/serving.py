"""Prediction in a process that stays alive: answers follow quarantine and publishing as they are committed.

Shapes: N images or rows of text, m nearest clusters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from lmeraser_jax.evaluation.predict import Model, Predictions, load_model, predict
from lmeraser_jax.unlearning.run import Run

Answers = TypeVar("Answers", bound=Any)  # a dataclass as `Predictions`: arrays [N, ...], clusters, keys, approximate


class Predictor:
    """Answers with the state that a workdir has when the answer is given.

    It looks at the catalog before and after each device batch. Answers that a change in between has reached are
    computed again before any is returned: once an erasure is accepted with quarantine, no returned answer used the
    prototype, the prompt or the head of a quarantined cluster, and all answers of a call are of one state.

    The run is used by one thread, the one that opened it; `state`, the model that gave the last answer, is used up by
    the next one. Raises `UserError` as `load_model` does, also from a call, after which a later call may succeed.
    """

    def __init__(self, run: Run):
        self.run = run
        self._stamp = run.catalog.stamp()  # before the state is read: a commit in between is noticed
        self.state = load_model(run)

    def __call__(self, images: np.ndarray) -> Predictions:
        """Predicts images of the stored shape: uint8 [N, h, w, c]."""
        return self.answer(images, predict)

    def answer(self, rows: np.ndarray, program: Callable[[Model, np.ndarray], Answers]) -> Answers:
        """What a program answers to rows [N, ...] in the state of this moment."""
        size = self.run.config.inference.batch * self.run.mesh.size
        model = self.follow()
        answers, waiting = _unanswered(program(model, rows[:0]), model, len(rows)), np.arange(len(rows))
        while len(waiting):
            batch, waiting = waiting[:size], waiting[size:]
            new = program(model, rows[batch])
            for name, values in _arrays(new).items():
                getattr(answers, name)[batch] = values
            before, model = model, self.follow()
            if model is not before:
                answers = _still_valid(answers, before, model)
                waiting = np.flatnonzero(answers.clusters[:, 0] < 0)
        return answers

    def follow(self) -> Model:
        """The state of this moment. Microseconds unless another one was committed since the last call."""
        stamp = self.run.catalog.stamp()
        if stamp != self._stamp:
            self.state, self._stamp = load_model(self.run, self.state), stamp
        return self.state


def _arrays(answers: Any) -> dict[str, Any]:
    """The fields of answers that have a row for each input."""
    return {name: values for name, values in vars(answers).items() if isinstance(values, np.ndarray)}


def _unanswered(like: Answers, model: Model, count: int) -> Answers:
    """So many answers whose clusters, those of the model, are all -1."""
    blank: dict[str, Any] = {
        name: np.zeros((count, *values.shape[1:]), values.dtype) for name, values in _arrays(like).items()
    }
    blank["clusters"] = np.full((count, model.nearest), -1, np.int32)
    return dataclasses.replace(like, keys=model.keys, approximate=model.approximate, **blank)


def _still_valid(answers: Answers, before: Model, model: Model) -> Answers:
    """The answers of the state before that the new one would give too; the others are unanswered (-1)."""
    same = (before.clustering, before.common_ref) == (model.clustering, model.common_ref)
    pairs = list(zip(before.refs, model.refs, strict=same))
    if not same or any(new and not old for old, new in pairs):  # what joins may be the nearest of any image
        return _unanswered(answers, model, len(answers.clusters))
    replaced = np.array([old != new for old, new in pairs])
    answers.clusters[(replaced[answers.clusters] & (answers.clusters >= 0)).any(axis=1)] = -1
    return dataclasses.replace(answers, approximate=model.approximate)
