"""What the options of `lmeff plan` add, in words and cells: a search, the room there is, compressions, serving."""

import re
from collections.abc import Mapping
from typing import Any

from lmeff.report import words

Json = Mapping[str, Any]
CACHES = ("bfloat16", "int8")  # the JSON has more


def searched_row(row: Json) -> tuple[str, ...]:
    """A plan in cells: what it is, seconds of a step, tokens a second, MFU, bytes on the fullest device."""
    names = f" [{', '.join(row['names'])}]" if row["names"] else ""
    return (
        f"{row['words']}{names}",
        words.brief(row["step_seconds"]["middle"]),
        words.amount(row["tokens_per_second"]),
        f"{row['mfu_full']:.0%}",
        f"{words.size(row['bytes'])}{'' if row['fits'] else ' (no)'}",
    )


def refusals(found: Json) -> list[str]:
    """Why plans cannot train, the most frequent reason first; an example for each."""
    kinds = sorted(found["refused"].values(), key=lambda refused: -refused["count"])
    return [f"{refused['count']:,} cannot train, such as: {refused['example']}" for refused in kinds]


def served(found: Json) -> str:
    """What is served, on what."""
    devices = words.plural(found["devices"], "device")
    return f"serving: {devices} a replica, contexts of {found['context']} tokens, at full rates; integers are the weights' alone but in W8A8"


def served_rows(found: Json) -> list[tuple[str, ...]]:
    """Rows of the table, for keys and values in the formats of `CACHES`.

    Formats, batch, bytes on a device, time of a token and what binds it, time of a prompt, tokens a second of a chip.
    """
    return [
        (
            f"{row['weights']}{' (W8A8)' if row['arithmetic'] == 'int8' else ''}",
            row["cache"],
            str(row["batch"]),
            f"{words.size(row['weight_bytes'] + row['cache_bytes'])}{'' if row['fits'] else ' (no)'}",
            words.brief(row["decode"]["seconds"]),
            row["decode"]["bound"],
            words.brief(row["prefill"]["seconds"]),
            words.amount(row["tokens_per_second"]),
        )
        for row in found["rows"]
        if row["cache"] in CACHES
    ]


def roomy(plan: Json) -> list[str]:
    """The largest batch and context that fit, and what the next would take."""
    found, job = plan["room"], plan["job"]
    return [
        _largest(
            found["rows"],
            "rows",
            f"of {job['tokens']} tokens",
            found["row_step"],
            found["rows_bytes"],
            found["more_rows_bytes"],
        ),
        _largest(
            found["tokens"],
            "tokens a row",
            f"in {job['rows']} rows",
            found["token_step"],
            found["tokens_bytes"],
            found["more_tokens_bytes"],
        ),
    ]


def _largest(count: int, what: str, beside: str, step: int, used: float, more: float) -> str:
    if not more:
        told = f"room for {count:,}" if count else "no room for"
        return f"{told} {what} {beside}: {count + step:,} are more than the budget of train.remat keeps the inputs of layers of"
    if not count:
        return f"not even {step:,} {what} {beside} fit: they need {words.size(more)}"
    return f"room for {count:,} {what} {beside}: {words.size(used)} on the fullest device; {count + step:,} would need {words.size(more)}"


def target(found: Json) -> str:
    """What compressions were asked to meet."""
    most = [words.size(found["bytes"])] if found["bytes"] else []
    return " and ".join(most + ([f"{words.number(found['ms'])} ms a token"] if found["ms"] else []))


def option_row(option: Json) -> tuple[str, ...]:
    """A compression in cells: the config of its stage, stored bytes, bits a parameter of the original, time of a token, expected damage."""
    cache = "" if option["cache"] == "bfloat16" else f" with keys and values in {option['cache']}"
    return (
        f"{option['code']}{cache}",
        words.size(option["stored_bytes"]),
        words.number(option["bits"]),
        words.brief(option["decode_ms"] / 1000),
        f"{option['nats']:+.3f}",
    )


def because(option: Json) -> str:
    """What the order of a compression is made of, without the sources, which the page and the JSON have."""
    return f"{option['rank']}: {re.sub(r' [(][^()]*[)]', '', option['because'])}"
