"""Cache-to-cache on vLLM: greedy answers are those of ``transformers``, whatever runs beside them and whatever fails.

Needs vLLM: ``make test-vllm``.
"""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from c2c import C2CModel, kv_cache
from c2c.integrations.vllm.errors import LoadError
from c2c.integrations.vllm.scheduler import TransferParams
from c2c.integrations.vllm.snapshot import Snapshot, new_name
from c2c.language_model import Receiver
from c2c.serving.config import ServeConfig
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from c2c.tokens import left_pad
from serving_harness import NAME, events, running, streamed, text_of, until, user
from test_serving_process import Process
from tiny import NO_SPECIALS, SIZES, open_fusers, tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

TOKENS = 24
WORDS = ["hello", "there", "fox", "red", "house", "sea", "cat", "dog", "who", "buys", "what", "and", "why", "today"]
TEXTS = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(3 + 5 * i)) for i in range(8)]
SMALL = {"kv_cache_memory_bytes": 2**26, "distributed_executor_backend": "uni"}
# one process and one thread per engine: these models are tiny, and threads that wait for each other are slow
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def build_receiver():
    """A head size of which vLLM has kernels, unlike that of the other tests."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **heads, **SIZES, **NO_SPECIALS))


def build_sharer():
    torch.manual_seed(2)
    sizes = SIZES | {"hidden_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=3, **heads, **sizes, **NO_SPECIALS))


def pair() -> C2CModel:
    """Always the same: vLLM takes the weights of one, and ``transformers`` answers with another."""
    ours = Receiver(build_receiver(), tokenizer("chatml"), "llama")
    theirs = Sharer(build_sharer(), tokenizer("llama3"), "qwen2")
    made = open_fusers(C2CModel.from_models(ours, theirs))
    made.fusers[0].config.training = {"config": "random"}
    return made


@pytest.fixture(scope="module")
def here() -> C2CModel:
    return pair()


@pytest.fixture(scope="module")
def fused(here) -> list[str]:
    return [here.generate(text, max_new_tokens=TOKENS, do_sample=False).text for text in TEXTS]


@pytest.fixture(scope="module")
def plain(here) -> list[str]:
    return [here.receiver.answer(user(text), max_new_tokens=TOKENS, do_sample=False).text for text in TEXTS]


def library(here, text, system, tokens=TOKENS) -> str:
    """What ``transformers`` answers."""
    made = make_system(system, here, SystemOptions(message_tokens=6))
    return made.generate(user(text), max_new_tokens=tokens, do_sample=False).text


@contextmanager
def serving(config: dict | None = None, **options):
    """A server on vLLM."""
    from c2c.integrations.vllm.engine import VLLMEngine

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        fields = {"max_batch": 24, "message_tokens": 6, "engine": "vllm"} | (config or {})
        engine = VLLMEngine(pair(), ServeConfig(**fields), SMALL | options)
        with running(None, engine=engine, max_batch=fields["max_batch"]) as server:
            yield SimpleNamespace(server=server, engine=engine, client=engine.clients[-1])


@pytest.fixture(scope="module")
def vllm():
    with serving() as found:
        yield found


def ask_all(server, systems=("", "/receiver"), texts=TEXTS):
    """Answers of each of these systems to every text, all at once."""
    with ThreadPoolExecutor(len(systems) * len(texts)) as clients:
        asked = [
            [clients.submit(server.chat, text, NAME + system, max_tokens=TOKENS) for text in texts]
            for system in systems
        ]
        return [[text_of(one.result()) for one in answers] for answers in asked]


# -- the same answers --------------------------------------------------------------------------------------------------


def test_fused_answers_differ_from_plain_ones(fused, plain):
    """So that the tests below would see a load that was not done."""
    assert all(one != other for one, other in zip(fused, plain, strict=True))
    assert len(set(fused)) == len(fused)


def test_eight_at_once_beside_eight_plain_ones(vllm, fused, plain):
    """Twice: at the second time the prefix cache knows the prompts."""
    for _ in range(2):
        assert ask_all(vllm.server) == [fused, plain]


def test_eight_caches_of_one_prompt_at_once(vllm, here):
    """Each answers from its own; none from that of another, nor from the prefix cache."""
    ids = here.receiver.encode(TEXTS[4]).ids[0].tolist()
    read = vllm.client.loop.run(vllm.client.prefill(ids[:-1]))
    clean = here.receiver.prefill(left_pad([ids], 0), len(ids) - 1)
    for ours, theirs in zip(kv_cache.layers(clean), kv_cache.layers(read.cache()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    changed = [_changed(read, seed) for seed in range(8)]
    expected = [
        here.receiver.generate(left_pad([ids], 0), one.cache(), max_new_tokens=TOKENS, do_sample=False)[0].tolist()
        for one in changed
    ]
    assert len(set(map(tuple, expected))) == 8
    loads = [_put(vllm.engine.store, one) for one in changed]
    found = _answers(vllm.client, ids, [*loads, None, None])
    assert found[:8] == expected
    assert found[8] == found[9] not in expected
    assert _answers(vllm.client, ids, [None])[0] == found[8]


def _changed(snapshot: Snapshot, seed: int) -> Snapshot:
    numbers = torch.Generator().manual_seed(seed)
    keys, values = (x + 0.5 * torch.randn(x.shape, generator=numbers) for x in (snapshot.keys, snapshot.values))
    return Snapshot(snapshot.info, keys, values)


def _put(store, snapshot: Snapshot) -> str:
    store.put(name := new_name(), snapshot)
    return name


def _answers(client, ids, loads) -> list:
    """Tokens that an engine answers from these snapshots, or from the prompt alone; the error where there is one."""
    settings = {"max_tokens": TOKENS, "temperature": 0.0}

    async def one(load):
        transfer = None if load is None else TransferParams(load=load, receipt=new_name())
        try:
            return [token async for new in client.stream(ids, settings, transfer) for token, _ in new]
        except LoadError as error:
            return error

    async def every():
        return await asyncio.gather(*(one(load) for load in loads))

    return client.loop.run(every())


def test_a_stream_is_the_same_answer(vllm, fused):
    found = events(vllm.server.chat(TEXTS[3], max_tokens=TOKENS, stream=True).text)
    assert found[-1] == "[DONE]"
    pieces = [choice["delta"].get("content") or "" for chunk in found[:-1] for choice in chunk["choices"]]
    assert "".join(pieces) == fused[3]
    assert len([piece for piece in pieces if piece]) > 4


def test_several_answers_samples_stops_and_log_probabilities(vllm, fused):
    server = vllm.server
    greedy = server.chat(TEXTS[1], max_tokens=TOKENS, n=3, logprobs=True, top_logprobs=2).json()
    assert [choice["message"]["content"] for choice in greedy["choices"]] == [fused[1]] * 3
    for entry in greedy["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
    sampled = [text_of(server.chat(TEXTS[1], max_tokens=TOKENS, temperature=1.5, seed=s)) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stop = fused[1][len(fused[1]) // 2 :][:3]
    stopped = server.chat(TEXTS[1], max_tokens=TOKENS, stop=stop).json()["choices"][0]
    assert stopped["message"]["content"] == fused[1][: fused[1].index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_a_sharer_beside_the_engine_answers_and_generates_texts(vllm, here):
    expected = [[library(here, TEXTS[2], system)] for system in ("sharer", "text")]
    assert ask_all(vllm.server, ("/sharer", "/text"), TEXTS[2:3]) == expected


def test_the_report_is_the_same(vllm, here):
    found = vllm.server.chat(TEXTS[5], c2c={"report": True}).json()["c2c"]
    expected = here.generate(TEXTS[5], max_new_tokens=1, do_sample=False).report.to_dict()
    assert found["fallback"] is None
    for field in ("prompt_tokens", "fused_tokens", "skipped_tokens", "skipped_layers", "sharer_bytes"):
        assert found["report"][field] == expected[field]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@contextmanager
def damaged(vllm, monkeypatch, count: int = 1):
    """The next fused caches are damaged after they are written."""
    put, left = vllm.engine.store.put, [count]

    def put_damaged(name, snapshot):
        put(name, snapshot)
        if left[0]:
            left[0] -= 1
            with (vllm.engine.store.folder / f"{name}.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")

    with monkeypatch.context() as patch:
        patch.setattr(vllm.engine.store, "put", put_damaged)
        yield


def test_a_cache_that_can_not_be_loaded_is_an_error_of_that_request(vllm, fused, plain, monkeypatch):
    with damaged(vllm, monkeypatch), ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda text: vllm.server.chat(text, max_tokens=TOKENS), TEXTS[:3]))
    assert sorted(response.status_code for response in found) == [200, 200, 500]
    for response, expected in zip(found, fused, strict=False):
        if response.status_code == 200:
            assert text_of(response) == expected
        else:
            assert response.json()["error"]["code"] == "load_failed"
    assert vllm.server.get("/health").status_code == 200
    assert ask_all(vllm.server, texts=TEXTS[:3]) == [fused[:3], plain[:3]]


def test_a_fallback_is_reported(fused, plain, monkeypatch):
    with serving({"on_failure": "receiver_only"}) as vllm:
        for stream in (False, True):
            with damaged(vllm, monkeypatch):
                response = vllm.server.chat(TEXTS[6], max_tokens=TOKENS, stream=stream)
            if stream:
                assert streamed(response) == [plain[6]]
                about = next(chunk["c2c"] for chunk in events(response.text)[:-1] if "c2c" in chunk)
            else:
                assert text_of(response) == plain[6]
                about = response.json()["c2c"]
            assert about["fallback"].startswith("receiver only: the fused cache could not be loaded")
            assert text_of(vllm.server.chat(TEXTS[6], max_tokens=TOKENS)) == fused[6]  # nothing stuck in a cache
        assert vllm.server.metric("c2c_fallbacks_total") == 2


def test_unknown_and_foreign_caches_are_refused(vllm, here):
    """By id, by model, by tokens; and an id that is a path. A plain request beside them is answered."""
    ids = here.receiver.encode(TEXTS[0]).ids[0].tolist()
    read, store = vllm.client.loop.run(vllm.client.prefill(ids[:-1])), vllm.engine.store
    foreign = Snapshot.of(read.keys, read.values, ids[:-1], "another-model")
    other = Snapshot.of(read.keys, read.values, [*ids[:-2], ids[-2] + 1], read.info.model)
    whole = Snapshot.of(*(torch.cat([x, x[:, :, :1]], 2) for x in (read.keys, read.values)), ids, read.info.model)
    loads = [new_name(), _put(store, foreign), _put(store, other), _put(store, whole), "../../secret", None]
    *refused, answer = _answers(vllm.client, ids, loads)
    assert all(isinstance(one, LoadError) for one in refused), refused
    assert answer == _answers(vllm.client, ids, [None])[0]
    assert vllm.engine.alive


def test_nothing_is_left_in_the_store(vllm):
    """An answer is sent first; what it was decoded from is deleted right after it."""
    folder = vllm.engine.store.folder
    before = set(folder.iterdir())
    ask_all(vllm.server, ("",), TEXTS[:2])
    until(lambda: set(folder.iterdir()) <= before)


# -- other engines -----------------------------------------------------------------------------------------------------


def test_prompts_in_pieces_and_requests_that_are_pre_empted(fused, plain):
    """32 tokens per step, and blocks for three or four requests at a time."""
    from prometheus_client import REGISTRY

    cramped = {"max_num_batched_tokens": 32, "max_model_len": 256, "num_gpu_blocks_override": 14}
    with serving(disable_log_stats=False, **cramped) as vllm:
        assert ask_all(vllm.server) == [fused, plain]
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    assert sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total") > 0


def test_a_sharer_in_an_engine_of_its_own(here, fused, plain):
    expected = [[library(here, text, system) for text in TEXTS[:2]] for system in ("sharer", "text")]
    with serving({"sharer_engine": "vllm"}) as vllm:
        assert ask_all(vllm.server) == [fused, plain]
        assert ask_all(vllm.server, ("/sharer", "/text"), TEXTS[:2]) == expected


def test_the_command(tmp_path, monkeypatch):
    """With vLLM's own processes and threads; it ends as the other engine does."""
    monkeypatch.setattr("serving_harness.PATIENCE", 600.0)  # with other work on the cores it takes minutes to start
    folders = [str(tmp_path / name) for name in ("receiver", "sharer")]
    for folder, model, words in zip(folders, (build_receiver(), build_sharer()), ("chatml", "llama3"), strict=True):
        model.save_pretrained(folder)
        tokenizer(words).save_pretrained(folder)
    made = open_fusers(C2CModel.from_models(*folders))
    made.save_pretrained(tmp_path / NAME)
    expected = [made.generate(text, max_new_tokens=TOKENS, do_sample=False).text for text in TEXTS]
    options = ["--receiver", folders[0], "--sharer", folders[1], "--max-batch", "8", "--on-failure", "receiver_only"]
    options += ["--engine", "vllm", "--engine-option", f"kv_cache_memory_bytes={2**26}"]
    process = Process(str(tmp_path / NAME), *options)
    try:
        assert ask_all(process.running, ("",)) == [expected]
        assert process.end(signal.SIGTERM) == 0
    finally:
        process.popen.kill()
