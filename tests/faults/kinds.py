"""The kinds of faults, each a function that strikes a round's command at random points.

They count events in `Round.events`: "struck" for a fault that met a working command, "too late"
for a fault after its end, "went on" for a command that worked despite the fault, and "refused" for
a command that ended with a message about it.
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
OVERRUN = 1.1  # the last possible time of a fault, relative to the undisturbed command's duration


@dataclasses.dataclass
class Round:
    """A command, the directory that it writes into, and the record of its faults."""

    job: jobs.Job
    rng: random.Random
    root: pathlib.Path
    inputs: pathlib.Path
    seconds: float = 0.0  # duration of the undisturbed command
    growth_bytes: int = 0  # disk space that the undisturbed command adds to the directory
    largest_bytes: int = 0  # size of the directory's largest file
    events: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    history: list[str] = dataclasses.field(default_factory=list)
    damaged: str = ""  # path of the file that `damage` damaged
    starts: int = 0

    def __post_init__(self):
        self.directory = self.root / "out"

    def begin(self) -> None:
        """Makes the directory in its state before the command."""
        self.root.mkdir()
        if self.job.initial_input:
            shutil.copytree(self.inputs / self.job.initial_input, self.directory)

    def start(self, before: Callable[[], object] = lambda: None) -> Running:
        """Starts the command.   Args: before: called in each of its processes first."""
        log = self.root / f"log-{self.starts}"
        self.starts += 1
        return Running(self.job, self.directory, self.inputs, log, before)

    def wait_for_random_point(self, running: Running) -> bool:
        """Waits for a random time of a command; returns whether the command still runs then."""
        running.wait_until_handled()
        seconds = self.rng.uniform(0, OVERRUN * self.seconds)
        self.history.append(f"{seconds:.2f} s")
        return not running.wait(seconds)

    def finish(self) -> None:
        """Runs the command undisturbed.   Raises: LostError if it fails."""
        running = self.start()
        if not running.wait_for_end():
            raise LostError(f"does not go on, {running.statuses}:\n{running.read_stderr()}")


def _draw_repetitions(rng):
    """Draws how often a fault strikes in a round, as a range."""
    return range(rng.choice([1, 1, 2, 3]))


def kill(this_round: Round) -> None:
    """Kills a process, with or without its children, then ends the others like a scheduler."""
    for _ in _draw_repetitions(this_round.rng):
        running = this_round.start()
        group = this_round.rng.random() < 0.5
        struck = this_round.wait_for_random_point(running)
        running.send(signal.SIGKILL, [this_round.rng.randrange(len(running))], group)
        if not running.wait(this_round.rng.uniform(0, 2)):
            running.send(signal.SIGTERM)
            running.wait(this_round.rng.uniform(0, 2))
        running.kill()
        this_round.events["struck" if struck else "too late"] += 1


def stop(this_round: Round) -> None:
    """Sends SIGTERM or SIGINT to one process, or sometimes to all until they have ended."""
    for _ in _draw_repetitions(this_round.rng):
        running = this_round.start()
        stop_signal = this_round.rng.choice([signal.SIGTERM, signal.SIGINT])
        repeats = this_round.rng.random() < 0.3
        group = this_round.rng.random() < 0.5
        struck = this_round.wait_for_random_point(running)
        target = this_round.rng.randrange(len(running))
        running.send(stop_signal, [target], group)
        this_round.history.append(f"{stop_signal.name} again" if repeats else stop_signal.name)
        until = time.monotonic() + (MAX_SECONDS if repeats else 0)
        while time.monotonic() < until and not running.wait(this_round.rng.uniform(0, 0.5)):
            running.send(stop_signal, group=group)
        succeeded = running.wait_for_end()
        this_round.events["struck" if struck else "too late"] += 1
        if succeeded:
            continue
        allowed = {0, 128 + signal.SIGTERM, 128 + stop_signal}
        if repeats and stop_signal == signal.SIGINT:  # it may arrive while Python itself shuts down
            allowed.add(-stop_signal)
        # A process that ends during its start leaves the others waiting, until they fail too.
        allowed_for_others = allowed | {1, -signal.SIGABRT}
        others = set(running.statuses[:target] + running.statuses[target + 1 :])
        if running.statuses[target] not in allowed or others - allowed_for_others:
            message = f"ends with {running.statuses} after {stop_signal.name}"
            raise LostError(f"{message}:\n{running.read_stderr()}")
        if "again: ended at once" not in running.read_stderr():
            running.check_way_on()


def damage(this_round: Round) -> None:
    """Kills the command, then damages a random file; the command must go on or refuse the file."""
    initial_files, written = _list_files(this_round.directory), []
    for _ in range(5):  # a command may be killed before it has written a file
        running = this_round.start()
        this_round.wait_for_random_point(running)
        running.kill()
        if written := sorted(set(_list_files(this_round.directory)) - set(initial_files)):
            break
    paths = _list_files(this_round.directory)
    if written and this_round.rng.random() < 0.7:
        paths = written
    if not paths:
        this_round.events["too late"] += 1
        return
    path = _draw_file(paths, this_round)
    this_round.damaged = str(path.relative_to(this_round.directory))
    original = path.read_bytes()
    damage_kind = _damage_file(path, original, this_round.rng)
    this_round.history.append(f"{this_round.damaged} {damage_kind}")
    running = this_round.start()
    if running.wait_for_end():
        this_round.events["went on"] += 1
        return
    running.check_error()
    this_round.events["refused"] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(original)


def _list_files(directory):
    paths = sorted(directory.rglob("*"))
    return [path for path in paths if path.is_file() and path.suffix != ".lock"]


def _draw_file(paths, this_round):
    """Draws a file level by level, so that directories with many files are no more likely."""
    path = this_round.directory
    while path.is_dir():
        entries = {path / p.relative_to(path).parts[0] for p in paths if p.is_relative_to(path)}
        path = this_round.rng.choice(sorted(entries))
    return path


def _damage_file(path, original, rng):
    """Damages a file, and returns how, as a participle; "flipped" changes one bit."""
    damage_kind = rng.choice(["flipped", "flipped", "cut", "emptied", "removed", "replaced"])
    contents = bytearray(original)
    if damage_kind == "flipped" and contents:
        contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
    elif damage_kind == "cut":
        contents = contents[: rng.randrange(len(contents) + 1)]
    elif damage_kind == "replaced":
        contents = rng.randbytes(len(contents))
    else:
        contents = b""
    path.write_bytes(contents)
    if damage_kind == "removed":
        path.unlink()
    return damage_kind


def starve(this_round: Round) -> None:
    """Fills the disk, if a small one can be mounted, or limits the size of files."""
    if this_round.rng.random() < 0.5 and can_mount():
        running = _run_on_small_disk(this_round)
    else:
        limit = this_round.rng.randrange(1, this_round.largest_bytes)
        this_round.history.append(f"files of {limit:,} bytes")
        running = this_round.start(
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        running.wait(MAX_SECONDS)
    if running.wait_for_end():
        this_round.events["too late"] += 1
        return
    running.check_error()
    running.check_way_on()
    this_round.events["struck"] += 1


@functools.cache
def can_mount() -> bool:
    """Returns whether this user may mount a disk; root may, except in some containers."""
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run([*MOUNT, directory], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", directory], check=True)
    return mounted


def _run_on_small_disk(this_round):
    """Runs the command in a mounted directory with too little space, then copies it back."""
    free_bytes = int(this_round.rng.uniform(0.1, 1) * this_round.growth_bytes)
    this_round.history.append(f"a disk with {free_bytes:,} free bytes")
    aside = this_round.root / "aside"
    if this_round.directory.exists():
        this_round.directory.rename(aside)
    this_round.directory.mkdir()
    subprocess.run([*MOUNT, this_round.directory, "-o", "size=1g"], check=True)
    try:
        if aside.exists():
            shutil.copytree(aside, this_round.directory, dirs_exist_ok=True)
            shutil.rmtree(aside)
        disk = os.statvfs(this_round.directory)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        options = f"remount,size={used + free_bytes}"
        subprocess.run([*MOUNT, this_round.directory, "-o", options], check=True)
        running = this_round.start()
        running.wait(MAX_SECONDS)
        shutil.copytree(this_round.directory, aside)
    finally:
        subprocess.run(["umount", "--lazy", this_round.directory], check=True)
    this_round.directory.rmdir()
    aside.rename(this_round.directory)
    return running


def twice(this_round: Round) -> None:
    """Starts the same command again while it runs; the second must wait or be refused."""
    first = this_round.start()
    struck = this_round.wait_for_random_point(first)
    second = this_round.start()
    succeeded = [running.wait_for_end() for running in (first, second)]
    if not any(succeeded):
        raise LostError(f"neither goes on:\n{first.read_stderr()}\n{second.read_stderr()}")
    for running in (first, second):
        if any(running.statuses):
            running.check_error(" writes into it")
    event = "went on" if all(succeeded) else "refused"
    this_round.events[event if struck else "too late"] += 1


def move(this_round: Round) -> None:
    """Moves the directory away while the command runs, which must not make it anew; restores it."""
    running = this_round.start()
    struck = this_round.wait_for_random_point(running)
    away = this_round.root / "away"
    with contextlib.suppress(FileNotFoundError):
        this_round.directory.rename(away)
    event = "went on"
    if not running.wait_for_end():
        running.check_error()
        event = "refused"  # the command had not yet opened the directory
        if "must be a directory that" not in running.read_stderr():
            running.check_way_on()
            event = "struck"
    this_round.events[event if struck else "too late"] += 1
    if away.exists():
        with contextlib.suppress(FileNotFoundError):  # Orbax completes a checkpoint that it began
            shutil.rmtree(this_round.directory / "checkpoints")
        with contextlib.suppress(OSError):
            this_round.directory.rmdir()
        if this_round.directory.exists():
            names = [path.name for path in this_round.directory.iterdir()]
            raise LostError(f"writes {names} under the old name:\n{running.read_stderr()}")
        away.rename(this_round.directory)


KINDS = {kind.__name__: kind for kind in (kill, stop, damage, starve, twice, move)}
