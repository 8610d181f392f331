"""What commands write: escaped, and no end of their work when nobody reads it."""

import io
import json
import logging
import os
import subprocess

import pytest

from dit_jax.system import terminal


def test_lines_and_tabs_stay_and_other_controls_are_escaped():
    assert terminal.escape("a\tb\nc\x1b]0;title\x07\u202e") == "a\tb\nc\\x1b]0;title\\x07\\u202e"


def _stream(encoding="utf-8", **options):
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return raw, terminal.Stream(text, **options)


def test_results_are_escaped_and_json_stays_json():
    raw, stream = _stream()
    row = {"name": "x\x1b[31m\n\u202e\udc80é"}
    print(json.dumps(row), file=stream)
    print(row["name"], file=stream)
    first, second, third, _ = raw.getvalue().decode().split("\n")
    assert json.loads(first) == row
    assert (second, third) == ("x\\x1b[31m", "\\u202e\\udc80é")


def test_characters_that_the_terminal_lacks_do_not_end_the_command():
    raw, stream = _stream("ascii")
    print("é 漢", file=stream)
    assert raw.getvalue() == b"\\xe9 \\u6f22\n"


def test_progress_bars_pass_and_names_in_them_are_escaped():
    raw, stream = _stream(allow_bars=True)
    stream.write("\r 50%\x1b[A\x1b[31m\x07")
    assert raw.getvalue() == b"\r 50%\x1b[A\\x1b[31m\\x07"


def test_output_without_a_reader_is_dropped():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        stream = terminal.Stream(file)
        for _ in range(2):
            stream.write("x" * 100_000)
            stream.flush()


def test_full_disk_behind_standard_output_is_an_error_once():
    with open("/dev/full", "w") as file:
        stream = terminal.Stream(file)
        stream.write("x")
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            stream.flush()
        stream.flush()


def test_log_lines_are_escaped():
    record = logging.LogRecord("dit_jax", 20, "", 0, "file %s", ("a\x1b[2Jb\nc",), None)
    assert terminal.Formatter("%(message)s").format(record) == "file a\\x1b[2Jb\nc"


def test_shell_reads_a_command_line_as_the_words_that_it_shows():
    words = ["printf", r"%s\0", "a b", "it's", "", "x\x1b[31m\n\u202eé\\'", "\udc80"]
    line = terminal.format_command(words)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words[2:]]
