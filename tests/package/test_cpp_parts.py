"""The parts of the C++ runner that need no runtime, against Python's: same bytes, same numbers, and nothing crashes on damaged files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cpp_probe
import numpy as np
import PIL
import pytest
from PIL import Image

from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime.bundle import canonical
from deploycc.runtime.doubts import instability
from deploycc.runtime.machine import available_cores, cpu_arch, cpu_flags, cpu_model
from deploycc.runtime.statistics import Samples, summarize
from deploycc.runtime.transform import Transform

DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TRANSFORMS = {
    "imagenet": Transform(resize=256, crop=(224, 224), **IMAGENET),
    "bicubic": Transform(resize=255, crop=(224, 224), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.25, 0.3, 0.7)),
    "lanczos": Transform(resize=(97, 131), interpolation="lanczos", layout="NHWC"),
    "nearest": Transform(resize=(75, 203), interpolation="nearest", dtype="uint8"),
    "larger": Transform(resize=(411, 533), interpolation="bicubic", dtype="uint8", layout="NHWC"),
    "grey": Transform(resize=64, crop=(61, 64), color="L", mean=(0.2,), std=(0.9,)),
    "bgr": Transform(resize=(40, 30), color="BGR", scale=1.0, mean=(104.0, 117.0, 123.0), std=(57.1, 57.4, 58.4)),
    "padded": Transform(resize=50, crop=(81, 200), **IMAGENET),
    "as it is": Transform(dtype="uint8", background=7),
}
PILLOW_13 = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason=f"Pillow {PIL.__version__}: older than 13, it resizes in another order"
)


@pytest.fixture(scope="session")
def probe(request: pytest.FixtureRequest) -> Path:
    assert request.config.cache is not None
    return cpp_probe.build(request.config.cache) / "probe"


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    """Real photos, and pictures of odd shapes: grey, with alpha, one pixel."""
    spec = importlib.util.find_spec("foolbox")  # importing it imports what is deprecated
    if spec is None or spec.origin is None:
        pytest.skip("foolbox, which has the photos, is not installed")
    folder = Path(spec.origin).parent / "data"
    paths = sorted(folder.glob("imagenet_*"))[:4]
    rng = np.random.default_rng(0)
    made = {
        "grey": rng.integers(0, 256, (90, 61), np.uint8),
        "alpha": rng.integers(0, 256, (70, 83, 4), np.uint8),
        "pixel": rng.integers(0, 256, (1, 1, 3), np.uint8),
        "tall": rng.integers(0, 256, (201, 5, 3), np.uint8),
        "wide": rng.integers(0, 256, (3, 200, 3), np.uint8),
        "black and white": (rng.integers(0, 2, (131, 97, 3)) * 255).astype(np.uint8),
    }
    assert len(paths) == 4
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in paths} | made


@PILLOW_13
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pre_processing_gives_the_same_bytes(probe: Path, photos: dict[str, np.ndarray], tmp_path: Path, name: str):
    transform = TRANSFORMS[name]
    (tmp_path / "transform.json").write_text(json.dumps(transform.to_json()))
    np.savez(tmp_path / "in.npz", **photos)  # pyright: ignore[reportArgumentType]
    done = cpp_probe.run(probe, "transform", tmp_path / "transform.json", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    found = cpp_probe.arrays(tmp_path / "out.npz")
    assert found.keys() == photos.keys()
    for key, picture in photos.items():
        wanted = transform.apply(picture)
        assert (key, found[key].dtype, found[key].shape) == (key, wanted.dtype, wanted.shape)
        assert found[key].tobytes() == wanted.tobytes(), f"{key}: {np.abs(found[key].astype(float) - wanted).max()} away"


@PILLOW_13
def test_resizing_to_any_size_gives_the_same_bytes(probe: Path, tmp_path: Path):
    rng = np.random.default_rng(5)
    for interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
        for _ in range(12):
            transform = Transform(resize=(int(rng.integers(1, 90)), int(rng.integers(1, 90))), interpolation=interpolation, dtype="uint8")
            picture = rng.integers(0, 256, (int(rng.integers(1, 90)), int(rng.integers(1, 90)), 3), np.uint8)
            (tmp_path / "t.json").write_text(json.dumps(transform.to_json()))
            np.savez(tmp_path / "in.npz", p=picture)
            assert cpp_probe.run(probe, "transform", tmp_path / "t.json", tmp_path / "in.npz", tmp_path / "out.npz").returncode == 0
            assert cpp_probe.arrays(tmp_path / "out.npz")["p"].tobytes() == transform.apply(picture).tobytes(), transform


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resize": 0}, "resize is 0, but must be pixels"),
        ({"resize": [1, 2, 3]}, "resize is [1, 2, 3], but must be [height, width] in pixels"),
        ({"crop": 5}, "crop is 5"),
        ({"interpolation": "box"}, 'interpolation is "box", but must be one of nearest, bilinear, bicubic, lanczos'),
        ({"mean": [0, 0]}, "RGB has 3 channels, but mean has 2 values and std 3"),
        ({"std": [1, 0, 1]}, "std is [1, 0, 1], but must be other than 0"),
        ({"scale": "much"}, 'scale is "much", but must be a number'),
        ({"background": 300}, "background is 300"),
        ({"softmax": None}, "softmax is null, but must be true or false"),
        ({"classes": [1]}, "classes is [1], but must be a list of names"),
        ({"sharpen": 1}, "unknown key sharpen"),
    ],
)
def test_a_transform_of_the_wrong_kind_is_refused(probe: Path, tmp_path: Path, changed: dict[str, Any], message: str):
    (tmp_path / "t.json").write_text(json.dumps(Transform().to_json() | changed))
    np.savez(tmp_path / "in.npz", p=np.zeros((2, 2, 3), np.uint8))
    done = cpp_probe.run(probe, "transform", tmp_path / "t.json", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 1
    assert message in done.stderr


def test_post_processing_gives_the_same_ranking(probe: Path, tmp_path: Path):
    scores = np.random.default_rng(2).standard_normal(1000).astype(np.float32) * 5
    scores[17] = scores[900] = scores.max() + 1  # a tie: the lower index first
    transform = Transform(classes=tuple(f"class {index}" for index in range(950)))
    (tmp_path / "t.json").write_text(json.dumps(transform.to_json()))
    np.savez(tmp_path / "in.npz", s=scores)
    found = cpp_probe.answer(cpp_probe.run(probe, "ranking", tmp_path / "t.json", tmp_path / "in.npz", 7))
    wanted = transform.predict(scores, 7)
    assert [item["index"] for item in found] == [item["index"] for item in wanted]
    assert [item["name"] for item in found] == [item.get("name", "") for item in wanted]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in wanted], rel=1e-12)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_go_through_unchanged(probe: Path, tmp_path: Path, save: Callable[..., None]):
    rng = np.random.default_rng(1)
    given: dict[str, np.ndarray] = {name: (rng.standard_normal((3, 5)) * 100).astype(name) for name in DTYPES}
    given |= {
        "feeds/0/x": rng.standard_normal(1),
        "scalar": np.array(0.25),
        "empty": np.zeros((2, 0, 3), np.float32),
        "columns": np.asfortranarray(rng.standard_normal((2, 3, 4))),
        "zeros": np.zeros(300_000, np.int64),
        "text": np.frombuffer(json.dumps(TRANSFORMS["imagenet"].to_json()).encode() * 50, np.uint8),
        "special": np.array([np.nan, np.inf, -np.inf, -0.0], np.float16),
    }
    save(tmp_path / "in.npz", **given)
    done = cpp_probe.run(probe, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    found = cpp_probe.arrays(tmp_path / "out.npz")
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}], dtype=object), "Object arrays cannot be loaded when allow_pickle=False"),
        (np.zeros(2, ">f4"), "big-endian arrays are not read"),
        (np.array(["a"]), "the array's type '<U1' is not known"),
        (np.zeros(2, [("a", "f4")]), "arrays of records are not read"),
    ],
)
def test_arrays_of_other_kinds_are_refused(probe: Path, tmp_path: Path, array: np.ndarray, message: str):
    np.savez(tmp_path / "in.npz", array)
    done = cpp_probe.run(probe, "npz", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 1
    assert f"in.npz is not an .npz file of plain arrays: {message}" in done.stderr


def test_pictures_are_read(probe: Path, tmp_path: Path):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "a.pgm")
    np.save(tmp_path / "a.npy", pixels)
    (tmp_path / "b.ppm").write_bytes(b"P6 # a comment\n7\t9\n# another\n255\n" + pixels.tobytes())
    for name, wanted in (("a.ppm", pixels), ("b.ppm", pixels), ("a.npy", pixels), ("a.pgm", pixels[:, :, :1])):
        done = cpp_probe.run(probe, "picture", tmp_path / name, tmp_path / "out.npz")
        assert done.returncode == 0, done.stderr
        assert np.array_equal(cpp_probe.arrays(tmp_path / "out.npz")["pixels"], wanted), name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jpg", b"\xff\xd8", "pixels come as .ppm, .pgm or .npy"),
        ("x.ppm", b"P3 1 1 255 0 0 0", "it is neither binary .ppm (P6) nor .pgm (P5)"),
        ("x.ppm", b"P6 1 1 65535\n123456", "its pixels go to 65535, not to 255"),
        ("x.ppm", b"P6 2 2 255\n123", "its pixels end early"),
        ("x.ppm", b"P6 99999999 99999999 255\n", "its size is [99999999, 99999999]"),
        ("x.ppm", b"P6 0 5 255\n", "its size is [5, 0]"),
        ("x.pgm", b"P5", "its header is damaged"),
        ("x.npy", b"no array", "it has no .npy header"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(probe: Path, tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    done = cpp_probe.run(probe, "picture", tmp_path / name, tmp_path / "out.npz")
    assert done.returncode == 1
    assert message in done.stderr


def test_a_manifest_is_written_again_byte_for_byte(probe: Path, tmp_path: Path, make_contents: Callable[..., Contents]):
    folder = write(tmp_path / "out", make_contents()).folder
    documents = {
        "manifest": (folder / "manifest.json").read_text(),
        "odd": json.dumps(
            {"ü": '\t"\\/\u2028\x7f\x01', "b": [1e-7, 1e22, -0.5, 12345678901234567890, True, None, {}], "a": {"z": [], "Z": "𝄞"}}
        ),
        "escaped": '{"a": "\\u00e9\\ud834\\udd1e\\/\\b"}',
        "twice": '{"a": 1, "b": 2, "a": 3}',
    }
    for name, text in documents.items():
        (tmp_path / "d.json").write_text(text)
        done = cpp_probe.run(probe, "canonical", tmp_path / "d.json")
        assert done.returncode == 0, done.stderr
        digest, written = done.stdout.split("\n")[:2]
        assert digest == hashlib.sha256(canonical(json.loads(text))).hexdigest(), name
        assert json.loads(written) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a"}', "[1,]", '{"a": 01x}', "nul", '"\\ud834"', '"\\u12"', '"a\nb"', "1 2", "[" * 100_000, "-", "1.", "1e", '"\\q"'],
)
def test_what_is_no_json_is_refused(probe: Path, tmp_path: Path, text: str):
    (tmp_path / "d.json").write_text(text)
    done = cpp_probe.run(probe, "canonical", tmp_path / "d.json")
    assert done.returncode == 1
    assert done.stderr.startswith("malformed: ")


@pytest.mark.parametrize("content", [b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf5\x80\x80\x80"', b'"\xe2\x82"'])
def test_what_is_no_utf8_is_refused(probe: Path, tmp_path: Path, content: bytes):
    (tmp_path / "d.json").write_bytes(content)
    assert "the text is not UTF-8" in cpp_probe.run(probe, "canonical", tmp_path / "d.json").stderr


def steady(seed: int) -> Samples:
    return Samples((1e6 * np.random.default_rng(seed).lognormal(0, 0.02, 40 * 8)).astype(np.int64), 8, 3)


def restless(seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    times = 1e6 * rng.lognormal(0, 0.05, 20 * 4) * np.repeat(rng.lognormal(0, 0.2, 20), 4)
    times[-30:] *= 2
    return Samples(times.astype(np.int64), 4, 3)


def two_speeds(seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples((1e6 * rng.lognormal(0, 0.01, 600) * np.where(rng.random(600) < 0.3, 1.3, 1)).astype(np.int64), 6, 3)


def interrupted(seed: int) -> Samples:
    times = 1e6 * np.random.default_rng(seed).lognormal(0, 0.01, 1200)
    times[::40] *= 3
    return Samples(times.astype(np.int64), 6, 3)


SERIES = (
    steady(1),
    steady(2),
    restless(3),
    two_speeds(4),
    interrupted(5),
    *(Samples(np.array(ns), 2, 1) for ns in ([5, 7, 6, 9], [5, 7, 6, 9, 8, 8])),
    replace(steady(6), openings=(0, 9, 20, 31)),
    replace(two_speeds(7), openings=(0, 1)),
)


@pytest.mark.parametrize("samples", SERIES)
def test_statistics_are_the_host_s(probe: Path, tmp_path: Path, samples: Samples):
    np.savez(tmp_path / "s.npz", ns=samples.ns, per_round=np.array(samples.per_round), openings=np.array(samples.openings))
    found = cpp_probe.answer(cpp_probe.run(probe, "statistics", tmp_path / "s.npz"))
    wanted = summarize(samples)
    assert found.pop("warnings") == list(instability(samples, wanted))
    assert list(found) == list(asdict(wanted))
    for name, value in asdict(wanted).items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name


def test_the_samples_are_of_every_kind():
    said = " ".join(text for item in SERIES for text in instability(item, summarize(item)))
    for words in ("standard deviation", "only known to", "heat, or other work", "is not shown", "times the median", "two speeds", "µs"):
        assert words in said
    assert not instability(steady(1), summarize(steady(1)))


def test_the_clock_goes_on_until_the_interval_is_narrow_or_the_time_is_over(probe: Path):
    def clock(*, sessions: int = 2, max_width: float = 0, max_seconds: float = 0, min_seconds: float = 0.1) -> dict[str, float]:
        return cpp_probe.answer(cpp_probe.run(probe, "clock", min_seconds, 20, sessions, max_width, max_seconds))

    plain = clock()
    assert plain["sessions"] == 2
    assert plain["width"] > 0.05  # two sessions of unlike speed tell little
    narrow = clock(max_width=0.06, max_seconds=20)
    assert narrow["sessions"] > 2  # more were opened
    assert narrow["width"] <= 0.06
    never = clock(max_width=1e-9, max_seconds=0.5)
    assert never["runs"] > plain["runs"]
    assert clock(min_seconds=60, max_seconds=0.2)["runs"] < 400
    assert clock(sessions=1)["sessions"] == 1


def test_the_machine_is_seen_as_python_sees_it(probe: Path):
    found = cpp_probe.answer(cpp_probe.run(probe, "machine"))
    assert found["arch"] == cpu_arch()
    assert found["model"] == cpu_model()
    assert found["cores"] == available_cores()
    if cpu_arch() == "x86_64":
        assert set(found["flags"]) == cpu_flags()
    else:
        assert set(found["flags"]) <= cpu_flags()


def test_damaged_archives_are_refused_and_nothing_crashes(probe: Path, tmp_path: Path):
    rng = random.Random(0)
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(200, dtype=np.float32).reshape(2, 100), y=np.array(1.5))
    archive = zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("x.npy", "w", force_zip64=True) as file:  # as write_golden does, with zip64 fields
        np.lib.format.write_array(file, np.random.default_rng(0).standard_normal((4, 9)))
    refused = 0
    for name in ("a.npz", "b.npz"):
        content = (tmp_path / name).read_bytes()
        for _ in range(150):
            (tmp_path / "d.npz").write_bytes(cpp_probe.damaged(content, rng))
            refused += cpp_probe.run(probe, "npz", tmp_path / "d.npz", tmp_path / "out.npz").returncode
    assert refused > 200  # a changed date or unused field is no damage


def test_damaged_manifests_are_refused_and_nothing_crashes(probe: Path, tmp_path: Path, make_contents: Callable[..., Contents]):
    rng = random.Random(1)
    folder = write(tmp_path / "out", make_contents()).folder
    content = (folder / "manifest.json").read_bytes()
    assert cpp_probe.run(probe, "manifest", folder).returncode == 0
    for _ in range(150):
        changed = cpp_probe.damaged(content, rng)
        (folder / "manifest.json").write_bytes(changed)
        done = cpp_probe.run(probe, "manifest", folder)
        assert done.returncode == 1 or changed == content or json.loads(changed) == json.loads(content)


def test_damaged_pictures_are_refused_or_read_and_nothing_crashes(probe: Path, tmp_path: Path):
    rng = random.Random(2)
    pixels = np.zeros((5, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.ppm", "a.npy"):
        content = (tmp_path / name).read_bytes()
        for _ in range(60):
            (tmp_path / f"d{name}").write_bytes(cpp_probe.damaged(content, rng))
            cpp_probe.run(probe, "picture", tmp_path / f"d{name}", tmp_path / "out.npz")
