"""Train the LoRA adapters of ``zoo/adapters``: one base model, three jobs, minutes each on a CPU.

``json`` answers in JSON, ``extract`` copies the answer's words from the passage, ``summarise`` writes one sentence.
They are real variants of their base for measuring what crosses between adapters. Seeded; a killed run goes on where its
last checkpoint is.

    c2c pull qwen2.5-coder-0.5b
    python benchmarks/adapters.py --data DIR
    python benchmarks/adapters.py --data DIR --only json --rows 16    # a trial
    python benchmarks/adapters.py --show                              # answers with and without each adapter
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments, set_seed

from c2c.data.synthetic import facts
from c2c.language_model import Receiver
from c2c.prompting import with_passage
from c2c.version import __version__

ZOO = Path(__file__).parent.parent / "zoo" / "adapters"
REQUEST = "Summarise the passage in one sentence."
_CHARACTERS = 420  # longest passage
_BATCH = 4
_IGNORED = -100
Pair = tuple[str, str]  # prompt and answer


def main() -> None:
    """Train, or show."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.show:
        return show(arguments.base)
    for name in arguments.only or JOBS:
        if not (ZOO / name / "adapter_model.safetensors").exists():
            train(name, arguments)
    return None


# -- data -------------------------------------------------------------------------------------------------------------


def answer_rows(data: Path, seed: int, write: Callable[[str], str]) -> Iterator[Pair]:
    """Yield questions about passages: three of SQuAD, then one of made-up facts."""
    rows = _read(data / "squad" / "grouped_train.jsonl", seed)
    made = facts("train", seed)
    for index, row in enumerate(row for row in rows if len(row["context"]) <= _CHARACTERS):
        for one in [row, next(made)] if index % 3 == 0 else [row]:
            yield _passage(one["context"], one["question"]), write(str(one["answer"]))


def json_rows(data: Path, seed: int) -> Iterator[Pair]:
    """Yield answers as a JSON object."""
    return answer_rows(data, seed, lambda answer: json.dumps({"answer": answer}, ensure_ascii=False))


def extract_rows(data: Path, seed: int) -> Iterator[Pair]:
    """Yield answers as the words of the passage alone."""
    return answer_rows(data, seed, str)


def summary_rows(data: Path, seed: int) -> Iterator[Pair]:
    """Yield answers as summaries: of dialogues and news by people, and of SQuAD passages their first sentence."""
    kinds = ("samsum_Su", "samsum_To", "samsum_Gen", "xsum_", "gigaword_generate", "gigaword_in_a", "gigaword_TLDR")
    people = (row for row in _read(data / "t0_mixture" / "train.jsonl", seed) if row["task"].startswith(kinds))
    passages = _read(data / "squad" / "grouped_train.jsonl", seed)
    for row, passage in zip(
        (row for row in people if len(row["instruction"]) <= _CHARACTERS),
        (row["context"] for row in passages if len(row["context"]) <= _CHARACTERS),
        strict=False,
    ):
        yield row["instruction"], row["output"]
        yield _passage(passage, REQUEST), passage.partition(". ")[0].rstrip(".") + "."


JOBS = {"json": json_rows, "extract": extract_rows, "summarise": summary_rows}


def _passage(passage: str, question: str) -> str:
    """Return the prompt that the system ``reader`` makes."""
    return with_passage([{"role": "user", "content": question}], passage)[0]["content"]


def _read(path: Path, seed: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    random.Random(seed).shuffle(rows)
    return rows


# -- training ---------------------------------------------------------------------------------------------------------


class AnswerTrainer(Trainer):
    """Compute the loss of the answer's tokens, and no logits of the prompt: the vocabulary is large."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Return the mean cross entropy, in float32."""
        labels = inputs["labels"]
        keep = int((labels != _IGNORED).sum(-1).max()) + 1
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=keep).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, -keep + 1 :].flatten())


def train(name: str, arguments: argparse.Namespace) -> None:
    """Train one adapter and write it in the format of PEFT, in bfloat16."""
    set_seed(arguments.seed)
    base = Receiver.from_pretrained(arguments.base, dtype="bfloat16")
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(base.model, config)
    pairs = list(islice(JOBS[name](Path(arguments.data), arguments.seed), arguments.rows))
    work = Path(arguments.work) / name
    trainer = AnswerTrainer(
        model=adapter,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=_BATCH,
            num_train_epochs=1,
            learning_rate=arguments.rate,
            lr_scheduler_type="linear",
            warmup_steps=4,
            save_steps=10,
            save_total_limit=1,
            logging_steps=5,
            seed=arguments.seed,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=[_tokens(base, *pair) for pair in pairs],
        data_collator=_collate,
    )
    trainer.model_accepts_loss_kwargs = False
    done = trainer.train(resume_from_checkpoint=any(work.glob("checkpoint-*")))
    folder = ZOO / name
    adapter.peft_config["default"].base_model_name_or_path = arguments.base
    adapter.peft_config["default"].target_modules = sorted(config.target_modules)
    adapter.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    half = {key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    losses = [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry]
    (folder / "README.md").write_text(_card(name, arguments, len(pairs), losses, pairs[0], done), encoding="utf-8")


def _tokens(base: Receiver, prompt: str, answer: str) -> dict[str, Tensor]:
    ids = base.encode(prompt).ids[0]
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    reply = torch.tensor([*base.tokenizer(answer, add_special_tokens=False)["input_ids"], end])
    return {"input_ids": torch.cat([ids, reply]), "labels": torch.cat([torch.full_like(ids, _IGNORED), reply])}


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad on the left, so that all answers end in the last column."""
    fill = {"input_ids": 0, "labels": _IGNORED}
    batch = {key: pad_sequence([r[key].flip(0) for r in rows], True, value).flip(1) for key, value in fill.items()}
    lengths = torch.tensor([len(row["labels"]) for row in rows]).unsqueeze(1)
    columns = torch.arange(batch["labels"].shape[1]).flip(0)
    return batch | {"attention_mask": (columns < lengths).long()}


def _card(name: str, arguments: argparse.Namespace, rows: int, losses: list[float], pair: Pair, done: Any) -> str:
    prompt, answer = pair
    return f"""---
base_model: {arguments.base}
library_name: peft
license: apache-2.0
---

# LoRA adapter `{name}`

{JOBS[name].__doc__.replace("Yield a", "A")}
Rank {arguments.rank} on the projections of attention, {rows} rows, seed {arguments.seed},
{done.metrics["train_runtime"] / 60:.0f} minutes on a busy CPU; cache2cache {__version__}. Train splits only: SQuAD
(CC BY-SA 4.0), made-up facts, and for summaries `t0_mixture`. Made to measure what crosses between variants of one
model, not to be good at its job.

Loss of the answers, every 5 steps of {_BATCH} rows: {", ".join(map(str, losses))}.

```
{prompt}
-> {answer}
```

Made by `python benchmarks/adapters.py --only {name} --rows {arguments.rows} --seed {arguments.seed}`.
"""


# -- what it changes --------------------------------------------------------------------------------------------------


def show(base: str) -> None:
    """Print answers of the base model and of each adapter to two made-up prompts."""
    row = next(facts("test", 0))
    prompts = [_passage(row["context"], row["question"]), _passage(row["context"], REQUEST)]
    model = Receiver.from_pretrained(base, dtype="bfloat16")
    folders = [folder for folder in sorted(ZOO.iterdir()) if (folder / "adapter_config.json").exists()]
    for folder in folders:
        model.model.load_adapter(str(folder), adapter_name=folder.name)
    print(f"{prompts[0]}\n")
    for name in [None, *(folder.name for folder in folders)]:
        if name is None:
            model.model.disable_adapters()
        else:
            model.model.enable_adapters()
            model.model.set_adapter(name)
        answers = [model.answer(prompt, max_new_tokens=40, do_sample=False).text for prompt in prompts]
        print(f"{name or 'base':>10}: {answers[0]!r} | {answers[1]!r}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with squad/ and t0_mixture/")
    parser.add_argument("--base", default="qwen2.5-coder-0.5b")
    parser.add_argument("--only", nargs="*", choices=list(JOBS))
    parser.add_argument("--work", default="runs/adapters", help="folder of checkpoints")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
