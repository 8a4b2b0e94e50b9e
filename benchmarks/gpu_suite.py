"""Everything that is to be known about a GPU, in one command of at most nine minutes, without network.

  python benchmarks/gpu_suite.py [--quick] [--out=DIR] [--again] [--vit=PATH] [--swin=FOLDER] [PART ...] [--json=FILE]

Each part (`gpu_parts.py`) runs in a process of its own and writes DIR/PART.json as its figures come. A part that is
complete there is not run again, unless --again asks for it; one that failed, or that ran out of time, is. Each part has
a share of the nine minutes, and what the parts before it left over. The networks have random weights unless a path is
given. Without a GPU, use --quick: the same code on tiny networks, whose figures mean nothing.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_settings import Settings, Unavailable
from reporting import new_parser, store, surroundings

SECONDS = {  # of each part, in the order in which they run; together at most nine minutes
    "exactness": 45,
    "determinism": 55,
    "vit": 90,
    "request": 50,
    "swin": 85,
    "language": 60,
    "memory": 50,
    "lanes": 45,
    "attention": 30,
    "adaptation": 30,
}


def main() -> None:
    parser = new_parser(__doc__, quick="tiny networks, to see that everything runs")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SECONDS)}; by default all")
    parser.add_argument("--out", default="gpu_suite", help="folder for a JSON file of each part")
    parser.add_argument("--again", action="store_true", help="run parts that are complete, too")
    parser.add_argument("--vit", default="", help="file or folder of a ViT-B/16's weights")
    parser.add_argument("--swin", default="", help="Hugging Face folder of a Swin-B's weights")
    arguments = parser.parse_args()
    chosen = arguments.parts or list(SECONDS)
    if unknown := sorted(set(chosen) - SECONDS.keys()):
        parser.error(f"no such part: {', '.join(unknown)}; legal: {', '.join(SECONDS)}")
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.quick, arguments.vit, arguments.swin)
    results = run_all([name for name in SECONDS if name in chosen], settings, folder, arguments.again)
    print_table(results)
    store(results, arguments.json)
    sys.exit(any(result["state"] not in ("complete", "unavailable") for result in results.values()))


def run_all(names: list[str], settings: Settings, folder: Path, again: bool) -> dict[str, dict[str, Any]]:
    """The result of each part, those of earlier runs with the same settings included."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs memory, too
    if settings.quick:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other on a busy machine
    processes = multiprocessing.get_context("forkserver")  # its processes have everything imported and no device yet
    processes.set_forkserver_preload(["gpu_parts", "bench_tuning", "bench_language"])
    results, deadline = {}, time.monotonic()
    for name in names:
        path, deadline = folder / f"{name}.json", deadline + SECONDS[name]
        result = read(path)
        if again or result.get("state") != "complete" or result["settings"] != settings.described():
            path.unlink(missing_ok=True)
            print(f"{name} ...", file=sys.stderr, flush=True)
            process = processes.Process(target=run_part, args=(name, settings, path))
            process.start()
            process.join(max(1.0, deadline - time.monotonic()))
            stop(process)
            result = completed(read(path), process.exitcode)
            store(result, str(path))
        results[name] = result
    return results


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def stop(process: Any) -> None:
    """Ends a part that is still running, with the processes that it started."""
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def completed(result: dict[str, Any], code: int | None) -> dict[str, Any]:
    """The result of a part that has ended; one that ended by itself has said how."""
    if result.get("state", "running") != "running":
        return result
    killed = code == -signal.SIGKILL
    why = "its time ran out; run the command again" if killed else f"its process ended with exit code {code}"
    return result | {"state": "failed", "why": why}


def run_part(name: str, settings: Settings, path: Path) -> None:
    """Runs a part in this process; its figures are in the file as soon as they are known."""
    os.setsid()  # so that the processes that it starts end with it
    import gpu_parts

    start, figures = time.perf_counter(), {}
    where = surroundings(f"gpu_suite.py {name}") | gpu_parts.versions()
    result = {"settings": settings.described(), **where, "state": "running"}

    def write() -> None:
        seconds = round(time.perf_counter() - start, 1)
        temporary = path.with_suffix(".part")
        store(result | {"seconds": seconds, "figures": figures}, str(temporary))
        temporary.replace(path)

    try:
        write()
        if not (settings.quick or gpu_parts.on_gpu()):
            raise Unavailable("needs a GPU; --quick runs on a CPU")
        for more in gpu_parts.PARTS[name](settings):
            figures.update(more)
            write()
        result["state"] = "complete"
    except (Unavailable, ModuleNotFoundError) as error:
        needed = f"needs the package {error.name}" if isinstance(error, ModuleNotFoundError) else str(error)
        result |= {"state": "unavailable", "why": needed}
    except Exception as error:  # whatever a library raises must not stop the other parts
        traceback.print_exc()
        result |= {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}
    write()


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """A line for each figure: part, name, value."""
    rows = []
    for part, result in results.items():
        rows.append((part, result["state"], result.get("why") or f"{result['seconds']} s"))
        rows += [(part, *row) for row in flat("", result.get("figures", {}))]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for part, name, value in rows:
        print(f"{part:{widths[0]}}  {name:{widths[1]}}  {value}")


def flat(prefix: str, figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every figure in a tree; lists, such as the seconds of rounds, are left to the JSON files."""
    rows = []
    for name, value in figures.items():
        name = f"{prefix} {name}".strip()
        if isinstance(value, dict):
            rows += flat(name, value)
        elif not isinstance(value, list):
            rows.append((name, f"{value:,.4g}" if isinstance(value, float) else str(value)))
    return rows


if __name__ == "__main__":
    main()
