"""How full the schedule is, and how long it takes to make: real images / images processed, seconds.

  python benchmarks/bench_schedule.py [--quick] [--json=FILE]

Cluster sizes: K and N as in the paper (CIFAR-10 194, CIFAR-100 347, SVHN 30, GTSRB 90 clusters), heavy-tailed: shares
drawn from a log-normal distribution, sigma 1. Batch 64, 50 epochs, one lane per device. On several devices the largest
cluster limits what any schedule can do: `bound`. `seconds`: to plan runs of up to 10 million records in 5,000 clusters;
batches are cut while the device works, so what counts for them is the time per call. --quick: one million at most.
"""

import time

from reporting import deliver, new_parser
from workloads import PAPER, heavy_tailed, jobs_of

from lmeraser_jax.config import Tuning
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.lanes import efficiency, step_batches

TUNING = Tuning(batch=64, epochs=50, lanes=1)
DEVICES = (1, 2, 4, 8)
SLOTS = 16


def main() -> None:
    parser = new_parser(__doc__, quick="one million records at most")
    arguments = parser.parse_args()
    result: dict[str, dict] = {"efficiency": {}, "bound": {}, "seconds": {}, "seconds_per_call": {}}
    for name, (clusters, records) in PAPER.items():
        jobs = jobs_of(heavy_tailed(clusters, records), TUNING)
        for devices in DEVICES:
            label = f"{name}, {devices} devices" if devices > 1 else name
            result["efficiency"][label] = round(efficiency(jobs, devices, TUNING.batch), 4)
            result["bound"][label] = round(bound(jobs, devices), 4)
    for records in (100_000, 1_000_000) if arguments.quick else (100_000, 1_000_000, 10_000_000):
        name, clusters = f"{records} records", min(5_000, records // 100)
        full, planned, per_call = large(records, clusters)
        result["efficiency"][f"{name}, 8 devices"] = full
        result["seconds"][name], result["seconds_per_call"][name] = planned, per_call
    deliver("bench_schedule.py", result, arguments.json)


def bound(jobs: list[Job], lanes: int) -> float:
    """What no schedule can exceed: a cluster's steps come one after the other, whole batches each."""
    steps = [job.steps for job in jobs]
    return sum(job.images for job in jobs) / (max(max(steps), -(-sum(steps) // lanes)) * lanes * TUNING.batch)


def large(records: int, clusters: int) -> tuple[float, float, float]:
    """Efficiency of a large run on 8 devices, seconds to plan it, seconds to cut the batches of a call of 64 steps."""
    sizes = heavy_tailed(clusters, records)
    start = time.perf_counter()
    jobs = jobs_of(sizes, TUNING)
    full = efficiency(jobs, 8, TUNING.batch)
    planned = time.perf_counter() - start
    calls, start = 0, time.perf_counter()
    for _ in step_batches(jobs, 8, TUNING, SLOTS, seed=0):
        calls += 1
        if calls == 20:
            break
    per_call = (time.perf_counter() - start) / calls
    return round(full, 4), round(planned, 3), round(per_call, 4)


if __name__ == "__main__":
    main()
