"""``c2c report``: results of ``c2c eval`` as Markdown, plots and one HTML page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from c2c.errors import C2CError
from c2c.utils import install_command

_EPILOG = """Examples:

c2c report runs/eval/result.json

c2c report runs/seed_0 runs/seed_1 runs/seed_2 --html report.html

c2c report results --markdown docs/results.md --plots docs/results --title "Results"

c2c report results --markdown docs/results.md --plots docs/results --check

c2c report results --readme README.md

RESULTS are result.json files of c2c eval --output-dir, or folders with such files.
Runs that differ in fuser, seed or systems only are shown as their mean, and one by one.
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
        Path | None, typer.Option(help="Write a short table into this file, between the markers that it has.")
    ] = None,
    overview: Annotated[
        bool, typer.Option("--overview", help="Print only the summary: a row for each pair and data set.")
    ] = False,
    title: Annotated[str, typer.Option(help="Heading.")] = "Results",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is not what would be written.")
    ] = False,
) -> None:
    """Show results as tables, plots and a page, losses marked; without options, Markdown on stdout."""
    if markdown is None and plots is not None:
        raise typer.BadParameter("--plots go with a Markdown file that shows them: give --markdown too.")
    if check and html is None and markdown is None and readme is None:
        raise typer.BadParameter("--check needs the file to check: give --markdown, --html or --readme.")
    try:
        from c2c import report as reports
    except ImportError as error:
        raise C2CError(f"reports need {error.name}: {install_command('report')}.") from error
    evaluations = reports.group_runs(reports.load_results(results))
    files = reports.make_files(evaluations, title, html=html, markdown=markdown, plots=plots, readme=readme)
    if check:
        reports.check_files(files, shlex.join(["c2c", *(word for word in sys.argv[1:] if word != "--check")]))
        return
    reports.write_files(files)
    for path in files:
        typer.echo(f"wrote {path}", err=True)
    if overview:
        typer.echo(reports.summary_markdown(evaluations))
    elif not files:
        typer.echo(reports.report_markdown(evaluations, title), nl=False)
