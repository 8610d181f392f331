"""The kinds of faults. Each strikes a round's command at random points, and counts what came of it.

Counted are faults that struck, commands that went on or that refused a damaged directory with a
message, and faults that came too late.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

from faults import jobs
from faults.running import MAX_SECONDS, LostError, Running

MOUNT = ("mount", "-t", "tmpfs", "tmpfs")
OVERRUN = 1.1  # faults strike until so many times the undisturbed command's duration


@dataclasses.dataclass
class Round:
    """A command, the directory that it writes into, and what has happened to it."""

    job: jobs.Job
    rng: random.Random
    root: pathlib.Path
    inputs: pathlib.Path
    seconds: float = 0.0  # that the undisturbed command takes
    grows: int = 0  # by so many bytes of a disk the directory
    largest: int = 0  # bytes of its largest file
    events: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    history: list[str] = dataclasses.field(default_factory=list)
    damaged: str = ""  # the file, if the kind is damage
    starts: int = 0

    def __post_init__(self):
        self.directory = self.root / "out"

    def begin(self) -> None:
        """Makes the directory as it is before the command."""
        self.root.mkdir()
        if self.job.begins_with:
            shutil.copytree(self.inputs / self.job.begins_with, self.directory)

    def start(self, before: Callable[[], object] = lambda: None) -> Running:
        """Starts the command. Args: before, called in each of its processes first."""
        log = self.root / f"log-{self.starts}"
        self.starts += 1
        return Running(self.job, self.directory, self.inputs, log, before)

    def at_random(self, running: Running) -> bool:
        """Waits for a random point of a command; whether it still runs then."""
        running.wait_until_handled()
        seconds = self.rng.uniform(0, OVERRUN * self.seconds)
        self.history.append(f"{seconds:.2f} s")
        return not running.wait(seconds)

    def finish(self) -> None:
        """Runs the command undisturbed.   Raises: LostError if it does not go on to its end."""
        running = self.start()
        if not running.wait_for_end():
            raise LostError(f"does not go on, {running.statuses}:\n{running.text()}")


def _repeat(rng):
    """How often a fault strikes in a round."""
    return range(rng.choice([1, 1, 2, 3]))


def kill(now: Round) -> None:
    """SIGKILL of one process, with or without its children; then the others, as schedulers do."""
    for _ in _repeat(now.rng):
        running = now.start()
        group = now.rng.random() < 0.5
        struck = now.at_random(running)
        running.send(signal.SIGKILL, [now.rng.randrange(len(running))], group)
        if not running.wait(now.rng.uniform(0, 2)):
            running.send(signal.SIGTERM)
            running.wait(now.rng.uniform(0, 2))
        running.kill()
        now.events["struck" if struck else "too late"] += 1


def stop(now: Round) -> None:
    """SIGTERM or Ctrl-C, once or until it has ended, to one process or to its children too."""
    for _ in _repeat(now.rng):
        running = now.start()
        number = now.rng.choice([signal.SIGTERM, signal.SIGINT])
        again = now.rng.random() < 0.3
        group = now.rng.random() < 0.5
        struck = now.at_random(running)
        first = now.rng.randrange(len(running))
        running.send(number, [first], group)
        now.history.append(number.name + " again" * again)
        until = time.monotonic() + MAX_SECONDS * again
        while time.monotonic() < until and not running.wait(now.rng.uniform(0, 0.5)):
            running.send(number, group=group)
        done = running.wait_for_end()
        now.events["struck" if struck else "too late"] += 1
        if done:
            continue
        # One that ends while it starts leaves the others waiting for it, as after a kill.
        ends = {0, 128 + signal.SIGTERM, 128 + number}
        if again and number == signal.SIGINT:  # a second may come when only Python has yet to end
            ends.add(-number)
        others = set(running.statuses[:first] + running.statuses[first + 1 :])
        if running.statuses[first] not in ends or others - ends - {1, -signal.SIGABRT}:
            message = f"ends with {running.statuses} after {number.name}"
            raise LostError(f"{message}:\n{running.text()}")
        if "again: ended at once" not in running.text():
            running.check_way_on()


def damage(now: Round) -> None:
    """After a kill: a bit of a random file flipped, or the file cut, emptied, removed, replaced."""
    given, written = _files(now.directory), []
    for _ in range(5):  # the first starts may not come as far as a file
        running = now.start()
        now.at_random(running)
        running.kill()
        if written := sorted(set(_files(now.directory)) - set(given)):
            break
    paths = written if written and now.rng.random() < 0.7 else _files(now.directory)
    if not paths:
        now.events["too late"] += 1
        return
    path = _draw_file(paths, now)
    now.damaged, before = str(path.relative_to(now.directory)), path.read_bytes()
    now.history.append(f"{now.damaged} {_damage(path, before, now.rng)}")
    running = now.start()
    if running.wait_for_end():
        now.events["went on"] += 1
        return
    running.check_error()
    now.events["refused"] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(before)


def _files(directory):
    paths = sorted(directory.rglob("*"))
    return [path for path in paths if path.is_file() and path.suffix != ".lock"]


def _draw_file(paths, now):
    """One of the files: from the directory down, each time any of what is there."""
    path = now.directory
    while path.is_dir():
        below = {path / p.relative_to(path).parts[0] for p in paths if p.is_relative_to(path)}
        path = now.rng.choice(sorted(below))
    return path


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
    """A disk that fills up, where one can be mounted, or a limit on the size of a file."""
    if now.rng.random() < 0.5 and can_mount():
        running = _run_on_small_disk(now)
    else:
        limit = now.rng.randrange(1, now.largest)
        now.history.append(f"files of {limit:,} bytes")
        running = now.start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        running.wait(MAX_SECONDS)
    if running.wait_for_end():
        now.events["too late"] += 1
        return
    running.check_error()
    running.check_way_on()
    now.events["struck"] += 1


@functools.cache
def can_mount() -> bool:
    """Whether this user may mount a disk: as root, and not in every container."""
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run([*MOUNT, directory], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", directory], check=True)
    return mounted


def _run_on_small_disk(now):
    room = int(now.rng.uniform(0.1, 1) * now.grows)
    now.history.append(f"a disk with {room:,} free bytes")
    aside = now.root / "aside"
    if now.directory.exists():
        now.directory.rename(aside)
    now.directory.mkdir()
    subprocess.run([*MOUNT, now.directory, "-o", "size=1g"], check=True)
    try:
        if aside.exists():
            shutil.copytree(aside, now.directory, dirs_exist_ok=True)
            shutil.rmtree(aside)
        disk = os.statvfs(now.directory)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        options = f"remount,size={used + room}"
        subprocess.run([*MOUNT, now.directory, "-o", options], check=True)
        running = now.start()
        running.wait(MAX_SECONDS)
        shutil.copytree(now.directory, aside)
    finally:
        subprocess.run(["umount", "--lazy", now.directory], check=True)
    now.directory.rmdir()
    aside.rename(now.directory)
    return running


def twice(now: Round) -> None:
    """The same command started again while it runs: one is told, or waits; neither is harmed."""
    one = now.start()
    struck = now.at_random(one)
    two = now.start()
    done = [running.wait_for_end() for running in (one, two)]
    if not any(done):
        raise LostError(f"neither goes on:\n{one.text()}\n{two.text()}")
    for running in (one, two):
        if any(running.statuses):
            running.check_error(" writes into it")
    now.events["too late" if not struck else "went on" if all(done) else "refused"] += 1


def move(now: Round) -> None:
    """The directory moved away while the command runs, which must not make it anew; put back."""
    running = now.start()
    struck = now.at_random(running)
    away = now.root / "away"
    with contextlib.suppress(FileNotFoundError):
        now.directory.rename(away)
    done = running.wait_for_end()
    unseen = "must be a directory that" in running.text()  # moved before the command had looked
    if not done:
        running.check_error()
        if not unseen:
            running.check_way_on()
    event = "went on" if done else "refused" if unseen else "struck"
    now.events[event if struck else "too late"] += 1
    if away.exists():
        with contextlib.suppress(FileNotFoundError):  # Orbax ends what it has begun
            shutil.rmtree(now.directory / "checkpoints")
        with contextlib.suppress(OSError):
            now.directory.rmdir()
        if now.directory.exists():
            left = [path.name for path in now.directory.iterdir()]
            raise LostError(f"writes {left} under the old name:\n{running.text()}")
        away.rename(now.directory)


KINDS = {kind.__name__: kind for kind in (kill, stop, damage, starve, twice, move)}
