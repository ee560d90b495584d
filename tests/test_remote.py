"""Sharers on other machines: what comes is what a local sharer would have given, and no more than is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.alignment import PublishedAligner
from c2c.errors import C2CError, CacheError, HandoffError, MismatchError, ModelLoadError, PromptError
from c2c.families import build_tiny
from c2c.handoff import Handoff
from c2c.remote import RemoteError, RemoteSharer
from c2c.remote.protocol import fuser_hash, packed_bytes
from c2c.sharer import EntrySelection, Sharer
from c2c.tokens import left_pad
from remote_rig import KEY, make_server, serving
from test_private import DOCUMENT, LONGER, QUESTION, logits
from tiny import build, memory_pair, open_fusers, pair, pair_folders, tokenizer

TEXTS = ["A dog and a cat.", "Hi", "The fox sleeps in a red house by the sea, they say."]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def local():
    return open_fusers(pair(fuser_options={"rank": 8}))


@pytest.fixture(scope="module")
def server(local):
    with serving(local.sharers[0]) as running:
        yield running


@pytest.fixture(scope="module")
def remote(local, server):
    sharer = RemoteSharer(server.url)
    yield C2CModel(local.receiver, [sharer], list(local.fusers))
    sharer.close()


def fused(model, messages):
    prepared = model.prefill(messages)
    return prepared, model.receiver.next_logits(prepared.tokens, kv_cache.copy(prepared.cache))


def same_caches(first, second) -> bool:
    pairs = zip(kv_cache.layers(first), kv_cache.layers(second), strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


# -- equal to a local sharer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TEXTS[0], TEXTS])
def test_remote_equals_local_bit_for_bit(local, remote, messages):
    (ours, our_logits), (theirs, their_logits) = fused(local, messages), fused(remote, messages)
    assert same_caches(ours.cache, theirs.cache)
    assert torch.equal(our_logits, their_logits)
    tokens = local.receiver.encode(messages)
    alone = local.receiver.next_logits(tokens, local.receiver.prefill(tokens, tokens.length - 1))
    assert not torch.allclose(our_logits, alone, atol=1e-3), "the fuser matters in these tests"
    assert ours.report.sharer_bytes == theirs.report.sharer_bytes
    first, second = local.generate(messages, **GREEDY), remote.generate(messages, **GREEDY)
    for one, other in zip(*(x if isinstance(x, list) else [x] for x in (first, second)), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
    assert theirs.report.notes == []


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {"fuser_options": {"rank": 8}}) for family in ("llama", "qwen3", "gemma3")]
    + [("qwen2", {"fuser": "c2c", "aligner": PublishedAligner(strategy="longest")})],
)
def test_every_family_and_the_published_alignment(family, options):
    ours = open_fusers(pair("qwen2", family, **options), scale=0.3)
    with serving(ours.sharers[0]) as running:
        sharer = RemoteSharer(running.url)
        theirs = C2CModel(ours.receiver, [sharer], list(ours.fusers), aligner=ours.aligner)
        assert torch.equal(fused(ours, TEXTS)[1], fused(theirs, TEXTS)[1])
        assert sharer.identity.weights == ours.sharers[0].identity.weights


def test_token_ids_with_padding_and_positions(local, remote):
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    select = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    given = {"fuse_mask": select, "receiver_mask": mask, "sharer_mask": mask}
    ours, theirs = local.fuse_ids(ids, ids, **given), remote.fuse_ids(ids, ids, **given)
    assert torch.equal(ours.last_logits, theirs.last_logits)


def test_a_sharer_without_a_tokenizer_whose_keys_have_no_known_rotation():
    with serving(Sharer(build_tiny("gptj"), None, "gptj")) as running:
        sharer = RemoteSharer(running.url)
    assert sharer.tokenizer is None
    with pytest.raises(CacheError, match="rotary"):
        sharer.check_rotary()


@pytest.mark.parametrize("family", ["lfm2", "glm4", "llama4_text", "gpt_oss"])
def test_sharers_of_other_conventions_and_hybrids_are_read_as_locally(family):
    sharer = Sharer(build_tiny(family), tokenizer("llama3"), family)
    ours = open_fusers(C2CModel.from_models(pair().receiver, sharer), scale=0.3)
    with serving(sharer) as running:
        theirs = C2CModel(ours.receiver, [RemoteSharer(running.url)], list(ours.fusers), aligner=ours.aligner)
        assert torch.equal(fused(ours, TEXTS)[1], fused(theirs, TEXTS)[1])


def test_a_local_and_a_remote_sharer_together(local, remote):
    near, away = local.sharers[0], remote.sharers[0]
    both, mixed = (
        C2CModel(local.receiver, [near, second], [local.fusers[0]] * 2, mode="parallel") for second in (near, away)
    )
    assert torch.equal(fused(both, TEXTS)[1], fused(mixed, TEXTS)[1])


def test_a_url_takes_the_place_of_a_name(local, server, tmp_path):
    local.save_pretrained(tmp_path)
    loaded = C2CModel.from_pretrained(tmp_path, receiver=local.receiver, sharer=server.url)
    assert torch.equal(fused(local, TEXTS)[1], fused(loaded, TEXTS)[1])
    fresh = C2CModel.from_models(local.receiver, server.url)
    assert fresh.fusers[0].config.sharer["weights"] == local.sharers[0].identity.weights


def test_several_threads_at_once(local, remote):
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        found = list(pool.map(lambda text: fused(remote, text)[1], TEXTS))
    assert all(torch.equal(fused(local, text)[1], one) for text, one in zip(TEXTS, found, strict=True))


def test_a_model_in_bfloat16_crosses_as_it_is(local, tmp_path):
    build("qwen2", 2).save_pretrained(tmp_path)
    half = Sharer.from_pretrained(tmp_path, tokenizer=tokenizer("llama3"), dtype=torch.bfloat16)
    ours = C2CModel(local.receiver, [half], list(local.fusers))
    with serving(half) as running:
        sharer = RemoteSharer(running.url, precision="float32")
        assert (sharer.dtype, sharer.precision) == (torch.bfloat16, "bfloat16")
        theirs = C2CModel(local.receiver, [sharer], list(local.fusers))
        assert torch.equal(fused(ours, TEXTS)[1], fused(theirs, TEXTS)[1])


def test_a_model_that_rotates_otherwise_is_refused():
    """Converting a whole module rounds the frequencies of its rotation too, and then it is another model."""
    half = Sharer(build("qwen2", 2).to(torch.bfloat16), tokenizer("llama3"), "qwen2")
    with serving(half) as running, pytest.raises(RemoteError, match="rotates its keys otherwise"):
        RemoteSharer(running.url)


# -- only what is needed -----------------------------------------------------------------------------------------------


def test_only_mapped_layers_and_columns_cross(local, server):
    crossed = {}
    for mapping in ([None, None, None, None, 1], [0, 0, 1, 1, 2]):
        sharer = RemoteSharer(server.url)
        model = open_fusers(C2CModel.from_models(local.receiver, sharer, layer_map=mapping))
        before, seen = sharer.traffic.received, len(server.log)
        model.prefill(TEXTS[2])
        used = {layer for layer in mapping if layer is not None}
        assert server.logged(seen + 1)[-1]["layers"] == len(used)
        crossed[len(used)] = sharer.traffic.received - before
        whole = packed_bytes(sharer.geometry, len(used), sharer.encode(TEXTS[2]).length, "float32")
        assert crossed[len(used)] < whole + 1500 * (2 + len(used)), "the template before the message is not read"
    assert crossed[3] > 1.5 * crossed[1]


def test_a_batch_that_is_too_large_for_the_server_is_sent_in_parts(local):
    length = max(local.sharers[0].encode(text).length for text in TEXTS)
    with serving(local.sharers[0], max_tokens=2 * length + 1) as running:
        remote = C2CModel(local.receiver, [RemoteSharer(running.url)], list(local.fusers))
        ours, theirs = fused(local, list(TEXTS)), fused(remote, list(TEXTS))
        assert [entry["rows"] for entry in running.logged(3)[1:]] == [2, 1]
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize(("most", "rows", "columns"), [(8192, [0, 0, 1], [1, 2, 3]), (4, [1, 1], [2, 3])])
def test_entries_that_were_not_wanted_do_not_cross(local, most, rows, columns):
    """Nor is a part of a batch sent of which nothing is read."""
    batch, wanted = (
        left_pad([[5, 6, 7, 8], [9, 10]], 0),
        EntrySelection([2, 1], torch.tensor(rows), torch.tensor(columns)),
    )
    with serving(local.sharers[0], max_tokens=most) as running:
        sharer = RemoteSharer(running.url)
        cache, whole = sharer.share(batch, wanted), local.sharers[0].prefill(batch)
    assert sharer.traffic.requests == 2, "the handshake, and one prefill"
    assert kv_cache.layer(cache, 0)[0].shape[2] == 0
    read = torch.zeros(2, 4, dtype=torch.bool).index_put((wanted.rows, wanted.columns), torch.tensor(True))
    for layer in (1, 2):
        for part, full in zip(kv_cache.layer(cache, layer), kv_cache.layer(whole, layer), strict=True):
            torch.testing.assert_close(part.transpose(1, 2)[read], full.transpose(1, 2)[read], rtol=1e-5, atol=1e-5)
            assert not part.transpose(1, 2)[~read].any()


def test_a_whole_prefill(remote, local):
    batch = left_pad([[5, 6, 7, 8], [9, 10]], 0)
    assert same_caches(remote.sharers[0].prefill(batch), local.sharers[0].prefill(batch))
    assert same_caches(remote.sharers[0].prefill(batch, 3), local.sharers[0].prefill(batch, 3))
    with pytest.raises(CacheError, match="can't extend"):
        remote.sharers[0].prefill(batch, cache=local.sharers[0].prefill(batch, 2))


def test_the_tokenizer_need_not_cross(local, server):
    with_files, without = RemoteSharer(server.url), RemoteSharer(server.url, tokenizer=tokenizer("llama3"))
    assert without.traffic.received < 0.5 * with_files.traffic.received
    assert with_files.tokenizer("Größe 42?")["input_ids"] == local.sharers[0].tokenizer("Größe 42?")["input_ids"]
    with pytest.raises(MismatchError, match="tokenizer"):
        RemoteSharer(server.url, tokenizer=tokenizer("chatml"))
    with pytest.raises(ModelLoadError, match="tokenizer"):
        RemoteSharer(server.url, tokenizer="/nowhere")


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "share", "error"),
    [("bfloat16", 0.52, 0.005), ("float16", 0.52, 0.001), ("int8", 0.4, 0.012), ("float8", 0.4, 0.05)],
)
def test_fewer_bits_are_close_and_small_and_a_batch_equals_its_singles(local, server, precision, share, error):
    exact, rough = RemoteSharer(server.url), RemoteSharer(server.url, precision=precision)
    rows = [list(range(5, 95)), list(range(40, 130))]
    sizes, caches = [], []
    for sharer in (exact, rough):
        before = sharer.traffic.received
        caches.append(kv_cache.layers(sharer.prefill(left_pad(rows, 0))))
        sizes.append(sharer.traffic.received - before)
    assert sizes[1] < share * sizes[0]
    singles = [kv_cache.layers(rough.prefill(left_pad([row], 0))) for row in rows]
    for layer, pair_ in enumerate(zip(*caches, strict=True)):
        for side, (x, y) in enumerate(zip(*pair_, strict=True)):
            assert not torch.equal(x, y)
            assert float((x - y).norm() / x.norm()) < error
            own = torch.cat([single[layer][side] for single in singles])
            assert float((own - y).norm() / y.norm()) < error, "scales belong to a row"
    ours = fused(local, TEXTS)[1]
    theirs = fused(C2CModel(local.receiver, [rough], list(local.fusers)), TEXTS)[1]
    assert float((ours - theirs).norm() / ours.norm()) < 10 * error


def test_the_server_sets_the_finest_precision(local):
    with serving(local.sharers[0], precision="bfloat16") as running:
        assert RemoteSharer(running.url).precision == "bfloat16"
        assert RemoteSharer(running.url, precision="int8").precision == "int8"
        with pytest.raises(RemoteError, match="float32, only bfloat16"):
            RemoteSharer(running.url, precision="float32")
    with pytest.raises(RemoteError, match="unknown precision 'int3'"):
        RemoteSharer("http://127.0.0.1:1", precision="int3")


# -- private context ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    return memory_pair()


@pytest.fixture(scope="module")
def library(reader):
    with serving(reader.sharers[0]) as running:
        yield running


def far(reader, library, **options) -> C2CModel:
    return C2CModel(reader.receiver, [RemoteSharer(library.url, **options)], list(reader.fusers))


def test_private_context_equals_local_bit_for_bit(reader, library):
    away = far(reader, library)
    assert torch.equal(logits(reader, QUESTION, DOCUMENT), logits(away, QUESTION, DOCUMENT))
    questions, documents = [QUESTION, "Who?"], [DOCUMENT, LONGER]
    ours = reader.generate(questions, sharer_messages=documents, **GREEDY)
    theirs = away.generate(questions, sharer_messages=documents, **GREEDY)
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.report.memory_slots == other.report.memory_slots
        assert one.report.sharer_bytes == other.report.sharer_bytes


@pytest.mark.parametrize("draft", [0, 4])
def test_a_handoff_is_the_same_value(reader, library, tmp_path, draft):
    sharer, away = reader.sharers[0], far(reader, library)
    ours, theirs = sharer.read(DOCUMENT, draft_tokens=draft), away.sharers[0].read(DOCUMENT, draft_tokens=draft)
    assert (ours.id, ours.ids.tolist(), ours.kept.tolist()) == (theirs.id, theirs.ids.tolist(), theirs.kept.tolist())
    assert same_caches(ours.cache(sharer.dtype, sharer.device), theirs.cache(sharer.dtype, sharer.device))
    theirs.save(tmp_path / "h.safetensors", key=KEY.encode())
    loaded = Handoff.load(tmp_path / "h.safetensors", key=KEY.encode())
    part = away.sharers[0].for_fuser(away.fusers[0]).read(DOCUMENT, draft_tokens=draft)
    for handoff in (theirs, loaded, part):
        assert torch.equal(logits(reader, QUESTION, handoff), logits(reader, QUESTION, ours))


def test_a_handoff_in_8_bits_equals_one_that_was_packed_here(reader, library):
    ours = reader.sharers[0].read(DOCUMENT).to("int8")
    theirs = far(reader, library, precision="int8").sharers[0].read(DOCUMENT)
    assert (theirs.precision, theirs.nbytes) == ("int8", ours.nbytes)
    assert same_caches(ours.cache(torch.float32, torch.device("cpu")), theirs.cache(torch.float32, torch.device("cpu")))


def test_a_growing_document_crosses_once(reader, library):
    away = far(reader, library).sharers[0]
    begun = away.read(LONGER)
    before = away.traffic.received
    grown = away.read(LONGER + DOCUMENT, reuse=begun)
    extended = away.traffic.received - before
    fresh = away.read(LONGER + DOCUMENT)
    assert extended < 0.5 * (away.traffic.received - before - extended)
    assert grown.ids.tolist() == fresh.ids.tolist()
    torch.testing.assert_close(logits(reader, QUESTION, grown), logits(reader, QUESTION, fresh), rtol=1e-4, atol=1e-4)
    other = Sharer(build("qwen3", 5), tokenizer("llama3"), "other").read(LONGER)
    with pytest.raises(MismatchError):
        away.read(LONGER, reuse=other)
    with pytest.raises(PromptError, match="one conversation"):
        away.read([DOCUMENT, LONGER])


@pytest.mark.parametrize(("slots", "kind"), [(2, "project"), (None, "prefill")])
def test_projection_happens_where_fewer_bytes_cross(slots, kind):
    """Two slots are fewer bytes than a document; all positions through a larger receiver are more."""
    ours = memory_pair(slots=slots)
    with serving(ours.sharers[0], fusers=list(ours.fusers)) as running, serving(ours.sharers[0]) as plain:
        theirs, raw = far(ours, running), far(ours, plain)
        assert torch.equal(logits(ours, QUESTION, LONGER), logits(theirs, QUESTION, LONGER))
        assert torch.equal(logits(ours, QUESTION, LONGER), logits(raw, QUESTION, LONGER))
        assert kind in [entry["kind"] for entry in running.logged(3)]
        few, many = (model.sharers[0].traffic.received for model in (theirs, raw))
        assert (few < 0.9 * many) == (slots is not None)
        expected = slots or len(theirs.sharers[0].read(LONGER).kept)
        assert theirs.prefill(QUESTION, sharer_messages=LONGER).report.memory_slots == expected


def test_the_server_projects_a_draft_and_in_8_bits():
    ours = memory_pair(slots=2)
    with serving(ours.sharers[0], fusers=list(ours.fusers)) as running:
        handoff = far(ours, running).sharers[0].for_fuser(ours.fusers[0]).read(LONGER, draft_tokens=3)
        expected = logits(ours, QUESTION, ours.sharers[0].read(LONGER, draft_tokens=3))
        assert torch.equal(logits(ours, QUESTION, handoff), expected)
        with pytest.raises(HandoffError, match="zeroed"):  # its entries would stay, and the control be no control
            handoff.zeros_like()
        rough, exact = far(ours, running, precision="int8"), logits(ours, QUESTION, LONGER)
        found = logits(rough, QUESTION, LONGER)
        assert not torch.equal(found, exact)
        assert float((found - exact).norm() / exact.norm()) < 0.1


def test_a_server_projects_with_this_very_fuser_or_not_at_all():
    ours, other = memory_pair(slots=2), memory_pair(slots=2)
    with torch.no_grad():
        other.fusers[0].bias += 1
    with serving(ours.sharers[0], fusers=list(other.fusers)) as running:
        assert torch.equal(logits(ours, QUESTION, LONGER), logits(far(ours, running), QUESTION, LONGER))
        assert running.logged(2)[1]["kind"] == "prefill"
    untrained = pair(fuser="memory", fuser_options={"slots": 2})  # makes no entries, wherever it is
    with serving(untrained.sharers[0], fusers=list(untrained.fusers)) as running:
        found, alone = (logits(one, QUESTION, LONGER) for one in (far(untrained, running), untrained))
        assert torch.equal(found, alone)
        assert running.logged(2)[1]["kind"] == "project"


def test_the_weights_of_a_fuser_are_hashed_once_and_again_when_they_change(monkeypatch):
    ours = memory_pair(slots=2)
    fuser, hashed = ours.fusers[0], []
    with serving(ours.sharers[0], fusers=list(ours.fusers)) as running:
        away = far(ours, running)
        whole = type(fuser).state_dict
        monkeypatch.setattr(type(fuser), "state_dict", lambda self, *a, **k: hashed.append(1) or whole(self, *a, **k))
        for _ in range(3):
            away.prefill(QUESTION, sharer_messages=LONGER)
        assert running.logged(4)[-1]["kind"] == "project"
    assert len(hashed) <= 1
    before = fuser_hash(fuser)
    with torch.no_grad():
        fuser.bias += 1
    assert fuser_hash(fuser) != before


def test_what_was_read_for_one_fuser_is_for_no_other(reader, library, tmp_path):
    away = far(reader, library)
    small = memory_pair()
    small.fusers[0].config.layer_map = [0, 0, 0, 0, 0]
    part = away.sharers[0].for_fuser(small.fusers[0]).read(DOCUMENT)
    with pytest.raises(HandoffError, match="another fuser"):
        logits(reader, QUESTION, part)
    for use in (
        lambda: part.save(tmp_path / "h"),
        lambda: part.to("int8"),
        lambda: away.sharers[0].read(DOCUMENT, reuse=part),
    ):
        with pytest.raises(HandoffError):
            use()
    pooled = memory_pair(slots=2)
    with serving(pooled.sharers[0], fusers=list(pooled.fusers)) as running:
        made = far(pooled, running).sharers[0].for_fuser(pooled.fusers[0]).read(DOCUMENT)
    with pytest.raises(HandoffError, match="another fuser"):
        logits(reader, QUESTION, made)


# -- what it can't do, and who it is -----------------------------------------------------------------------------------


def test_it_only_shares(remote):
    sharer = remote.sharers[0]
    for use in (sharer.answer, sharer.generate, sharer.next_logits, lambda: sharer.draft(None, None, 1)):
        with pytest.raises(RemoteError, match="only shares its cache"):
            use()
    with pytest.raises(PromptError, match="made for"):
        remote.prefill("long " * 600)


def test_a_fuser_for_another_sharer_is_refused_before_anything_crosses(local, server):
    strange = Sharer(build("qwen2", 9), tokenizer("llama3"), "strange")
    fuser = open_fusers(C2CModel.from_models(local.receiver, strange)).fusers[0]
    sharer = RemoteSharer(server.url)
    before = sharer.traffic.received
    with pytest.raises(MismatchError, match="weights"):
        C2CModel(local.receiver, [sharer], [fuser])
    assert sharer.traffic.received == before


def test_the_server_refuses_what_it_can_not_serve(local):
    strange = Sharer(build("qwen2", 9), tokenizer("llama3"), "strange")
    for sharer, options, match in (
        (local.sharers[0], {"layers": "0,3"}, r"layers \[3\] do not exist"),
        (local.sharers[0], {"fusers": list(local.fusers)}, "merges into the receiver's entries"),
        (strange, {"fusers": list(memory_pair().fusers)}, "weights"),
    ):
        with pytest.raises(C2CError, match=match):
            make_server(sharer, **options)


def test_layers_that_are_not_shared_are_refused(local):
    with serving(local.sharers[0], layers="0") as running:
        sharer = RemoteSharer(running.url)
        with pytest.raises(RemoteError, match=r"layers \[1, 2\] are not shared"):
            C2CModel(local.receiver, [sharer], list(local.fusers)).prefill("Hi")
        mapping = [0, None, None, None, None]
        ours = open_fusers(C2CModel.from_models(local.receiver, local.sharers[0], layer_map=mapping))
        theirs = C2CModel(local.receiver, [sharer], list(ours.fusers))
        assert torch.equal(fused(ours, TEXTS)[1], fused(theirs, TEXTS)[1])


def test_a_cache_tells_its_text_to_whoever_has_the_model(local, server):
    """One layer, in 8 bits: each token is found by trying all of them. That is why a cache is treated as the text."""
    sharer, model = RemoteSharer(server.url, precision="int8"), local.sharers[0]
    batch = left_pad([model.tokenizer("The fox sleeps by the sea.")["input_ids"]], 0)
    wanted = EntrySelection([2], torch.zeros(batch.length, dtype=torch.long), torch.arange(batch.length))
    stolen = torch.cat(kv_cache.layer(sharer.share(batch, wanted), 2), dim=-1)
    found: list[int] = []
    for column in range(batch.length):
        tried = kv_cache.layer(model.prefill(left_pad([[*found, word] for word in range(512)], 0)), 2)
        apart = (torch.cat(tried, dim=-1)[:, :, column] - stolen[:, :, column]).flatten(1).norm(dim=-1)
        found.append(int(apart.argmin()))
    assert found == batch.ids[0].tolist()


def test_loaded_from_folders_the_name_shows_no_path(tmp_path_factory):
    folder = pair_folders(tmp_path_factory.mktemp)[1]
    with serving(Sharer.from_pretrained(folder)) as running:
        sharer = RemoteSharer(running.url)
    assert "/" not in sharer.identity.name
    assert sharer.identity.weights is not None
