"""One, two, four, eight devices: the same bits, and how many steps each of them makes.

  python benchmarks/bench_scaling.py [--quick] [--json=FILE]

Without accelerators the devices are XLA's fake ones on the CPU: they show bits and steps, not seconds. On real ones
images per second are given too. Strong scaling: the same clusters on more devices; weak: as many more, drawn anew. A
slice has the same bits on all of them. --quick: fewer clusters.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from reporting import deliver, log, new_parser
from sklearn.datasets import load_digits
from workloads import jobs_of

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.lanes import efficiency, pack

COUNTS = (1, 2, 4, 8)
INNER = "--devices="


def main() -> None:
    parser = new_parser(__doc__, quick="fewer clusters")
    parser.add_argument("--devices", type=int, default=0, help="used by the script itself: one measurement")
    arguments = parser.parse_args()
    if arguments.devices:
        print(json.dumps(measured(arguments.devices, arguments.quick)))
        return
    rows = []
    for count in COUNTS:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        call = [sys.executable, __file__, f"{INNER}{count}", *["--quick"] * arguments.quick]
        done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
        if done.returncode:
            print(f"{count} devices: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout))
        log({k: v for k, v in rows[-1].items() if k != "slices"})
    result: dict[str, Any] = {"same_bits": all(row["slices"] == rows[0]["slices"] for row in rows)}
    result["scaling"] = [{k: v for k, v in row.items() if k != "slices"} for row in rows]
    deliver("bench_scaling.py", result, arguments.json)


def small_problem() -> tuple[train_step.TuningSpec, Backbone, np.ndarray, np.ndarray]:
    """Digits and a small random ViT."""
    config = ViTConfig(image_size=8, patch=4, width=32, depth=2, heads=2, mlp=64, channels=1)
    params = jax.device_get(nnx.to_pure_dict(nnx.split(backbone_lib.build(config, nnx.Rngs(0)), nnx.Param)[1]))
    backbone = backbone_lib.make(config, params, (0.5,), (0.5,))
    images = ImageSpec(8, 8, 1, size=8, resize=8, out_channels=1)
    spec = train_step.TuningSpec(config, images, Tuning(batch=8, epochs=2, min_steps=1, prompt_width=1), 10, seed=0)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return spec, backbone, images, digits.target.astype(np.int32)


def measured(devices: int, quick: bool) -> dict:
    """Tunes the same clusters on so many devices, and plans as many times more."""
    spec, backbone, images, labels = small_problem()
    t, sizes = spec.tuning, np.random.default_rng(0).integers(8, 64, 8 if quick else 24)
    jobs = jobs_of(sizes, t)
    mesh = train_step.mesh_of(jax.devices()[:devices])
    slices, seconds = {}, 0.0
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        slices = {done.job.key: done.slice for done in tune.make_slices(spec, backbone, jobs, images, labels, mesh)}
        seconds = time.perf_counter() - start

    def longest(jobs: list[Job]) -> int:
        return max(sum(jobs[i].steps for i in lane) for lane in pack([job.steps for job in jobs], devices))

    alone = sum(job.steps for job in jobs)
    more = jobs_of(np.random.default_rng(1).integers(8, 64, len(sizes) * devices), t)
    row: dict[str, Any] = {"devices": devices, "strong_steps": longest(jobs), "weak_steps": longest(more)}
    row |= {
        "strong_speedup": round(alone / longest(jobs), 2),
        "efficiency": round(efficiency(jobs, devices, t.batch), 3),
    }
    row |= {"weak_efficiency": round(sum(job.steps for job in more) / devices / longest(more), 3)}
    if jax.devices()[0].platform != "cpu":
        row["images_per_s"] = round(sum(job.images for job in jobs) / seconds, 1)
    row["slices"] = {key: np.concatenate([np.ravel(leaf) for leaf in s[:3]]).tolist() for key, s in slices.items()}
    return row


if __name__ == "__main__":
    main()
