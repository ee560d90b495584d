"""``c2c run``: one prompt, every way to answer it, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from c2c.cli.output import err, human_bytes, out, print_json
from c2c.pull.defaults import DEFAULT_RECEIVER, DEFAULT_SHARER

if TYPE_CHECKING:
    from c2c.model import C2CModel

UNTRAINED = (
    "The fuser is untrained: it adds nothing, so the cache-to-cache output equals the receiver's. Pass --fuser FOLDER "
    "for a trained one."
)

_EPILOG = """Examples:

c2c run "Why is the sky blue?"

c2c run --fuser ./my-fuser --max-new-tokens 64 "Name three uses of copper."

c2c run --receiver smollm2-135m --sharer qwen2.5-coder-1.5b --mode c2c --json "2 + 2 ="

c2c run --fuser ./my-memory-fuser --context report.txt "Who signed the report?"

cat prompt.txt | c2c run -

With --context, only the sharer reads that file; the receiver, and what is text-to-text, get no more than what is handed
over."""


class Mode(StrEnum):
    """Ways to answer."""

    ALL = "all"
    RECEIVER = "receiver"
    SHARER = "sharer"
    TEXT = "text"
    C2C = "c2c"


_TITLES = {
    Mode.RECEIVER: "receiver alone",
    Mode.SHARER: "sharer alone",
    Mode.TEXT: "text-to-text",
    Mode.C2C: "cache-to-cache",
}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="run", epilog=_EPILOG)(run)


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    fuser: Annotated[str | None, typer.Option(help="Folder or hub id of a fuser; untrained if not given.")] = None,
    receiver: Annotated[
        str | None,
        typer.Option(help=f"Alias, hub id, folder or GGUF. [default: the fuser's, else {DEFAULT_RECEIVER}]"),
    ] = None,
    sharer: Annotated[
        str | None,
        typer.Option(help=f"Alias, hub id, folder or GGUF. [default: the fuser's, else {DEFAULT_SHARER}]"),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Which way to answer.")] = Mode.ALL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens per answer.")] = 64,
    message_tokens: Annotated[int, typer.Option(min=1, help="At most this many for the text-to-text message.")] = 64,
    context: Annotated[
        Path | None, typer.Option(help="Text that only the sharer reads; for a fuser of private context.")
    ] = None,
    draft_tokens: Annotated[
        int,
        typer.Option(min=0, help="With --context: the sharer drafts so many tokens of an answer, handed over as well."),
    ] = 0,
    system: Annotated[str | None, typer.Option(help="System message for both models.")] = None,
    answer_prefix: Annotated[str, typer.Option(help="Text that the answer continues, such as 'The answer is'.")] = "",
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Device map: cpu, cuda, auto.")] = None,
    allow_mismatch: Annotated[bool, typer.Option(help="Accept models with other weights than the fuser's.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Answer one prompt with the receiver, the sharer, text-to-text and cache-to-cache, with times."""
    text = sys.stdin.read().strip() if prompt == "-" else prompt
    _check_text(text, "the prompt" if prompt != "-" else "the prompt on stdin")
    passage = None if context is None else _read(context)  # before the models, which take their time
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with err.status("loading models ..."):
        model = _load(fuser, receiver, sharer, allow_mismatch, dtype=dtype, device_map=device)
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, "answer_prefix": answer_prefix}
    if mode in (Mode.ALL, Mode.C2C):
        _check_context(model, context)
    if passage is not None:
        ways = _private_ways(model, messages, passage, message_tokens, draft_tokens, **kwargs)
    else:
        ways = _ways(model, messages, message_tokens, **kwargs)
    chosen = list(ways) if mode is Mode.ALL else [mode]
    if not json_:
        out.print(_header(model))
    results: dict[str, Any] = {}
    for way in chosen:
        _seed(seed)
        with err.status(f"{_TITLES[way]} ..."):
            results[way.value] = ways[way]().to_dict()
        if not json_:
            out.print(_panel(way, results[way.value]))
    if json_:
        print_json(_as_json(model, text, results))
        return
    if len(results) > 1:
        out.print(_table(results))
    if not model.trained and Mode.C2C.value in results:
        out.print(f"[yellow]{UNTRAINED}[/yellow]")


def _load(fuser: str | None, receiver: str | None, sharer: str | None, allow_mismatch: bool, **kwargs: Any) -> C2CModel:
    from c2c.model import C2CModel

    if fuser is not None:
        return C2CModel.from_pretrained(
            fuser, receiver=receiver, sharer=sharer, allow_mismatch=allow_mismatch, **kwargs
        )
    return C2CModel.from_models(receiver or DEFAULT_RECEIVER, sharer or DEFAULT_SHARER, **kwargs)


def _read(path: Path) -> str:
    from c2c.errors import PromptError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PromptError(
            f"--context {path} can't be read as text: {reason}. Expected a text file in UTF-8, for the sharer alone."
        ) from error
    _check_text(text, f"--context {path}")
    return text


def _check_text(text: str, what: str) -> None:
    from c2c.errors import PromptError

    if not text.strip():
        raise PromptError(f"{what} is empty; expected some text to read.")


def _check_context(model: C2CModel, context: Path | None) -> None:
    """Say what fits this fuser in words of the command line, before the other ways are answered."""
    from c2c.errors import PromptError

    family = model.fusers[0].family
    if model.private and context is None:
        raise PromptError(
            f"a {family} fuser hands over what the sharer alone has read: give a text with --context FILE, or choose "
            "--mode receiver or sharer."
        )
    if context is not None and not model.private:
        raise PromptError(
            f"--context {context} is for a memory fuser; a {family} fuser merges what both models read. Put the text "
            "into the prompt, or give a memory fuser with --fuser."
        )


def _private_ways(
    model: C2CModel,
    messages: list[dict[str, str]],
    passage: str,
    message_tokens: int,
    draft_tokens: int,
    answer_prefix: str = "",
    **kwargs: Any,
) -> dict[Mode, Callable[[], Any]]:
    """The same ways where only the sharer has the passage; its draft answers the question, so it reads that as well."""
    from c2c.prompting import RenderOptions
    from c2c.systems.base import with_passage
    from c2c.systems.text_to_text import passage_to_text, summary_request

    kwargs["options"] = RenderOptions(answer_prefix=answer_prefix)
    sharer, request = model.sharers[0], summary_request(passage, message_tokens)

    def fused() -> Any:
        if draft_tokens > 0:
            given: Any = sharer.read(with_passage(messages, passage), draft_tokens=draft_tokens)
        else:
            given = passage
        return model.generate(messages, sharer_messages=given, **kwargs)

    return {
        Mode.RECEIVER: lambda: model.receiver.answer(messages, **kwargs),
        Mode.SHARER: lambda: sharer.answer(with_passage(messages, passage), **kwargs),
        Mode.TEXT: lambda: passage_to_text(
            model.receiver, sharer, messages, request, message_tokens=message_tokens, **kwargs
        ),
        Mode.C2C: fused,
    }


def _ways(
    model: C2CModel, messages: list[dict[str, str]], message_tokens: int, answer_prefix: str = "", **kwargs: Any
) -> dict[Mode, Callable[[], Any]]:
    from c2c.prompting import RenderOptions
    from c2c.systems.text_to_text import text_to_text

    kwargs["options"] = RenderOptions(answer_prefix=answer_prefix)
    sharer = model.sharers[0]
    return {
        Mode.RECEIVER: lambda: model.receiver.answer(messages, **kwargs),
        Mode.SHARER: lambda: sharer.answer(messages, **kwargs),
        Mode.TEXT: lambda: text_to_text(model.receiver, sharer, messages, message_tokens=message_tokens, **kwargs),
        Mode.C2C: lambda: model.generate(messages, **kwargs),
    }


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _header(model: C2CModel) -> str:
    names = ", ".join(sharer.name for sharer in model.sharers)
    state = "trained" if model.trained else "untrained"
    fuser = model.fusers[0]
    parameters = sum(p.numel() for f in model.fusers for p in f.parameters())
    return (
        f"[bold]receiver[/bold] {model.receiver.name}   [bold]sharer[/bold] {names}   "
        f"[bold]fuser[/bold] {fuser.family}, {parameters / 1e6:.1f} M parameters, {state}"
    )


def _panel(way: Mode, result: dict[str, Any]) -> Panel:
    body = Text(result["text"].strip() or "(no text)")
    if "message" in result:
        body = Text.assemble(("sharer wrote: " + result["message"].strip() + "\n\n", "dim"), body)
    return Panel(body, title=_TITLES[way], title_align="left")


def _table(results: dict[str, Any]) -> Table:
    table = Table()
    for title in ("", "first token", "total", "read", "written", "crossed"):
        table.add_column(title, no_wrap=True)
    for name, result in results.items():
        report = result["report"]
        if report:
            crossed = f"{human_bytes(report['sharer_bytes'])} cache"
        else:
            crossed = f"{result['message_tokens']} text tokens" if "message" in result else "-"
        table.add_row(
            _TITLES[Mode(name)],
            f"{result['seconds_to_first_token']:.2f} s",
            f"{result['seconds_total']:.2f} s",
            str(result["prompt_tokens"]),
            str(result["new_tokens"]),
            crossed,
        )
    return table


def _as_json(model: C2CModel, prompt: str, results: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "prompt": prompt,
        "receiver": model.receiver.name,
        "sharer": [sharer.name for sharer in model.sharers],
        "trained": model.trained,
        "results": results,
    }
    if not model.trained:
        data["note"] = UNTRAINED
    return data
