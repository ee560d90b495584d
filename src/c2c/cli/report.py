"""``c2c report``: results of ``c2c eval`` as Markdown, plots and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2c.errors import C2CError
from c2c.utils import argument_text, command, install_command

_File = Path | None


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files, or folders that hold result.json files.")],
    html: Annotated[_File, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[_File, typer.Option(help="Write Markdown here.")] = None,
    plots: Annotated[
        _File, typer.Option(help="Write the plots as SVG into this folder; the Markdown shows them.")
    ] = None,
    readme: Annotated[_File, typer.Option(help="Write a short table between the markers of this file.")] = None,
    overview: Annotated[
        bool, typer.Option("--overview", help="Print only the summary: a row per pair and data set.")
    ] = False,
    title: Annotated[str, typer.Option(help="Heading.")] = "Results",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if a file would change.")] = False,
) -> None:
    """Show results as tables, plots and a page, losses marked; without options, Markdown on stdout."""
    if markdown is None and plots is not None:
        raise typer.BadParameter("--plots go with a Markdown file that shows them: give --markdown too.")
    title = argument_text(title, "--title", C2CError)
    given = [path.absolute() for path in (html, markdown, readme) if path is not None]
    if len(set(given)) < len(given):
        raise typer.BadParameter("--html, --markdown and --readme name one file: each would overwrite the other.")
    if check and html is None and markdown is None and readme is None:
        raise typer.BadParameter("--check needs the file to check: give --markdown, --html or --readme.")
    try:
        from c2c import report as reports
    except ImportError as error:
        raise C2CError(f"reports need {error.name}: {install_command('report')}.") from error
    evaluations = reports.load_evaluations(results)
    files = reports.make_files(evaluations, title, html=html, markdown=markdown, plots=plots, readme=readme)
    if check:
        reports.check_files(files, command().replace(" --check", ""))
        return
    reports.write_files(files)
    for path in files:
        typer.echo(f"wrote {path}", err=True)
    if overview:
        typer.echo(reports.render("summary.md", evaluations))
    elif not files:
        typer.echo(reports.render("report.md", evaluations, title), nl=False)
