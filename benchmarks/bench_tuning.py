"""Images per second of prompt and head tuning: ours, the reference algorithm in PyTorch, the best PyTorch we can write.

  python benchmarks/bench_tuning.py [--quick] [--backbone=vit-ti] [--size=96] [--lanes=4] [--batch=16] [--json=FILE]

Same weights (random, of a published size), images, batches, rates and precision (float32 on CPU, bfloat16 on GPU). The
losses of the first five steps must agree before anything is timed; rounds are interleaved, medians are compared. An
image counts once: forward, backward to its prompt and head, update. Needs PyTorch (the extra `test` brings it).
A Swin: --backbone=swin-b-22k --size=224. --quick: four blocks instead of all, short rounds.
"""

import argparse
import dataclasses
import functools
import os

import jax
import numpy as np
import torch
import torch_tuning
from flax import nnx
from reporting import deliver, interleaved, new_parser, rates_and_ratios
from torch import nn
from torch_swin import swin_pair
from torch_vit import frozen_vit
from workloads import Program

from lmeraser_jax import config as settings
from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, zoo
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.training.features import Extractor, compute_dtype
from lmeraser_jax.training.jobs import Job, batches, make_job
from lmeraser_jax.training.lanes import step_batches

CLASSES = 10
CHECKED = 5  # steps whose losses must agree
TOLERANCE = {"cpu": 1e-3, "gpu": 5e-2}  # of a loss, relative; bfloat16 on GPU


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """A tuning problem: as many clusters as lanes, of equal size, so that every step is a full batch."""

    problem: train_step.TuningSpec
    backbone: Backbone
    network: nn.Module  # the same in PyTorch
    jobs: list[Job]
    images: np.ndarray
    labels: np.ndarray
    prototypes: np.ndarray

    @functools.cached_property
    def mesh(self):
        return train_step.mesh_of(jax.devices()[:1])

    def tune(self) -> None:
        """What a request pays for, from host arrays to finished slices."""
        for _ in tune.make_slices(self.problem, self.backbone, self.jobs, self.images, self.labels, self.mesh):
            pass

    @functools.cached_property
    def program(self) -> Program:
        """The tuning program alone: as many steps as a round has, backbone and images on the device."""
        return Program(self.problem, self.backbone.params, self.images, self.labels, self.jobs[0].steps)

    def losses(self) -> np.ndarray:
        """Mean over the clusters of each of the first steps' losses."""
        call = next(step_batches(self.jobs, 1, self.problem.tuning, self.problem.slots, self.problem.seed))
        work = train_step.Batch(call.rows, call.valid, call.seed_words, call.step, call.total, call.slot)
        return self.program.run(work, np.int32(CHECKED))[1][:CHECKED].mean(axis=1)


def networks(arguments: argparse.Namespace) -> tuple[Backbone, nn.Module]:
    """A backbone of a published size and the same in PyTorch: of a file, or random, with --quick of four blocks."""
    config = dataclasses.replace(zoo.entry(arguments.backbone).architecture, image_size=arguments.size)
    if isinstance(config, SwinConfig):
        if arguments.quick:
            config = dataclasses.replace(config, depths=(1,) * len(config.depths), window=arguments.size // 32)
        network, backbone = swin_pair(config, arguments.weights)
        return backbone, network
    if arguments.weights:
        chosen = settings.Backbone(weights=arguments.weights, feature="cls", mean="0.5", std="0.5")
        backbone, _ = convert.load(chosen, arguments.size)
        return backbone, frozen_vit(backbone)
    config = dataclasses.replace(config, feature="cls", depth=4 if arguments.quick else config.depth)
    model = backbone_lib.build(config, nnx.Rngs(0))
    params = jax.device_get(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    backbone = backbone_lib.make(config, params, (0.5,), (0.5,))
    return backbone, frozen_vit(backbone)


def workload_of(arguments: argparse.Namespace) -> Workload:
    """Random images, a random network; the members of a cluster are images whose nearest prototype is the cluster's."""
    backbone, network = networks(arguments)
    config = backbone.config
    size = arguments.size
    spec = ImageSpec(size, size, 3, size=size, resize=size, out_channels=3)
    tuning = Tuning(
        prompt_width=max(1, round(arguments.size * 30 / 224)),  # the paper's share of the image
        optimizer="sgd",
        prompt_rate=0.01,
        head_rate=0.01,
        epochs=1,
        min_steps=1,
        batch=arguments.batch,
        lanes=arguments.lanes,
        scan_steps=arguments.steps,  # a round is one call
    )
    problem = train_step.TuningSpec(config, spec, tuning, CLASSES, seed=0)
    members = arguments.steps * arguments.batch
    rng = np.random.default_rng(0)
    tints = rng.integers(0, 256, (arguments.lanes, 1, 1, 3), np.int16)
    noise = rng.integers(-40, 40, (arguments.lanes, members, arguments.size, arguments.size, 3), np.int16)
    images = np.clip(tints[:, None] + noise, 0, 255).astype(np.uint8).reshape(-1, *noise.shape[2:])
    labels = (rng.integers(0, 2, len(images)) + np.arange(len(images)) // members) % CLASSES  # two in each cluster
    workload = Workload(problem, backbone, network, [], images, labels.astype(np.int32), np.zeros(0))
    extract = Extractor(backbone, spec, 32, workload.mesh, compute_dtype("auto", workload.mesh))
    features = extract(images).reshape(arguments.lanes, members, -1)
    prototypes = features.mean(axis=1)
    nearest = ((features[:, :, None] - prototypes) ** 2).sum(axis=-1).argmin(axis=-1)
    assert (nearest == np.arange(arguments.lanes)[:, None]).all(), "the clusters overlap"
    jobs = [make_job(f"c{k}", np.arange(k * members, (k + 1) * members), tuning) for k in range(arguments.lanes)]
    return dataclasses.replace(workload, jobs=jobs, prototypes=prototypes)


def task_of(workload: Workload) -> torch_tuning.Task:
    """The same problem for PyTorch, with the batches that our lanes get, in their order."""
    t, on_gpu = workload.problem.tuning, torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    rows = np.stack([batches(job, workload.problem.seed)[0] for job in workload.jobs], axis=1)  # [steps, G, B]
    total = workload.jobs[0].steps
    factors = [train_step.learning_rate(t, np.int32(step), np.int32(total)) for step in range(total)]
    return torch_tuning.Task(
        network=workload.network.to(device, dtype),
        images=workload.images,
        labels=workload.labels.astype(np.int64),
        rows=rows.astype(np.int64),
        prototypes=workload.prototypes,
        classes=CLASSES,
        width=t.prompt_width,
        rates=t.prompt_rate * np.array(factors, np.float64),
        momentum=t.momentum,
        device=device,
        dtype=dtype,
    )


def first(losses) -> list[float]:
    return [float(loss) for loss, _ in zip(losses, range(CHECKED), strict=False)]


def disagreement(workload: Workload, task: torch_tuning.Task, best: torch_tuning.Best) -> float:
    """The largest relative difference between the losses of the first steps; refuses to compare different things."""
    expected = workload.losses()
    torch_losses = np.array([first(torch_tuning.reference(task)), first(best.run())])
    worst = float(np.abs(torch_losses / expected - 1).max())
    limit = TOLERANCE[jax.devices()[0].platform]
    assert worst < limit, f"losses differ by {worst:.1e}, more than {limit}: {expected}, {torch_losses}"
    assert expected[-1] < expected[0], f"nothing is learnt: {expected}"
    return worst


def main() -> None:
    parser = new_parser(__doc__, quick="four blocks, short rounds")
    parser.add_argument("--backbone", default="vit-ti", help="of lmeraser backbone --list, with random weights")
    parser.add_argument("--weights", default="", help="file or folder of such a backbone")
    parser.add_argument("--size", type=int, default=96, help="side of the images")
    parser.add_argument("--lanes", type=int, default=4, help="clusters tuned at the same time")
    parser.add_argument("--batch", type=int, default=16, help="images of a cluster per step")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round, at least 5")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = CHECKED
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    workload = workload_of(arguments)
    result: dict = {
        name: getattr(arguments, name) for name in ("backbone", "size", "lanes", "batch", "steps", "rounds")
    }
    architecture = workload.problem.architecture
    blocks = architecture.depths if isinstance(architecture, SwinConfig) else architecture.depth
    result |= {"torch": torch.__version__, "depth": blocks} | compared(workload, arguments.rounds)
    deliver("bench_tuning.py", result, arguments.json)


def compared(workload: Workload, rounds: int, compiled: bool = True) -> dict:
    """Images per second of each side, and how much faster ours is."""
    task = task_of(workload)
    best = torch_tuning.Best(task, compiled)
    worst = disagreement(workload, task, best)
    sides = {"ours": workload.tune, "reference": lambda: list(torch_tuning.reference(task))}
    sides["best_torch"] = lambda: float(list(best.run())[-1])  # waits for the device
    seconds = interleaved(sides, rounds)
    rates, ratios = rates_and_ratios(seconds, sum(job.images for job in workload.jobs))
    return {"losses_differ_by": worst, "images_per_s": rates, "ratio": ratios, "seconds": seconds}


if __name__ == "__main__":
    main()
