"""``make coverage``: every model in every scenario, in parallel, resumable; writes docs/coverage.md.

Each model has a process of its own, so that a crash or an endless loop costs one row. Rows are
appended to a JSON-lines file; a run leaves out the rows that are there already and were made by
the same sources. One architecture takes about 40 seconds of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "coverage.jsonl"
_ROW, _START = "@row ", "@start "
# Importing torch and transformers on a busy machine.
_START_LIMIT = 300.0


def main() -> int:
    """0 where every row agrees with stock, 1 otherwise."""
    arguments = _arguments()
    if arguments.worker:
        _work(arguments.worker, arguments.scenario.split(","))
        return 0
    import models_to_cover as cover  # only now: it imports torch and transformers

    results = Path(arguments.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        results.unlink(missing_ok=True)
    version = sources_version()
    done = {
        (row["name"], row["scenario"])
        for row in read(results)
        if row["version"] == version or arguments.any_version
    }
    wanted = cover.plan(arguments.only, arguments.scenario, quick=arguments.quick)
    todo = {
        name: left
        for name, scenarios in wanted.items()
        if (left := [s for s in scenarios if (name, s) not in done])
    }
    if not arguments.render:
        _run(todo, results, version, arguments)
    rows = latest(read(results))
    if arguments.write:
        import coverage_table

        Path(arguments.write).write_text(coverage_table.render(rows), encoding="utf-8")
    bad = [r for r in rows if r["state"] in ("crash", "mismatch", "timeout")]
    for row in bad:
        print(f"{row['name']} {row['scenario']}: {row['state']} {row['difference']} {row['error']}")
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--scenario", default="", help="scenarios, separated by commas")
    parser.add_argument("--quick", action="store_true", help="every third model")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one scenario")
    parser.add_argument("--results", default=str(RESULTS), help="JSON lines, appended to")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument(
        "--any-version", action="store_true", help="keep rows that other sources have made"
    )
    parser.add_argument("--render", action="store_true", help="run nothing, only write the table")
    parser.add_argument("--write", default="", help="where the table goes, e.g. docs/coverage.md")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def sources_version() -> str:
    """A digest of everything that a row depends on: the package and this directory."""
    digest = hashlib.sha256()
    for folder in (ROOT / "sparse_compiler", Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".jinja") and path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read(results: Path) -> Iterator[dict[str, Any]]:
    """Rows of the file, oldest first; a line that was cut off is left out."""
    if not results.exists():
        return
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def latest(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each model and scenario."""
    return list({(row["name"], row["scenario"]): row for row in rows}.values())


def _work(name: str, scenarios: list[str]) -> None:
    """In a worker: one row a scenario, as lines on standard output."""
    import torch
    from compare import compare
    from coverage_table import surroundings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for scenario in scenarios:
        print(_START + scenario, flush=True)
        row = {**compare(name, scenario).as_dict(), "where": surroundings()}
        print(_ROW + json.dumps(row), flush=True)


def _run(
    todo: dict[str, list[str]], results: Path, version: str, arguments: argparse.Namespace
) -> None:
    states: Counter[str] = Counter()
    lock = threading.Lock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        results.open("a", encoding="utf-8") as file,
        Progress(*columns, TimeElapsedColumn()) as progress,
        ThreadPoolExecutor(arguments.workers) as pool,
    ):
        task = progress.add_task("", total=sum(map(len, todo.values())))

        def keep(row: dict[str, Any]) -> None:
            with lock:
                file.write(json.dumps({**row, "version": version}) + "\n")
                file.flush()
                states[row["state"]] += 1
                text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
                progress.update(task, advance=1, description=f"{row['name']}: {text}")

        def cover(name: str) -> None:
            left = todo[name]
            while left:
                left = left[one_process(_command(name, left), name, left, arguments.limit, keep) :]

        for outcome in [pool.submit(cover, name) for name in todo]:
            outcome.result()


def _command(name: str, scenarios: list[str]) -> list[str]:
    return [sys.executable, __file__, "--worker", name, "--scenario", ",".join(scenarios)]


def one_process(
    command: list[str],
    name: str,
    scenarios: list[str],
    limit: float,
    keep: Callable[[dict[str, Any]], None],
) -> int:
    """Run scenarios in one process until it ends or one takes longer than ``limit`` seconds.

    Args:
        command: prints a line for each start and each row, as ``--worker`` does.
        keep: is given each row; the row of a scenario whose process ended says so.
    Returns:
        How many scenarios are settled, at least one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def drain() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    readers = [
        threading.Thread(target=drain, daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    number, failure = 0, ""
    deadline = time.monotonic() + _START_LIMIT
    while number < len(scenarios):
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            failure = "timeout"
            break
        if line is None:
            failure = "crash"
            break
        if line.startswith(_START):
            deadline = time.monotonic() + limit
        elif line.startswith(_ROW):
            keep(json.loads(line.removeprefix(_ROW)))
            number += 1
            deadline = time.monotonic() + _START_LIMIT
    process.kill()
    process.wait()
    if failure:
        for reader in readers:
            reader.join(5)
        text = f"exit status {process.returncode}: {''.join(errors[-3:])[-300:]}"
        keep(_lost(name, scenarios[number], failure, limit, text))
        number += 1
    return number


def _lost(name: str, scenario: str, state: str, limit: float, text: str) -> dict[str, Any]:
    """The row of a scenario whose process ended or was ended."""
    from compare import Row

    error = f"more than {limit:g} s" if state == "timeout" else text
    return Row(name, scenario, state, error=error, seconds=limit).as_dict()


if __name__ == "__main__":
    sys.exit(main())
