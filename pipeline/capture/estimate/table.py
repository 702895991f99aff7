"""Format an estimate as text: the table, its legend, and the projection to more tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pipeline.records import Estimate, EstimatedEncoding
from pipeline.softlabels.names import encoding_name


def human(size: float) -> str:
    """Format a number of bytes in decimal units."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    unit = 0
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {units[unit]}" if size < 999.5 else f"{size:,.0f} {units[unit]}"


def format_estimate(found: Estimate) -> str:
    """Return the table, its legend, and the projection."""
    return "\n".join(_lines(found))


def _lines(found: Estimate) -> Iterator[str]:
    yield (
        f"{found.teacher} on {found.source}: about {found.rows:,} rows, {found.tokens:,} tokens, {found.positions:,} positions, from a pilot of {found.pilot_rows} rows and "
        f"{found.pilot_positions:,} positions; the teacher's pass: {found.tokens_per_second:,.0f} tokens a second here"
    )
    yield ""
    yield (
        f"{'encoding':<18}{'kept':>7}{'B/position':>12}{'total':>10}{'shards':>8}{'hours':>9}{'overhead':>10}{'noise':>9}{'bias':>9}{'KL':>9}"
        f"{'angle':>8}  mass kept at T = 1, 2, 4"
    )
    for line in found.encodings:
        chosen = "  <- chosen" if line.encoding == found.chosen else ""
        yield _line(line) + chosen
    yield ""
    yield "noise     of the target in a student's gradient, as a share of what one label drawn from the teacher has; more data averages it out"
    yield "bias      the part that more data does not average out, on the same scale"
    yield "overhead  time of encoding relative to the teacher's pass; not overlapped with it here"
    for column in found.columns:
        size = f"{column.bytes_per_position:.1f} B a position, {human(column.total_bytes)}"
        where = "counted above" if column.included else "more, not counted above"
        yield f"{column.flag}: {size} {where}"
    if found.scale_tokens is not None:
        yield ""
        yield from _projection(found, found.scale_tokens)


def _line(line: EstimatedEncoding) -> str:
    cost = f"{line.bytes_per_position:>12.1f}{human(line.total_bytes):>10}{line.num_shards:>8,}{line.hours:>9.3g}{line.overhead:>10.1%}"
    if line.fidelity is None:
        return f"{encoding_name(line.encoding):<18}{'-':>7}{cost}"
    f = line.fidelity
    one_draw = f.noise / f.noise_share if f.noise_share else math.inf
    kl = "-" if f.kl is None else f"{f.kl:.4f}"
    bias = "-" if f.bias is None else f"{f.bias / one_draw:.3%}"
    masses = "  ".join(f"{mass:.3f}" for mass in f.kept_mass.values())
    return f"{encoding_name(line.encoding):<18}{f.kept:>7.1f}{cost}{f.noise_share:>9.2%}{bias:>9}{kl:>9}{f.angle:>7.1f}\N{DEGREE SIGN}  {masses}"


def _projection(found: Estimate, tokens: float) -> Iterator[str]:
    share = found.positions / max(found.tokens, 1)
    yield f"At {tokens:.3g} tokens on {found.gpus} device(s) like this one ({share:.0%} of the tokens supervised, as in the pilot; shards of 128 MB):"
    for line in found.encodings:
        size = tokens * share * line.bytes_per_position
        hours = tokens / found.tokens_per_second * (1 + line.overhead) / 3600
        rate = found.gpus * found.tokens_per_second * share
        cores = rate / line.decoded_per_second
        yield (
            f"  {encoding_name(line.encoding):<18}{human(size):>10}{math.ceil(size / (128 << 20)):>12,} shards{hours:>12,.0f} device-hours"
            f"{hours / found.gpus / 24:>10,.1f} days; students at the teacher's rate read {human(rate * line.bytes_per_position)}/s, decoded by {cores:.2g} core(s)"
        )
    yield "Assumed: the teacher's rate as measured here, encoding not overlapped with it, and a student no faster than its teacher's forward pass."
