"""What is stored of an image file: the same pixels, and nothing else."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import FileDataset, FileMetaDataset

from echovlm_jax.data.media import read_medium
from echovlm_jax.data.quarantine import Refused
from echovlm_jax.data.record import Medium
from echovlm_jax.data.strip import strip_jpeg, strip_png
from echovlm_jax.errors import InputError
from echovlm_jax.processing.images import decode_image, load_media
from tests.data.sources import encoded, pixels

SECRET = "DOE^JOHN"


def read(path, **options):
    return read_medium(path, **{"num_frames": 16, "crop": False, **options})


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, SECRET
    return exif


def _jpeg(mode="RGB", orientation=1, **options):
    out = io.BytesIO()
    picture = Image.fromarray(pixels(1, 40, 48)).convert(mode)
    picture.save(out, "JPEG", exif=_exif(orientation), comment=SECRET, **options)
    return out.getvalue() + SECRET.encode()


def _png(mode="RGB", orientation=1, **options):
    out = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", SECRET)
    picture = Image.fromarray(pixels(1)).convert(mode)
    picture.save(out, "PNG", pnginfo=text, exif=_exif(orientation), **options)
    return out.getvalue() + SECRET.encode()


@pytest.mark.parametrize(
    "data",
    [
        *(_jpeg(), _jpeg("L"), _jpeg("CMYK"), _jpeg(progressive=True), _jpeg(orientation=6)),
        _jpeg(icc_profile=SECRET.encode() * 9),
        *(_png(), _png("L"), _png("P"), _png("RGBA"), _png("1"), _png(orientation=3)),
        _png("P", transparency=0),
    ],
)
def test_pixels_stay_and_metadata_goes(tmp_path, data):
    path = tmp_path / "image"
    path.write_bytes(data)
    assert SECRET.encode() in data
    stored = read(path)
    (image,) = stored.images
    want = load_media(path)
    np.testing.assert_array_equal(decode_image(image, ""), want)
    assert stored.medium == Medium(0, *want.shape[:2])
    assert SECRET.encode() not in image and b"Exif" not in image and b"ICC" not in image
    assert not Image.open(io.BytesIO(image)).getexif()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_clean_file_keeps_its_bytes(tmp_path, kind):
    data = encoded(1, kind)
    (tmp_path / "a").write_bytes(data)
    assert read(tmp_path / "a").images == (data,)


def test_compressed_bytes_survive_stripping():
    jpeg = _jpeg()
    assert (strip_jpeg(jpeg) or b"").endswith(jpeg[jpeg.index(b"\xff\xda") : -len(SECRET)])
    assert strip_png(_png()[: -len(SECRET) - 20]) is None  # no end: made anew instead


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _hidden(name):
    """A regular picture with a name in a place of its container that no decoder looks at."""
    secret, png, jpeg = SECRET.encode(), encoded(1, "PNG"), encoded(1, "JPEG")
    idat = png.index(b"IDAT") - 4
    if name.startswith("png"):
        rows, end = zlib.decompress(png[idat + 8 : -16]), png[-12:]
        return {
            "png text": png[:33] + _chunk(b"tEXt", secret) + png[33:],
            "png palette of RGB": png[:33] + _chunk(b"PLTE", secret + b"!") + png[33:],
            "png behind the stream": png[:-12] + _chunk(b"IDAT", secret) + end,
            "png end": png[:-12] + _chunk(b"IEND", secret),
            "png second header": png[:-12] + _chunk(b"IHDR", secret + b"12345") + end,
            "png behind the rows": png[:idat]
            + _chunk(b"IDAT", zlib.compress(rows + secret, 0))
            + end,
            "png spare palette": _palette_png(),
        }[name]
    scan, table = jpeg.index(b"\xff\xda"), b"\x03" + (secret * 9)[:64]
    first, last = jpeg.index(b"\xff\xdb"), jpeg.rindex(b"\xff\xc4")  # tables that are used
    frame, size = jpeg.index(b"\xff\xc0"), int.from_bytes(jpeg[last + 2 : last + 4], "big")
    return {
        "jpeg quantization": jpeg[: first + 61] + secret + jpeg[first + 69 :],
        "jpeg Huffman": jpeg[: last + 2 + size - 8] + secret + jpeg[last + 2 + size :],
        "jpeg names of components": _renamed(jpeg, frame, scan, secret),
        "jpeg comment": jpeg[:2] + _segment(0xFE, secret) + jpeg[2:],
        "jpeg before the scan": jpeg[:scan] + _segment(0xEE, secret) + jpeg[scan:],
        "jpeg end of the scan": jpeg[:-2] + secret + jpeg[-2:],
        "jpeg spare quantization": jpeg[:2] + _segment(0xDB, table) + jpeg[2:],
        "jpeg spare Huffman": jpeg[:2]
        + _segment(0xC4, b"\x13" + bytes([0] * 15 + [8]) + secret)
        + jpeg[2:],
        "jpeg arithmetic coding": jpeg[:scan] + _segment(0xCC, b"\x00\x10") + jpeg[scan:],
        "jpeg thumbnail": jpeg[:2]
        + _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1" + bytes([2, 1]) + secret[:6])
        + jpeg[20:],
        "jpeg trailing": jpeg + secret,
    }[name]


def _renamed(jpeg, frame, scan, secret):
    """A JPEG with other names of its three components, in the frame and in the scan."""
    made = bytearray(jpeg)
    for n in range(3):
        made[frame + 10 + 3 * n] = made[scan + 5 + 2 * n] = secret[n]
    return bytes(made)


def _palette_png():
    out, picture = io.BytesIO(), Image.fromarray(pixels(1)[..., 0] // 64).convert("P")
    picture.putpalette(bytes(range(12)) + SECRET.encode() + b"!")
    picture.save(out, "PNG", bits=8)
    return out.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        *("png text", "png palette of RGB", "png behind the stream", "png end"),
        *("png second header", "png behind the rows", "png spare palette"),
        *("jpeg comment", "jpeg before the scan", "jpeg end of the scan"),
        *("jpeg spare quantization", "jpeg spare Huffman", "jpeg arithmetic coding"),
        *("jpeg thumbnail", "jpeg trailing", "jpeg quantization", "jpeg Huffman"),
    ],
)
def test_nothing_hides_in_a_container(tmp_path, name):
    data, path = _hidden(name), tmp_path / "a"
    path.write_bytes(data)
    try:
        want = load_media(path)
    except InputError:
        with pytest.raises(Refused):
            read(path)
        return
    (image,) = read(path).images
    np.testing.assert_array_equal(decode_image(image, ""), want)
    shown = image
    if image.startswith(b"\x89PNG"):
        shown += zlib.decompress(image[image.index(b"IDAT") + 4 : -16])
    assert SECRET.encode()[:6] not in shown


def test_names_of_components_are_the_usual_ones():
    data = _hidden("jpeg names of components")
    assert strip_jpeg(encoded(1, "JPEG")) and strip_jpeg(data) is None
    assert decode_image(data, "").shape == (20, 30, 3)


@pytest.mark.parametrize("quality", [1, 49, 50, 75, 90, 100])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_pictures_of_every_quality_keep_their_bytes(quality, mode):
    jpeg = _jpeg(mode, quality=quality)
    kept = strip_jpeg(jpeg)
    assert kept and kept.endswith(jpeg[jpeg.index(b"\xff\xda") : -len(SECRET)])
    np.testing.assert_array_equal(decode_image(kept, ""), decode_image(jpeg, ""))


def test_a_picture_with_codes_of_its_own_is_encoded_anew():
    """Nobody can tell what an unusual table is for."""
    assert strip_jpeg(_jpeg(optimize=True)) is None


def _dicom(path, frames):
    array = np.stack([pixels(n)[..., 0] for n in range(frames)])
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.PatientName, data.PatientID = SECRET, SECRET
    data.Rows, data.Columns, data.NumberOfFrames = 20, 30, frames
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = array.tobytes()
    data.save_as(path)
    return array


@pytest.mark.parametrize(("frames", "asked", "found"), [(1, 16, 0), (5, 16, 5), (6, 3, 3)])
def test_dicom_frames_become_png(tmp_path, frames, asked, found):
    array = _dicom(tmp_path / "a.dcm", frames)
    stored = read(tmp_path / "a.dcm", num_frames=asked)
    assert stored.medium == Medium(found, 20, 30)
    assert len(stored.images) == max(found, 1)
    for n, image in enumerate(stored.images):
        want = array[n * frames // len(stored.images)]
        assert image.startswith(b"\x89PNG") and SECRET.encode() not in image
        np.testing.assert_array_equal(decode_image(image, "")[..., 0], want)


def _claim(width, height):
    """A PNG that claims to be large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    good = encoded(1)
    return good[:12] + head + struct.pack(">I", zlib.crc32(head)) + good[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable image"),
        (b"GIF89a", "unreadable image"),
        (encoded(1)[:200], "unreadable image"),
        (encoded(1, "JPEG")[:300], "unreadable image"),
        (_claim(60_000, 60_000), "image too large"),
        (_claim(8_200, 8_200), "image too large"),
    ],
)
def test_files_that_are_no_use_are_refused(tmp_path, data, reason):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(Refused) as refused:
        read(tmp_path / "a")
    assert refused.value.reason == reason


def test_a_line_of_pixels_is_no_image(tmp_path):
    Image.fromarray(pixels(1, 2, 500)).save(tmp_path / "a.png")
    with pytest.raises(Refused) as refused:
        read(tmp_path / "a.png")
    assert refused.value.reason == "unusable shape"


def test_what_can_not_be_cropped_is_noted_or_refused(tmp_path):
    """Also what is no DICOM file: nothing there says where the picture is."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(1, "PNG"))
    assert read(path).notes == ()
    assert read(path, crop=True).notes == ("not_cropped",)
    with pytest.raises(Refused) as caught:
        read(path, crop="require")
    assert caught.value.reason == "not cropped"
