"""Codes of a few bits packed densely into words of 32: code i takes the bits from i x bits on, lowest first, across words where they do not divide."""

import numpy as np

WORD = 32
AT_ONCE = 1 << 22  # codes that are spread into single bits at a time


def words(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // WORD)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [rows, count] of `bits` bits as int32 [rows, words]. A code is stored with 2^(bits - 1) added; what is left of the last word is 0.

    >>> [hex(word) for word in pack(np.array([[-8, -7, 7]]), 4)[0]]
    ['0xf10']
    """
    rows, count = codes.shape
    packed = np.zeros((rows, words(count, bits) * 4), np.uint8)
    for part in _parts(rows, count):
        stored = codes[part].astype(np.uint8) + np.uint8(1 << (bits - 1))  # modulo 256
        some = _join(stored, bits)
        packed[part, : some.shape[1]] = some
    return packed.view("<i4").astype(np.int32, copy=False)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: int8 [rows, count]."""
    rows = len(packed)
    stored = np.ascontiguousarray(packed.astype("<i4", copy=False)).view(np.uint8)
    codes = np.empty((rows, count), np.int8)
    for part in _parts(rows, count):
        codes[part] = (_split(stored[part], bits, count) - np.uint8(1 << (bits - 1))).view(np.int8)
    return codes


def _join(stored: np.ndarray, bits: int) -> np.ndarray:
    """Codes from 0 up as bytes."""
    if bits == 8:
        return stored
    if bits == 4:
        even = np.pad(stored, ((0, 0), (0, stored.shape[1] % 2)))
        return even[:, ::2] | (even[:, 1::2] << 4)
    spread = np.unpackbits(stored[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(spread.reshape(len(stored), -1), axis=-1, bitorder="little")


def _split(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `_join`."""
    if bits == 8:
        return packed[:, :count]
    if bits == 4:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :count]
    spread = np.unpackbits(packed, axis=-1, bitorder="little")[:, : count * bits].reshape(-1, count, bits)
    return np.packbits(spread, axis=-1, bitorder="little")[..., 0]


def _parts(rows: int, count: int) -> list[slice]:
    step = max(1, AT_ONCE // max(1, count))
    return [slice(start, start + step) for start in range(0, rows, step)]
