"""The thread that has the devices: it gathers what callers ask into batches, and follows the workdir between them.

A batch is one call of `serving.Predictor`, so all its answers are of one published state, and none used a slice that an
erasure accepted before the answer with quarantine. While no one asks, the thread follows the workdir all the same: an
erased slice leaves the memory within `IDLE` seconds.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from lmeraser_jax.config import Config, Inference
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.service.metrics import Metrics
from lmeraser_jax.service.problems import BUSY, Problem, Unavailable, log, place_of, public_text
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import binding
from lmeraser_jax.unlearning.run import Run, open_run

IDLE = 0.5  # seconds between two looks at the workdir while nobody asks
PAUSE = 1.0  # seconds before another try to open the workdir
Program = Callable[..., Any]  # `predict.predict`, `language.score` or a `language.Respond`; equal ones share a batch


@dataclasses.dataclass(frozen=True, eq=False)
class _Question:
    """What one caller asks; the answer comes as the result of the future."""

    program: Program
    rows: np.ndarray  # [n, ...]
    future: "Future[Answered]"


@dataclasses.dataclass(frozen=True, eq=False)
class Answered:
    """What a program answers to the rows of one caller."""

    answers: Any  # as `program` gives them
    version: int  # of the manifest that answered


class Answering:
    """Answers rows of images or tokens, from any thread. `run` is the opened workdir, whose catalog is not for callers.

    A caller gets `Problem` 503 while the queue is full, and `Unavailable` while the workdir can answer nothing: nothing
    is published, or every cluster is in quarantine.
    """

    def __init__(self, layout: Layout, inference: Inference, most: int, metrics: Metrics):
        """At most `most` rows wait, but a caller who finds the queue empty is always admitted."""
        self.run: Run | None = None
        self.problem = "the model is being loaded"  # why there is no answer now; "" where there is
        self._layout, self._inference, self._most, self._metrics = layout, inference, most, metrics
        self._version = 0  # of the state that answered last
        self._questions: collections.deque[_Question] = collections.deque()
        self._changed, self._stopping = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="devices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the batch under way; whoever waits is told that the service is ending."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ready_run(self) -> Run:
        """The opened workdir, for its settings and its tokenizer. Raises `Unavailable` before it is opened."""
        if self.run is None:
            raise Unavailable(self.problem)
        return self.run

    def submit(self, rows: np.ndarray, program: Program) -> "Future[Answered]":
        """Asks a program for answers to rows [n, ...]."""
        question = _Question(program, rows, Future())
        with self._changed:
            if self.problem:
                raise Unavailable(self.problem)
            if self._questions and self._waiting() + len(rows) > self._most:
                raise Problem(503, "too much waits for the devices; try again in a moment", headers=BUSY)
            self._questions.append(question)
            self._metrics.waiting.set(self._waiting())
            self._changed.notify()
        return question.future

    def _waiting(self) -> int:
        return sum(len(question.rows) for question in self._questions)

    def _work(self) -> None:
        """Opens the workdir, and opens it again after any failure."""
        while not self._stopping.is_set():
            try:
                with open_run(self._layout.root, self._config()) as run:
                    self._read_ahead(run)
                    self.run = run
                    self._answer(run)
            except Exception as error:
                self._fail(error)
                self._stopping.wait(PAUSE)
        self._refuse("the service is ending")

    def _config(self) -> Config | None:
        """The workdir's config of this moment, with the inference of this service."""
        stored = binding.stored_config(self._layout)
        return stored and dataclasses.replace(stored, inference=self._inference)

    @staticmethod
    def _read_ahead(run: Run) -> None:
        """What callers need of the catalog, which no other thread may use: the run keeps it."""
        assert run.classes is not None and run.input_spec is not None
        assert not run.config.is_text or run.encoder is not None

    def _answer(self, run: Run) -> None:
        """Answers until the service ends or the workdir has another config."""
        predictor, size = None, run.config.inference.batch * run.mesh.size
        while not self._stopping.is_set():
            batch = self._gather(size)
            try:
                predictor = predictor or Predictor(run)
                self._note(predictor)
                if batch:
                    self._serve(predictor, batch, size)
            except Exception as error:
                for question in batch:
                    question.future.set_exception(self._unavailable(error))
                self._fail(error)
                if not isinstance(error, UserError) or self._config() != run.config:
                    return
                self._stopping.wait(PAUSE)

    def _note(self, predictor: Predictor) -> None:
        """Follows the workdir, and counts a state that took over."""
        version = predictor.follow().version
        if version != self._version:
            self._metrics.swaps.inc()
        self._metrics.manifest.set(version)
        self._version, self.problem = version, ""

    def _gather(self, size: int) -> list[_Question]:
        """The first question that waits and others for the same program, of `size` rows if there are as many."""
        with self._changed:
            self._changed.wait_for(lambda: self._questions or self._stopping.is_set(), IDLE)
            batch, rows = [], 0
            for question in list(self._questions):
                fits = not batch or (question.program == batch[0].program and rows + len(question.rows) <= size)
                if not fits:
                    continue
                self._questions.remove(question)
                if question.future.set_running_or_notify_cancel():  # the caller may have gone
                    batch.append(question)
                    rows += len(question.rows)
            self._metrics.waiting.set(self._waiting())
        return batch

    def _serve(self, predictor: Predictor, batch: list[_Question], size: int) -> None:
        rows = np.concatenate([question.rows for question in batch])
        answers, start = predictor.answer(rows, batch[0].program), 0
        version = predictor.state.version
        self._metrics.fill.observe(len(rows) / (-(-len(rows) // size) * size))
        for question in batch:
            own = slice(start, start + len(question.rows))
            question.future.set_result(Answered(_rows_of(answers, own), version))
            start = own.stop

    def _unavailable(self, error: Exception) -> Exception:
        return Unavailable(public_text(self._layout, error)) if isinstance(error, UserError) else error

    def _fail(self, error: Exception) -> None:
        """Notes why there are no answers, and refuses those who wait."""
        expected = isinstance(error, UserError)
        if not expected:
            log.error("%s", place_of(error))
        self._refuse(public_text(self._layout, error) if expected else "the devices failed; the service's log says why")

    def _refuse(self, problem: str) -> None:
        with self._changed:
            self.problem = problem
            for question in self._questions:
                if question.future.set_running_or_notify_cancel():
                    question.future.set_exception(Unavailable(problem))
            self._questions.clear()
            self._metrics.waiting.set(0)


def _rows_of(answers: Any, own: slice) -> Any:
    """The answers to some of the rows."""
    arrays = {name: values[own] for name, values in vars(answers).items() if isinstance(values, np.ndarray)}
    return dataclasses.replace(answers, **arrays)
