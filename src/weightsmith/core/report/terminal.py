"""The report's story for a terminal."""

import io

from rich.box import ASCII2, SIMPLE_HEAD, Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightsmith.core.report import Report
from weightsmith.core.report.story import Column, Stage, Story
from weightsmith.core.report.words import duration, number, percent, printable, size


def table(report: Report, box: Box = SIMPLE_HEAD) -> RenderableType:
    """A table of the stages, and a sentence for each step under it."""
    story = Story(report)
    bits = any(stage.step.bits for stage in story.stages)
    shown = Table(
        box=box,
        title=Text(printable(report.run.title), style="bold") if report.run.title else None,
        title_justify="left",
    )
    shown.add_column("stage")
    heads = [*map(str, story.columns), "size", *(["bits"] * bits), "time"]
    for head in heads:
        shown.add_column(Text(printable(head)), justify="right")
    for stage in story.stages:
        shown.add_row(
            Text(printable(stage.name), style="bold"),
            *(_score(story, stage, column) for column in story.columns),
            Text(size(stage.step.bytes)),
            *([Text(f"{stage.step.bits:.2f}" if stage.step.bits else "–")] * bits),
            Text(duration(stage.step.seconds)),
        )
    told = [(stage.name, " ".join(story.sentences(stage))) for stage in story.stages]
    lines = [Text.assemble((printable(name), "bold"), ": ", printable(text)) for name, text in told if text]
    return Group(shown, *lines)


def text(report: Report, width: int = 100) -> str:
    """The same without colours and with letters every terminal has."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table(report, ASCII2), highlight=False)
    plain = buffer.getvalue()
    swaps = str.maketrans({"−": "-", "→": "->", "–": "-", "±": "+-", "×": "x", "∞": "inf", "…": "..", "·": "-"})
    return "\n".join(line.rstrip() for line in plain.translate(swaps).splitlines()) + "\n"


def _score(story: Story, stage: Stage, column: Column) -> Text:
    change = story.change(stage, column)
    shown = Text(number(stage.scores.get(column)))
    if change is not None:
        better = (change < 0) == (column.better == "lower")
        shown.append(f" {percent(change):>7}", style="dim" if abs(change) < 5e-4 else "green" if better else "red")
    return shown
