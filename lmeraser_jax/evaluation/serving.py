"""Prediction in a process that stays alive: answers follow quarantine and publishing as they are committed.

Shapes: N images, m nearest clusters.
"""

import numpy as np

from lmeraser_jax.evaluation.predict import Model, Predictions, load_model, predict
from lmeraser_jax.unlearning.run import Run


class Predictor:
    """Answers with the state that a workdir has when the answer is given.

    It looks at the catalog before and after each device batch. Answers that a change since then has reached are
    computed again before any is returned: once an erasure is accepted with quarantine, no answer that is returned
    used the prototype, the prompt or the head of a quarantined cluster, and all answers of a call are of one state.

    Args:
        run: an opened workdir; used by one thread, the one that opened it.

    Attributes:
        state: the model that gave the last answer; used up by the next one that it is replaced by.

    Raises:
        UserError: see `load_model`; also from a call, after which a later call may succeed.
    """

    def __init__(self, run: Run):
        self.run = run
        self._stamp = run.catalog.stamp()  # before the state is read: what is committed meanwhile is noticed
        self.state = load_model(run)

    def __call__(self, images: np.ndarray) -> Predictions:
        """Predicts images of the stored shape: uint8 [N, h, w, c]."""
        size = self.run.config.inference.batch * self.run.mesh.size
        model = self.follow()
        found, waiting = _unanswered(model, len(images)), np.arange(len(images))
        while len(waiting):
            now, waiting = waiting[:size], waiting[size:]
            answers = predict(model, images[now])
            found.probabilities[now], found.clusters[now] = answers.probabilities, answers.clusters
            old, model = model, self.follow()
            if model is not old:
                found = _still_right(found, old, model)
                waiting = np.flatnonzero(found.clusters[:, 0] < 0)
        return found

    def follow(self) -> Model:
        """The state of this moment. Microseconds unless another one was committed since the last call."""
        stamp = self.run.catalog.stamp()
        if stamp != self._stamp:
            self.state, self._stamp = load_model(self.run, self.state), stamp
        return self.state


def _unanswered(model: Model, count: int) -> Predictions:
    classes = len(model.run.classes)
    return Predictions(
        np.zeros((count, classes), np.float32), np.full((count, model.nearest), -1, np.int32), model.keys
    )


def _still_right(found: Predictions, old: Model, new: Model) -> Predictions:
    """The answers of the old state that are those of the new one too; the others are unanswered (-1).

    Taking clusters away, or replacing their slices, changes only the answers that used them; a cluster that joins
    may be the nearest of any image.
    """
    joined = any(b and not a for a, b in zip(old.refs, new.refs, strict=True))
    if joined or (old.clustering, old.common_ref) != (new.clustering, new.common_ref):
        return _unanswered(new, len(found.clusters))
    replaced = np.array([a != b for a, b in zip(old.refs, new.refs, strict=True)])
    used = (replaced[found.clusters] & (found.clusters >= 0)).any(axis=1)
    found.clusters[used] = -1
    return found
