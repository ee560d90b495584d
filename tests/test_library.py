"""Libraries: documents on disk that are found whole, by the right name, by their owner alone, or refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from c2c import library as library_module
from c2c.errors import HandoffError
from c2c.handoff import Handoff
from c2c.library import Library
from c2c.sharer import Sharer
from test_handoff import DOCUMENT, assert_same
from tiny import build, tokenizer

OTHER = "By the sea, there is a dog, and the fox does not know where."


@pytest.fixture(scope="module")
def sharer():
    return Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")


@pytest.fixture(scope="module")
def handoff(sharer):
    return sharer.read(DOCUMENT)


@pytest.fixture(scope="module")
def other(sharer):
    return sharer.read(OTHER)


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "library")


def problems(library: Library, **how) -> dict[str, str | None]:
    return {entry.name: entry.problem for entry in library.entries(**how)}


def test_documents_are_found_by_name(library, handoff, other):
    library.add(handoff, "fox", source="fox.txt", about={"language": "en"})
    library.add(other.to("int8"), "the dog, zweite Fassung (ß)")
    by_id = library.add(handoff)
    assert by_id.name == handoff.id
    assert_same(library.get("fox"), handoff)
    assert_same(library.get("the dog, zweite Fassung (ß)"), other.to("int8"))
    assert sorted(library.names()) == sorted(["fox", "the dog, zweite Fassung (ß)", handoff.id])
    entry = Library(library.folder).entry("fox")
    shown = entry.to_dict()
    assert (shown["model"], shown["precision"], shown["tokens"]) == ("qwen2", "float32", len(handoff.kept))
    assert (shown["source"], shown["problem"], entry.about["language"]) == ("fox.txt", None, "en")
    assert abs(entry.created - time.time()) < 60
    assert library.entry("the dog, zweite Fassung (ß)").nbytes < 0.6 * entry.nbytes
    library.remove("fox")
    with pytest.raises(HandoffError, match="no document 'fox'"):
        library.get("fox")
    with pytest.raises(HandoffError, match="no document 'fox'"):
        library.remove("fox")


def test_a_taken_name_is_not_written_over(library, handoff, other):
    library.add(handoff, "fox")
    with pytest.raises(HandoffError, match="has a document 'fox' already"):
        library.add(other, "fox")
    assert_same(library.get("fox"), handoff)
    library.add(other, "fox", overwrite=True)
    assert_same(library.get("fox"), other)


@pytest.mark.parametrize(
    "name",
    ["", " a", "a/b", "../a", "a\\b", ".hidden", "a\nb", "a\0", "a.safetensors", "x" * 201, "ü" * 101, "\udc80", 5],
)
def test_names_that_are_no_names(library, handoff, name):
    for call in (lambda: library.add(handoff, name), lambda: library.get(name), lambda: library.remove(name)):
        with pytest.raises(HandoffError, match="name"):
            call()
    assert not library.folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_its_owner_alone_can_read_it(library, handoff, tmp_path):
    mask = os.umask(0o002)
    try:
        library.add(handoff, "fox")
    finally:
        os.umask(mask)
    assert library.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in library.folder.iterdir()} == {0}
    open_folder = tmp_path / "open"
    open_folder.mkdir(0o755)
    with pytest.raises(HandoffError, match="chmod 700"):
        Library(open_folder).add(handoff, "fox")
    assert list(open_folder.iterdir()) == []


def test_every_changed_byte_is_found(library, handoff):
    path = library.add(handoff, "fox").path
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert problems(library, check=True)["fox"], at
        with pytest.raises(HandoffError, match="fox"):
            library.get("fox")
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert problems(library)["fox"], length
        with pytest.raises(HandoffError, match="fox"):
            library.get("fox")
    assert library.names() == []
    library.remove("fox")
    assert library.entries() == []


def test_what_others_put_into_the_folder(library, handoff, tmp_path):
    library.add(handoff, "fox")
    outside = tmp_path / "outside.safetensors"
    handoff.save(outside, about={"name": "link", "tokens": 1, "created": 0.0})
    (library.folder / "link.safetensors").symlink_to(outside)
    (library.folder / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    (library.folder / "text.safetensors").write_text("no handoff")
    (library.folder / "folder.safetensors").mkdir()
    (library.folder / "notes.txt").write_text("none of ours")
    (library.folder / ".writing-half").mkdir()
    shutil.copy(library.folder / "fox.safetensors", library.folder / "wolf.safetensors")
    handoff.save(library.folder / "plain.safetensors")
    words = {
        "link": "link",
        "nowhere": "link",
        "text": "safetensors",
        "folder": "no such handoff",
        "wolf": "added as 'fox'",
        "plain": "manifest",
    }
    found = problems(library)
    assert set(found) == {"fox", *words}
    assert library.names() == ["fox"]
    for name, word in words.items():
        assert word in found[name]
        with pytest.raises(HandoffError, match=name):
            library.get(name)
    with pytest.raises(HandoffError, match="is a folder"):
        library.add(handoff, "folder", overwrite=True)
    library.add(handoff, "link", overwrite=True)
    library.remove("nowhere")
    assert Handoff.load(outside).id == handoff.id
    assert library.names() == ["fox", "link"]


def test_a_document_is_for_what_it_was_made_for(library, handoff):
    library.add(handoff, "fox", bound_to="anna")
    assert_same(library.get("fox", bound_to="anna"), handoff)
    for wrong in (None, "bert"):
        with pytest.raises(HandoffError, match="anna"):
            library.get("fox", bound_to=wrong)
    assert problems(library, check=True) == {"fox": None}


def test_documents_expire(library, handoff, other):
    library.add(handoff, "fox", expires=time.time() + 1000)
    late = library.add(other, "dog", expires=time.time() - 1)
    assert late.expired
    assert library.names() == ["fox"]
    with pytest.raises(HandoffError, match="expired"):
        library.get("dog")
    library.add(other, "dog")  # what has expired takes no name
    library.add(other, "cat", expires=time.time() - 1)
    assert library.prune() == ["cat"]
    assert sorted(library.names()) == ["dog", "fox"]
    assert Library(library.folder / "none").prune() == []


def test_half_written_files_are_removed_when_their_writer_is_gone(library, handoff):
    library.add(handoff, "fox")
    old, new = library.folder / ".writing-old", library.folder / ".writing-new"
    for half in (old, new):
        half.mkdir()
        (half / "dog.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    library.prune()
    assert (old.exists(), new.exists(), library.names()) == (False, True, ["fox"])


def test_two_writers_at_once_in_threads(library, handoff, other):
    def write(number: int) -> bool:
        try:
            Library(library.folder).add([handoff, other][number % 2], f"document {number // 4}")
        except HandoffError:
            return False
        return True

    with ThreadPoolExecutor(8) as writers:
        written = list(writers.map(write, range(16)))
    assert [sum(written[first : first + 4]) for first in range(0, 16, 4)] == [1] * 4  # one of four had the name
    assert problems(library, check=True) == {f"document {number}": None for number in range(4)}


@pytest.mark.slow
def test_two_writers_at_once_in_processes(library, handoff, other, tmp_path):
    for name, one in (("a", handoff), ("b", other)):
        one.save(tmp_path / f"{name}.safetensors")
    code = (
        "import sys\n"
        "from c2c import Handoff\n"
        "from c2c.library import Library\n"
        "handoff = Handoff.load(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    Library(sys.argv[2]).add(handoff, 'fox', overwrite=True)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / f"{name}.safetensors"), str(library.folder)])
        for name in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if library.folder.is_dir() and (library.folder / "fox.safetensors").exists():
            seen.add(library.get("fox").id)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {handoff.id, other.id}
    assert problems(library, check=True) == {"fox": None}
    assert [path.name for path in library.folder.glob(".writing-*")] == []


def test_a_writer_that_does_not_end_is_named(library, handoff, monkeypatch):
    library.add(handoff, "fox")
    monkeypatch.setattr(library_module, "LOCK_SECONDS", 0.05)
    with FileLock(library.folder / ".lock"), pytest.raises(HandoffError, match="another process"):
        library.add(handoff, "dog")


def test_a_folder_that_is_a_file(tmp_path, handoff):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        Library(tmp_path / "file").add(handoff, "fox")
    assert Library(Path("file")).entries() == []
