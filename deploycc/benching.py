"""`deploycc bench`: bundles, .onnx, .pt2 and models as candidates of one interleaved run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploycc.bench import fresh
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.bench.scenario import Scenario
from deploycc.bench.stages import Pictures
from deploycc.core.artifact import Artifact, Feeds, Form
from deploycc.core.contract import Progress, silent
from deploycc.core.data import Data
from deploycc.core.registry import FORMS
from deploycc.core.target import Bench
from deploycc.errors import UsageError
from deploycc.planning import open_dataset
from deploycc.runtime import bundle as bundles
from deploycc.runtime import host, sessions
from deploycc.runtime.inputs import interpret, read_input
from deploycc.runtime.signature import Signature
from deploycc.tools import Shapes, is_bundle, load_model

FEEDS = 8  # inputs that a candidate takes turns over
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})
MOST_PICTURES = 64
FRESH_MODEL = "deploycc.fresh_model"  # opens what is no bundle and no file of a runtime


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured and how.

    Attributes:
        models: bundles, .onnx, .pt2 or models; the first is the baseline.
        data: real inputs; random ones where there is none.
        inputs: shapes of inputs, by name.
        weights: file of weights.
        random_weights: accept random ones.
        settings: threads, and when to stop.
        scenario: how queries come.
        by_loadgen: MLPerf's LoadGen issues and times them.
        fresh_starts: processes started anew per candidate, for cold starts and memory.
        pictures: a picture or a folder of them: stages are timed, which only bundles with a transform have.
        seed: of every random choice.
    """

    models: Sequence[str]
    data: str | None = None
    inputs: Shapes = field(default_factory=dict[str, tuple[int | str, ...]])
    weights: Path | None = None
    random_weights: bool = False
    settings: Bench = field(default_factory=Bench)
    scenario: Scenario = field(default_factory=Scenario)
    by_loadgen: bool = False
    fresh_starts: int = 0
    pictures: Path | None = None
    seed: int = 0


def bench_all(request: Request, progress: Progress = silent) -> BenchResult:
    """Measure. Raises what the harness, the sources and the runtimes raise; UsageError for what does not go together."""
    if len(set(request.models)) != len(request.models):
        raise UsageError("a model is named twice", fix="name each once; a model against itself says how noisy the machine is, not more")
    samples = Data(open_dataset(request.data), seed=request.seed) if request.data else None
    with tempfile.TemporaryDirectory(prefix="deploycc-") as work:
        candidates = [_candidate(text, request, samples, Path(work) / str(index)) for index, text in enumerate(request.models)]
        return measure(
            candidates,
            settings=request.settings,
            baseline=request.models[0],
            scenario=request.scenario,
            seed=request.seed,
            progress=progress,
            by_loadgen=request.by_loadgen,
            fresh_starts=request.fresh_starts,
        )


def _candidate(text: str, request: Request, samples: Data | None, work: Path) -> Candidate:
    threads = request.settings.threads
    if is_bundle(text):
        loaded = bundles.load(Path(text))
        host.check_host(loaded.manifest)
        return Candidate(
            text,
            lambda: bundles.open_session(loaded, threads),
            bundle_feeds(loaded, request.seed),
            fresh=fresh.of_bundle(Path(text), threads),
            pictures=_pictures(text, loaded, request.pictures) if request.pictures else None,
        )
    if request.pictures:
        raise UsageError(f"'{text}' has no transform, so there are no stages to time", fix="give bundles only, or leave --pictures out")
    artifact = load_model(text, request.inputs, request.weights, request.random_weights, request.seed)
    feeds = _feeds(artifact, samples, request.seed)
    if artifact.form is not Form.ONNX:
        form = FORMS.get(artifact.form.value)
        return Candidate(text, lambda: form.open(artifact, threads=threads), feeds, fresh=_fresh_model(text, request))
    path = saved(artifact, work)
    return Candidate(
        text,
        lambda: sessions.find("onnxruntime").open(path, artifact.signature, {}, threads),
        feeds,
        fresh=fresh.of_file("onnxruntime", path, artifact.signature, threads),
    )


def saved(artifact: Artifact, work: Path) -> Path:
    """An ONNX model as a file: it opens in the runtime that ships it, fully optimized."""
    work.mkdir()
    FORMS.get(Form.ONNX.value).save(artifact, work)
    return next(path for path in sorted(work.iterdir()) if path.suffix == ".onnx")


def _fresh_model(text: str, request: Request) -> fresh.Fresh:
    """A torch model, captured and run eagerly by a process of its own."""
    asked = {
        "model": text,
        "inputs": {name: list(shape) for name, shape in request.inputs.items()},
        "weights": None if request.weights is None else str(request.weights),
        "random_weights": request.random_weights,
        "seed": request.seed,
        "threads": request.settings.threads,
    }
    return fresh.Fresh((json.dumps(asked),), FRESH_MODEL)


def _feeds(artifact: Artifact, samples: Data | None, seed: int) -> Sequence[Feeds]:
    from deploycc.forms.module import example_feeds

    real = samples.probe(artifact, FEEDS) if samples else []
    return real or single(example_feeds(artifact.signature, seed=seed), artifact.signature)


def bundle_feeds(loaded: bundles.LoadedBundle, seed: int) -> Sequence[Feeds]:
    """Its golden inputs, or random ones."""
    from deploycc.forms.module import example_feeds

    if loaded.file("golden") is None:
        return single(example_feeds(loaded.signature, seed=seed), loaded.signature)
    return bundles.read_golden(loaded).feeds


def single(feeds: Feeds, signature: Signature) -> list[Feeds]:
    """Made-up feeds with one sample where the batch axis is free: what candidates of a free and of a fixed one have in common."""
    free = all(spec.shape and isinstance(spec.shape[0], str) for spec in signature.inputs)
    return [{name: array[:1] for name, array in feeds.items()}] if free else [feeds]


def _pictures(text: str, loaded: bundles.LoadedBundle, path: Path) -> Pictures:
    """Real pictures through the bundle's own transform. Raises UsageError."""
    if loaded.transform is None:
        raise UsageError(f"bundle '{text}' does not take pictures: it has no transform", fix="leave it or --pictures out")
    found = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.suffix.lower() in PICTURES)
    if not found:
        raise UsageError(f"there are no pictures in {path}", fix=f"give a folder of {', '.join(sorted(PICTURES))} files, or one of them")
    return Pictures(
        found[:MOST_PICTURES],
        prepare=lambda file: read_input(loaded, file),
        finish=lambda outputs: interpret(loaded, outputs, 5),
    )
