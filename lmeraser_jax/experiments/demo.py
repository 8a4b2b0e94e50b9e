"""The whole job in one function: train, evaluate, three erasures, evaluate, audit, picture."""

import dataclasses
import time
from collections import Counter
from typing import Any

from lmeraser_jax.config import Config
from lmeraser_jax.evaluation import montage, overview
from lmeraser_jax.evaluation.accuracy import Evaluation, evaluate
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import Verdict, audit
from lmeraser_jax.unlearning.build import BuildReport, build
from lmeraser_jax.unlearning.run import Run, prepare_run


@dataclasses.dataclass(frozen=True)
class Demo:
    """Everything the demo's table shows."""

    workdir: str
    picture: str
    before: Evaluation
    after: Evaluation
    trained: BuildReport
    expected_share: float
    requests: tuple[tuple[str, int, BuildReport], ...]  # whose erasure, number of records, what the build did
    verdict: Verdict
    seconds: float

    def values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        requests = [dict(zip(("name", "records", "outcome"), row, strict=True)) for row in values["requests"]]
        return values | {"requests": requests, "ok": self.verdict.ok}

    def table(self) -> str:
        columns = ("clusters", "re-tuned", "reused", "images", "ratio", "seconds")
        lines = [
            f"\n{'test accuracy':<34}{'before':>10}{'after':>10}",
            f"{'  LMEraser':<34}{self.before.accuracy:>10.4f}{self.after.accuracy:>10.4f}",
            f"{'  plain linear head, same features':<34}{self.before.linear:>10.4f}{self.after.linear:>10.4f}",
            f"\n{'work':<26}{'records':>8}" + "".join(f"{column:>10}" for column in columns),
        ]
        work = [("train", "", self.trained)]
        work += [(f"erase {name}", str(records), outcome) for name, records, outcome in self.requests]
        for name, records, report in work:
            line = f"{name:<26}{records:>8}{report.clusters:>10}{report.retuned:>10}{report.reused:>10}"
            lines.append(f"{line}{report.images:>10}{report.ratio:>10.1%}{report.seconds:>10.1f}")
        lines += [
            f"\nexpected share of the data to re-tune per request: {self.expected_share:.1%}",
            f"audit: {self.verdict.text()}",
            f"picture: {self.picture}",
            f"workdir: {self.workdir}",
            f"total: {self.seconds:.0f} s",
        ]
        return "\n".join(lines)


def demo(workdir: str, config: Config) -> Demo:
    """Runs the demo in a new workdir."""
    start = time.perf_counter()
    with prepare_run(workdir, config) as (run, _):
        trained = build(run)
        before = evaluate(run)
        share = overview.overview(run.layout, run.catalog, run.config).expected_share
        requests = []
        for name, ids in _choose(run).items():
            erasure = erase.request_erasure(run, ids)
            assert erasure.outcome is not None
            requests.append((name, erasure.records, erasure.outcome))
        after = evaluate(run)
        verdict = audit(run)
        montage.save_montage(run, run.layout.picture)
    return Demo(
        workdir=str(run.layout.root),
        picture=str(run.layout.picture),
        before=before,
        after=after,
        trained=trained,
        expected_share=share,
        requests=tuple(requests),
        verdict=verdict,
        seconds=time.perf_counter() - start,
    )


def _choose(run: Run) -> dict[str, list[str]]:
    """An unsampled and a sampled record of a cluster of median size, and all records of one owner."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    sample = set(load_clustering(run.layout, manifest.clustering).sample)
    records = run.catalog.live("train")
    sizes = Counter(records.clusters)
    median = sorted(sizes, key=lambda key: (sizes[key], key))[len(sizes) // 2]
    members = [name for name, cluster in zip(records.ids, records.clusters, strict=True) if cluster == median]
    chosen = {
        "an unsampled record": [name for name in members if name not in sample][:1],
        "a sampled record": [name for name in members if name in sample][:1],
    }
    if owners := sorted(set(filter(None, records.owners))):
        chosen["an owner"] = run.catalog.owned(owners[len(owners) // 2])
    return {name: ids for name, ids in chosen.items() if ids}
