"""NIfTI and MetaImage: the numbers as they are stored, or one line."""

import builtins
import gzip
import struct
import zlib

import numpy as np
import pytest

from echovlm_jax.errors import InputError
from echovlm_jax.processing import levels
from echovlm_jax.processing.files import ExtraMissing, locate
from echovlm_jax.processing.images import load_media
from echovlm_jax.processing.volumes import data_file

LOOP = np.random.default_rng(0).integers(0, 256, (5, 12, 20), np.uint8)  # frames, rows, columns
LOOP[0, 0, :2] = 0, 255


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def meta(values, kind="MET_UCHAR", name="LOCAL", channels=1, **keys):
    """A MetaImage's header for [T, H, W] or [H, W], and its data."""
    shape = values.shape[: values.ndim - (channels > 1)]
    header = {"ObjectType": "Image", "NDims": len(shape)}
    header |= {"DimSize": " ".join(map(str, shape[::-1])), "ElementType": kind}
    header |= {"ElementNumberOfChannels": channels} if channels > 1 else {}
    header |= {**keys, "ElementDataFile": name}
    return "".join(f"{key} = {value}\n" for key, value in header.items()).encode()


def nifti(values, folder, name="a.nii.gz", **options):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(values, np.eye(4))
    if options:
        image.header.set_slope_inter(*options["scaling"])
    nibabel.save(image, folder / name)
    return folder / name


def test_a_loop_in_metaimage(tmp_path):
    path = tmp_path / "a.mha"
    path.write_bytes(meta(LOOP) + LOOP.tobytes())
    np.testing.assert_array_equal(load_media(path), grey(LOOP))
    np.testing.assert_array_equal(load_media(path, num_frames=2), grey(LOOP[[0, 2]]))
    path.write_bytes(meta(LOOP, CompressedData="True") + zlib.compress(LOOP.tobytes()))
    np.testing.assert_array_equal(load_media(path), grey(LOOP))
    path.write_bytes(meta(LOOP[0]) + LOOP[0].tobytes())
    np.testing.assert_array_equal(load_media(path), grey(LOOP[0]))  # a picture
    colour = np.stack([LOOP, LOOP[::-1], 255 - LOOP], -1)
    path.write_bytes(meta(colour, channels=3) + colour.tobytes())
    np.testing.assert_array_equal(load_media(path), colour)


@pytest.mark.parametrize("order", ["<", ">"])
def test_wider_values_of_metaimage(tmp_path, order):
    wide = (LOOP.astype(np.int16) * 16 - 1000).astype(f"{order}i2")
    flag = {"BinaryDataByteOrderMSB": order == ">"}
    (tmp_path / "a.mhd").write_bytes(meta(wide, "MET_SHORT", "a.raw", **flag))
    (tmp_path / "a.raw").write_bytes(wide.tobytes())
    said = []
    np.testing.assert_array_equal(load_media(tmp_path / "a.mhd", say=said.append), grey(LOOP))
    assert said == [f"{tmp_path / 'a.mhd'}: its values -1000 to 3080 are scaled to 0 to 255"]


def test_a_metaimage_s_data_don_t_leave_the_folder(tmp_path):
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    (root / "deep").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_bytes(LOOP.tobytes())
    (root / "link.raw").symlink_to(blobs / "x")
    header = root / "a.mhd"
    for name in ("../blobs/x", str(blobs / "x"), "link.raw", "..\\blobs\\x", "none.raw", "deep"):
        header.write_bytes(meta(LOOP, name=name))
        for path in (header, locate("a.mhd", root)):
            with pytest.raises(InputError, match=r"^\S+a\.mhd: its ElementDataFile [^\n]+$"):
                load_media(path)
    header.write_bytes(meta(LOOP, name="link.raw"))
    assert data_file(locate("a.mhd", root, blobs)) == blobs.resolve() / "x"
    found = load_media(locate("a.mhd", root, blobs))
    np.testing.assert_array_equal(found, grey(LOOP))
    # In a cache of downloads the header is a link as well; its data are beside the link.
    header.rename(blobs / "y")
    header.symlink_to(blobs / "y")
    np.testing.assert_array_equal(load_media(locate("a.mhd", root, blobs)), grey(LOOP))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"DimSize": "20 12"}, "disagree"),
        ({"DimSize": "20 12 0"}, "no picture"),
        ({"DimSize": "20 -12 5"}, "whole number"),
        ({"DimSize": "20 12 6"}, "truncated"),
        ({"DimSize": "20 12 4"}, "more values"),
        ({"DimSize": "20000 20000 5"}, "limit"),
        ({"NDims": 4, "DimSize": "20 2 6 5"}, "volumes in time"),
        ({"ElementType": "MET_STRING"}, "ElementType"),
        ({"ElementDataFile": "LIST"}, "files of their own"),
        ({"BinaryData": "False"}, "as text"),
        ({"CompressedData": "True"}, "damaged"),
        ({"HeaderSize": "17"}, "HeaderSize"),
    ],
)
def test_bad_metaimages_are_one_line(tmp_path, change, word):
    lines = dict(line.split(" = ") for line in meta(LOOP).decode().splitlines())
    end = lines.pop("ElementDataFile")
    lines |= {"ElementDataFile": end, **{k: str(v) for k, v in change.items()}}
    lines["ElementDataFile"] = lines.pop("ElementDataFile")  # always the last
    header = "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()
    (tmp_path / "a.mha").write_bytes(header + LOOP.tobytes())
    with pytest.raises(InputError, match=rf"^\S+a\.mha: [^\n]*{word}[^\n]*$"):
        load_media(tmp_path / "a.mha")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_a_loop_in_nifti_is_columns_rows_frames(tmp_path, name):
    path = nifti(LOOP.T.copy(), tmp_path, name)
    np.testing.assert_array_equal(load_media(path), grey(LOOP))
    np.testing.assert_array_equal(load_media(path, num_frames=2), grey(LOOP[[0, 2]]))
    path = nifti(LOOP.T[:, :, None], tmp_path, name)  # one slice, five moments
    np.testing.assert_array_equal(load_media(path), grey(LOOP))
    path = nifti(LOOP[0].T.copy(), tmp_path, name)
    np.testing.assert_array_equal(load_media(path), grey(LOOP[0]))


def test_wider_values_of_nifti(tmp_path):
    wide = (LOOP.astype(np.int16) * 16 - 1000).T.copy()
    np.testing.assert_array_equal(load_media(nifti(wide, tmp_path)), grey(LOOP))
    np.testing.assert_array_equal(load_media(nifti(wide / 4080, tmp_path)), grey(LOOP))
    np.testing.assert_array_equal(load_media(nifti(LOOP.T / 1.0, tmp_path)), grey(LOOP))
    # A stored slope and intercept make 0 to 255 of what is stored.
    path = nifti(wide, tmp_path, "a.nii")
    data = bytearray(path.read_bytes())
    data[112:120] = struct.pack("<ff", -1 / 16, 192.5)
    path.write_bytes(data)
    np.testing.assert_array_equal(load_media(path), grey(255 - LOOP))


def test_bad_nifti_are_one_line(tmp_path, monkeypatch):
    path = nifti(LOOP.T.copy(), tmp_path, "a.nii")
    good = path.read_bytes()
    for data, word in {
        good[:-1]: "truncated",
        good + b"\0": "more values",
        good[:200]: "none of",
        gzip.compress(good)[:-9]: "damaged",
        gzip.compress(b"\0" * 500): "no NIfTI",
        good[:344] + b"ni1\0" + good[348:]: "pair",
        good[:70] + b"\x20\0" + good[72:]: "complex64",
        good[:42] + struct.pack("<3h", 32000, 32000, 5) + good[48:]: "limit",
        good[:40] + struct.pack("<5h", 4, 20, 2, 6, 5) + good[50:]: "volumes in time",
        good[:40] + struct.pack("<5h", 3, 20, 0, 6, 5) + good[50:]: "no picture",
        good[:108] + struct.pack("<f", 1e30) + good[112:]: "damaged",
    }.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"^\S+a\.nii: [^\n]*{word}[^\n]*$"):
            load_media(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(good)
        for at in rng.integers(0, 360, 3):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        try:
            assert load_media(path).dtype == np.uint8
        except InputError as error:
            assert "\n" not in str(error)
    path.write_bytes(good)
    monkeypatch.setattr(levels, "MAX_LOOP_PIXELS", LOOP.size - 1)
    with pytest.raises(InputError, match="limit"):
        load_media(path)


def test_without_nibabel_it_names_the_extra(tmp_path, monkeypatch):
    path = nifti(LOOP.T.copy(), tmp_path)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("nibabel"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExtraMissing, match=r"^\S+a\.nii\.gz: [^\n]*'echovlm-jax\[nifti\]'[^\n]*$"):
        load_media(path)
