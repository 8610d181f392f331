"""Interrupts commands at random points, runs them to their end, and compares every result.

  PYTHONPATH=tests python -m faults.campaign --rounds 24 --seed 0

A round takes a command and a kind of fault. The fault strikes once or a few times at points that
the seed draws; then the same command runs undisturbed. What it leaves must be what a run without
faults leaves, bit for bit, and every command that ends of itself must say why, without a traceback.
`--round N` repeats round N alone; what a signal meets in a program varies a little all the same.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from faults import inputs, jobs, kinds
from faults.running import LostError
from helpers import zygote

# Of all rounds, in proportion; the last two take longest.
SHARES = {"train": 6, "encode": 6, "evaluate": 6, "two processes": 1, "sweep": 1}
# Logs and pictures of what is over: what a fault took of them is not made again.
LASTING = ("metrics.jsonl", "evaluations.jsonl", "samples/", "evaluations/")
COLUMNS = ("rounds", "struck", "went on", "refused", "too late", "lost")


class Campaign:
    """Rounds one after the other, with their counts."""

    def __init__(self, root: pathlib.Path, names: Sequence[str], faults: Sequence[str]):
        self._root, self._names, self._faults = root, names, faults
        self._inputs = root / "inputs"
        self._counts = collections.defaultdict(collections.Counter)
        self._undisturbed = {}  # a command's name -> (results, seconds, growth, largest file)

    def prepare(self) -> None:
        """Makes what the commands read."""
        self._inputs.mkdir()
        _in_fork(lambda: inputs.make(self._inputs), self._root / "made")

    def _run_undisturbed(self, name):
        """(results, seconds, bytes that the directory grows by, of its largest file)."""
        for i in range(2):  # the second finds what is compiled, as those of the rounds will
            root = self._root / f"{name}-{i}"
            now = kinds.Round(jobs.JOBS[name], random.Random(), root, self._inputs)
            now.begin()
            before = _used(now.directory)
            running = now.start()
            running.wait_until_handled()
            began = time.monotonic()
            if not running.wait_for_end():
                raise LostError(f"{name} fails, {running.statuses}:\n{running.text()}")
            seconds = time.monotonic() - began
        results = _results(now)
        _say(f"{name}: {seconds:.1f} s undisturbed, {len(results)} results")
        largest = max(path.stat().st_size for path in now.directory.rglob("*"))
        return results, seconds, _used(now.directory) - before, largest

    def round(self, seed: int, number: int) -> bool:
        """Runs a round; whether nothing was lost."""
        rng = random.Random(f"{seed}:{number}")
        (name,) = rng.choices(self._names, [SHARES[name] for name in self._names])
        fault = rng.choice(self._faults)
        if name not in self._undisturbed:
            self._undisturbed[name] = self._run_undisturbed(name)
        results, *measures = self._undisturbed[name]
        root = self._root / f"round-{number}"
        now = kinds.Round(jobs.JOBS[name], rng, root, self._inputs, *measures)
        counts = self._counts[name, fault]
        counts["rounds"] += 1
        lost = ""
        try:
            now.begin()
            kinds.KINDS[fault](now)
            now.finish()
            _compare(_results(now), results, now.damaged)
            shutil.rmtree(root)
        except LostError as error:
            lost = f": LOST, kept in {root}: {error}"
            counts["lost"] += 1
        counts.update(now.events)
        events = ", ".join(f"{count} {what}" for what, count in now.events.items())
        _say(f"round {number}: {name}, {fault} ({', '.join(now.history)}): {events}{lost}")
        return not lost

    def struck(self) -> int:
        """How many faults met a command at work, or what it had written."""
        return sum(counts[name] for counts in self._counts.values() for name in COLUMNS[1:4])

    def table(self) -> str:
        """Markdown: a row for each command and fault, and their sums."""
        lines = [f"| command | fault | {' | '.join(COLUMNS)} |"]
        lines.append("|---|---" + "|---:" * len(COLUMNS) + "|")
        total = collections.Counter()
        for (name, fault), counts in sorted(self._counts.items()):
            total.update(counts)
            lines.append(_line(name, fault, counts))
        return "\n".join([*lines, _line("all", "all", total)])


def _line(name, fault, counts):
    return f"| {name} | {fault} | {' | '.join(str(counts[column]) for column in COLUMNS)} |"


def _say(text):
    print(text, flush=True)


def _used(directory):
    """Bytes of a disk."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("*"))


def _results(now):
    return _in_fork(lambda: now.job.results(now.directory), now.root / "results")


def _compare(actual, expected, damaged):
    """Raises: LostError that names a result that differs."""
    names = sorted(actual.keys() | expected.keys())
    differing = [name for name in names if actual.get(name) != expected.get(name)]
    if _is_lasting(damaged):
        differing = [name for name in differing if not _is_lasting(name)]
    if differing:
        one = differing[0]
        raise LostError(
            f"{len(differing)} of {len(expected)} results differ, such as {one}:\n"
            f"{str(actual.get(one))[:1000]}\ninstead of\n{str(expected.get(one))[:1000]}"
        )


def _is_lasting(name):
    """Of a file or a result, of a run or of a cell of a sweep."""
    return name.startswith(LASTING) or name.partition("/")[2].startswith(LASTING)


def _in_fork(call: Callable[[], object], path: pathlib.Path):
    """What the call returns, through a JSON file: JAX must not start in the process that forks."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
            path.write_text(json.dumps(call()))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise LostError(f"{path} cannot be made")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--commands", default=",".join(jobs.JOBS), help="with commas")
    parser.add_argument("--faults", default=",".join(kinds.KINDS), help="with commas")
    flags = parser.parse_args()
    zygote.prepare()
    root = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    campaign = Campaign(root, flags.commands.split(","), flags.faults.split(","))
    campaign.prepare()
    numbers = range(flags.rounds) if flags.round is None else [flags.round]
    _say(f"seed {flags.seed}, {len(numbers)} rounds, in {root}")
    lost = [number for number in numbers if not campaign.round(flags.seed, number)]
    _say(campaign.table())
    if len(numbers) >= 10 and not campaign.struck():
        sys.exit("No fault struck: nothing is shown.")
    if lost:
        sys.exit(f"rounds {', '.join(map(str, lost))} of seed {flags.seed} lost something.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
