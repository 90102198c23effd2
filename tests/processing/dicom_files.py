"""DICOM files made up from a description, right or lying in one place."""

from __future__ import annotations

import copy
import io
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    apply_windowing,
)

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
GREYS, COLOURS = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422")


@dataclass(frozen=True)
class Case:
    """What a file's header and pixels are to be."""

    syntax: str = uid.ExplicitVRLittleEndian
    vr: str = "OW"
    photometric: str = "MONOCHROME2"
    allocated: int = 8
    stored: int = 8
    high: int = 7
    signed: bool = False
    planar: int = 0
    frames: int = 1
    states_frames: str = "true"  # or "absent", "0", "empty", "more", "fewer"
    size: tuple[int, int] = (4, 6)
    length: str = "right"  # or "frame less", "byte less", "odd", "zeros", "junk", "frame more"
    palette: tuple[int, str, int, int] | None = None  # bits, how they lie, entries, first mapped
    modality: str = ""
    voi: str = ""

    @property
    def native(self) -> bool:
        return self.syntax in NATIVE

    @property
    def colour(self) -> bool:
        return self.photometric in COLOURS


def plain_cases() -> Iterator[Case]:
    """Uncompressed and RLE: every kind of pixel, and lengths that fit and that do not."""
    bits = [(8, 8, 7), (8, 6, 5), (16, 16, 15), (16, 12, 11), (16, 12, 15), (16, 10, 9)]
    kinds = [
        Case(photometric=grey, allocated=a, stored=s, high=h, signed=signed)
        for grey, (a, s, h), signed in itertools.product(GREYS, bits, (False, True))
    ]
    kinds += [Case(photometric=name, planar=p) for name in COLOURS for p in (0, 1)]
    lengths = ("right", "frame less", "byte less", "odd", "zeros", "junk", "frame more")
    for syntax, kind, size in itertools.product(NATIVE, kinds, ((4, 6), (3, 5))):
        for vr, frames, length in itertools.product(("OB", "OW"), (1, 3), lengths):
            yield replace(kind, syntax=syntax, vr=vr, frames=frames, size=size, length=length)
        for states, frames in itertools.product(("absent", "0", "empty", "more", "fewer"), (1, 2)):
            yield replace(kind, syntax=syntax, frames=frames, size=size, states_frames=states)
    for kind, size, frames in itertools.product(kinds, ((4, 6), (3, 5)), (1, 3)):
        for length in ("right", "frame less", "byte less", "junk", "frame more"):
            yield replace(
                kind, syntax=uid.RLELossless, vr="OB", frames=frames, size=size, length=length
            )


def palette_cases() -> Iterator[Case]:
    lies = [(8, "bytes"), (8, "low"), (8, "high"), (8, "both"), (16, "words"), (16, "bytes")]
    for syntax, (bits, lie), entries, first, allocated in itertools.product(
        NATIVE, lies, (256, 255, 16, 2**16), (0, 3, -2), (8, 16)
    ):
        yield Case(
            syntax=syntax,
            photometric="PALETTE COLOR",
            allocated=allocated,
            stored=allocated,
            high=allocated - 1,
            signed=first < 0,
            palette=(bits, lie, entries, first),
        )


def display_cases() -> Iterator[Case]:
    """Modality and VOI lookup tables, rescaling and windows."""
    kinds = [(8, 8, False), (16, 12, False), (16, 12, True)]
    modality = ("", "rescale", "inverting", "table 8", "table 16")
    voi = ("", "window", "LINEAR_EXACT", "SIGMOID", "table 8", "table 12", "table 16")
    for syntax, photometric, (allocated, stored, signed), m, v in itertools.product(
        NATIVE[:3], GREYS, kinds, modality, voi
    ):
        yield Case(
            syntax=syntax,
            photometric=photometric,
            allocated=allocated,
            stored=stored,
            high=stored - 1,
            signed=signed,
            modality=m,
            voi=v,
        )


def compressed_cases() -> Iterator[Case]:
    syntaxes = (
        uid.JPEGBaseline8Bit,
        uid.JPEGExtended12Bit,
        uid.JPEGLossless,
        uid.JPEGLosslessSV1,
        uid.JPEGLSLossless,
        uid.JPEGLSNearLossless,
        uid.JPEG2000Lossless,
        uid.JPEG2000,
    )
    grey = [(8, 8), (16, 12), (16, 16)]
    kinds = [
        Case(photometric=name, allocated=a, stored=s, high=s - 1, signed=signed)
        for name, (a, s), signed in itertools.product(GREYS, grey, (False, True))
    ]
    kinds += [Case(photometric=name) for name in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT")]
    kinds += [Case(photometric="YBR_ICT")]
    for syntax, kind, frames in itertools.product(syntaxes, kinds, (1, 2)):
        for length in ("right", "frame less", "byte less", "junk", "frame more"):
            yield replace(kind, syntax=syntax, vr="OB", frames=frames, size=(16, 24), length=length)


def pixels_of(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Stored values [T, H, W] or [T, H, W, 3], within the bits stored."""
    shape = (case.frames, *case.size, *([3] if case.colour or "YBR" in case.photometric else []))
    low, high = (
        (-(2 ** (case.stored - 1)), 2 ** (case.stored - 1)) if case.signed else (0, 2**case.stored)
    )
    pixels = rng.integers(low, high, shape)
    if case.syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):  # smooth, as pictures are
        ramp = np.linspace(low, high - 1, case.size[0] * case.size[1]).reshape(case.size)
        pixels = np.broadcast_to(ramp.reshape(*case.size, *([1] * (len(shape) - 3))), shape)
    return pixels.astype(f"{'i' if case.signed else 'u'}{case.allocated // 8}")


def write(case: Case, path: Path, rng: np.random.Generator) -> np.ndarray:
    """Makes the file. Returns the values that it stores."""
    pixels = pixels_of(case, rng)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = case.syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns = case.size
    stated = {"true": case.frames, "more": case.frames + 1, "fewer": case.frames - 1}
    stated |= {"0": 0, "empty": None}
    if case.states_frames != "absent":
        dataset.NumberOfFrames = stated[case.states_frames]
    dataset.SamplesPerPixel = pixels.shape[3] if pixels.ndim == 4 else 1
    dataset.PhotometricInterpretation = case.photometric
    dataset.BitsAllocated, dataset.BitsStored = case.allocated, case.stored
    dataset.HighBit, dataset.PixelRepresentation = case.high, int(case.signed)
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = case.planar
    big = case.syntax == uid.ExplicitVRBigEndian
    if case.palette:
        _add_palette(dataset, case.palette, big)
    _add_display(dataset, case, big)
    if case.native:
        dataset.PixelData = _plain_bytes(case, pixels, big)
    else:
        dataset.PixelData = _compressed_bytes(case, pixels, dataset)
    dataset["PixelData"].VR = case.vr
    dataset["PixelData"].is_undefined_length = not case.native
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {
            "implicit_vr": case.syntax == uid.ImplicitVRLittleEndian,
            "little_endian": not big,
        }
        pydicom.dcmwrite(path, dataset, enforce_file_format=False, **options)
    if case.native and case.length == "odd":
        _make_odd(path, dataset, case)
    return pixels


def _make_odd(path: Path, dataset: Dataset, case: Case) -> None:
    """An element of an odd length, which pydicom does not write: the last byte taken off it."""
    if case.syntax == uid.DeflatedExplicitVRLittleEndian:
        return
    data, value = path.read_bytes(), dataset.PixelData
    order = "big" if case.syntax == uid.ExplicitVRBigEndian else "little"
    end = len(data) - len(value)
    length = (len(value) - 1).to_bytes(4, order)
    path.write_bytes(data[: end - 4] + length + value[:-1])


def _plain_bytes(case: Case, pixels: np.ndarray, big: bool) -> bytes:
    if case.photometric == "YBR_FULL_422":  # Y Y Cb Cr for each pair of columns
        even = pixels[:, :, : case.size[1] // 2 * 2]
        pairs = even.reshape(*even.shape[:2], -1, 2, 3)
        pixels = np.stack(
            [pairs[..., 0, 0], pairs[..., 1, 0], *np.moveaxis(pairs[..., 0, 1:], -1, 0)], -1
        )
    elif case.planar:
        pixels = pixels.transpose(0, 3, 1, 2)
    data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    frame = len(data) // case.frames
    data = {
        "right": data,
        "odd": data,
        "frame less": data[:-frame],
        "byte less": data[: -2 + len(data) % 2],
        "zeros": data + b"\0" * (2 + len(data) % 2),
        "junk": data + b"\1\2\3" * 2,
        "frame more": data + data[:frame],
    }[case.length]
    data += b"\0" * (len(data) % 2)
    if big and case.vr == "OW" and case.allocated == 8:  # as bytes lie in big-endian words
        data = np.frombuffer(data, "<u2").byteswap().tobytes()
    return data


def _compressed_bytes(case: Case, pixels: np.ndarray, dataset: Dataset) -> bytes:
    frames = [encode(case, frame, dataset) for frame in pixels]
    if case.length == "byte less":
        frames[-1] = frames[-1][: len(frames[-1]) * 3 // 4 // 2 * 2]
    elif case.length == "junk":
        frames[-1] += b"\1\2\3\4"
    elif case.length == "frame less":
        frames.pop()
    elif case.length == "frame more":
        frames.append(frames[0])
    return encapsulate(frames or [b"\0\0"], has_bot=False)


class CannotEncode(Exception):
    """No encoder here makes this."""


def encode(case: Case, frame: np.ndarray, dataset: Dataset) -> bytes:
    """One frame as a codestream."""
    if case.syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        if (
            case.allocated != 8
            or case.signed
            or "RCT" in case.photometric
            or "ICT" in case.photometric
        ):
            raise CannotEncode
        out = io.BytesIO()
        mode = {"RGB": "RGB"}.get(case.photometric, "YCbCr") if frame.ndim == 3 else "L"
        options = {"keep_rgb": True} if mode == "RGB" else {}
        Image.frombytes(mode, frame.shape[1::-1], frame.tobytes()).save(
            out, "JPEG", quality=95, **options
        )
        return out.getvalue()
    single = Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    single.file_meta.MediaStorageSOPClassUID = single.SOPClassUID = dataset.SOPClassUID
    single.file_meta.MediaStorageSOPInstanceUID = single.SOPInstanceUID = "1.2.3"
    pixels = [element for element in dataset if element.tag >> 16 == 0x28]
    single.update({element.tag: copy.deepcopy(element) for element in pixels})
    single.NumberOfFrames, single.PlanarConfiguration = 1, 0
    single.PixelData = frame.tobytes() + b"\0" * (frame.nbytes % 2)
    single["PixelData"].VR = "OW"
    if case.syntax not in (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEG2000):
        return _by_gdcm(case, single)
    options = {"j2k_cr": [5]} if case.syntax == uid.JPEG2000 else {}
    plugin = "pydicom" if case.syntax == uid.RLELossless else "pylibjpeg"  # gdcm may abort
    try:
        single.compress(case.syntax, encoding_plugin=plugin, generate_instance_uid=False, **options)
    except Exception:
        raise CannotEncode from None
    return next(generate_frames(single.PixelData, number_of_frames=1))


def _by_gdcm(case: Case, single: Dataset) -> bytes:
    """JPEG lossless and JPEG-LS, which only gdcm writes here, from a file to a file."""
    import gdcm

    if case.photometric not in (*GREYS, "RGB", "YBR_FULL"):
        raise CannotEncode
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = f"{folder}/plain.dcm", f"{folder}/packed.dcm"
        pydicom.dcmwrite(plain, single, enforce_file_format=True)
        reader, change, writer = (
            gdcm.ImageReader(),
            gdcm.ImageChangeTransferSyntax(),
            gdcm.ImageWriter(),
        )
        reader.SetFileName(plain)
        if not reader.Read():
            raise CannotEncode
        kind = gdcm.TransferSyntax.GetTSType(str.__str__(case.syntax))
        change.SetTransferSyntax(gdcm.TransferSyntax(kind))
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise CannotEncode
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(packed)
        if not writer.Write():
            raise CannotEncode
        return next(generate_frames(pydicom.dcmread(packed).PixelData, number_of_frames=1))


def _add_palette(dataset: Dataset, palette: tuple[int, str, int, int], big: bool) -> None:
    bits, lie, entries, first = palette
    for n, colour in enumerate(("Red", "Green", "Blue")):
        table = (np.arange(entries) * (n + 2) * (257 if lie == "words" else 1)) % 2**16
        if lie != "words":
            table = table % 256
        if lie == "bytes":
            data = table.astype(np.uint8).tobytes()
            data += b"\0" * (len(data) % 2)
            if big:
                data = np.frombuffer(data, "<u2").byteswap().tobytes()
        else:
            spread = {"low": 1, "high": 256, "both": 257, "words": 1}[lie]
            data = (table * spread).astype(">u2" if big else "<u2").tobytes()
        name = f"{colour}PaletteColorLookupTable"
        tag = pydicom.datadict.tag_for_keyword(f"{name}Descriptor")
        dataset.add_new(tag, "SS" if first < 0 else "US", _descriptor(entries, first, bits))
        dataset.add_new(pydicom.datadict.tag_for_keyword(f"{name}Data"), "OW", data)


def _descriptor(entries: int, first: int, bits: int) -> list[int]:
    return [entries % 2**16 - (2**16 if first < 0 and 2**15 <= entries < 2**16 else 0), first, bits]


def _add_display(dataset: Dataset, case: Case, big: bool) -> None:
    first = -100 if case.signed else 10
    if case.modality in ("rescale", "inverting"):
        dataset.RescaleSlope = 2 if case.modality == "rescale" else -1
        dataset.RescaleIntercept = -10 if case.modality == "rescale" else 255
    elif case.modality:
        dataset.ModalityLUTSequence = [_table(case.modality, first, case.signed, big)]
    if case.voi in ("window", "LINEAR_EXACT", "SIGMOID"):
        dataset.WindowCenter, dataset.WindowWidth = 100.5, 97
        if case.voi != "window":
            dataset.VOILUTFunction = case.voi
    elif case.voi:
        # After a modality table or rescale what comes has no sign, or one of its own.
        dataset.VOILUTSequence = [_table(case.voi, first, case.signed, big)]


def _table(kind: str, first: int, signed: bool, big: bool) -> Dataset:
    bits = int(kind.split()[1])
    entries = np.linspace(2**bits - 1, 3, 200).astype(np.uint16)  # falling: seen when left out
    item = Dataset()
    item.add_new(0x00283002, "SS" if signed else "US", [200, first, bits])
    item.add_new(0x00283006, "OW", entries.astype(">u2" if big else "<u2").tobytes())
    return item


def palette_colours(case: Case, stored: np.ndarray) -> np.ndarray:
    """What `write` put into the palettes for these values, uint8 [T, H, W, 3]."""
    assert case.palette is not None
    _, lie, entries, first = case.palette
    at = np.clip(stored.astype(np.int64) - first, 0, entries - 1)
    values = [at * (n + 2) * (257 if lie == "words" else 1) % 2**16 for n in range(3)]
    return np.stack([v >> 8 if lie == "words" else v % 256 for v in values], -1).astype(np.uint8)


def by_pydicom(path: Path) -> np.ndarray:
    """What pydicom makes of a file, uint8 [T, H, W, 3]: its own functions but the last scaling."""
    dataset = pydicom.dcmread(path)
    pixels = pydicom.pixels.pixel_array(dataset, raw=False)
    samples, frames = dataset.SamplesPerPixel, int(dataset.get("NumberOfFrames") or 1)
    pixels = pixels.reshape(-1, dataset.Rows, dataset.Columns, *([3] if samples == 3 else []))
    if len(pixels) != frames:
        raise ValueError("more frames than the header says")
    if samples == 3:
        return pixels
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        rgb = apply_color_lut(pixels, dataset)
        wide = dataset.RedPaletteColorLookupTableDescriptor[2] == 16 and rgb.dtype != np.uint8
        return (rgb >> 8 if wide else rgb).astype(np.uint8)
    values = apply_modality_lut(pixels.astype(np.int64), dataset)
    if dataset.get("VOILUTSequence"):
        _, first, bits = dataset.VOILUTSequence[0].LUTDescriptor
        low, high = 0, 2**bits - 1
        # In a table of 8 bits pydicom lets an input beyond 255 wrap round: held within it before.
        shown = apply_voi_lut(np.clip(np.rint(values), -(2**15), 199 + first).astype(int), dataset)
    elif dataset.get("WindowWidth"):
        low, high = (apply_windowing(np.array([end]), dataset)[0] for end in (-1e9, 1e9))
        shown = apply_windowing(values, dataset)
    else:
        shown, (low, high) = values, _range(dataset, values)
    grey = np.clip(np.round((shown - low) / ((high - low) or 1) * 255), 0, 255).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, -1)


def _range(dataset: Dataset, values: np.ndarray) -> list[float]:
    """What is black and white without a window: where 8 bits fix it, else what the values span."""
    byte = dataset.BitsStored <= 8 and not dataset.PixelRepresentation
    if dataset.get("ModalityLUTSequence"):
        bits = dataset.ModalityLUTSequence[0].LUTDescriptor[2]
        return [0, 2**bits - 1] if byte or bits == 8 else [values.min(), values.max()]
    if byte:
        ends = np.array([0, 2**dataset.BitsStored - 1])
        return sorted(float(end) for end in apply_modality_lut(ends, dataset))
    return [values.min(), values.max()]
