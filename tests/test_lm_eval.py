"""The lm-evaluation-harness on tiny pairs: the same numbers as its own models, and what fusion adds. Offline."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from c2c.alignment import PublishedAligner
from c2c.alignment.base import derange, truncate
from c2c.cli.app import app
from c2c.errors import AlignmentError, PromptError
from c2c.integrations import IntegrationError, MissingExtraError
from c2c.language_model import LanguageModel
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch
from tiny import open_fusers, pair, saved_fuser

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from c2c.evaluation.lm_eval import C2CLM, Chat  # noqa: E402

COMMON = """
task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/data.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
OPEN = """
output_type: generate_until
description: "Be brief."
doc_to_text: "Question: {{question}}\\n"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
TASKS = ["tiny_choice", "tiny_open"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["a fox", "dogs", "the warm sun", "A", "sky"]
    rows = [
        {"question": f"Which is number {i}, {'very ' * i}please?", "choices": words[: 2 + i % 4], "answer": i % 2}
        for i in range(5)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("open", OPEN), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + text)
    return folder


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


def opening(tokenizer):
    """Let a tokenizer put its first token before every text, as those of Llama do."""
    processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.fixture(scope="module")
def untrained():
    model = pair()
    opening(model.sharers[0].tokenizer)
    return model


@pytest.fixture(scope="module")
def opened():
    model = open_fusers(pair(fuser_options={"rank": 8}))
    opening(model.sharers[0].tokenizer)
    return model


def evaluate(lm, manager, tasks=TASKS, **options):
    """Every answer of a run, task by task."""
    result = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **{"num_fewshot": 1} | options
    )
    return {name: [sample["resps"] for sample in samples] for name, samples in result["samples"].items()}


def harness(model, **options):
    """The harness's own model around a model of ours."""
    return HFLM(model.model, tokenizer=copy.deepcopy(model.tokenizer), **options)


def likelihoods(lm, pairs):
    """Scores of (document, context, continuation)."""
    requests = [Instance("loglikelihood", {}, (ask, text), 0, metadata=("task", doc, 1)) for doc, ask, text in pairs]
    return lm.loglikelihood(requests, disable_tqdm=True)


def generations(lm, *contexts, **arguments):
    """Texts that follow contexts, each of a document of its own."""
    requests = [
        Instance("generate_until", {}, (context, dict(arguments)), 0, metadata=("task", index, 1))
        for index, context in enumerate(contexts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


def same(ours, theirs):
    """Equal flags and texts, and likelihoods within 1e-4."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, float):
        return ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)
    return ours == theirs


def chat(*contents, prefix=""):
    roles = ("user", "assistant")
    return Chat([{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], prefix).dump()


PAIRS = [
    (0, "Which one is it? ", "A"),
    (0, "Which one is it? ", "B"),
    (0, "Which one is it? ", "the brown fox"),
    (1, "A longer question, about the weather of the day before:\n\n", "rain"),
    (1, "A longer question, about the weather of the day before:\n\n", "it was sunny"),
    (2, "Short", " one"),
    (3, "", "nothing before"),
    (3, " ", "only a space before"),
]


@pytest.mark.parametrize("system", ["receiver", "sharer"])
def test_a_model_alone_is_what_the_harness_makes_of_it(untrained, manager, system):
    model = untrained.receiver if system == "receiver" else untrained.sharers[0]
    for templates in (False, True):
        ours, theirs = C2CLM(untrained, system, batch_size=3), harness(model, enable_thinking=False)
        answers = evaluate(ours, manager, apply_chat_template=templates)
        assert same(answers, evaluate(theirs, manager, apply_chat_template=templates))
        assert any(text for sample in answers["tiny_open"] for text in sample[0])
    pairs = PAIRS if system == "sharer" else PAIRS[:-1]  # without a first token hf refuses a context of spaces
    assert same(likelihoods(C2CLM(untrained, system, batch_size=4), pairs), likelihoods(harness(model), pairs))
    for limit in (None, 8):
        ours, theirs = C2CLM(untrained, system, max_length=limit), harness(model, max_length=limit)
        texts = evaluate(ours, manager, ["tiny_text"], num_fewshot=0)
        assert same(texts, evaluate(theirs, manager, ["tiny_text"], num_fewshot=0))


def test_whole_texts_are_refused_when_fused(opened, manager):
    for system in ("matched", "deranged"):
        with pytest.raises(IntegrationError, match="no prompt whose cache could be fused"):
            evaluate(C2CLM(opened, system), manager, ["tiny_text"], num_fewshot=0)


@pytest.mark.parametrize("templates", [False, True])
def test_an_untrained_fuser_is_the_receiver(untrained, manager, templates):
    receiver, matched = C2CLM(untrained, "receiver", batch_size=4), C2CLM(untrained, "matched", batch_size=4)
    answers = evaluate(matched, manager, apply_chat_template=templates)
    assert same(answers, evaluate(receiver, manager, apply_chat_template=templates))
    assert matched.counts["contexts with nothing to fuse"] == 0
    assert same(likelihoods(matched, PAIRS), likelihoods(receiver, PAIRS))
    assert matched.counts["contexts with nothing to fuse"] == 1


@pytest.mark.parametrize("templates", [False, True])
def test_an_open_fuser_changes_the_answers_and_so_does_the_message(opened, manager, templates):
    runs = {
        system: evaluate(C2CLM(opened, system, batch_size=4), manager, apply_chat_template=templates)
        for system in ("receiver", "matched", "deranged")
    }
    for one, other in (("receiver", "matched"), ("matched", "deranged")):
        ours, theirs = runs[one]["tiny_choice"], runs[other]["tiny_choice"]
        assert not any(map(same, ours, theirs))
        assert runs[one]["tiny_open"] != runs[other]["tiny_open"]


def step_by_step(model, ask, prefix, continuation):
    """The likelihood of a continuation by ``prepare`` and one token at a time."""
    fused = model.prefill(ask, options=RenderOptions(answer_prefix=prefix))
    tokens, total, greedy = fused.tokens, 0.0, True
    for token in model.receiver.tokenizer.encode(continuation, add_special_tokens=False):
        scores = model.receiver.next_logits(tokens, fused.cache)[0].log_softmax(-1)
        total, greedy = total + float(scores[token]), greedy and int(scores.argmax()) == token
        following = (torch.tensor([[token]]), torch.tensor([[True]]), tokens.positions[:, -1:] + 1)
        parts = zip((tokens.ids, tokens.mask, tokens.positions), following, strict=True)
        tokens = TokenBatch(*(torch.cat(part, 1) for part in parts), tokens.padded, tokens.natural)
    return total, greedy


@pytest.mark.parametrize("aligner", [None, PublishedAligner()])
def test_scores_and_texts_are_those_of_the_public_path(aligner):
    """What is scored after a chat prompt is what ``prefill`` gives a user, and what follows it is ``generate``'s."""
    model = open_fusers(pair(fuser_options={"rank": 8}, aligner=aligner))
    asks, continuations = ["Which letter?", "Which of many letters, please?"], [" B", " 1", "?", " fox"]
    pairs = [(ask, chat(ask, prefix="The answer is"), text) for ask in asks for text in continuations]
    answers = likelihoods(C2CLM(model, batch_size=3), pairs)
    assert same(answers, [step_by_step(model, ask, "The answer is", text) for ask, _, text in pairs])
    texts = generations(C2CLM(model, batch_size=2), *map(chat, asks), until=[], max_gen_toks=6)
    assert texts == [model.generate(ask, max_new_tokens=6, do_sample=False).text for ask in asks]


def test_the_published_alignment_needs_chats_that_fit():
    model = pair(aligner=PublishedAligner())
    assert all(score < 0 for score, _ in likelihoods(C2CLM(model), [(0, chat("Which letter?"), "A")]))
    with pytest.raises(AlignmentError, match="last section"):
        likelihoods(C2CLM(model), PAIRS[:1])
    with pytest.raises(PromptError, match="can't be cut"):
        likelihoods(C2CLM(model, max_length=16), [(0, chat("Which letter?"), "A")])


def test_an_empty_prompt_is_answered_alone_and_not_fused(untrained):
    assert generations(C2CLM(untrained, "receiver"), "", until=[], max_gen_toks=3)[0]
    with pytest.raises(PromptError, match="empty prompt"):
        generations(C2CLM(untrained, "matched"), "", until=[], max_gen_toks=3)
    with pytest.raises(PromptError, match="0 tokens"):
        likelihoods(C2CLM(untrained, "matched"), [(0, "Question", "")])


@pytest.mark.parametrize("system", ["matched", "deranged"])
def test_batches_equal_single_runs(opened, manager, system):
    runs = [evaluate(C2CLM(opened, system, batch_size=size), manager, limit=4) for size in (1, 3, 16)]
    assert all(same(runs[0], run) for run in runs)


def test_the_options_of_a_question_share_one_prefill(opened, monkeypatch):
    read = []
    prefill = LanguageModel.prefill

    def counting(self, batch, stop=None, cache=None):
        if cache is None or not cache.layers:
            read.append((self.role, batch.rows))
        return prefill(self, batch, stop, cache)

    monkeypatch.setattr(LanguageModel, "prefill", counting)
    options = [(0, "Which of these five?", f" the {word}") for word in ("fox", "dog", "sun", "sea", "long sky")]
    alone = likelihoods(C2CLM(opened, batch_size=2), options)
    assert sorted(read) == [("receiver", 1), ("sharer", 1)]
    assert len({score for score, _ in alone}) == 5


def test_a_deranged_cache_is_another_documents(opened):
    """Two prompts of one document (as in winogrande) are not taken for different messages."""
    own = [(0, "The first has a question", " A"), (0, "The first has a second question", " A")]
    one = [*own, (1, "Rain falls", " A")]
    other = [*own, (1, "The sun is warm today", " A")]
    matched = C2CLM(opened, "matched")
    assert same(likelihoods(matched, one)[:2], likelihoods(matched, other)[:2])
    deranged = C2CLM(opened, "deranged")
    assert not any(map(same, likelihoods(deranged, one)[:2], likelihoods(deranged, other)[:2]))
    with pytest.raises(IntegrationError, match="at least two documents"):
        likelihoods(deranged, own)


LONG = [
    (0, "word " * 60 + "end", " and more"),
    (0, "word " * 60 + "end", " A"),
    (1, "Short enough", " A"),
    (2, "other " * 50, "words that go on and on"),
]


def test_long_contexts_are_cut_as_the_harness_does(untrained, opened):
    receiver = C2CLM(untrained, "receiver", max_length=32)
    assert same(likelihoods(receiver, LONG), likelihoods(harness(untrained.receiver, max_length=32), LONG))
    assert receiver.counts["contexts truncated"] == 3
    matched = C2CLM(untrained, "matched", max_length=32, batch_size=4)
    assert same(likelihoods(matched, LONG), likelihoods(receiver, LONG))
    assert matched.counts["sharer contexts truncated"] > 0
    opened_scores = likelihoods(C2CLM(opened, max_length=32), LONG)
    assert not any(map(same, opened_scores, likelihoods(receiver, LONG)))


@pytest.mark.parametrize("system", ["receiver", "matched"])
def test_long_prompts_leave_room_for_the_answer(untrained, system):
    texts, arguments = ("word " * 60, "Short"), {"until": ["\n"], "max_gen_toks": 8}
    ours = generations(C2CLM(untrained, system, max_length=32, batch_size=2), *texts, **arguments)
    assert ours == generations(harness(untrained.receiver, max_length=32, batch_size=2), *texts, **arguments)
    with pytest.raises(PromptError, match="max_gen_toks is 8"):
        generations(C2CLM(untrained, system, max_length=8), *texts, **arguments)


def aligned(model, ask):
    return model.align([[{"role": "user", "content": ask}]], RenderOptions())[0]


def pairs_of(prompt):
    return set(prompt.chunks[0].alignments[0].pairs())


def test_a_fitted_prompt_keeps_the_pairs_that_are_left(opened):
    prompt = aligned(opened, "A message with some words in it")
    ids, width = prompt.receiver.ids[0].tolist(), prompt.sharers[0].length
    ids = [*ids[:-2], 7]  # the last two tokens became one
    fitted = truncate(prompt, ids, 5, [width - 9])
    assert fitted.receiver.ids[0].tolist() == ids[5:]
    assert torch.equal(fitted.sharers[0].ids, prompt.sharers[0].ids[:, 9:])
    assert fitted.receiver.positions[0, 0] == fitted.sharers[0].positions[0, 0] == 0
    last = len(ids) - 1
    assert pairs_of(fitted) == {(0, t - 5, s - 9) for _, t, s in pairs_of(prompt) if 5 <= t < last and s >= 9}
    assert fitted.chunks[0].stop == last - 5
    assert truncate(prompt, ids, 0, [1]).chunks[0].stop == last  # only what took the sharer's last token is left


def test_a_deranged_prompt_takes_the_others_columns(opened):
    own, other = aligned(opened, "A message with some words"), aligned(opened, "No")
    ours, theirs = sorted(pairs_of(own)), sorted(pairs_of(other))
    taken = sorted(pairs_of(derange(own, other)))
    assert [pair[1] for pair in taken] == [pair[1] for pair in ours]
    assert {pair[2] for pair in taken} == {pair[2] for pair in theirs}
    assert taken[0][2] == theirs[0][2]
    assert [pair[2] == theirs[-1][2] for pair in taken] == [pair[2] == ours[-1][2] for pair in ours]
    assert derange(own, own).chunks[0].alignments[0].sharer.tolist() == own.chunks[0].alignments[0].sharer.tolist()


def test_a_template_without_system_messages_drops_them(untrained):
    model = copy.deepcopy(untrained)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model.sharers[0].tokenizer.chat_template = refusal + model.sharers[0].tokenizer.chat_template
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for system, kept in (("receiver", messages), ("matched", messages[1:])):
        lm = C2CLM(model, system)
        assert Chat.load(lm.apply_chat_template(messages)).messages == kept
        assert lm.counts["system messages dropped"] == len(messages) - len(kept)


def test_the_beginning_of_an_answer_stays_one(untrained):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    lm = C2CLM(untrained, "receiver", enable_thinking=True)  # this template closes an empty thought otherwise
    context = lm.apply_chat_template(messages, add_generation_prompt=False)
    assert Chat.load(context) == Chat(messages[:1], "Because")
    theirs = harness(untrained.receiver)
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=False)
    assert same(likelihoods(lm, [(0, context, " of")]), likelihoods(theirs, [(0, rendered, " of")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"system": "zero"}, "unknown system"), ({"batch_size": "auto"}, "positive integer"), ({"batch_size": 0}, "0")],
)
def test_impossible_models_are_refused(untrained, changes, message):
    with pytest.raises(IntegrationError, match=message):
        C2CLM(untrained, **changes)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuser(tmp_path_factory):
    return saved_fuser(tmp_path_factory.mktemp)


def command(fuser, tasks, *arguments):
    return CliRunner().invoke(app, ["lm-eval", "--fuser", fuser, "--include-path", str(tasks), *arguments])


def test_command_prints_one_object_or_a_table_and_writes_a_file(fuser, tasks, tmp_path):
    run = command(
        fuser,
        tasks,
        *("--tasks", "tiny_choice,tiny_open", "--system", "receiver,matched", "--limit", "3", "--apply-chat-template"),
        *("--num-fewshot", "1", "--json", "--log-samples", "--output", str(tmp_path / "out" / "result.json")),
    )
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert set(result["systems"]) == {"receiver", "matched"}
    for system in result["systems"].values():
        assert 0 <= system["results"]["tiny_choice"]["acc,none"] <= 1
        assert system["n-samples"]["tiny_open"]["effective"] == 3
    assert result["provenance"]["settings"]["limit"] == 3
    assert "samples" not in result["systems"]["matched"]
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(written["systems"]["matched"]["samples"]["tiny_choice"]) == 3
    assert written["provenance"] == result["provenance"]
    run = command(fuser, tasks, "--tasks", str(tasks / "choice.yaml"), "--system", "deranged", "--limit", "2")
    assert run.exit_code == 0, run.output
    assert "|tiny_choice|" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "tiny_choice", "--system", "zero"), "systems out of receiver, sharer, matched, deranged"),
        (("--tasks", ","), "at least one of each"),
        (("--tasks", "tiny_choice", "--include-path", "nowhere"), "no such folder"),
        (("--tasks", "broken"), "task 'broken' can't be loaded"),
    ],
)
def test_command_names_what_is_wrong(fuser, tasks, arguments, message, tmp_path):
    text = (tasks / "choice.yaml").read_text().replace("tiny_choice", "broken").replace("data.jsonl", "none.jsonl")
    (tmp_path / "broken.yaml").write_text(text)
    run = command(fuser, tasks, "--include-path", str(tmp_path), *arguments)
    assert isinstance(run.exception, IntegrationError), run.output
    assert message in str(run.exception)


def test_without_the_harness_the_command_says_how_to_get_it(fuser, tasks, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "c2c.evaluation.lm_eval")
    run = command(fuser, tasks, "--tasks", "tiny_choice")
    assert isinstance(run.exception, MissingExtraError)
    assert "pip install 'lm-eval" in str(run.exception)
