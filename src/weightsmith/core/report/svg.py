"""Pictures as SVG text: a scale, a tag, and one function a picture. Colours come from the page's style sheet."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from weightsmith.core.report.words import number, printable, short, superscript

LEVELS = 10
"""Shades of a heat map."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; text is escaped, numbers are short, `_` in attribute names stands for `-`."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Markup) else escape(printable(child)) for child in children)
    return Markup(f"<{name}{said}>{inside}</{name}>") if inside else Markup(f"<{name}{said}/>")


def _attribute(value: object) -> object:
    return _short(value) if isinstance(value, int | float) else escape(printable(value))


def _short(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0").replace("-0", "0") if abs(x) < 0.1 else f"{x:.1f}".removesuffix(".0")


def picture(width: float, height: float, title: str, about: str, *marks: Markup, kind: str, above: float = 0) -> Markup:
    """The svg element, with a title and a description for those who cannot see it."""
    box = f"0 {_short(-above)} {_short(width)} {_short(height + above)}"
    said = f"{title}: {about}"
    return tag(
        "svg", tag("title", title), tag("desc", about), *marks, viewBox=box, role="img", aria_label=said, class_=kind
    )


def join(marks: Sequence[Markup]) -> Markup:
    """Several elements as one piece."""
    return Markup("").join(marks)


class Scale:
    """Numbers to places, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False):
        low, high = max(low, -1e150), min(high, 1e150)
        if log:
            low, high = max(low, high * 1e-12, 1e-150), max(high, 1e-150)
        if not high > low:
            pad = abs(low) / 10 or 0.5
            low, high = (low / 2, high * 2) if log else (low - pad, low + pad)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, x: float) -> float:
        x = min(max(x, self.low), self.high)
        share = (
            math.log(x / self.low) / math.log(self.high / self.low)
            if self.log
            else (x - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers inside the scale."""
        if self.log:
            decades = math.log10(self.high / self.low)
            steps = (1, 2, 5) if decades < 2.2 else (1,)
            skip = max(1, math.ceil(decades / count)) if steps == (1,) else 1
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers if p % skip == 0 for m in steps]
            found = [x for x in found if self.low * 0.999 <= x <= self.high * 1.001]
            if len(found) > 1:
                return found
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def label(text: object, x: float, y: float, anchor: str = "start", kind: str | None = None, limit: int = 400) -> Markup:
    """Text at a place."""
    return tag(
        "text", short(str(text), limit), x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=kind
    )


def axis_x(scale: Scale, top: float, bottom: float, name: str = "", ticks: Sequence[float] | None = None) -> Markup:
    """Vertical grid lines with their numbers beneath."""
    ticks = scale.ticks() if ticks is None else ticks
    lines = "".join(f"M{_short(scale(t))} {_short(top)}V{_short(bottom)}" for t in ticks)
    marks = [tag("path", d=lines, class_="grid")] if lines else []
    marks += [label(tick(t, scale.log), scale(t), bottom + 15, "middle") for t in ticks]
    if name:
        marks.append(label(name, (scale.start + scale.end) / 2, bottom + 31, "middle", "name"))
    return join(marks)


def axis_y(scale: Scale, left: float, right: float, ticks: Sequence[float] | None = None) -> Markup:
    """Horizontal grid lines with their numbers at the left."""
    ticks = scale.ticks(4) if ticks is None else ticks
    lines = "".join(f"M{_short(left)} {_short(scale(t))}H{_short(right)}" for t in ticks)
    marks = [tag("path", d=lines, class_="grid")] if lines else []
    return join([*marks, *(label(tick(t, scale.log), left - 6, scale(t) + 4, "end") for t in ticks)])


def tick(x: float, log: bool) -> str:
    """A number on an axis."""
    if log and x > 0 and (x >= 1e4 or x < 1e-2) and math.isclose(math.log10(x), round(math.log10(x))):
        return "10" + superscript(round(math.log10(x)))
    text = number(x)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def path(points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> Markup:
    """A line through points."""
    drawn = "".join(f"{'L' if i else 'M'}{_short(x)} {_short(y)}" for i, (x, y) in enumerate(points))
    return tag("path", *([tag("title", tip)] if tip else []), d=drawn, class_=kind) if drawn else Markup("")


OUTLINES = (
    "",
    "M0-1.3L1.3 0L0 1.3L-1.3 0z",
    "M-.9-.9h1.8v1.8h-1.8z",
    "M0-1.2L1.2.9h-2.4z",
)
"""Series differ by shape as well as by colour: circle, diamond, square, triangle."""


def marker(shape: int, x: float, y: float, kind: str, tip: str, r: float = 5) -> Markup:
    """A point of a series."""
    outline, title = OUTLINES[shape % len(OUTLINES)], tag("title", tip)
    if not outline:
        return tag("circle", title, cx=x, cy=y, r=r, class_=kind)
    place = f"translate({_short(x)} {_short(y)})scale({r})"
    return tag("path", title, d=outline, transform=place, class_=kind, vector_effect="non-scaling-stroke")
