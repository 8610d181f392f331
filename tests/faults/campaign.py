"""Interrupts commands at random points, runs them to their end, and compares every result.

  PYTHONPATH=tests python -m faults.campaign --rounds 24 --seed 0

A round takes a command and a kind of fault. The fault strikes once or a few times at points that
the round's seed draws; then the same command runs undisturbed. What it leaves must be what a run
without faults leaves, bit for bit, and every command that ends of itself must say why, without a
traceback. `--round N` repeats round N alone; the point in a program where a signal meets it differs
a little from time to time.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import zygote
from faults import inputs, jobs

MOST_SECONDS = 240  # that an undisturbed command may take
OVERRUN = 1.2  # faults strike until so many times the undisturbed command's duration
STOPPED = {signal.SIGTERM: (143,), signal.SIGINT: (130,)}
# Of a command's share of the rounds: a sweep takes longest.
SHARES = {"train": 6, "encode": 5, "evaluate": 5, "two processes": 3, "sweep": 1}


class LostError(Exception):
    """A result that differs, or an end that a user would not understand."""


class Running:
    """The processes of one start of a command."""

    def __init__(self, job: jobs.Job, directory, given, log, before=lambda: None):
        self.words = job.words(directory, given)
        self.logs = [log.with_name(f"{log.name}-{i}") for i in range(len(self.words))]
        each = job.devices // len(self.words)
        env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={each}"}
        self.pids = [
            zygote.start(words, env, log, before)
            for words, log in zip(self.words, self.logs, strict=True)
        ]
        self._left = dict(enumerate(self.pids))
        self.statuses = [None] * len(self.pids)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for i, pid in list(self._left.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[i] = os.waitstatus_to_exitcode(status)
                del self._left[i]
        return not self._left

    def wait(self, seconds: float) -> bool:
        """Until all have ended, or for so long; whether they have."""
        until = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < until:
            time.sleep(0.005)
        return not self._left

    def wait_until_handled(self) -> None:
        """Until they receive signals as commands do; before, Python's imports would be ended."""
        mask = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
        while not self.poll():
            with contextlib.suppress(OSError):
                texts = [_status(pid, "SigCgt") for pid in self._left.values()]
                if all(int(text, 16) & mask == mask for text in texts):
                    return
            time.sleep(0.005)

    def send(self, number: int, which: Sequence[int] | None = None, group: bool = False) -> None:
        """Sends a signal to the processes, or to some; with `group` to their descendants too."""
        for i in self._left if which is None else which:
            if i not in self._left:
                continue
            pids = [self._left[i], *(_descendants(self._left[i]) if group else [])]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def text(self) -> str:
        """What they wrote to standard error."""
        return "\n".join(pathlib.Path(f"{log}.err").read_text() for log in self.logs)

    def end(self) -> None:
        """Ends all that is left."""
        self.send(signal.SIGKILL, group=True)
        self.wait(30)


def _status(pid, name):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def _descendants(pid):
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


class Round:
    """One round: a command, its directory, and what has happened to it."""

    def __init__(self, name: str, rng: random.Random, root: pathlib.Path, given, seconds: float):
        self.job, self.rng, self.given, self.seconds = jobs.JOBS[name], rng, given, seconds
        self.root = root
        self.directory = root / "out"
        self.events = collections.Counter()
        self.history = []
        self.texts = []

    def begin(self) -> None:
        """Makes the directory as it is before the command."""
        if self.job.begins_with:
            shutil.copytree(self.given / self.job.begins_with, self.directory)

    def start(self, before: Callable[[], object] = lambda: None) -> Running:
        log = self.root / f"log-{len(self.texts)}"
        running = Running(self.job, self.directory, self.given, log, before)
        self.texts.append(log)
        return running

    def at_random(self, running: Running) -> bool:
        """Waits for a random point of a command; whether it still runs then."""
        running.wait_until_handled()
        seconds = self.rng.uniform(0, OVERRUN * self.seconds)
        self.history.append(f"{seconds:.3f} s")
        return not running.wait(seconds)

    def finish(self) -> None:
        """Runs the command undisturbed.   Raises: LostError if it fails."""
        running = self.start()
        ended = running.wait(MOST_SECONDS)
        running.end()
        if not ended or any(running.statuses):
            raise LostError(f"does not go on: {running.statuses}\n{running.text()}")
        self.check_text(running)

    def check_text(self, running: Running) -> None:
        """Raises: LostError for a traceback."""
        text = running.text()
        if "Traceback" in text:
            raise LostError(f"shows a traceback, {running.statuses}:\n{text}")


def _count(rng):
    """How often a fault strikes in a round."""
    return rng.choice([1, 1, 2, 3])


def kill(now: Round) -> None:
    """SIGKILL: of one process, then of the others as a scheduler does; of children or not."""
    for _ in range(_count(now.rng)):
        running = now.start()
        group = now.rng.random() < 0.5
        struck = now.at_random(running)
        running.send(signal.SIGKILL, [now.rng.randrange(len(running.pids))], group)
        if not running.wait(now.rng.uniform(0, 2)):
            running.send(signal.SIGTERM)
            running.wait(now.rng.uniform(0, 2))
        running.end()
        now.events["struck" if struck else "too late"] += 1


def stop(now: Round) -> None:
    """SIGTERM or Ctrl-C, once, or again until it has ended."""
    for _ in range(_count(now.rng)):
        running = now.start()
        number = now.rng.choice([signal.SIGTERM, signal.SIGINT])
        again = now.rng.random() < 0.3
        group = now.rng.random() < 0.5
        struck = now.at_random(running)
        which = [now.rng.randrange(len(running.pids))] if len(running.pids) > 1 else None
        running.send(number, which, group)
        now.history.append(number.name + " again" * again)
        if again:
            until = time.monotonic() + MOST_SECONDS
            while not running.wait(now.rng.uniform(0, 0.5)) and time.monotonic() < until:
                running.send(number, group=group)
        ended = running.wait(MOST_SECONDS)
        running.end()
        if not ended:
            raise LostError(f"does not end after {number.name}:\n{running.text()}")
        if not struck:
            now.events["too late"] += 1
            continue
        now.events["struck"] += 1
        _check_stopped(now, running, number)


def _check_stopped(now, running, number):
    """After the first signal every process ends in order, and says so, unless it was done."""
    statuses = set(running.statuses) - {0, 128 + signal.SIGTERM, 128 + number}
    if statuses:
        raise LostError(f"ends with {running.statuses} after {number.name}:\n{running.text()}")
    now.check_text(running)
    text = running.text()
    if (
        any(running.statuses)
        and "again: ended at once" not in text
        and "To go on, run:" not in text
    ):
        raise LostError(f"does not say how to go on after {number.name}:\n{text}")


def damage(now: Round) -> None:
    """After a kill: a bit of a random file flipped, or the file cut, emptied, removed, replaced."""
    running = now.start()
    now.at_random(running)
    running.end()
    paths = sorted(p for p in now.directory.rglob("*") if p.is_file() and p.suffix != ".lock")
    if not paths:
        now.events["too late"] += 1
        return
    path = now.rng.choice(paths)
    name, before = str(path.relative_to(now.directory)), path.read_bytes()
    how = _damage(path, before, now.rng)
    now.history.append(f"{name} {how}")
    running = now.start()
    ended = running.wait(MOST_SECONDS)
    running.end()
    now.check_text(running)
    if ended and not any(running.statuses):
        now.events["went on"] += 1
        return
    if not ended or set(running.statuses) - {1} or "error: " not in running.text():
        raise LostError(f"after {name} {how}: {running.statuses}\n{running.text()}")
    now.events["refused"] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(before)


def _damage(path, before, rng):
    how = rng.choice(["flipped", "flipped", "cut", "emptied", "removed", "replaced"])
    contents = bytearray(before)
    if how == "flipped" and contents:
        contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        contents = contents[: rng.randrange(len(contents) + 1)]
    elif how == "replaced":
        contents = rng.randbytes(len(contents))
    else:
        contents = b""
    path.write_bytes(contents)
    if how == "removed":
        path.unlink()
    return how


def starve(now: Round) -> None:
    """A full disk, or a limit on the size of a file."""
    running = None
    if _can_mount() and now.rng.random() < 0.5:
        limit = int(now.sizes[0] + now.rng.random() * (now.sizes[1] - now.sizes[0])) + 2**16
        saved = now.root / "saved"
        if now.directory.exists():
            now.directory.rename(saved)
        now.directory.mkdir()
        _mount(now.directory, f"size={limit}")
        try:
            if saved.exists():
                with contextlib.suppress(OSError, shutil.Error):
                    shutil.copytree(saved, now.directory, dirs_exist_ok=True)
            now.history.append(f"a disk of {limit:,} bytes")
            running = now.start()
            ended = running.wait(MOST_SECONDS)
            running.end()
            if saved.exists():
                shutil.rmtree(saved)
            shutil.copytree(now.directory, saved)
        finally:
            subprocess.run(["umount", "--lazy", str(now.directory)], check=True)
        now.directory.rmdir()
        saved.rename(now.directory)
    else:
        limit = now.rng.randrange(1, max(2, now.sizes[2]))
        now.history.append(f"files of {limit:,} bytes")
        running = now.start(lambda: _limit_files(limit))
        ended = running.wait(MOST_SECONDS)
        running.end()
    now.check_text(running)
    if not ended:
        raise LostError(f"does not end on {now.history[-1]}:\n{running.text()}")
    if not any(running.statuses):
        now.events["too late"] += 1
        return
    if set(running.statuses) - {0, 1}:
        raise LostError(f"ends with {running.statuses} on {now.history[-1]}:\n{running.text()}")
    text = running.text()
    if "error: " not in text:
        raise LostError(f"does not say why on {now.history[-1]}:\n{text}")
    now.events["struck"] += 1


def _limit_files(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _can_mount():
    return os.geteuid() == 0 and shutil.which("mount") is not None


def _mount(directory, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)


def twice(now: Round) -> None:
    """The same command started again while it runs: one of them is told, neither is harmed."""
    one = now.start()
    now.at_random(one)
    two = now.start()
    ended = [running.wait(MOST_SECONDS) for running in (one, two)]
    for running in (one, two):
        running.end()
        now.check_text(running)
    statuses = [*one.statuses, *two.statuses]
    if not all(ended) or set(statuses) - {0, 1} or 0 not in statuses:
        raise LostError(f"{statuses}:\n{one.text()}\n{two.text()}")
    told = [running for running in (one, two) if any(running.statuses)]
    if any("writes into it" not in running.text() for running in told):
        raise LostError(f"{statuses}:\n{one.text()}\n{two.text()}")
    now.events["refused" if told else "too late"] += 1


def move(now: Round) -> None:
    """The directory moved away while the command runs; then put back."""
    running = now.start()
    struck = now.at_random(running)
    away = now.root / "away"
    struck = struck and now.directory.exists()
    if struck:
        now.directory.rename(away)
    ended = running.wait(MOST_SECONDS)
    running.end()
    now.check_text(running)
    if not ended or set(running.statuses) - {0, 1}:
        raise LostError(f"{running.statuses}:\n{running.text()}")
    if not struck:
        now.events["too late"] += 1
        return
    if any(running.statuses) and "error: " not in running.text():
        raise LostError(f"does not say why:\n{running.text()}")
    shutil.rmtree(now.directory, ignore_errors=True)
    away.rename(now.directory)
    now.events["struck" if any(running.statuses) else "went on"] += 1


FAULTS = {f.__name__: f for f in (kill, stop, damage, starve, twice, move)}
# What one fault may take for good, which is no result: only the part that it struck.
LASTING = ("metrics.jsonl", "evaluations.jsonl", "samples/", "evaluations/")


def _in_fork(call, log):
    """Calls in a fork, since JAX must not start here; what it returns, as JSON."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
            log.write_text(json.dumps(call()))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise LostError("its results cannot be read")
    return json.loads(log.read_text())


def compare(found: dict, expected: dict, damaged: str | None) -> None:
    """Raises: LostError that names the results which differ."""
    differing = [
        name
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if damaged and damaged.startswith(LASTING):
        differing = [name for name in differing if not name.startswith(LASTING)]
    if differing:
        name = differing[0]
        raise LostError(
            f"{len(differing)} of {len(expected)} results differ, such as {name}:\n"
            f"{found.get(name)}\ninstead of\n{expected.get(name)}"
        )


class Campaign:
    """Rounds one after the other, with their counts."""

    def __init__(self, root: pathlib.Path, names: Sequence[str], faults: Sequence[str]):
        self.root, self.names, self.faults = root, names, faults
        self.given = root / "inputs"
        self.counts = collections.defaultdict(collections.Counter)
        self.expected, self.seconds, self.sizes = {}, {}, {}

    def prepare(self) -> None:
        """Makes the inputs, and what each command leaves without a fault."""
        self.given.mkdir()
        _in_fork(lambda: inputs.make(self.given), self.root / "made")
        for name in self.names:
            for _ in range(2):  # the second finds what is compiled, as those of the rounds will
                shutil.rmtree(self.root / "whole", ignore_errors=True)
                now = Round(name, None, self.root / "whole", self.given, 0)
                now.root.mkdir()
                now.begin()
                before = _sizes(now.directory)
                running = now.start()
                running.wait_until_handled()
                began = time.monotonic()
                running.wait(MOST_SECONDS)
                if any(running.statuses):
                    raise LostError(f"{name} fails: {running.statuses}\n{running.text()}")
                self.seconds[name] = time.monotonic() - began
            sizes = _sizes(now.directory)
            self.sizes[name] = sum(before), sum(sizes), max(sizes)
            self.expected[name] = self.results(now)
            print(
                f"{name}: {self.seconds[name]:.1f} s, {len(self.expected[name])} results",
                flush=True,
            )

    def results(self, now: Round) -> dict:
        return _in_fork(lambda: now.job.results(now.directory), now.root / "results")

    def round(self, seed: int, number: int) -> bool:
        """Runs a round; whether nothing was lost."""
        rng = random.Random(f"{seed}:{number}")
        name = rng.choices(self.names, [SHARES[name] for name in self.names])[0]
        fault = rng.choice(self.faults)
        root = self.root / f"round-{number}"
        root.mkdir()
        now = Round(name, rng, root, self.given, self.seconds[name])
        now.sizes = self.sizes[name]
        counts = self.counts[name, fault]
        counts["rounds"] += 1
        try:
            now.begin()
            FAULTS[fault](now)
            now.finish()
            damaged = now.history[-1].rpartition(" ")[0] if fault == "damage" else None
            compare(self.results(now), self.expected[name], damaged)
        except LostError as error:
            counts["lost"] += 1
            print(f"LOST, kept in {root}: {error}", flush=True)
            return False
        finally:
            counts.update(now.events)
            told = ", ".join(f"{n} {what}" for what, n in now.events.items())
            print(f"round {number}: {name}, {fault}: {', '.join(now.history)}: {told}", flush=True)
        shutil.rmtree(root)
        return True

    def table(self) -> str:
        """Markdown: a row for each command and fault."""
        columns = ("rounds", "struck", "went on", "refused", "too late", "lost")
        lines = [f"| command | fault | {' | '.join(columns)} |", "|---|---" + "|---:" * 6 + "|"]
        total = collections.Counter()
        for (name, fault), counts in sorted(self.counts.items()):
            total.update(counts)
            cells = " | ".join(str(counts[column]) for column in columns)
            lines.append(f"| {name} | {fault} | {cells} |")
        cells = " | ".join(str(total[column]) for column in columns)
        return "\n".join([*lines, f"| all | | {cells} |"])


def _sizes(directory):
    return [path.stat().st_size for path in directory.rglob("*") if path.is_file()] or [0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--commands", default=",".join(jobs.JOBS))
    parser.add_argument("--faults", default=",".join(FAULTS))
    arguments = parser.parse_args()
    zygote.prepare()
    root = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    campaign = Campaign(root, arguments.commands.split(","), arguments.faults.split(","))
    campaign.prepare()
    first = arguments.round
    numbers = range(arguments.rounds) if first is None else [first]
    print(f"seed {arguments.seed}, {len(numbers)} rounds", flush=True)
    lost = [number for number in numbers if not campaign.round(arguments.seed, number)]
    print(campaign.table())
    if lost:
        sys.exit(f"rounds {', '.join(map(str, lost))} of seed {arguments.seed} lost something.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
