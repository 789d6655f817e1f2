"""How many architectures `prune-channels` prunes, of torchvision's and timm's families, with random weights and no data.

    python benchmarks/prune_coverage.py [--only NAME …] [--again NAME …] [--rows-of JSON …]
                                        [--seconds N] [--jobs N]

Each model in a process of its own: 30 % of every group's channels go, then the result is run, trained for one step, exported to ONNX and
rebuilt from its JSON edits. A row is written when it is there; the next run goes on behind it. Needs timm.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _shared import DASH, about, results_folder, say, table, write

from deploycc.bench.environment import capture

NAME = "prune_coverage"
RATIO = 0.3
ASKED = 1 - (1 - RATIO) ** 2  # of the MACs: inputs and outputs of a layer both go
BAR = 0.9
LIMIT_SECONDS = 240  # of processor time, which another load on the machine does not stretch
HANGS_SECONDS = 3600
SMALL = 96  # pixels, where a model takes any size
TORCHVISION = (
    *("resnet18", "mobilenet_v3_small", "googlenet", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf"),
    *("convnext_tiny", "swin_s@224", "swin_t@224", "mobilenet_v2", "efficientnet_b0", "densenet121", "resnext50_32x4d", "convnext_small"),
    *("inception_v3@299", "efficientnet_v2_s", "swin_v2_t@224", "maxvit_t@224", "resnet50", "resnet34", "mobilenet_v3_large"),
    *("regnet_x_400mf", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_0", "efficientnet_b2", "efficientnet_b1"),
)
TIMM = (
    *("resnet10t", "convnext_atto", "mobilenetv4_conv_small", "vit_tiny_patch16_224@224", "levit_128s@224", "ghostnet_100", "resnest14d"),
    *("gmlp_ti16_224@224", "mixer_s32_224@224", "regnetx_002", "repvgg_a0", "dla34", "deit_tiny_patch16_224@224", "edgenext_xx_small@256"),
    *("poolformer_s12", "efficientformer_l1@224", "efficientvit_b0", "fbnetv3_b", "tinynet_e", "rexnet_100", "hardcorenas_a", "skresnet18"),
    *("res2net50_14w_8s", "selecsls42b", "nf_resnet26", "dm_nfnet_f0", "pit_ti_224@224", "visformer_tiny@224", "mobilevit_xxs@256"),
    *(
        "xcit_nano_12_p16_224@224",
        "crossvit_tiny_240@240",
        "coat_tiny@224",
        "cait_xxs24_224@224",
        "tnt_s_patch16_224@224",
        "twins_pcpvt_small@224",
    ),
    *("swin_tiny_patch4_window7_224@224", "repghostnet_050", "cspresnet50", "cspdarknet53", "ese_vovnet19b_dw", "hrnet_w18_small"),
    *("xception41", "nextvit_small@224", "maxvit_rmlp_pico_rw_256@256"),
)
MODELS = tuple(
    f"{source}:{name}" for pair in zip(TORCHVISION, TIMM, strict=False) for source, name in zip(("torchvision", "timm"), pair, strict=True)
)
MODELS += tuple(f"timm:{name}" for name in TIMM[len(TORCHVISION) :])


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one model.

    Attributes:
        name: "source:model@pixels".
        share: of the MACs that is gone; None when nothing was pruned.
        form: "resize" or "graph".
        reason: what failed first; empty when everything went through.
        done: the checks that went through, of forward, backward, onnx, reload.
        unknown: operators that froze channels, when little went.
        seconds: of processor time, for the whole; 0 when it was not measured on the page's machine.
    """

    name: str
    share: float | None = None
    form: str = ""
    reason: str = ""
    done: tuple[str, ...] = ()
    unknown: str = ""
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """All four checks went through."""
        return self.share is not None and not self.reason


def one(text: str) -> Row:
    """Prune and check a model in this process."""
    import torch

    from deploycc.core import target
    from deploycc.core.artifact import Artifact, Form
    from deploycc.core.contract import Context
    from deploycc.core.data import Data
    from deploycc.forms._edits import apply_edits
    from deploycc.forms.module import capture_signature
    from deploycc.passes.export_onnx import ExportOnnx
    from deploycc.passes.prune_channels import PruneChannels
    from deploycc.runtime.signature import TensorSpec

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, pixels = load(text)
    if sum(p.numel() for p in module.parameters()) > 60e6 and text.startswith("torchvision"):
        return Row(text, reason="over 60 M parameters")
    row = Row(text)
    step = "prune"
    try:
        made = Artifact(
            Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", (1, 3, pixels, pixels)),)), "net", edits=()
        )
        context = Context(target.load("x86-onnxruntime"), made, Data(None), 0, Path())
        after = PruneChannels(ratio=RATIO, multiple=1)(made, context)
        macs = (after.details or {})["macs"]
        unknown = "; ".join(note for note in after.notes if "understood" in note or "put back" in note)
        row = replace(row, share=1 - macs[0] / macs[1], form=str((after.edits or ({},))[-1].get("kind")), unknown=unknown[:300])
        x = torch.randn(1, 3, pixels, pixels)
        small: Any = after.model
        step = "forward"
        with torch.no_grad():
            expected = small(x)
        row = replace(row, done=("forward",))
        step = "reload"
        rebuilt: Any = apply_edits(copy.deepcopy(module), json.loads(json.dumps(after.edits)))
        rebuilt.load_state_dict(small.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(rebuilt.eval()(x), expected)
        row = replace(row, done=(*row.done, "reload"))
        step = "onnx"
        ExportOnnx()(after, context)
        row = replace(row, done=(*row.done, "onnx"))
        step = "backward"
        small.train()
        out = small(torch.randn(2, 3, pixels, pixels))
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
        return replace(row, done=(*row.done, "backward"))
    except Exception as error:  # noqa: BLE001  (the reason is the result)
        return replace(row, reason=f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def load(text: str) -> tuple[Any, int]:
    """The model with random weights, and its input size."""
    source, _, rest = text.partition(":")
    name, _, pixels = rest.partition("@")
    if source == "timm":
        import timm

        return timm.create_model(name, pretrained=False).eval(), int(pixels or SMALL)
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options).eval(), int(pixels or SMALL)


def apart(text: str) -> Row:
    """`one` in a process of its own."""
    try:
        command = [sys.executable, __file__, "--one", text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        return Row(text, reason=f"no end after {HANGS_SECONDS} s")
    if done.returncode == -signal.SIGXCPU:
        return Row(text, reason=f"over {LIMIT_SECONDS} s of processor time", seconds=LIMIT_SECONDS)
    lines = done.stdout.strip().splitlines()
    return Row(**json.loads(lines[-1])) if done.returncode == 0 and lines else Row(text, reason=done.stderr.strip()[-300:])


def limited(text: str) -> Row:
    """`one` with a limit on processor time, and the time it took."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 10))
    row = one(text)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return replace(row, seconds=round(used.ru_utime + used.ru_stime, 1))


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    share = DASH if row.share is None else f"{row.share:.1%}"
    return (
        row.name,
        share,
        row.form or DASH,
        ", ".join(row.done) or DASH,
        row.reason or row.unknown or DASH,
        f"{row.seconds:.0f}" if row.seconds else DASH,
    )


def markdown(rows: list[Row], machine: str) -> str:
    """The whole page."""
    count = {bar: sum(row.works and (row.share or 0) >= bar for row in rows) for bar in (ASKED / 2, RATIO / 2)}
    head = ("model@pixels", "MACs gone", "form", "went through", "what failed, or was left whole", "processor s")
    lines = [
        f"- {number} of {len(rows)} ({number / max(len(rows), 1):.0%}) lost at least {bar:.1%} of their MACs and passed all four checks"
        for bar, number in count.items()
    ]
    return f"""# Architectures that prune-channels prunes

`prune-channels{{ratio={RATIO}}}`, random weights, multiple=1. {len(rows)} of the {len(MODELS)} models of the list were run.
{RATIO:.0%} of the channels asks for {ASKED:.0%} of the MACs; the bar is {BAR:.0%} of the models.

{chr(10).join(lines)}

Checks: a forward, the model rebuilt from its JSON edits gives the same, our ONNX export, one backward step in train mode. Models that take
any size were run at {SMALL} pixels. A row without a time is kept from an earlier run, on another machine or of another commit.
Written by `python benchmarks/{NAME}.py`.

{machine}

{table(head, map(cells, rows))}
"""


def read(path: Path) -> dict[str, Row]:
    """The rows of an earlier run, by name."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["name"]: Row(**{**row, "done": tuple(row["done"])}) for row in rows}


def main() -> int:
    """Run what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(MODELS), help="run no others")
    parser.add_argument("--again", nargs="+", metavar="NAME", default=[], help="run these even though they have a row")
    parser.add_argument("--rows-of", nargs="+", type=Path, metavar="JSON", default=[], help="keep what other runs found, untimed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no model after this time")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(limited(options.one))))
        return 0
    folder, environment, start = results_folder(), capture(threads=1), time.monotonic()
    path = folder / f"{NAME}.json"
    rows = {name: replace(row, seconds=0.0) for source in options.rows_of for name, row in read(source).items()}
    rows |= read(path) if path.is_file() else {}
    wanted = [text for text in MODELS if text in options.only and (text not in rows or text in options.again)]

    def run(text: str) -> Row | None:
        return apart(text) if time.monotonic() - start <= options.seconds else None

    def keep() -> None:
        ordered = [rows[name] for name in MODELS if name in rows]
        document = {"ratio": RATIO, "environment": environment.model_dump(), "rows": list(map(asdict, ordered))}
        write(folder, NAME, document, markdown(ordered, about(environment)))

    keep()
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(run, text) for text in wanted]):
            row = future.result()
            if row is not None:
                rows[row.name] = row
                say(" | ".join(cells(row)))
                keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
