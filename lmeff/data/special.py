"""Which ids are special, read from the files beside a tokenizer: nothing is guessed, and what is named but does not exist is refused.

special_ids.json           lmeff's own, beside a copy: what was found where the tokenizer came from; it alone counts
tokenizer_config.json      bos_token, eos_token, pad_token by name; add_bos_token
special_tokens_map.json    the same names
generation_config.json     bos_token_id, eos_token_id (one or several), pad_token_id
config.json                the same ids
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lmeff.core.errors import DataError

KEPT = "special_ids.json"
NAMED = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERED = ("generation_config.json", "config.json")
BESIDE = (*NAMED, *NUMBERED)
ROLES = ("bos", "eos", "pad")


class Specials(NamedTuple):
    """Special ids; None where no file names one.

    stops:  what ends a text: eos, and whatever else the model's generation config names.
    prefix: what stands before every prompt; None where no file says.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    stops: tuple[int, ...] = ()
    prefix: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `kept` reads."""
        return self._asdict()


def kept(folder: Path) -> Specials | None:
    """What `special_ids.json` says, where there is one."""
    if not (folder / KEPT).exists():
        return None
    found = read_object(folder / KEPT)
    try:
        ids = [None if found[role] is None else int(found[role]) for role in ROLES]
        prefix = None if found["prefix"] is None else tuple(map(int, found["prefix"]))
        return Specials(*ids, stops=tuple(map(int, found["stops"])), prefix=prefix)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / KEPT}: is damaged ({error!r}), expected {', '.join(Specials._fields)}; copy the tokenizer anew"
        ) from error


def find(folder: Path, id_of: Callable[[str], int | None], own: Specials) -> Specials:
    """The special ids of the tokenizer in `folder`; `own` are those that its own file gives, which count last, but for its prefix."""
    named = {name: read_object(folder / name) for name in BESIDE if (folder / name).exists()}
    found = {role: _first(role, named, folder, id_of, getattr(own, role)) for role in ROLES}
    stops = [i for name in NUMBERED for i in _ids(named.get(name, {}).get("eos_token_id"), folder / name)]
    if found["eos"] is not None:
        stops.insert(0, found["eos"])
    return Specials(
        **found,
        stops=tuple(dict.fromkeys(stops or own.stops)),
        prefix=_prefix(named.get("tokenizer_config.json", {}), found["bos"], own.prefix, folder),
    )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; raises `DataError` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}), expected a JSON object; fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: holds a {type(found).__name__}, expected a JSON object; fetch it again")
    return found


def special_names(folder: Path) -> dict[str, int | None]:
    """Tokens that the files beside a tokenizer add to it as special ones, with their ids where they are told."""
    found: dict[str, int | None] = {}
    for name in NAMED:
        if (folder / name).exists():
            values = read_object(folder / name)
            for role in ROLES:
                token = _name(values.get(f"{role}_token"))
                if token is not None:
                    found.setdefault(token, None)
            for i, entry in values.get("added_tokens_decoder", {}).items():
                if entry.get("special"):
                    found[entry["content"]] = int(i)
    return found


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens with ids that the files beside a vocabulary add to it."""
    file = folder / "added_tokens.json"
    found = {token: int(i) for token, i in read_object(file).items()} if file.exists() else {}
    file = folder / "tokenizer_config.json"
    entries = read_object(file).get("added_tokens_decoder", {}) if file.exists() else {}
    return found | {entry["content"]: int(i) for i, entry in entries.items()}


def _first(
    role: str, named: dict[str, dict[str, Any]], folder: Path, id_of: Callable[[str], int | None], own: int | None
) -> int | None:
    for name in NAMED:
        token = _name(named.get(name, {}).get(f"{role}_token"))
        if token is not None:
            found = id_of(token)
            if found is None:
                raise DataError(
                    f"{folder / name}: names {role}_token {token!r}, which the tokenizer does not have; expected one of its tokens. "
                    "Use the files that belong together."
                )
            return found
    for name in NUMBERED:
        ids = _ids(named.get(name, {}).get(f"{role}_token_id"), folder / name)
        if ids:
            return ids[0]
    return own


def _name(token: Any) -> str | None:
    """A token is a string or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any, file: Path) -> list[int]:
    """Numbers; negative ones stand for none in some configs."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in found):
        raise DataError(f"{file}: got the special id {value!r}, expected a number or a list of numbers")
    return [i for i in found if i >= 0]


def _prefix(
    config: dict[str, Any], bos: int | None, own: tuple[int, ...] | None, folder: Path
) -> tuple[int, ...] | None:
    """An explicit add_bos_token counts; without one what the tokenizer's own file does."""
    asked = config.get("add_bos_token")
    if asked is None:
        return own
    if asked and bos is None:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: sets add_bos_token without a bos token, expected a bos_token; name it or set add_bos_token to false"
        )
    return (bos,) if asked and bos is not None else ()
