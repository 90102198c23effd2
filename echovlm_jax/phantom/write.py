"""Phantom exams as files: the official JSON beside PNG images and DICOM loops."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from echovlm_jax.data.disk import writing
from echovlm_jax.data.keys import mix, text_key
from echovlm_jax.data.record import ORGANS
from echovlm_jax.data.sections import join_report
from echovlm_jax.data.workers import Workers
from echovlm_jax.errors import InputError
from echovlm_jax.phantom.dataset import organ_of
from echovlm_jax.phantom.exam import HEARTBEAT, MOST_VIEWS, Exam, make_exam
from echovlm_jax.phantom.render import HEADER, RULER, render
from echovlm_jax.phantom.reports import reports
from echovlm_jax.processing.files import shown
from echovlm_jax.progress import progress

NOTE = "SYNTHETIC: simulated ultrasound of nobody"
_ASKED = {"zh": "请根据图像写出超声报告。", "en": "Write the ultrasound report of these images."}


def write_exams(
    out: str | Path,
    exams: int,
    seed: int,
    *,
    balanced: bool | Sequence[str] = False,
    cine: float = 0.25,
    views: int = MOST_VIEWS,
    language: str | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes exams as users' own come: OUT/phantom.json and OUT/images/.

    Args:
      out: a folder to make; it may be there if it is empty.
      exams: number of exams.
      seed: another seed makes other exams, and none of a `PhantomDataset`.
      balanced, cine: those of `PhantomDataset`; or organs, of which alone there are exams, as many
        of each.
      views: maximum number of images an exam.
      language: "zh" or "en"; None: each exam has texts in both.
      workers: processes that draw them; the files are the same.

    Returns:
      out, exams, images, loops and organs (exams of each).

    Raises:
      InputError: there is something in the folder, or a number is out of its range.
    """
    out = Path(out)
    for name, number in {"exams": exams, "views": views, "workers": workers}.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, found {number}")
    if language not in (None, *_ASKED):
        raise InputError(f"language must be one of {', '.join(_ASKED)}, found {language!r}")
    base = int(mix(text_key("phantom/files"), seed))
    organs = _organs(base, exams, balanced)
    try:
        (out / "images").mkdir(parents=True)
        if len(list(out.iterdir())) > 1:
            (out / "images").rmdir()
            raise FileExistsError
    except FileExistsError:
        raise InputError(f"{shown(out)}: is not empty; name a new folder") from None
    except OSError as error:
        raise InputError(f"{shown(out)}: can't be made ({error.strerror})") from None
    counts = {"images": 0, "loops": 0}
    entries, planned = [], 0
    jobs = []
    for i, organ in enumerate(organs):
        exam = make_exam(int(mix(base, 1, i)), ORGANS[organ], cine=cine, views=views)
        jobs.append((f"phantom-{seed}-{i:06d}", exam))
        files = _files(*jobs[-1])
        counts["loops"] += sum(file.endswith(".dcm") for file in files)
        counts["images"] += sum(file.endswith(".png") for file in files)
        entries.append(_entry(jobs[-1][0], exam, files, language))
        planned += len(files)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_all_or_nothing(out))
        tick = stack.enter_context(progress(exams, "exam", "phantom"))
        write = partial(_write_views, out, planned)
        if workers > 1:
            pool = Workers(write, workers, {}, lambda job, _: job[0])
            stack.callback(pool.close)
            threads = stack.enter_context(ThreadPoolExecutor(workers))
            for _ in threads.map(pool, jobs):
                tick(1)
        else:
            for job in jobs:
                write(job)
                tick(1)
        # Last, so that a folder with it is whole.
        text = "[\n" + ",\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n]\n"
        data, source = text.encode(), out / "phantom.json"
        with writing(source, lambda: len(data)), _whole_file(source) as file:
            file.write(data)
    found = np.bincount(organs, minlength=len(ORGANS)).tolist()
    return {
        "out": str(out),
        "exams": exams,
        **counts,
        "organs": dict(zip(ORGANS, found, strict=True)),
        "synthetic": True,
    }


def _organs(base: int, exams: int, balanced: bool | Sequence[str]) -> np.ndarray:
    """The organ of each exam: indices into ORGANS."""
    if isinstance(balanced, bool):
        return organ_of(base, np.arange(exams), balanced)
    if unknown := sorted(set(balanced) - set(ORGANS)) or not balanced:
        raise InputError(f"balanced: choose among {', '.join(ORGANS)}, found {unknown or 'none'}")
    chosen = np.array([ORGANS.index(name) for name in balanced], np.int16)
    return chosen[np.arange(exams) % len(chosen)]


def _entry(name: str, exam: Exam, files: list[str], language: str | None) -> dict[str, Any]:
    """One exam in the official form, its reports beside the conversation."""
    written = [each for each in reports(exam) if language in (None, each.language)]
    told = written[exam.key % len(written)]
    answer = join_report(told.findings, told.impression, told.language)
    return {
        "id": name,
        "image": files,
        "conversations": [
            {"from": "human", "value": "<image>" * len(files) + _ASKED[told.language]},
            {"from": "gpt", "value": answer},
        ],
        "organ": exam.organ,
        "patient_id": name,
        "synthetic": True,
        "reports": [dataclasses.asdict(report) for report in written],
    }


def _files(name: str, exam: Exam) -> list[str]:
    """An exam's images, as paths relative to the folder."""
    kinds = ("dcm" if view.frames else "png" for view in exam.views)
    return [f"images/{name}-{n}.{kind}" for n, kind in enumerate(kinds)]


def _write_views(out: Path, planned: int, job: tuple[str, Exam], *_: Any) -> None:
    """Draws an exam's images; also what a worker process does. `planned`: images of all exams."""
    exam = job[1]
    for view, file in zip(exam.views, _files(*job), strict=True):
        pixels = render(exam, view)[..., 0]  # grey
        data = _dicom(pixels, view.key) if view.frames else _png(pixels)
        path = out / file
        with writing(path, partial(_left, path.parent, planned)), _whole_file(path) as stream:
            stream.write(data)


def _png(pixels: np.ndarray) -> bytes:
    note, buffer = PngInfo(), io.BytesIO()
    note.add_text("Comment", NOTE)
    Image.fromarray(pixels).save(buffer, "png", pnginfo=note, compress_level=4)
    return buffer.getvalue()


def _dicom(frames: np.ndarray, key: int) -> bytes:
    """A grey loop [T, H, W] as an Ultrasound Multi-frame Image (PS3.3 A.7), of nobody."""
    uids = [UID(f"2.25.{(int(mix(key, 80, n)) << 64) + int(mix(key, 81, n))}") for n in range(3)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = uids[0]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = UltrasoundMultiFrameImageStorage, uids[0]
    image.StudyInstanceUID, image.SeriesInstanceUID = uids[1], uids[2]
    image.Modality, image.ImageType = "US", ["DERIVED", "SECONDARY"]
    image.SeriesDescription = image.ImageComments = NOTE
    # Asked for by the standard, and empty: there is no patient, physician or date.
    for keyword in (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
        "StudyID", "SeriesNumber", "InstanceNumber", "AccessionNumber", "ReferringPhysicianName",
        "Manufacturer",
    ):  # fmt: skip
        setattr(image, keyword, "" if keyword not in ("SeriesNumber", "InstanceNumber") else None)
    image.NumberOfFrames, image.Rows, image.Columns = frames.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    image.SequenceOfUltrasoundRegions = [_region(*frames.shape[1:])]
    image.FrameTime = f"{HEARTBEAT / len(frames):.6g}"
    image.FrameIncrementPointer = Tag("FrameTime")
    image.LossyImageCompression = "00"
    data = frames.tobytes()
    image.PixelData = data + b"\0" * (len(data) % 2)
    buffer = io.BytesIO()
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()


def _region(height: int, width: int) -> Dataset:
    """Where in a frame the tissue is (PS3.3 C.8.5.5): inside of the label and the ruler."""
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0  # 2-D, tissue
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, HEADER
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = width - RULER - 1, height - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 0  # none is stated
    region.PhysicalDeltaX = region.PhysicalDeltaY = 1.0
    return region


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Any]:
    """A file that has its name once it is all there."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            if path.suffix == ".json":  # one that stands for all the others
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[None]:
    """Leaves nothing of ours in a folder whose exams could not all be written."""
    try:
        yield
    except BaseException:
        (out / "phantom.json").unlink(missing_ok=True)
        shutil.rmtree(out / "images", ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()
        raise


def _left(images: Path, planned: int) -> int:
    """About how many bytes are still to be written, as large as the images so far."""
    sizes = [path.stat().st_size for path in images.iterdir() if path.suffix != ".part"]
    return (planned - len(sizes)) * (sum(sizes) // max(1, len(sizes)))
