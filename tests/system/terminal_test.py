"""Output of commands is escaped; a closed reader does not end a command."""

import io
import json
import logging
import os
import subprocess

import pytest

from dit_jax.system import terminal


def test_all_control_characters_but_newline_and_tab_are_escaped():
    assert terminal.escape("a\tb\nc\x1b]0;title\x07\u202e") == "a\tb\nc\\x1b]0;title\\x07\\u202e"


def _stream(encoding="utf-8", **options):
    """Returns a buffer, and a Stream that writes into it."""
    buffer = io.BytesIO()
    text = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    return buffer, terminal.Stream(text, **options)


def test_printed_text_is_escaped_and_json_stays_valid():
    buffer, stream = _stream()
    row = {"name": "x\x1b[31m\n\u202e\udc80é"}
    print(json.dumps(row), file=stream)
    print(row["name"], file=stream)
    json_line, *name_lines = buffer.getvalue().decode().splitlines()
    assert json.loads(json_line) == row
    assert name_lines == ["x\\x1b[31m", "\\u202e\\udc80é"]


def test_characters_outside_the_terminals_encoding_are_escaped():
    buffer, stream = _stream("ascii")
    print("é 漢", file=stream)
    assert buffer.getvalue() == b"\\xe9 \\u6f22\n"


def test_controls_of_progress_bars_pass_and_all_others_are_escaped():
    buffer, stream = _stream(allow_bars=True)
    stream.write("\r 50%\x1b[A\x1b[31m\x07")
    assert buffer.getvalue() == b"\r 50%\x1b[A\\x1b[31m\\x07"


def test_output_without_a_reader_is_dropped():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        stream = terminal.Stream(file)
        for _ in range(2):
            stream.write("x" * 100_000)
            stream.flush()


def test_full_disk_raises_only_once():
    with open("/dev/full", "w") as file:
        stream = terminal.Stream(file)
        stream.write("x")
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            stream.flush()
        stream.flush()


def test_log_lines_are_escaped():
    record = logging.LogRecord("dit_jax", 20, "", 0, "file %s", ("a\x1b[2Jb\nc",), None)
    assert terminal.Formatter("%(message)s").format(record) == "file a\\x1b[2Jb\nc"


def test_shell_reads_a_formatted_command_as_the_same_words():
    words = ["printf", r"%s\0", "a b", "it's", "", "x\x1b[31m\n\u202eé\\'", "\udc80"]
    line = terminal.format_command(words)
    assert line.isprintable()
    result = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert result.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words[2:]]
