"""POST /v1/predict: images are classified, queries are answered."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as WaitedTooLong
from typing import Annotated, Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictStr, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.queries import Query
from lmeraser_jax.evaluation import answers
from lmeraser_jax.evaluation.language import Sampling
from lmeraser_jax.evaluation.predict import Predictions, predict
from lmeraser_jax.service.answering import Answered, Program
from lmeraser_jax.service.auth import Caller
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.problems import BUSY, Problem, unfit

LONGEST_TEXT = 100_000  # characters of a query or a candidate
MOST_CANDIDATES = 100
WAITING = 32  # threads that wait for answers to queries: others are left for requests and reading
Text = Annotated[StrictStr, Field(max_length=LONGEST_TEXT, pattern=r"\S")]


class Question(BaseModel):
    """A query to a language model."""

    model_config = ConfigDict(extra="forbid")
    query: Text
    candidates: Annotated[list[Text], FailFast()] = Field(
        [], max_length=MOST_CANDIDATES, description="choose the likeliest of these"
    )


class PredictBody(BaseModel):
    """Images in base64, or queries."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[StrictStr], FailFast()] = Field([], description="image files (PNG, JPEG, ...) in base64")
    queries: Annotated[list[Question], FailFast()] = []
    max_tokens: int = Field(64, ge=1, description="most tokens of a generated response")
    temperature: float = Field(0.0, ge=0, le=100, description="0: the likeliest token")
    seed: int = Field(0, ge=0, lt=2**31)


class _Parser(MultiPartParser):
    """Keeps uploads in memory, however large the limit on a request lets them be: they are personal."""

    spool_max_size = 1 << 62
    ended = False  # whether the form's end was read

    def on_end(self) -> None:
        self.ended = True

    async def parse(self) -> FormData:
        self.stream = self._whole(self.stream)
        return await super().parse()

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self.ended:  # what came would be answered as if it were all
            raise MultiPartException("it is cut short")


BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PredictBody.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}


def router(service: Service) -> APIRouter:
    """The routes that answer."""
    routes = APIRouter(tags=["predictions"])
    waiting = anyio.CapacityLimiter(WAITING)

    @routes.post("/v1/predict", openapi_extra=BODY)
    async def _(request: Request, _: Annotated[Caller, Depends(service.guard.require("predict"))]) -> JSONResponse:
        """Label, probabilities, cluster and manifest of each image, or the answer to each query.

        Images come as files of a form, fields `image`, or in JSON as base64; queries in JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return JSONResponse(await _predict(service, await _uploads(service, request)))
        if kind != "application/json":
            raise Problem(415, "send application/json, or multipart/form-data with fields `image`")
        body = await run_in_threadpool(_parsed, await request.body())
        run = service.answering.ready_run()
        if run.config.is_text != bool(body.queries) or bool(body.images) == bool(body.queries):
            raise Problem(422, "this model answers `queries`" if run.config.is_text else "this model takes `images`")
        _check_count(service, len(body.images) + sum(max(1, len(each.candidates)) for each in body.queries))
        if len({bool(each.candidates) for each in body.queries}) > 1:
            raise Problem(422, "give every query of a call candidates, or none: a call is answered by one state")
        if body.images:
            files = from_base64({f"/images/{n}": text for n, text in enumerate(body.images)})
            return JSONResponse(await _predict(service, files))
        return JSONResponse(await anyio.to_thread.run_sync(_answer, service, body, limiter=waiting))

    return routes


def _parsed(raw: bytes) -> PredictBody:
    try:
        return PredictBody.model_validate_json(raw)
    except ValidationError as error:
        raise unfit(error.errors(include_input=False, include_url=False)) from None


def _check_count(service: Service, count: int) -> None:
    most = service.settings.limits.inputs
    if not 0 < count <= most:
        raise Problem(422, f"send 1 to {most} images, queries or candidates in a call, not {count} (--max_inputs)")


async def _uploads(service: Service, request: Request) -> list[bytes]:
    """The files of a form."""
    limits = service.settings.limits
    parser = _Parser(request.headers, request.stream(), max_files=limits.inputs, max_fields=1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem(400, f"the form cannot be read: {error.message}") from None
    except KeyError:
        raise Problem(400, "the form cannot be read: its content type names no boundary") from None
    try:
        files = [value for name, value in form.multi_items() if name == "image" and isinstance(value, UploadFile)]
        if len(files) != len(form.multi_items()):
            raise Problem(422, "a form holds files in fields named `image`, and nothing else")
        _check_count(service, len(files))
        return [await file.read() for file in files]
    finally:
        await form.close()


def from_base64(texts: Mapping[str, str]) -> list[bytes]:
    """The bytes of texts in base64, {place in the body: text}. Raises `Problem` with every text that is none."""
    raws, errors = [], []
    for place, text in texts.items():
        try:
            raws.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            errors.append({"pointer": place, "detail": "is no base64"})
    if errors:
        raise Problem(422, "images must be in base64", errors)
    return raws


async def _predict(service: Service, files: list[bytes]) -> dict[str, Any]:
    """The answers to image files; none where one of them cannot be read."""
    run = service.answering.ready_run()
    if run.config.is_text:
        raise Problem(422, "this model answers `queries`")
    spec, most = run.image_spec, run.config.data.max_pixels
    images = await run_in_threadpool(decode, files, spec.height, spec.width, spec.channels, most)
    if images.unreadable:
        errors = [{"pointer": f"/images/{place}", "detail": text} for place, text in images.unreadable.items()]
        raise Problem(422, "an image cannot be read", errors)
    future = asyncio.wrap_future(service.answering.submit(images.rows, predict))
    try:
        answered = await asyncio.wait_for(future, service.settings.limits.seconds)
    except TimeoutError:
        raise Problem(503, "no answer in time; try again in a moment", headers=BUSY) from None
    return _classified(run.classes, answered)


def _classified(classes: tuple[str, ...], answered: Answered) -> dict[str, Any]:
    """The answers of a classifier as JSON."""
    predictions: Predictions = answered.answers
    rows = []
    for label, probabilities, clusters in zip(
        predictions.labels.tolist(), predictions.probabilities, predictions.clusters, strict=True
    ):
        keys = [predictions.keys[k] for k in clusters if k >= 0]
        rows.append(
            {
                "label": classes[label],
                "probability": round(float(probabilities[label]), 6),
                "probabilities": {name: round(float(p), 6) for name, p in zip(classes, probabilities, strict=True)},
                "cluster": keys[0],
                "approximate": not predictions.approximate.isdisjoint(keys),
            }
        )
    return {"manifest": answered.version, "predictions": rows}


def _answer(service: Service, body: PredictBody) -> dict[str, Any]:
    """The answers to queries; none where one of them cannot be answered."""
    limits, versions = service.settings.limits, []
    if body.max_tokens > limits.tokens:
        raise Problem(422, f"max_tokens is {body.max_tokens}; must be at most {limits.tokens} (--max_tokens)")

    def ask(rows: np.ndarray, program: Program) -> Any:
        future = service.answering.submit(rows, program)
        try:
            answered = future.result(limits.seconds)
        except (WaitedTooLong, CancelledError):
            future.cancel()
            raise Problem(503, "no answer in time; try again in a moment", headers=BUSY) from None
        versions.append(answered.version)
        return answered.answers

    queries = [Query(str(n), each.query, tuple(each.candidates)) for n, each in enumerate(body.queries)]
    sampling = Sampling(body.max_tokens, body.temperature, body.seed)
    rows, failures = answers.answer(service.answering.ready_run(), queries, sampling, ask)
    if failures:
        errors = [{"pointer": f"/queries/{place}", "detail": text} for place, text in failures]
        raise Problem(422, "a query cannot be answered", errors)
    wanted = ("answer", "cluster", "approximate", "candidates")
    return {
        "manifest": versions[0],
        "predictions": [{name: row[name] for name in wanted if name in row} for row in rows],
    }
