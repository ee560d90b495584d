"""Text that is no text: other encodings, half surrogate pairs, and terminals without most characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from c2c.errors import PromptError
from c2c.utils import argument_text, decode_text, json_line
from tiny import pair_folders

ASK = "Größe der Brücke? 🙂"


@pytest.mark.parametrize("data", [ASK.encode(), ASK.encode("utf-8-sig")])
def test_utf_8_is_read_with_and_without_a_mark(data):
    assert decode_text(data, "the prompt", PromptError) == ASK
    assert decode_text(b"a\r\nb\rc", "the prompt", PromptError) == "a\nb\nc"


@pytest.mark.parametrize("data", [ASK.encode("utf-16"), "Größe".encode("latin-1"), b"a\0b", b"", b" \n"])
def test_other_bytes_are_refused(data):
    with pytest.raises(PromptError, match=r"the prompt .*(UTF-8|empty)"):
        decode_text(data, "the prompt", PromptError)


def test_an_argument_is_read_as_utf_8_whatever_the_locale_says():
    assert argument_text(ASK, "the prompt", PromptError) == ASK
    as_in_argv = ASK.encode().decode("ascii", "surrogateescape")
    assert argument_text(as_in_argv, "the prompt", PromptError) == ASK
    for broken in ("a\udcffb", "a\ud800b"):
        with pytest.raises(PromptError, match="the prompt"):
            argument_text(broken, "the prompt", PromptError)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_json_is_one_line_that_any_terminal_can_show(encoding):
    line = json_line({"text": ASK + "\n"}, encoding)
    assert json.loads(line.encode(encoding).decode(encoding)) == {"text": ASK + "\n"}
    assert "\n" not in line


@pytest.mark.slow
@pytest.mark.parametrize("shape", [[], ["--json"]])
def test_a_command_reads_and_prints_on_a_terminal_without_utf_8(tmp_path, shape):
    receiver, sharer = pair_folders(lambda name: _made(tmp_path / name))
    command = [sys.executable, "-m", "c2c", "run", "--receiver", receiver, "--sharer", sharer, "--max-new-tokens", "4"]
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    run = subprocess.run([*command, *shape, "--", ASK.encode()], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"Traceback" not in run.stderr
    run.stdout.decode("ascii")
    latin = subprocess.run([*command, "--", b"Gr\xf6\xdfe"], env=environment, capture_output=True)
    assert latin.returncode != 0
    assert b"the prompt" in latin.stderr
    assert b"Traceback" not in latin.stderr


def _made(folder):
    folder.mkdir()
    return folder
