"""``c2c report``: results of ``c2c eval`` as a page and as Markdown."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

_EPILOG = """Examples:

c2c report runs/eval/result.json

c2c report runs/seed_0 runs/seed_1 runs/seed_2 --html report.html

c2c report results --markdown docs/results.md --plots docs/results --title "Results"

c2c report results --markdown docs/results.md --plots docs/results --check

c2c report results --readme README.md

RESULTS are result.json files of c2c eval --output-dir, or folders with such files.
Runs that differ in fuser, seed or systems only are shown as their mean, and one by one.
Losses are said in words: the sharer alone is better; no content is shown (the
interval of P reaches zero); text-to-text is better or quicker; an adapter does as
well; a wrong message helps too; another system is ahead.
--readme fills the lines between <!-- results --> and <!-- /results -->."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="report", epilog=_EPILOG)(report)


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files, or folders that hold result.json files.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots as SVG files into this folder; the Markdown shows them.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Write the overview into this file, between the markers that it has.")
    ] = None,
    overview: Annotated[
        bool, typer.Option("--overview", help="Print only the overview: a line per pair and data set.")
    ] = False,
    title: Annotated[str, typer.Option(help="Heading.")] = "Results",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is not what would be written.")
    ] = False,
) -> None:
    """Show results as a page and as Markdown, losses included; without options, Markdown on stdout."""
    from c2c.report import check_files, group_runs, load_results, make_files, summary_markdown, to_markdown, write_files

    if markdown is None and plots is not None:
        raise typer.BadParameter("--plots go with a Markdown file that shows them: give --markdown too.")
    if check and html is None and markdown is None and readme is None:
        raise typer.BadParameter("--check needs the file to check: give --markdown, --html or --readme.")
    evaluations = group_runs(load_results(results))
    files = make_files(evaluations, title, html=html, markdown=markdown, plots=plots, readme=readme)
    if check:
        check_files(files, _command(results, html, markdown, plots, readme, title))
        return
    write_files(files)
    for path in files:
        typer.echo(f"wrote {path}", err=True)
    if overview:
        typer.echo(summary_markdown(evaluations))
    elif not files:
        typer.echo(to_markdown(evaluations, title), nl=False)


def _command(
    results: list[Path],
    html: Path | None,
    markdown: Path | None,
    plots: Path | None,
    readme: Path | None,
    title: str,
) -> str:
    """The command that writes what was checked."""
    words = ["c2c", "report", *map(str, results)]
    options = (("--html", html), ("--markdown", markdown), ("--plots", plots), ("--readme", readme))
    for option, path in options:
        words += [option, str(path)] if path is not None else []
    return shlex.join(words + (["--title", title] if title != "Results" else []))
