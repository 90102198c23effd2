"""DICOM reading: pixels by kind, sampling, cropping, limits, and no patient data anywhere."""

import io
import logging
import resource
import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    MPEG2MPML,
    MPEG4HP41,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SMPTEST211020UncompressedProgressiveActiveVideo,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from echovlm_jax.errors import InputError
from echovlm_jax.processing import dicom, dicom_frames, dicom_header, levels
from echovlm_jax.processing.dicom import read_dicom, read_loop
from echovlm_jax.processing.dicom_identity import dicom_identity
from echovlm_jax.processing.files import file_kind

FILES = ["examples_rgb_color", "examples_palette", "examples_jpeg2k", "examples_ybr_color"]
SECRET = "GEHEIM"  # planted in every tag that could name somebody


def sample(name: str) -> str:
    return str(get_testdata_file(f"{name}.dcm"))


def new_dicom(pixels: np.ndarray, photometric: str, **elements) -> FileDataset:
    """A DICOM data set around uint8/uint16 pixels [T, H, W] or [T, H, W, 3], with planted names."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.PatientName = f"{SECRET}^Name"
    dataset.PatientID = f"{SECRET}-4711"
    dataset.PatientBirthDate = "19700101"
    dataset.InstitutionName = f"{SECRET} Clinic"
    dataset.ImageComments = f"{SECRET} comment"
    bits = pixels.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = pixels.shape[1:3]
    dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = pixels.tobytes()
    for key, value in elements.items():
        setattr(dataset, key, value)
    return dataset


def save(dataset: FileDataset, path, **options) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=False, **options)
    return str(path)


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 256, (3, 12, 10), np.uint8)


@pytest.fixture
def colour():
    return np.random.default_rng(1).integers(0, 256, (3, 12, 10, 3), np.uint8)


def refused(path, *words) -> str:
    with pytest.raises(InputError) as caught:
        read_dicom(path)
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message and str(path) in message
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    for word in words:
        assert word in message, message
    return message


def test_grey_is_as_stored_and_monochrome1_is_inverted(grey, tmp_path):
    path = save(new_dicom(grey, "MONOCHROME2"), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path), np.repeat(grey[..., None], 3, axis=-1))
    path = save(new_dicom(grey, "MONOCHROME1"), tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_dicom(path)[..., 0], 255 - grey)


def test_window_and_sixteen_bits(tmp_path):
    pixels = np.linspace(100, 4100, 120).astype(np.uint16).reshape(1, 12, 10)
    whole = read_dicom(save(new_dicom(pixels, "MONOCHROME2"), tmp_path / "a.dcm"))[..., 0]
    assert whole.min() == 0 and whole.max() == 255  # its own range

    window = {"WindowCenter": [1000, 7], "WindowWidth": [500, 7]}
    shown = read_dicom(save(new_dicom(pixels, "MONOCHROME2", **window), tmp_path / "b.dcm"))
    expected = np.clip(np.round(((pixels - 999.5) / 499 + 0.5) * 255), 0, 255)
    np.testing.assert_array_equal(shown[..., 0], expected)

    signed = (pixels.astype(np.int32) - 2000).astype(np.int16)
    dataset = new_dicom(signed, "MONOCHROME2", PixelRepresentation=1)
    signed_shown = read_dicom(save(dataset, tmp_path / "c.dcm"))[..., 0]
    np.testing.assert_array_equal(signed_shown, whole)


@pytest.mark.parametrize(("slope", "intercept"), [("1e-12", "0"), ("1e300", "-1e300")])
def test_a_slope_of_any_size_keeps_the_greys(slope, intercept, tmp_path):
    pixels = np.arange(120, dtype=np.uint8).reshape(1, 12, 10)
    scaled = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    path = save(new_dicom(pixels, "MONOCHROME2", **scaled), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path)[..., 0], pixels)


@pytest.mark.parametrize(("slope", "intercept"), [("1e308", "0"), ("1", "1e300")])
def test_a_scale_without_greys_is_refused(slope, intercept, tmp_path):
    pixels = np.arange(120, dtype=np.uint8).reshape(1, 12, 10)
    scaled = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    refused(save(new_dicom(pixels, "MONOCHROME2", **scaled), tmp_path / "a.dcm"), "RescaleSlope")


def test_rgb_planes_and_uncompressed_422(colour, tmp_path):
    np.testing.assert_array_equal(
        read_dicom(save(new_dicom(colour, "RGB"), tmp_path / "a.dcm")), colour
    )
    planes = new_dicom(colour, "RGB", PlanarConfiguration=1)
    planes.PixelData = colour.transpose(0, 3, 1, 2).tobytes()
    np.testing.assert_array_equal(read_dicom(save(planes, tmp_path / "b.dcm")), colour)

    for kind in ("YBR_FULL", "YBR_FULL_422"):
        dataset = new_dicom(colour, kind)
        if kind == "YBR_FULL_422":  # Y Y Cb Cr for each pair of columns
            pairs = colour.reshape(3, 12, 5, 2, 3)
            packed = [pairs[..., 0, 0], pairs[..., 1, 0], pairs[..., 0, 1], pairs[..., 0, 2]]
            dataset.PixelData = np.stack(packed, axis=-1).tobytes()
        path = save(dataset, tmp_path / f"{kind}.dcm")
        np.testing.assert_array_equal(read_dicom(path), pixel_array(path))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless])
def test_other_transfer_syntaxes(syntax, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 4000, (3, 12, 10), np.uint16)
    expected = read_dicom(save(new_dicom(pixels, "MONOCHROME2"), tmp_path / "a.dcm"))
    dataset = new_dicom(pixels, "MONOCHROME2")
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
        path = save(dataset, tmp_path / "b.dcm")
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        path = save(dataset, tmp_path / "b.dcm", implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_dicom(path), expected)


@pytest.mark.parametrize(
    "name",
    ["SC_rgb_jpeg_gdcm", "SC_rgb_jpeg", "SC_rgb_jls_lossy_line", "GDCMJ2K_TextGBR", "SC_rgb_rle"],
)
def test_every_compression_decodes(name):
    """JPEG goes through Pillow, JPEG-LS through gdcm, JPEG 2000 through pylibjpeg."""
    path = sample(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pixel_array(pydicom.dcmread(path))
    np.testing.assert_array_equal(read_dicom(path)[0], expected)


def test_one_image_in_several_encodings_reads_the_same():
    kinds = ["implicit", "bigendian", "expb", "padded", "RLE", "jp2klossless", "jpeg_ls_lossless"]
    plain = read_dicom(sample("MR_small"))
    assert len(np.unique(plain)) > 100
    for kind in kinds:
        np.testing.assert_array_equal(read_dicom(sample(f"MR_small_{kind}")), plain)


def test_a_loop_is_sampled_evenly_and_frame_by_frame(monkeypatch):
    path = sample("examples_ybr_color")
    whole, decoded = pixel_array(path), []
    decode = dicom.FrameDecoder.__call__
    monkeypatch.setattr(dicom.FrameDecoder, "__call__", lambda *a: decoded.append(1) or decode(*a))
    for count, picks in ((4, [0, 7, 15, 22]), (1, [0]), (100, list(range(30)))):
        decoded.clear()
        np.testing.assert_array_equal(read_dicom(path, num_frames=count), whole[picks])
        assert len(decoded) == len(picks)  # only what is asked for


@pytest.mark.parametrize("table", ["none", "right", "lying"])
def test_frames_of_several_fragments(table, tmp_path):
    """A frame in two fragments each, found by the offset table or by where a codestream begins."""
    dataset = pydicom.dcmread(sample("examples_ybr_color"))
    from pydicom.encaps import generate_frames

    frames = list(generate_frames(dataset.PixelData, number_of_frames=30))[:3]
    dataset.NumberOfFrames = 3
    dataset.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=table != "none")
    if table == "lying":
        dataset.PixelData = dataset.PixelData[:12] + b"\7\0\0\0" + dataset.PixelData[16:]
    path = save(dataset, tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path), pixel_array(sample("examples_ybr_color"))[:3])


def region(kind: int, left: int, top: int, right: int, bottom: int) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = kind, 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item


def test_crop_to_the_union_of_spatial_regions(colour, tmp_path):
    regions = [region(1, 2, 3, 5, 6), region(2, 4, 5, 7, 9), region(4, 0, 0, 9, 11)]
    path = save(new_dicom(colour, "RGB", SequenceOfUltrasoundRegions=regions), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path, crop=True), colour[:, 3:10, 2:8])
    np.testing.assert_array_equal(read_dicom(path), colour)
    # Of another frame size, or none at all: the frame stays whole, and it is said.
    for regions in (
        [region(1, 2, 3, 500, 600)],
        [region(1, 5, 5, 5, 5)],
        [region(4, 0, 0, 9, 9)],
        [],
    ):
        dataset = new_dicom(colour, "RGB", SequenceOfUltrasoundRegions=regions)
        path = save(dataset, tmp_path / "b.dcm")
        loop = read_loop(path, crop=True)
        np.testing.assert_array_equal(loop.frames, colour)
        assert not loop.cropped
        with pytest.raises(InputError, match="can't be cropped"):
            read_loop(path, crop="require")


def test_regions_that_reach_out_are_cut_or_said(colour, tmp_path):
    """A few pixels outside are the frame's edge; one bad region among two is not dropped unsaid."""
    out = [region(1, 0, 4, 11, 12)]  # of a frame 10 wide and 12 high
    path = save(new_dicom(colour, "RGB", SequenceOfUltrasoundRegions=out), tmp_path / "a.dcm")
    loop = read_loop(path, crop="require")
    np.testing.assert_array_equal(loop.frames, colour[:, 4:])
    assert loop.cropped and not loop.burned_in
    for unknown in (9, None):  # of no known format, it may be what was to be shown
        two = [region(1, 2, 3, 5, 6), region(9, 4, 5, 7, 9)]
        two[1].RegionSpatialFormat = unknown
        save(new_dicom(colour, "RGB", SequenceOfUltrasoundRegions=two), tmp_path / "c.dcm")
        assert not read_loop(tmp_path / "c.dcm", crop=True).cropped
    two = [region(1, 2, 3, 5, 6), region(1, 4, 5, 500, 9)]
    dataset = new_dicom(colour, "RGB", SequenceOfUltrasoundRegions=two, BurnedInAnnotation="YES")
    path = save(dataset, tmp_path / "b.dcm")
    loop = read_loop(path, crop=True)
    assert loop.frames.shape[1:3] == (4, 4) and not loop.cropped and loop.burned_in
    with pytest.raises(InputError, match="can't be cropped"):
        read_loop(path, crop="require")


@pytest.mark.parametrize("meta", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_the_data_set_tells_how_it_is_encoded(meta, colour, tmp_path):
    """Whatever the file meta information says of VRs, and where there is none, or no preamble."""
    body = ExplicitVRLittleEndian if meta == ImplicitVRLittleEndian else ImplicitVRLittleEndian
    dataset, files = new_dicom(colour, "RGB"), []
    for syntax in (meta, body):
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(tmp_path / "x.dcm", dataset, enforce_file_format=True)
        data = (tmp_path / "x.dcm").read_bytes()
        end = 144 + int.from_bytes(data[140:144], "little")
        files.append((data[:end], data[end:]))
    path = tmp_path / "a.dcm"
    for content in (files[0][0] + files[1][1], files[1][1], files[1][0][132:] + files[1][1]):
        path.write_bytes(content)
        assert file_kind(path) == "dicom"
        np.testing.assert_array_equal(read_dicom(path), colour)
    path.write_bytes((files[0][0] + files[0][1])[128:])  # from "DICM" on
    assert file_kind(path) == "dicom" and dicom_identity(path).patient
    np.testing.assert_array_equal(read_dicom(path), colour)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("megabytes", [5, 40])
def test_a_long_private_sequence_is_walked_past(implicit, megabytes, colour, tmp_path, monkeypatch):
    dataset = new_dicom(colour, "RGB")
    inner, item = Dataset(), Dataset()
    inner.add_new(0x200D0010, "LO", SECRET)
    inner.add_new(0x200D10F3, "OB", b"\1" * (megabytes * 2**20))
    item.add_new(0x200D0010, "LO", SECRET)
    item.add_new(0x200D1001, "SQ", [inner])
    dataset.add_new(0x200D0010, "LO", SECRET)
    dataset.add_new(0x200D1002, "SQ", [item, Dataset(), inner])
    for each in (dataset[0x200D1002], item[0x200D1001]):
        each.is_undefined_length = True
    item.is_undefined_length_sequence_item = True
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    dataset.file_meta.TransferSyntaxUID = syntax
    path = save(dataset, tmp_path / "a.dcm", implicit_vr=implicit, little_endian=True)
    monkeypatch.setattr(dicom_header, "MAX_HEADER_BYTES", 2**16)
    np.testing.assert_array_equal(read_dicom(path), colour)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    refused(path, "truncated")


def test_more_than_the_header_says_is_refused(grey, tmp_path):
    dataset = new_dicom(grey, "MONOCHROME2")
    for extra, words in ((b"\1\2", "holds more"), (b"\0" * 120, "holds more")):
        dataset.PixelData = grey.tobytes() + extra
        refused(save(dataset, tmp_path / "a.dcm"), words, "take 360 bytes")
    dataset.PixelData = grey.tobytes() + b"\0" * 40
    assert len(read_dicom(save(dataset, tmp_path / "a.dcm"))) == 3
    jpeg = pydicom.dcmread(sample("examples_ybr_color"))
    jpeg.NumberOfFrames = 1
    refused(save(jpeg, tmp_path / "b.dcm"), "holds 30 frames where its header says 1")
    jpeg.NumberOfFrames = 29
    refused(save(jpeg, tmp_path / "b.dcm"), "don't make the 29 frames")


@pytest.mark.parametrize("size", [60, 700])  # shorter and longer than the length that "??" makes
def test_an_element_without_a_valid_vr_is_named(size, tmp_path):
    pixels = np.zeros((size, size, 3), np.uint8)
    data = Path(save(new_dicom(pixels, "RGB"), tmp_path / "a.dcm")).read_bytes()
    at = data.rindex(b"\xe0\x7f\x10\x00")
    element = struct.pack("<HH2sH", 0x7FDF, 0x1010, b"??", 4) + b"DOE^"
    (tmp_path / "b.dcm").write_bytes(data[:at] + element + data[at:])
    message = refused(tmp_path / "b.dcm", "(7FDF,1010) has no valid VR")
    assert "DOE" not in message and "?" not in message


def test_a_deflated_data_set_is_bounded(grey, tmp_path, monkeypatch):
    dataset = new_dicom(grey, "MONOCHROME2")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(dataset, tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path)[..., 0], grey)
    monkeypatch.setattr(dicom_header, "MAX_INFLATED_BYTES", 500)
    refused(path, "inflates to more than 500")


def test_video_inside_dicom(tmp_path):
    av = pytest.importorskip("av")
    frames = np.zeros((20, 32, 48, 3), np.uint8)
    for n, frame in enumerate(frames):
        frame[:, : 2 * n + 2] = 200
    out = io.BytesIO()
    with av.open(out, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    dataset = new_dicom(frames, "YBR_FULL_422")
    dataset.file_meta.TransferSyntaxUID = MPEG4HP41
    dataset.PixelData = encapsulate([out.getvalue() + b"\0" * (len(out.getvalue()) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    read = read_dicom(save(dataset, tmp_path / "a.dcm"), num_frames=5)
    assert read.shape == (5, 32, 48, 3)
    assert np.abs(read.astype(int) - frames[::4]).mean() < 10
    dataset.NumberOfFrames = 21
    refused(save(dataset, tmp_path / "a.dcm"), "20 frames where its header says 21")
    dataset.NumberOfFrames, dataset.Rows = 20, 30
    refused(save(dataset, tmp_path / "a.dcm"), "32 x 48 pixels where its header says")


@pytest.mark.parametrize(
    "elements, words",
    [
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels a frame is over the limit"),
        ({"NumberOfFrames": 2**31 - 1}, "frames is over the limit"),
        ({"NumberOfFrames": 4}, "truncated"),
        ({"NumberOfFrames": 0}, "holds more pixels than its header says: 1 frames"),
        ({"NumberOfFrames": 2}, "holds more pixels than its header says: 2 frames"),
        ({"NumberOfFrames": -1}, "-1 frames"),
        ({"HighBit": 6}, "HighBit 6"),
        ({"Rows": 0}, "frames of 0 x"),
        ({"PhotometricInterpretation": f"{SECRET} colours"}, "photometric"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "lookup"),
        ({"SamplesPerPixel": 3}, "samples"),
        ({"BitsAllocated": 64}, "bits"),
        ({"BitsStored": 12}, "bits stored"),
        ({"WindowCenter": "nan", "WindowWidth": "5"}, "WindowCenter"),
    ],
)
def test_headers_that_lie_are_refused(elements, words, grey, tmp_path):
    dataset = new_dicom(grey, "MONOCHROME2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, value in elements.items():
            setattr(dataset, key, value)
    refused(save(dataset, tmp_path / "a.dcm"), words)


def test_codestreams_that_lie_are_refused(tmp_path):
    """Each claims a huge frame inside a small file; a decoder would allocate it."""
    jpeg = pydicom.dcmread(sample("examples_ybr_color"))
    data = bytearray(jpeg.PixelData)
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65000, 65000)
    jpeg.PixelData = bytes(data)
    refused(save(jpeg, tmp_path / "a.dcm"), "claims 65000 x 65000")

    j2k = pydicom.dcmread(sample("examples_jpeg2k"))
    siz = j2k.PixelData.index(b"\xff\x4f\xff\x51")
    data = bytearray(j2k.PixelData)
    data[siz + 8 : siz + 16] = struct.pack(">LL", 2**30, 2**30)
    j2k.PixelData = bytes(data)
    refused(save(j2k, tmp_path / "b.dcm"), "claims")

    data = bytearray(pydicom.dcmread(sample("examples_jpeg2k")).PixelData)
    data[siz + 24 : siz + 32] = struct.pack(">LL", 1, 1)  # a tile for each pixel
    j2k.PixelData = bytes(data)
    refused(save(j2k, tmp_path / "c.dcm"), "tiles")


def test_run_length_bombs_are_refused(tmp_path):
    pixels = np.zeros((1, 64, 64), np.uint8)
    dataset = new_dicom(pixels, "MONOCHROME2")
    dataset.compress(RLELossless, generate_instance_uid=False)
    path = save(dataset, tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom(path)[..., 0], pixels)
    head = struct.pack("<16L", 1, 64, *[0] * 14)
    dataset.PixelData = encapsulate([head + b"\x81\0" * 4000])  # 8 kB for half a megabyte
    refused(save(dataset, tmp_path / "b.dcm"), "unpacks to more")


def test_a_missing_end_mark_is_forgiven(tmp_path):
    whole = Path(sample("examples_jpeg2k")).read_bytes()
    end = whole.rindex(b"\xfe\xff\xdd\xe0")
    path = tmp_path / "a.dcm"
    path.write_bytes(whole[:end])
    np.testing.assert_array_equal(read_dicom(path), read_dicom(sample("examples_jpeg2k")))


def test_files_that_are_no_images_are_refused(grey, tmp_path):
    path = tmp_path / "note.dcm"
    path.write_text(f"Dear {SECRET}, this is only a text file. " * 10)
    refused(path, "DICOM")
    path.write_bytes(b"")
    refused(path)
    refused(tmp_path / "absent.dcm", "read")
    refused(tmp_path, "read")  # a folder
    whole = new_dicom(grey, "MONOCHROME2")
    del whole.PixelData
    refused(save(whole, path), "no pixel data")
    dataset = new_dicom(grey, "MONOCHROME2")
    dataset.PixelData = encapsulate([b"\0" * 100])
    dataset["PixelData"].VR = "OB"
    for syntax, words in (
        (MPEG2MPML, ""),
        (SMPTEST211020UncompressedProgressiveActiveVideo, ""),
    ):
        dataset.file_meta.TransferSyntaxUID = syntax
        refused(save(dataset, path), words)


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere_is_refused(name, tmp_path):
    whole = Path(sample(name)).read_bytes()
    path = tmp_path / "cut.dcm"
    for part in (0.001, 0.005, 0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        refused(path)


def test_memory_stays_bounded_whatever_a_header_claims(tmp_path):
    """Under a limit of 1 GB more address space than now, each lie must still end in its error."""
    pixels = np.zeros((1, 4, 4), np.uint8)
    lies = []
    plain = Path(save(new_dicom(pixels, "MONOCHROME2"), tmp_path / "a")).read_bytes()
    huge_element = bytearray(plain)
    at = huge_element.index(b"\x28\x00\x02\x00US")  # SamplesPerPixel becomes 4 GB of text
    huge_element[at + 4 : at + 12] = b"UT\0\0\xfe\xff\xff\xff"
    lies.append(bytes(huge_element) + b"\0" * (8 * 2**20))
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * (2**20)  # a million empty regions in 8 MB
    crowded = b"\x18\x00\x11\x60SQ\0\0" + struct.pack("<L", len(items)) + items
    at = plain.index(b"\x28\x00\x02\x00US")
    lies.append(plain[:at] + crowded + plain[at:])
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        for i, lie in enumerate(lies):
            path = tmp_path / f"lie{i}.dcm"
            path.write_bytes(lie)
            refused(path, ("truncated within its header", "header holds more")[i])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_patient_data_never_leaves(grey, tmp_path, caplog, capfd):
    """Good and broken files full of planted names: nothing in output, logs, warnings or errors."""
    caplog.set_level(logging.DEBUG)
    dataset = new_dicom(grey, "MONOCHROME2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.add_new(0x00280301, "CS", f"{SECRET} lower case and far too long for a code string")
        dataset.add_new(0x00281050, "DS", "1.00000000000000000000000001")  # WindowCenter, too long
        dataset.add_new(0x00080005, "CS", SECRET)  # a character set that nobody knows: warned of
    good = save(dataset, tmp_path / "good.dcm")
    data = Path(good).read_bytes()
    caplog.clear()  # writing the file warns; reading it must not
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_dicom(good).shape == (3, 12, 10, 3)
        broken = tmp_path / "broken.dcm"
        for name in ("WindowCenter", "Rows", "NumberOfFrames", "PhotometricInterpretation"):
            tag = struct.pack("<L", tag_for_keyword(name))
            tag = tag[2:] + tag[:2]
            at = data.index(tag)
            broken.write_bytes(data[: at + 4] + b"LO\x0c\x00" + f"{SECRET} {SECRET[:5]}".encode())
            refused(broken)
            length = struct.unpack("<H", data[at + 6 : at + 8])[0]
            text = SECRET.encode()[:length].ljust(length)
            broken.write_bytes(data[: at + 8] + text + data[at + 8 + length :])
            try:
                read_dicom(broken)
            except InputError as error:
                assert SECRET not in str(error) and "GEHE" not in str(error)
        assert not caught
    out, err = capfd.readouterr()
    assert not out and not err and not caplog.records
    assert logging.getLogger("pydicom").disabled is False  # as it was


def test_a_decoder_that_aborts_takes_only_its_own_process(tmp_path, capfd, monkeypatch):
    """A sample precision of 174 bits makes gdcm end its process with a C++ exception."""
    monkeypatch.setattr(dicom_frames, "check_codestream", lambda *_: None)  # which refuses it first
    data = bytearray(Path(sample("SC_rgb_jls_lossy_sample")).read_bytes())
    data[data.index(b"\xff\xf7") + 4] = 174
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    refused(path, "doesn't decode")
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_never_ends_is_stopped(tmp_path, monkeypatch):
    """A JP2 box whose length makes pydicom read the same box for ever."""
    monkeypatch.setattr(dicom_frames, "CHILD_SECONDS", 1)
    data = bytearray(Path(sample("GDCMJ2K_TextGBR")).read_bytes())
    data[data.index(b"\xff\x4f\xff\x51") - 1643] = 231
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    refused(path, "doesn't decode")


def must_refuse_or_read(data: bytes, path) -> None:
    """The whole promise: uint8 frames or a one-line InputError."""
    path.write_bytes(data)
    try:
        frames = read_dicom(path, num_frames=2, crop=True)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3


@st.composite
def dicom_bytes(draw, originals: list[bytes]) -> bytes:
    """Truncated, overwritten or spliced real files, or random bytes after a real magic."""
    whole = draw(st.sampled_from(originals))
    kind = draw(st.sampled_from(["mutate", "head", "cut", "splice", "random"]))
    if kind == "random":
        return b"\0" * 128 + b"DICM" + draw(st.binary(max_size=400))
    data = bytearray(whole)
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    reach = min(len(data), 3000) if kind == "head" else len(data)
    for _ in range(draw(st.integers(1, 12))):
        at = draw(st.integers(132, reach - 1))
        new = draw(st.binary(min_size=1, max_size=8))
        if kind == "splice":
            data[at : at + draw(st.integers(0, 16))] = new
        else:
            data[at : at + len(new)] = new
    return bytes(data)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """Real files of every compression, small enough to be mutated quickly."""
    names = [*FILES, "GDCMJ2K_TextGBR", "SC_rgb_jls_lossy_line", "SC_rgb_jpeg_gdcm", "SC_rgb_rle"]
    names += ["SC_rgb_jpeg_dcmtk", "MR_small_bigendian", "MR_small_RLE", "UN_sequence"]
    return [Path(sample(name)).read_bytes() for name in names]


FUZZ = {"suppress_health_check": list(HealthCheck), "database": None}


def fuzz(data, originals, tmp_path) -> None:
    case = data.draw(dicom_bytes(originals))
    must_refuse_or_read(case, tmp_path / "fuzz.dcm")


@settings(max_examples=150, derandomize=True, **FUZZ)
@given(data=st.data())
def test_fuzzed_bytes_never_crash(data, originals, tmp_path):
    fuzz(data, originals, tmp_path)


@pytest.mark.slow
@settings(max_examples=2000, **FUZZ)
@given(data=st.data())
def test_2000_fuzzed_files_never_crash(data, originals, tmp_path):
    fuzz(data, originals, tmp_path)


def test_limits_are_what_the_messages_say():
    assert levels.MAX_FRAME_PIXELS <= levels.MAX_SAMPLED_PIXELS
    with pytest.raises(InputError, match="num_frames"):
        read_dicom(sample("examples_ybr_color"), num_frames=0)


def test_syntaxes_without_an_installed_decoder_say_which(monkeypatch, tmp_path):
    for syntax in (JPEGBaseline8Bit, JPEG2000Lossless):
        monkeypatch.setitem(dicom_frames._PLUGINS, syntax, ("imaginary",))
    refused(sample("examples_ybr_color"), "install imaginary")
    refused(sample("examples_jpeg2k"), "install imaginary")
