"""``c2c run``: one prompt, answered by several systems, side by side."""

# ruff: noqa: RUF009 - option() returns a dataclass field
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text

from c2c.cli.library import read_contexts
from c2c.cli.options import Json, from_config
from c2c.cli.output import err, human_bytes, out, print_result, print_table
from c2c.config import option
from c2c.errors import PromptError
from c2c.evaluation.config import system_kind
from c2c.hub_aliases import DEFAULT_RECEIVER, DEFAULT_SHARER
from c2c.utils import argument_text, decode_text

if TYPE_CHECKING:
    from c2c.connection import Connection, Method
    from c2c.model import C2CModel
    from c2c.systems import System, SystemOptions

ALL = ("receiver", "sharer", "text", "c2c")
UNTRAINED = (
    "The fuser is untrained: it adds nothing, so the cache-to-cache output equals the receiver's. Pass --fuser FOLDER "
    "for a trained one."
)
_SOURCE = "Alias, hub id, folder or GGUF. [default: the fuser's, else {}]"


@dataclass(frozen=True)
class RunConfig:
    """Options of ``c2c run``."""

    fuser: str | None = option(None, "Folder or hub id of a fuser; if not given, the best method that the models have.")
    receiver: str | None = option(None, _SOURCE.format(DEFAULT_RECEIVER))
    sharer: str | None = option(None, _SOURCE.format(DEFAULT_SHARER))
    mode: str = option("all", f"Which system answers; all is {', '.join(ALL)}; others are reader, zero, untrained.")
    max_new_tokens: int = option(64, "At most this many tokens per answer.", min=1)
    message_tokens: int = option(64, "At most this many for the text-to-text message.", min=1)
    context: list[str] | None = option(
        None,
        "What only the sharer has read: a text file, a handoff's file, or a name in --library; may be repeated. For a "
        "fuser of private context.",
    )
    library: Path | None = option(None, "Folder of documents that c2c library add has made, which --context names.")
    draft_tokens: int = option(0, "With --context: hand over so many tokens of the sharer's own answer too.", min=0)
    think: int = option(0, "With --context: hand over so many thinking steps of the sharer too.", min=0)
    system: str | None = option(None, "System message for both models.")
    answer_prefix: str = option("", "Text that the answer continues, such as 'The answer is'.")
    sample: bool = option(False, "Sample instead of greedy decoding.", flag="--sample")
    seed: int = option(0, "Seed for sampling.", min=0, max=2**63 - 1)
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")
    allow_mismatch: bool = option(False, "Accept models with other weights than the fuser's.")


@from_config(RunConfig)
def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    *,
    json_: Json = False,
    **options: Any,
) -> None:
    """Answer one prompt with the receiver, the sharer, text-to-text and cache-to-cache, with times."""
    config = RunConfig(**options)
    if prompt == "-":
        text = decode_text(sys.stdin.buffer.read(), "the prompt on stdin", PromptError).strip()
    else:
        text = argument_text(prompt, "the prompt", PromptError)
    if not text.strip():
        raise PromptError("the prompt is empty; expected some text to read.")
    system_message = None if config.system is None else argument_text(config.system, "--system", PromptError)
    prefix = argument_text(config.answer_prefix, "--answer-prefix", PromptError)
    contexts = read_contexts(config.context or [], config.library)
    context: Any = None if not contexts else contexts[0] if len(contexts) == 1 else contexts
    import torch

    from c2c.prompting import RenderOptions
    from c2c.systems import SystemOptions, make_system, systems

    given = ALL if all(isinstance(one, str) for one in contexts) else ("receiver", "c2c")  # the others are handed text
    names = given if config.mode == "all" else (config.mode,)
    if not {system_kind(name) for name in names} <= set(systems()):
        known = ", ".join(sorted(systems()))
        raise typer.BadParameter(f"{config.mode!r} is not one of all, {known}.", param_hint="--mode")
    with err.status("loading models ..."):
        lengths = {name: getattr(config, name) for name in ("message_tokens", "draft_tokens", "think")}
        shared = SystemOptions(**lengths)
        loading = {"dtype": config.dtype, "device_map": config.device}
        model, connection = load_pair(config, config.fuser, config.sharer, shared, **loading)
        if connection is not None:
            model = connection.system("private" if contexts else "shared").model
        chosen: dict[str, System] = {
            name: connection if connection is not None and name == "c2c" else make_system(name, model, shared)
            for name in names
        }
        if any(system.needs_context for system in chosen.values()):
            _check_context(model, config.context)
    method = None if connection is None else connection.chosen("shared" if context is None else "private")
    if not json_:
        _show_pair(model, method)
    how: dict[str, Any] = {"options": RenderOptions(answer_prefix=prefix), "do_sample": config.sample}
    messages = make_messages(text, system_message)
    results: dict[str, dict[str, Any]] = {}
    for name, system in chosen.items():
        torch.manual_seed(config.seed)
        with err.status(f"{system.title} ..."):
            results[name] = system.generate(messages, context, max_new_tokens=config.max_new_tokens, **how).to_dict()
        if not json_:
            _show_answer(system.title, results[name])

    def show_costs(data: dict[str, Any]) -> None:
        if len(results) > 1:
            columns = ("", "first token", "total", "read", "written", "crossed")
            print_table(columns, (_costs(chosen[name].title, result) for name, result in results.items()))
        if "note" in data and "c2c" in results:
            out.print(f"[yellow]{UNTRAINED}[/yellow]")

    pair = {"receiver": model.receiver.name, "sharer": [sharer.name for sharer in model.sharers]}
    extra: dict[str, Any] = {"trained": model.trained, **({} if model.trained else {"note": UNTRAINED})}
    if method is not None:
        extra = {"method": method.name, "reason": method.reason}
    data = {"prompt": text, **pair, **extra, "results": results}
    print_result(data, json_, show_costs)


def load_pair(
    config: Any, fuser: str | None, sharer: Any, options: SystemOptions | None = None, **kwargs: Any
) -> tuple[C2CModel, Connection | None]:
    """Load a fuser with its models; without one the models of ``config``, by default the usual pair, are connected.

    Args:
        config: has ``receiver`` and ``allow_mismatch``.
        fuser: folder or hub id; None for the best method that the models have.
        sharer: in place of the fuser's.
        options: of the connection's systems.
        **kwargs: how to load the models.

    Returns:
        The model, and the connection that it is of, with a fuser of private context if it has one; None for a given
        fuser.
    """
    from c2c.connection import connect
    from c2c.model import C2CModel

    if fuser is not None:
        kwargs |= {"receiver": config.receiver, "sharer": sharer, "allow_mismatch": config.allow_mismatch}
        return C2CModel.from_pretrained(fuser, **kwargs), None
    connection = connect(config.receiver or DEFAULT_RECEIVER, sharer or DEFAULT_SHARER, options=options, **kwargs)
    return connection.model, connection


def make_messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """Return a conversation of a user's prompt, after a system message if there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": prompt}]


def _check_context(model: C2CModel, context: list[str] | None) -> None:
    """Refuse a context that does not suit the fuser, in words of the command line."""
    family = model.fusers[0].family
    if model.private and not context:
        raise PromptError(
            f"a {family} fuser hands over what the sharer alone has read: give a text with --context FILE, or choose "
            "--mode receiver or sharer."
        )
    if context and not model.private:
        raise PromptError(
            f"--context {' '.join(context)} is for a memory fuser; a {family} fuser merges what both models read. Put "
            "the text into the prompt, or give a memory fuser with --fuser."
        )


def _show_pair(model: C2CModel, method: Method | None) -> None:
    names = ", ".join(sharer.name for sharer in model.sharers)
    if method is None:
        state = "trained" if model.trained else "untrained"
        parameters = sum(p.numel() for fuser in model.fusers for p in fuser.parameters())
        how = f"[bold]fuser[/bold] {model.fusers[0].family}, {parameters / 1e6:.1f} M parameters, {state}"
    else:
        how = f"[bold]method[/bold] {method.name}: {method.reason}"
    out.print(f"[bold]receiver[/bold] {model.receiver.name}   [bold]sharer[/bold] {names}   {how}")


def _show_answer(title: str, result: dict[str, Any]) -> None:
    body = Text(result["text"].strip() or "(no text)")
    if "message" in result:
        body = Text.assemble(("sharer wrote: " + result["message"].strip() + "\n\n", "dim"), body)
    out.print(Panel(body, title=title, title_align="left"))


def _costs(title: str, result: dict[str, Any]) -> list[object]:
    crossed = f"{result['message_tokens']} text tokens" if "message" in result else "-"
    if result["report"]:
        crossed = f"{human_bytes(result['report']['sharer_bytes'])} cache"
    seconds = (f"{result[key]:.2f} s" for key in ("seconds_to_first_token", "seconds_total"))
    return [title, *seconds, result["prompt_tokens"], result["new_tokens"], crossed]
