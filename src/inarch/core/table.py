"""Plain-text tables, and what is written in their cells."""

from collections.abc import Sequence


def render(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right, everything else to the left."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(headers))]
    widths = [max(len(line[column]) for line in [list(headers), *cells]) for column in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        return "  ".join(
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def layers(numbers: list[int]) -> str:
    """`[0, 1, 2]` as "layers 0-2", `[3]` as "layer 3"."""
    distinct = sorted(set(numbers))
    return f"layer{'s' if len(distinct) > 1 else ''} {ranges(distinct)}"


def counted(number: int, thing: str) -> str:
    """So many of a thing, in words: `1 image`, `1,397 images`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
