"""Picture files of every kind and depth: right levels, or one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from echovlm_jax.errors import InputError
from echovlm_jax.processing import levels
from echovlm_jax.processing.images import load_media
from echovlm_jax.processing.levels import to_levels

RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (20, 1))  # each level, 257 apart
LEVELS = np.tile(np.arange(256, dtype=np.uint8), (20, 1))


def colours(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def read(path, **options):
    said = []
    return load_media(path, say=said.append, **options), said


def raw_png(depth, colour_type, rows, extra=b""):
    """A PNG made by hand of rows of bytes."""

    def chunk(kind, data):
        check = struct.pack(">L", zlib.crc32(kind + data))
        return struct.pack(">L", len(data)) + kind + data + check

    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    head = struct.pack(">LLBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def rows_of(values):
    return [row.astype(">u2").tobytes() for row in values.reshape(len(values), -1)]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000"])
@pytest.mark.parametrize(
    ("values", "range"),
    [(RAMP, "0 to 65535"), (RAMP >> 4, "0 to 4095"), (RAMP >> 6, "0 to 1023"), (RAMP >> 8, None)],
)
def test_16_bit_grey_keeps_its_levels_and_says_so(tmp_path, form, values, range):
    if form == "JPEG2000":
        if range != "0 to 65535":
            return
        Image.fromarray(values).save(tmp_path / "a", form, irreversible=False)
    else:
        Image.fromarray(values).save(tmp_path / "a", form)
    found, said = read(tmp_path / "a")
    np.testing.assert_array_equal(found, grey(LEVELS))
    told = f"{tmp_path / 'a'}: its values {range} are scaled to 0 to 255"
    assert said == ([told] if range else [])


def test_small_differences_at_a_high_level_are_seen(tmp_path):
    Image.fromarray(LEVELS.astype(np.uint16) * 4 + 30000).save(tmp_path / "a", "PNG")
    np.testing.assert_array_equal(read(tmp_path / "a")[0], grey(LEVELS))


@pytest.mark.parametrize("mode", ["I", "F", "I;16B", "float", "negative", "unsigned", "signed"])
def test_wider_modes_of_tiff(tmp_path, mode):
    values = {
        "I": RAMP.astype(np.int32) * 1000,
        "F": LEVELS.astype(np.float32) / 255,
        "I;16B": RAMP.astype(">u2"),
        "float": LEVELS.astype(np.float32),  # whole numbers of 8 bits
        "negative": RAMP.astype(np.int32) - 40000,
        "unsigned": RAMP.astype(np.uint32) << 16,
        "signed": (RAMP.astype(np.int32) - 32768).astype(np.int16),
    }[mode]
    types = {"unsigned": (1, 32), "signed": (2, 16)}
    path = tmp_path / "a"
    if mode in types:
        path.write_bytes(tiff(values, *types[mode]))
    else:
        Image.fromarray(values).save(path, "TIFF")
    found, said = read(path)
    np.testing.assert_array_equal(found, grey(LEVELS))
    assert len(said) == (mode != "float")


def tiff(values, sample_format, bits, photometric=1, planes=1):
    """A little-endian TIFF of one strip, made by hand."""
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    samples = values.shape[2] if values.ndim == 3 else 1
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8, 277: samples, 278: values.shape[0], 279: len(data), 284: planes}
    tags |= {339: sample_format}
    tail = b""
    if samples == 3:  # three shorts lie outside the entry
        tail = struct.pack("<3H", bits, bits, bits)
    entries = b"".join(
        struct.pack("<HHLL", tag, 3, 3, 8 + len(data))
        if samples == 3 and tag == 258
        else struct.pack("<HHLL", tag, 4, 1, value)
        for tag, value in tags.items()
    )
    start = struct.pack("<2sHL", b"II", 42, 8 + len(data) + len(tail))
    return start + data + tail + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_a_tiff_whose_lowest_value_is_white(tmp_path):
    (tmp_path / "a").write_bytes(tiff(RAMP, 1, 16, photometric=0))
    np.testing.assert_array_equal(read(tmp_path / "a")[0], grey(255 - LEVELS))


@pytest.mark.parametrize("top", [65535, 4095])
def test_colours_of_16_bits_are_not_their_high_byte(tmp_path, top):
    want = colours()
    want[0, 0], want[0, 1] = 0, 255
    wide = np.rint(want * (top / 255)).astype(np.uint16)
    path = tmp_path / "a"
    path.write_bytes(raw_png(16, 2, rows_of(wide)))
    np.testing.assert_array_equal(read(path)[0], want)
    path.write_bytes(tiff(wide, 1, 16, photometric=2))
    np.testing.assert_array_equal(read(path)[0], want)


def test_opacity_of_16_bits(tmp_path):
    path, full = tmp_path / "a", np.full((*RAMP.shape, 1), 65535, np.uint16)
    half = full // 2 + 1
    for opacity, want in ((full, LEVELS), (half, np.rint(255 - (255 - LEVELS) / 2))):
        path.write_bytes(raw_png(16, 4, rows_of(np.dstack([RAMP, opacity]))))
        np.testing.assert_allclose(read(path)[0], grey(want), atol=1)
        path.write_bytes(raw_png(16, 6, rows_of(np.dstack([RAMP, RAMP, RAMP, opacity]))))
        np.testing.assert_allclose(read(path)[0], grey(want), atol=1)


def test_a_colour_that_is_transparent_in_16_bits(tmp_path):
    kind = b"tRNS" + struct.pack(">H", 257)
    extra = struct.pack(">L", 2) + kind + struct.pack(">L", zlib.crc32(kind))
    (tmp_path / "a").write_bytes(raw_png(16, 0, rows_of(RAMP), extra))
    want = LEVELS.copy()
    want[:, 1] = 255
    np.testing.assert_array_equal(read(tmp_path / "a")[0], grey(want))


@pytest.mark.parametrize("form", ["planar", "pages", "NaN"])
def test_what_would_be_drawn_wrongly_is_refused(tmp_path, form):
    path, wide = tmp_path / "a", colours().astype(np.uint16) * 257
    if form == "planar":
        path.write_bytes(tiff(wide, 1, 16, photometric=2, planes=2))
    elif form == "pages":
        pages = [Image.fromarray(colours(*size)) for size in ((20, 30), (10, 15))]
        pages[0].save(path, "TIFF", save_all=True, append_images=pages[1:])
    else:
        Image.fromarray(np.full((20, 30), np.nan, np.float32)).save(path, "TIFF")
    words = {"planar": "16 bits", "pages": "differ in size", "NaN": "finite"}
    with pytest.raises(InputError, match=rf"^\S+a: [^\n]*{words[form]}[^\n]*$"):
        read(path)


def test_a_few_far_values_don_t_turn_a_picture_black():
    values = np.tile(np.arange(4096, dtype=np.uint16), (4, 1))
    values[0, 0] = 65535
    with pytest.raises(InputError, match="save it as 8 bits"):
        to_levels(values)
    assert to_levels(np.uint16([[0, 300]])).tolist() == [[0, 255]]  # two levels are two
    assert to_levels(np.uint16([[700, 700]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("form", ["BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "PNG"])
def test_kinds_are_told_by_content(tmp_path, form):
    picture = Image.fromarray(colours())
    if form == "GIF":
        picture = picture.quantize(64)
    picture.save(tmp_path / "a.jpg", form, **({"lossless": True} if form == "WEBP" else {}))
    found, said = read(tmp_path / "a.jpg")
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))
    assert not said
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"^\S+a\.jpg: [^\n]*damaged[^\n]*$"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_a_loop(tmp_path, form):
    frames = [Image.fromarray(np.full((20, 30, 3), 20 * n, np.uint8)) for n in range(9)]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:], **options)
    found, _ = read(tmp_path / "a", num_frames=3)
    assert found.shape == (3, 20, 30, 3)
    assert found[:, 0, 0, 0].tolist() == [0, 60, 120]
    assert len(read(tmp_path / "a", num_frames=16)[0]) == 9
    assert read(tmp_path / "a", num_frames=1)[0].shape == (20, 30, 3)


def test_pages_of_16_bits_share_one_range(tmp_path):
    pages = [Image.fromarray(RAMP), Image.fromarray(RAMP // 2)]
    pages[0].save(tmp_path / "a", "TIFF", save_all=True, append_images=pages[1:])
    found, said = read(tmp_path / "a")
    np.testing.assert_allclose(found, np.stack([grey(LEVELS), grey(LEVELS // 2)]), atol=1)
    assert len(said) == 1


def test_limits_hold_for_loops(tmp_path, monkeypatch):
    frames = [Image.fromarray(np.full((20, 30), n, np.uint8)) for n in range(9)]
    frames[0].save(tmp_path / "a", "GIF", save_all=True, append_images=frames[1:])
    for limit, least in (
        ("MAX_FRAME_PIXELS", 600),
        ("MAX_FRAMES", 9),
        ("MAX_LOOP_PIXELS", 5400),
        ("MAX_SAMPLED_PIXELS", 2400),
    ):
        monkeypatch.setattr(levels, limit, least)
        assert len(read(tmp_path / "a", num_frames=4)[0]) == 4
        monkeypatch.setattr(levels, limit, least - 1)
        with pytest.raises(InputError, match=r"is over the limit of|are over the limit of"):
            read(tmp_path / "a", num_frames=4)
        monkeypatch.undo()


def test_side_data_that_pillow_refuses_doesn_t_hide_the_picture(tmp_path):
    rgb, noise = colours(), np.random.default_rng(1).bytes(1_200_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "x" * 3_000_000, zip=True)
    for options in ({"icc_profile": noise}, {"pnginfo": text}):
        out = io.BytesIO()
        Image.fromarray(rgb).save(out, "PNG", **options)
        (tmp_path / "a").write_bytes(out.getvalue())
        np.testing.assert_array_equal(read(tmp_path / "a")[0], rgb)


def test_a_tiff_is_turned_as_it_says_and_transparency_is_white(tmp_path):
    rgb = colours()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "a", "TIFF", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a")[0], np.rot90(rgb, -1))
    clear = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    for form in ("TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        Image.fromarray(clear).save(tmp_path / "a", form, **options)
        assert (read(tmp_path / "a")[0] == 255).all()


def test_pil_images_go_by_the_same_rules():
    np.testing.assert_array_equal(load_media(Image.fromarray(RAMP)), grey(LEVELS))
    with pytest.raises(InputError, match=r"^the image: holds values[^\n]*$"):
        load_media(Image.fromarray(np.full((4, 4), np.inf, np.float32)))


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_phones_pictures_are_refused_by_name(tmp_path, brand):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(InputError, match=r"^\S+a\.heic: is HEIC or AVIF[^\n]*save it as PNG$"):
        read(tmp_path / "a.heic")
