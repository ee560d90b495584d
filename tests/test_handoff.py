"""Handoffs as values: files that can be trusted, fewer bits, reuse."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from c2c.errors import HandoffError
from c2c.handoff import Handoff
from c2c.sharer import Sharer
from tiny import assert_equal_caches, build, entries, tokenizer

DOCUMENT = "The fox sleeps in a red house by the sea, and the dog does not know where."


@pytest.fixture(scope="module")
def sharer():
    return Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")


@pytest.fixture(scope="module")
def handoff(sharer):
    return sharer.read(DOCUMENT)


def cache(handoff: Handoff):
    return handoff.cache(torch.float32, torch.device("cpu"))


def assert_same(first: Handoff, second: Handoff):
    assert_equal_caches(cache(first), cache(second))
    assert first.kept.tolist() == second.kept.tolist()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "float8"])
def test_saved_and_loaded(handoff, tmp_path, precision):
    packed = handoff.to(precision)
    packed.save(tmp_path / "a.safetensors", bound_to="talk 1", key=b"secret")
    again = Handoff.load(tmp_path / "a.safetensors", bound_to="talk 1", key=b"secret")
    assert_same(packed, again)
    assert (again.id, again.precision, again.sharer) == (handoff.id, precision, handoff.sharer)


def test_fewer_bits_are_close_and_small(handoff):
    for precision, size, error in (("bfloat16", 0.5, 0.005), ("int8", 0.45, 0.01), ("float8", 0.45, 0.05)):
        packed = handoff.to(precision)
        assert packed.nbytes <= size * handoff.nbytes
        for exact, close in zip(entries(cache(handoff)), entries(cache(packed)), strict=True):
            assert float((exact - close).norm() / exact.norm()) < error
    with pytest.raises(HandoffError, match="unknown precision 'int3'"):
        handoff.to("int3")


def test_a_file_that_is_cut_off_is_refused(handoff, tmp_path):
    path = tmp_path / "a.safetensors"
    handoff.save(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(HandoffError, match=r"cut off|no handoff"):
            Handoff.load(path)


def test_every_changed_byte_is_found(handoff, tmp_path):
    path = tmp_path / "a.safetensors"
    handoff.save(path, key=b"secret")
    whole = bytearray(path.read_bytes())
    for at in range(8, len(whole), max(1, len(whole) // 97)):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(bytes(changed))
        try:
            loaded = Handoff.load(path, key=b"secret")
        except HandoffError:
            continue
        assert_same(loaded, handoff)  # what is left are bytes that mean nothing: spaces of the header


def test_a_forged_manifest_needs_the_key(handoff, tmp_path):
    path = tmp_path / "a.safetensors"
    handoff.save(path, bound_to="talk 1", key=b"secret")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    manifest = json.loads(header["manifest"]) | {"bound_to": "talk 2"}
    save_file(load_file(path), path, metadata=header | {"manifest": json.dumps(manifest, sort_keys=True)})
    with pytest.raises(HandoffError, match="damaged"):
        Handoff.load(path, bound_to="talk 2", key=b"secret")
    handoff.save(path, key=b"another")
    with pytest.raises(HandoffError, match="another key"):
        Handoff.load(path, key=b"secret")
    with pytest.raises(HandoffError, match="pass its key"):
        Handoff.load(path)


def test_other_files_are_refused(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.zeros(2)}
    for write, message in [
        (lambda: None, "no such handoff"),
        (lambda: path.write_text("not a tensor in sight"), "cut off or no safetensors"),
        (lambda: save_file(tensors, path), "no handoff"),
        (lambda: save_file(tensors, path, metadata={"manifest": "[]", "digest": ""}), "no handoff"),
    ]:
        write()
        with pytest.raises(HandoffError, match=message):
            Handoff.load(path)


def test_a_whole_file_with_missing_parts_is_refused(handoff, tmp_path):
    """The digest is right, and what it covers is not a handoff."""
    path = tmp_path / "a.safetensors"
    short = dataclasses.replace(handoff, layers=handoff.layers[:-1])
    far = dataclasses.replace(handoff, kept=handoff.kept + len(handoff.ids))
    nameless = dataclasses.replace(handoff, sharer=dataclasses.replace(handoff.sharer, kv={}))
    cut = dataclasses.replace(handoff, ids=handoff.ids[:-1], kept=handoff.kept[:1])
    for broken in (short, far, nameless, cut):
        broken.save(path)
        with pytest.raises(HandoffError, match="no whole handoff"):
            Handoff.load(path)


def test_a_file_is_readable_by_its_owner_alone(handoff, tmp_path):
    handoff.save(tmp_path / "new" / "a.safetensors")
    assert (tmp_path / "new" / "a.safetensors").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_handoff_of_another_conversation_or_an_expired_one_is_refused(handoff, tmp_path):
    path = tmp_path / "a.safetensors"
    handoff.save(path, bound_to="talk 1")
    with pytest.raises(HandoffError, match="'talk 1', and is to be used for 'talk 2'"):
        Handoff.load(path, bound_to="talk 2")
    with pytest.raises(HandoffError, match="to be used for None"):
        Handoff.load(path)
    handoff.save(path, expires=time.time() - 1)
    with pytest.raises(HandoffError, match="expired"):
        Handoff.load(path)
    handoff.save(path, expires=time.time() + 60)
    assert_same(Handoff.load(path), handoff)


def test_the_id_depends_on_text_and_sharer(sharer, handoff):
    assert sharer.read(DOCUMENT).id == handoff.id
    assert sharer.read(DOCUMENT + "!").id != handoff.id
    assert Sharer(build("qwen2", 3), tokenizer("llama3"), "qwen2").read(DOCUMENT).id != handoff.id
