"""Stored values of a DICOM frame to what a screen shows (PS3.3 C.11, C.7.6.3.1.5), as uint8 RGB.

Grey goes through the modality lookup table or rescale, then the VOI lookup table or window, then
MONOCHROME1's inversion; indices go through their palette. Where pydicom's own functions are wrong
(see `_table` and `palette_table`) the standard is followed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pydicom.multival import MultiValue

from echovlm_jax.errors import InputError
from echovlm_jax.processing.dicom_header import PixelHeader


class _Table(NamedTuple):
    """A lookup table: values below `first` take its first entry, those beyond it the last."""

    first: int
    entries: np.ndarray  # int64
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        at = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries[at]


def palette_to_rgb(header: PixelHeader, dataset: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What turns indices [H, W] into uint8 [H, W, 3], through the red, green and blue tables."""
    tables = [_palette(dataset, colour, header) for colour in ("Red", "Green", "Blue")]
    if len({(table.first, len(table.entries), table.bits) for table in tables}) > 1:
        raise InputError("its three palettes differ in size")
    if tables[0].bits == 16:
        highest = max(int(table.entries.max()) for table in tables)
        if 0 < highest < 256:
            raise InputError("its palettes state 16 bits and hold no value above 255")
        tables = [table._replace(entries=table.entries >> 8) for table in tables]
    return lambda frame: np.stack([table(frame) for table in tables], axis=-1).astype(np.uint8)


def _palette(dataset: Any, colour: str, header: PixelHeader) -> _Table:
    """One colour's table, its entries of 8 or 16 bits.

    Entries of 8 bits may lie in 16 each, as old writers do, in the low byte or repeated in the
    high one; and an odd number of them is padded to even. pydicom refuses the padding, reads
    big-endian words as little-endian, and lets an index beyond 255 wrap round in a table of 8 bits.
    """
    # until: pydicom 3.1
    name = f"{colour}PaletteColorLookupTable"
    data = dataset.get(f"{name}Data")
    if not isinstance(data, bytes):
        raise InputError("is PALETTE COLOR without plain lookup tables")
    count, first, bits = _descriptor(dataset, f"{name}Descriptor", header)
    if bits not in (8, 16):
        raise InputError(f"its palettes state {bits} bits an entry, neither 8 nor 16")
    big = not header.little_endian
    if len(data) in (count, count + count % 2):
        entries = np.frombuffer(data, np.uint8)
        if big and dataset[f"{name}Data"].VR == "OW":  # two entries a word
            entries = entries[: len(entries) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
        return _Table(first, entries[:count].astype(np.int64), 8)
    if len(data) != 2 * count:
        raise InputError(
            f"its palettes state {count} entries of {bits} bits, but hold {len(data)} bytes"
        )
    entries = np.frombuffer(data, ">u2" if big else "<u2").astype(np.int64)
    if bits == 8:
        low, high = entries & 255, entries >> 8
        if not high.any() or (high == low).all():
            entries = low
        elif not low.any():
            entries = high
        else:
            raise InputError("its palettes of 8 bits lie in words of 16 and use all of them")
    return _Table(first, entries, bits)


def _descriptor(source: Any, keyword: str, header: PixelHeader) -> tuple[int, int, int]:
    """(entries, first value mapped, bits) of a table; 0 entries stands for 65536."""
    value = source.get(keyword)
    try:
        count, first, bits = (int(number) for number in value)
    except (TypeError, ValueError):
        raise InputError(f"the element {keyword} is not three numbers") from None
    # US or SS: as the pixels have a sign or not. A writer's VR may say otherwise.
    count, bits = count % 2**16 or 2**16, bits % 2**16
    if first >= 2**15 and header.signed:
        first -= 2**16
    return count, first, bits


def _table(item: Any, header: PixelHeader) -> _Table:
    """A modality or VOI lookup table. Its entries lie in 16 bits each, whatever it states.

    pydicom can't read tables of 9 to 15 bits here, and those longer than they state.
    """
    # until: pydicom 3.1
    count, first, bits = _descriptor(item, "LUTDescriptor", header)
    data = item.get("LUTData")
    if isinstance(data, bytes):
        if len(data) in (count, count + count % 2) and bits == 8:
            entries = np.frombuffer(data, np.uint8)[:count].astype(np.int64)
        else:
            word = "<u2" if header.little_endian else ">u2"
            entries = np.frombuffer(data[: len(data) // 2 * 2], word).astype(np.int64)
    else:
        listed = list(data) if isinstance(data, list | MultiValue) else [data]
        entries = np.array([int(value) % 2**16 for value in listed if value is not None], np.int64)
    if len(entries) != count:
        raise InputError(f"a lookup table of it states {count} entries and holds {len(entries)}")
    if not 8 <= bits <= 16 or int(entries.max()) >= 2**bits:
        raise InputError(f"a lookup table of it states {bits} bits, which its entries don't fit")
    return _Table(first, entries, bits)


def grey_to_rgb(frames: np.ndarray, dataset: Any, header: PixelHeader) -> np.ndarray:
    """Stored values [T, H, W] to displayed grey, as uint8 [T, H, W, 3].

    Without a VOI table or window, 8 bits without a sign are shown from 0 to their highest value;
    others between the sampled frames' own extremes, one range for all so that a loop doesn't
    flicker.
    """
    least, most = int(frames.min()), int(frames.max())
    stored = np.arange(least, most + 1)
    modality, full = _modality(dataset, header)
    values = modality(stored)
    items = dataset.get("VOILUTSequence")
    centre, width = _number(dataset, "WindowCenter", None), _number(dataset, "WindowWidth", None)
    if items:
        table = _table(items[0], header)
        share = table(values) / (2**table.bits - 1)
    elif centre is not None and width is not None:
        share = _window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    else:
        low, high = sorted(float(end) for end in (full if full else (values.min(), values.max())))
        share = (values - low) / ((high - low) or 1.0)
    table = np.clip(np.round(share * 255), 0, 255).astype(np.uint8)
    if header.photometric == "MONOCHROME1":  # its lowest value is white
        table = 255 - table
    grey = table[frames.astype(np.int32) - least]
    return np.repeat(grey[..., None], 3, axis=-1)


def _modality(
    dataset: Any, header: PixelHeader
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[float, float] | None]:
    """Stored values to modality values, and the range of those where the header fixes it."""
    byte = header.bits_stored <= 8 and not header.signed
    if items := dataset.get("ModalityLUTSequence"):
        table = _table(items[0], header)
        return table, (0.0, 2.0**table.bits - 1) if byte or table.bits == 8 else None
    slope = _number(dataset, "RescaleSlope", None)
    intercept = _number(dataset, "RescaleIntercept", None)
    if (slope is None) != (intercept is None):
        raise InputError("has one of RescaleSlope and RescaleIntercept without the other")
    if slope is None or intercept is None:
        slope, intercept = 1.0, 0.0
    if slope == 0:
        raise InputError("its RescaleSlope is 0")
    top = slope * (2**header.bits_stored - 1) + intercept

    def rescaled(stored: np.ndarray) -> np.ndarray:
        values = stored * slope + intercept
        if not np.isfinite([*values, top - intercept]).all() or not np.diff(values).all():
            raise InputError("its RescaleSlope and RescaleIntercept make one grey of several")
        return values

    return rescaled, (intercept, top) if byte else None


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """The share of white of each value (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise InputError("its VOILUTFunction is none of LINEAR, LINEAR_EXACT and SIGMOID")
    if width < (1 if function == "LINEAR" else 1e-9):
        raise InputError("its WindowWidth is too small for its VOILUTFunction")
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if function in ("LINEAR", "LINEAR_EXACT"):
        if width == 0:
            return (values > centre).astype(float)
        return (values - centre) / width + 0.5
    return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))


def _number(dataset: Any, keyword: str, default: float | None) -> Any:
    value = dataset.get(keyword)
    if isinstance(value, list | MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"the element {keyword} is not a number") from None
    if not np.isfinite(number):
        raise InputError(f"the element {keyword} is not a finite number")
    return number
