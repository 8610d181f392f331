"""Interrupts commands at random points, lets them finish, and compares all of their results.

  PYTHONPATH=tests python -m faults.campaign --rounds 24 --seed 0

A round takes a command and a kind of fault. The fault strikes once or a few times, at points that
depend on the seed. Then the same command runs undisturbed. Its results must equal those of a run
without faults, bit for bit. A command that ends by itself must say why, without a traceback.
`--round N` repeats round N alone, but signals arrive at slightly different points each time.
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

# Relative frequencies of the commands; the last two take longest.
SHARES = {"train": 6, "encode": 6, "evaluate": 6, "two processes": 1, "sweep": 1}
# Logs and pictures of past steps, which a command does not make again after damage.
NOT_REMADE = ("metrics.jsonl", "evaluations.jsonl", "samples/", "evaluations/")
COLUMNS = ("rounds", "struck", "went on", "refused", "too late", "lost")


class Campaign:
    """Runs rounds one after the other, and counts their events."""

    def __init__(self, root: pathlib.Path, names: Sequence[str], faults: Sequence[str]):
        self._root, self._names, self._faults = root, names, faults
        self._inputs = root / "inputs"
        self._counts = collections.defaultdict(collections.Counter)
        self._undisturbed = {}  # a command's name -> `_run_undisturbed(name)`

    def prepare(self) -> None:
        """Makes the inputs of the commands."""
        self._inputs.mkdir()
        _call_in_fork(lambda: inputs.make(self._inputs), self._root / "made")

    def _run_undisturbed(self, name):
        """Returns a command's (results, seconds, growth_bytes, largest_bytes) without faults."""
        for i in range(2):  # the second run uses the compilation cache, as rounds do
            root = self._root / f"{name}-{i}"
            this_round = kinds.Round(jobs.JOBS[name], random.Random(), root, self._inputs)
            this_round.begin()
            bytes_before = _measure_disk_use(this_round.directory)
            running = this_round.start()
            running.wait_until_handled()
            began = time.monotonic()
            if not running.wait_for_end():
                raise LostError(f"{name} fails, {running.statuses}:\n{running.read_stderr()}")
            seconds = time.monotonic() - began
        results = _read_results(this_round)
        _print(f"{name}: {seconds:.1f} s undisturbed, {len(results)} results")
        growth_bytes = _measure_disk_use(this_round.directory) - bytes_before
        largest_bytes = max(path.stat().st_size for path in this_round.directory.rglob("*"))
        return results, seconds, growth_bytes, largest_bytes

    def run_round(self, seed: int, number: int) -> bool:
        """Runs the round with this number; returns whether nothing was lost."""
        rng = random.Random(f"{seed}:{number}")
        (name,) = rng.choices(self._names, [SHARES[name] for name in self._names])
        fault = rng.choice(self._faults)
        if name not in self._undisturbed:
            self._undisturbed[name] = self._run_undisturbed(name)
        results, *measures = self._undisturbed[name]
        root = self._root / f"round-{number}"
        this_round = kinds.Round(jobs.JOBS[name], rng, root, self._inputs, *measures)
        counts = self._counts[name, fault]
        counts["rounds"] += 1
        loss = ""
        try:
            this_round.begin()
            kinds.KINDS[fault](this_round)
            this_round.finish()
            _compare(_read_results(this_round), results, this_round.damaged)
            shutil.rmtree(root)
        except LostError as error:
            loss = f": LOST, kept in {root}: {error}"
            counts["lost"] += 1
        counts.update(this_round.events)
        events = ", ".join(f"{count} {event}" for event, count in this_round.events.items())
        _print(f"round {number}: {name}, {fault} ({', '.join(this_round.history)}): {events}{loss}")
        return not loss

    def count_effective_faults(self) -> int:
        """Returns how many faults met a running command, or damaged a file that it had written."""
        effective = ("struck", "went on", "refused")
        return sum(counts[event] for counts in self._counts.values() for event in effective)

    def make_table(self) -> str:
        """Makes a Markdown table with a row for each command and fault, and their sums."""
        lines = [f"| command | fault | {' | '.join(COLUMNS)} |"]
        lines.append("|---|---" + "|---:" * len(COLUMNS) + "|")
        total = collections.Counter()
        for (name, fault), counts in sorted(self._counts.items()):
            total.update(counts)
            lines.append(_make_line(name, fault, counts))
        return "\n".join([*lines, _make_line("all", "all", total)])


def _make_line(name, fault, counts):
    return f"| {name} | {fault} | {' | '.join(str(counts[column]) for column in COLUMNS)} |"


def _print(text):
    print(text, flush=True)


def _measure_disk_use(directory):
    """Returns the bytes that the directory's files occupy on a disk."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("*"))


def _read_results(this_round):
    return _call_in_fork(
        lambda: this_round.job.read_results(this_round.directory), this_round.root / "results"
    )


def _compare(actual, expected, damaged):
    """Raises LostError if a result differs, apart from those that damage excuses."""
    names = sorted(actual.keys() | expected.keys())
    differing = [name for name in names if actual.get(name) != expected.get(name)]
    if _is_not_remade(damaged):
        differing = [name for name in differing if not _is_not_remade(name)]
    if differing:
        name = differing[0]
        raise LostError(
            f"{len(differing)} of {len(expected)} results differ, such as {name}:\n"
            f"{str(actual.get(name))[:1000]}\ninstead of\n{str(expected.get(name))[:1000]}"
        )


def _is_not_remade(name):
    """Returns whether a file or result, of a run or of a sweep's cell, is in NOT_REMADE."""
    return name.startswith(NOT_REMADE) or name.partition("/")[2].startswith(NOT_REMADE)


def _call_in_fork(call: Callable[[], object], path: pathlib.Path):
    """Calls in a fork, and returns the result through a JSON file at the path.

    JAX must not start in this process, because it forks the commands.
    """
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
    parser.add_argument("--round", type=int, help="run this round alone")
    parser.add_argument("--commands", default=",".join(jobs.JOBS), help="separated by commas")
    parser.add_argument("--faults", default=",".join(kinds.KINDS), help="separated by commas")
    flags = parser.parse_args()
    zygote.prepare()
    root = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    campaign = Campaign(root, flags.commands.split(","), flags.faults.split(","))
    campaign.prepare()
    numbers = range(flags.rounds) if flags.round is None else [flags.round]
    _print(f"seed {flags.seed}, {len(numbers)} rounds, in {root}")
    lost = [number for number in numbers if not campaign.run_round(flags.seed, number)]
    _print(campaign.make_table())
    if len(numbers) >= 10 and not campaign.count_effective_faults():
        sys.exit("No fault struck a command, so this campaign shows nothing.")
    if lost:
        sys.exit(f"rounds {', '.join(map(str, lost))} of seed {flags.seed} lost something.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
