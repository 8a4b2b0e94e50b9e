"""Imports many small images into a new workdir and reports time, images per second and peak memory.

  python benchmarks/bench_import.py [--images=200000] [--source=npz|folder] [--threads=1,2] [--json=FILE]

The images are random: 32x32x3 in an .npz that is written in pieces, or PNGs of mixed sizes in class folders, kept at
64x64. Each import is a process of its own; its memory is the peak of the process less what it had after its modules
were loaded. Threads are those that decode the folder's files; each number is timed on its own workdir.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import commit, log, machine, new_parser, store

SIDE, KEPT = 32, 64  # pixels: of an image in the .npz, of a stored image of the folder
SMALLEST, LARGEST = 24, 192  # sides of the folder's images
CLASSES, PIECE = 10, 10_000


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--images", type=int, default=200_000, help="images")
    parser.add_argument("--source", choices=["npz", "folder"], default="npz", help="where they come from")
    parser.add_argument("--threads", default="", help="folder: numbers of threads to compare, such as 1,2")
    parser.add_argument("--step", choices=["make", "import"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step = make if arguments.step == "make" else load
        print(json.dumps(step(arguments, Path(arguments.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        written = in_a_process("make", folder)
        load_average, runs = round(os.getloadavg()[0], 1), []
        for threads in arguments.threads.split(","):
            runs.append(in_a_process("import", folder, f"--threads={threads}"))
            log(runs[-1])
    versions = runs[0].pop("versions")
    for run in runs[1:]:
        run.pop("versions")
    result = {
        "command": "python benchmarks/bench_import.py " + " ".join(sys.argv[1:]),
        "device": "cpu",
        "machine": machine(),
        "load_average": load_average,  # of other jobs, before the first import
        **versions,
        "commit": commit(),
        "images": arguments.images,
        "source": arguments.source,
        "source_bytes": written["bytes"],
        "runs": runs,
    }
    print(json.dumps(result, indent=2))
    store(result, arguments.json)


def in_a_process(step: str, folder: str, *more: str) -> dict:
    """Runs one step in a new process: what this one or an earlier import used must not count."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, f"--step={step}", f"--folder={folder}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make(arguments: argparse.Namespace, folder: Path) -> dict:
    """Writes the images; returns their size on disk."""
    import numpy as np

    rng = np.random.default_rng(0)
    if arguments.source == "npz":
        write_npz(folder / "images.npz", arguments.images, rng)
        return {"bytes": (folder / "images.npz").stat().st_size}
    from PIL import Image

    total = 0
    for i in range(arguments.images):
        split = "test" if i % 10 == 9 else "train"
        path = folder / "images" / split / f"class-{i // 10 % CLASSES}" / f"{i:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(SMALLEST, LARGEST, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path, compress_level=1)
        total += path.stat().st_size
    return {"bytes": total}


def write_npz(path: Path, images: int, rng) -> None:
    """Nine tenths training images, the rest test images; never more than a piece in memory."""
    import zipfile

    import numpy as np

    counts = {"test": images // 10, "train": images - images // 10}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for split, count in counts.items():
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
            with file.open(f"{split}_images.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)  # pyright: ignore[reportArgumentType]
                for start in range(0, count, PIECE):
                    member.write(rng.bytes(min(PIECE, count - start) * SIDE * SIDE * 3))
            with file.open(f"{split}_labels.npy", "w") as member:
                np.lib.format.write_array(member, np.arange(count) % CLASSES)


def load(arguments: argparse.Namespace, folder: Path) -> dict:
    """Imports the images into a new workdir; seconds, images per second and megabytes."""
    import contextlib

    import numpy as np
    import PIL

    import lmeraser_jax
    from lmeraser_jax.config import Config, Data
    from lmeraser_jax.data import decode, load
    from lmeraser_jax.data import folder as images_in_folders
    from lmeraser_jax.data import npz as images_in_npz
    from lmeraser_jax.storage.catalog import Catalog
    from lmeraser_jax.storage.ingest import import_source
    from lmeraser_jax.storage.workdir import Layout

    assert images_in_folders and images_in_npz  # loaded before memory is measured
    decode.THREADS = int(arguments.threads or decode.THREADS)
    path = folder / ("images.npz" if arguments.source == "npz" else "images")
    config = Config(data=Data(source=arguments.source, path=str(path), image_size=KEPT))
    layout = Layout(tempfile.mkdtemp(dir=folder))
    layout.prepare()
    before = resident()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        start, busy = time.perf_counter(), time.process_time()
        source = load.load(config.data)
        listed, listed_bytes = time.perf_counter(), resident()
        imported = import_source(layout, catalog, source, config)
        end, busy = time.perf_counter(), time.process_time() - busy
    assert imported.added == arguments.images
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    measured = {
        "seconds": round(end - start, 2),
        "images_per_second": round(arguments.images / (end - start)),
        "cpu_seconds": round(busy, 2),
        "seconds_listing": round(listed - start, 2),
        "peak_mb": round((peak - before) / 1e6, 1),
        "listing_mb": round((listed_bytes - before) / 1e6, 1),
        "modules_mb": round(before / 1e6, 1),
        "catalog_mb": round(layout.catalog.stat().st_size / 1e6, 1),
    }
    if arguments.source == "folder":
        measured = {"decode_threads": decode.THREADS, **measured}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    return measured | {"versions": versions | {"lmeraser_jax": lmeraser_jax.__version__}}


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
