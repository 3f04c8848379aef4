"""The story a report tells: its stages in order, compared with what they came from."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from weightsmith.core.report import Report, Score, Step
from weightsmith.core.report.words import number, percent, size

SAME = 0.005
"""Relative changes smaller than this are called none."""


@dataclass(frozen=True)
class Column:
    """Something that was measured on the stages."""

    metric: str
    on: str
    better: str

    def __str__(self) -> str:
        return f"{self.metric}, {self.on}" if self.on else self.metric

    def gain(self, before: float, after: float) -> float:
        """Relative change in the good direction."""
        change = (after - before) / abs(before) if before else 0.0
        return -change if self.better == "lower" else change


@dataclass(frozen=True)
class Stage:
    """A step with its scores."""

    step: Step
    scores: dict[Column, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the weights are called."""
        return self.step.name


class Story:
    """The stages of a report and what changed between them."""

    def __init__(self, report: Report):
        scores = report.all(Score)
        steps = {step.name: step for step in report.all(Step)}
        for score in scores:
            steps.setdefault(score.step, Step(name=score.step))
        self.columns = list(dict.fromkeys(_column(score) for score in scores))
        self.stages = [
            Stage(step, {_column(score): score.value for score in scores if score.step == name})
            for name, step in steps.items()
        ]
        self._by_name = {stage.name: stage for stage in self.stages}

    @cached_property
    def base(self) -> Stage | None:
        """The starting point: the first stage that has been measured, or the first."""
        return next((stage for stage in self.stages if stage.scores), next(iter(self.stages), None))

    def parents(self, stage: Stage) -> list[Stage]:
        """The stages it was made from."""
        return [self._by_name[name] for name in stage.step.inputs if name in self._by_name and name != stage.name]

    def change(self, stage: Stage, column: Column) -> float | None:
        """Relative change of a score against the base; None where there is nothing to compare."""
        before = self.base.scores.get(column) if self.base else None
        after = stage.scores.get(column)
        return (
            None
            if stage is self.base or before is None or after is None or not before
            else (after - before) / abs(before)
        )

    def sentences(self, stage: Stage) -> list[str]:
        """What the step did to the scores and the size, in words."""
        parents = self.parents(stage)
        if not parents:
            return []
        told = self._kept(stage, parents) if len(parents) > 1 else []
        against = parents[0] if len(parents) == 1 else self.base
        if not told and against and against is not stage:
            told = self._moved(stage, against)
        before, after = parents[0].step.bytes, stage.step.bytes
        if len(parents) == 1 and before and after and abs(after / before - 1) > SAME:
            verb = "saves" if after < before else "costs"
            told.append(
                f"It {verb} {percent(abs(after / before - 1))[1:]} of the bytes ({size(before)} → {size(after)})."
            )
        return told

    def _moved(self, stage: Stage, against: Stage) -> list[str]:
        better, worse, same = [], [], []
        for column in self.columns:
            before, after = against.scores.get(column), stage.scores.get(column)
            if before is None or after is None or not math.isfinite(before) or math.isnan(after):
                continue
            gain = column.gain(before, after)
            group = same if abs(gain) < SAME else better if gain > 0 else worse
            factor = after / before if before > 0 else 1.0
            amount = f"a factor of {number(factor)}" if gain < 0 and factor >= 2 else f"{abs(gain) * 100:.1f} %"
            group.append(f"{amount} on {column.on or column.metric}")
        parts = ([f"gains {_and(better)}"] if better else []) + ([f"loses {_and(worse)}"] if worse else [])
        if not parts:
            return [f"No change against {against.name}."] if same else []
        said = " and ".join(parts)
        return [f"{said[0].upper()}{said[1:]} against {against.name}."]

    def _kept(self, stage: Stage, parents: list[Stage]) -> list[str]:
        told: list[str] = []
        for column in self.columns:
            before = self.base.scores.get(column) if self.base else None
            after = stage.scores.get(column)
            reached = {parent.name: parent.scores[column] for parent in parents if column in parent.scores}
            if not reached or before is None or after is None or not math.isfinite(before) or math.isnan(after):
                continue
            gains = {name: column.gain(before, value) for name, value in reached.items()}
            best = max(gains, key=lambda name: gains[name])
            gained, kept = gains[best], column.gain(before, after)
            if gained > SAME:
                share = f"{kept / gained * 100:.0f} %" if kept > 0 else "none"
                told.append(f"{share} of what {best} gained on {column.on or column.metric}")
        return [f"Keeps {_and(told)}."] if told else []


def headline(story: Story) -> list[tuple[str, str, str]]:
    """The figures to show first, from the base to the last stage: label, figures, comment."""
    if not story.base or len(story.stages) < 2:
        return []
    first, last = story.base, story.stages[-1]
    shown = []
    for column in story.columns[:3]:
        before, change = first.scores.get(column), story.change(last, column)
        if before is not None and change is not None:
            figures = f"{number(before)} → {number(last.scores[column])}"
            shown.append((str(column), figures, f"{percent(change)} from {first.name} to {last.name}"))
    before, after = first.step.bytes, last.step.bytes
    if before and after and before != after:
        bits = f" · {last.step.bits:.2f} bits a weight" if last.step.bits else ""
        shown.append(("size", f"{size(before)} → {size(after)}", f"{percent(after / before - 1)}{bits}"))
    return shown


def _column(score: Score) -> Column:
    return Column(score.metric, score.on, score.better)


def _and(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""
