"""Numbers and foreign text as people read them."""

import re

UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Characters that act, turn the direction of writing, or cannot be seen."""
_EXPONENT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: object) -> str:
    r"""Text with control, direction-changing and invisible characters made visible, so that it cannot lie or act.

    Example:
        >>> print(printable(chr(27) + "[31mred"))
        \x1b[31mred
    """
    return UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode(), str(text))


def short(text: str, limit: int) -> str:
    """Text cut in its middle, where names differ least.

    Example:
        >>> short("model.layers.11.self_attn.q_proj.weight", 20)
        'model.lay…roj.weight'
    """
    text = printable(text)
    return text if len(text) <= limit else f"{text[: (limit - 1) // 2]}…{text[len(text) - limit // 2 :]}"


def number(x: float | None) -> str:
    """A number with about four significant digits.

    Example:
        >>> [number(x) for x in (14.9372, 1234567, 0.0312, 0.00000271, float("inf"), 3)]
        ['14.94', '1,234,567', '0.0312', '2.7×10⁻⁶', '∞', '3']
    """
    if x is None or x != x:
        return "–"
    size = abs(x)
    if size == float("inf"):
        return "∞" if x > 0 else "−∞"
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, exponent = f"{x:.1e}".split("e")
        text = f"{mantissa}×10{superscript(int(exponent))}"
    elif x == int(x):
        text = f"{int(x):,}"
    else:
        text = f"{x:,.0f}" if size >= 1e4 else f"{x:,.1f}" if size >= 100 else f"{x:.2f}" if size >= 1 else f"{x:.3g}"
    return text.replace("-", "−")


def superscript(exponent: int) -> str:
    """An integer written as an exponent.

    Example:
        >>> superscript(-12)
        '⁻¹²'
    """
    return str(exponent).translate(_EXPONENT)


def percent(ratio: float) -> str:
    """A relative change with its sign.

    Example:
        >>> percent(-0.1234), percent(0.00001), percent(4.2)
        ('−12.3 %', '±0 %', '+420 %')
    """
    if abs(ratio) < 5e-4 or ratio != ratio:
        return "±0 %"
    digits = (
        "∞"
        if abs(ratio) == float("inf")
        else f"{abs(ratio) * 100:,.0f}"
        if abs(ratio) >= 1
        else f"{abs(ratio) * 100:.1f}"
    )
    return f"{'−' if ratio < 0 else '+'}{digits} %"


def size(nbytes: int | None) -> str:
    """Bytes in decimal units.

    Example:
        >>> size(98_234_112), size(999), size(2_500_000_000)
        ('98.2 MB', '999 B', '2.50 GB')
    """
    if nbytes is None:
        return "–"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return (
                f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
            )
    return f"{nbytes} B"


def duration(seconds: float | None) -> str:
    """A span of time.

    Example:
        >>> duration(0.0421), duration(8.25), duration(151), duration(7320)
        ('42 ms', '8.2 s', '2 min 31 s', '2 h 2 min')
    """
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
