"""Compiles one program with AOTInductor, in a process of its own: `python _inductor_worker.py FOLDER`.

A process of its own, because oneDNN fixes what it takes this CPU for (ONEDNN_MAX_CPU_ISA) when it is first used, and packs weights for
it; and because the compiler must not look at what this CPU has beyond the target's. Imports torch and the standard library alone.

FOLDER holds program.pt2 and request.json: `flags` (CPU flags that may be used), `level` (-march=), `compiler`. It gets compiled.pt2.
Nothing of the folder's name nor of PyTorch's stays in it, since both are mapped away in debug text and messages (-ffile-prefix-map).
"""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

PROGRAM, REQUEST, COMPILED = "program.pt2", "request.json", "compiled.pt2"
# How inductor asks what the CPU has, and the flag that says so.
ASKED = {
    "_is_avx512_supported": "avx512f",
    "_is_vnni_supported": "avx512_vnni",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx_tile",
    "_is_amx_fp16_supported": "amx_fp16",
}
OPTIONS = {
    "freezing": True,  # weights become constants: folded, packed, fused (mobilenet_v2: 7.8 instead of 10.4 ms)
    "max_autotune": False,  # picks by the clock: other code every time, for 3 % at most
    "deterministic": True,
    "size_asserts": False,  # run only when debugging, and quote addresses of this process
    "cpp.dynamic_threads": True,  # else the number of threads of this process is compiled in
    "aot_inductor.model_name_for_generated_files": "model",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.precompile_headers": False,  # which are kept outside of the folder
}
# oneDNN's description of packed weights as PyTorch 2.13 writes it, and its bytes between two fields, which hold what was on the stack.
DESCRIPTION_BYTES, GAPS = 772, ((108, 112), (316, 320), (420, 424))
SCRIPT = """#!/bin/sh
exec "{compiler}" "$@" -march={level} -ffile-prefix-map="{folder}"=. -ffile-prefix-map="{torch}"=torch -Wl,--build-id=none
"""


def hide(flags: list[str]) -> None:
    """Make inductor blind to what this CPU has beyond `flags`."""
    import torch

    for question, flag in ASKED.items():
        getattr(torch.cpu, question)  # an AttributeError here: this PyTorch asks in another way
        if flag not in flags:
            setattr(torch.cpu, question, lambda: False)


def add_compiler(folder: Path, compiler: str, level: str) -> None:
    """Put first on the path a g++ that adds the target's level behind inductor's own options, and keeps paths out."""
    import torch

    script = folder / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(compiler=compiler, level=level, folder=folder, torch=Path(torch.__file__).parent))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = os.pathsep.join([str(script.parent), os.environ.get("PATH", os.defpath)])


def tidy_descriptions() -> None:
    """Let descriptions of packed weights be the same every time: zeros between their fields."""
    import torch

    operator: Any = torch.ops.mkldnn._get_mkldnn_serialized_md
    describe = operator._op

    def tidy(weights: torch.Tensor) -> torch.Tensor:
        found = describe(weights)
        for start, end in GAPS if found.numel() == DESCRIPTION_BYTES else ():
            found[start:end] = 0
        return found

    operator._op = tidy


def main(folder: Path) -> None:
    """Read, compile, write."""
    request = json.loads((folder / REQUEST).read_text())
    hide(request["flags"])
    tidy_descriptions()
    add_compiler(folder, request["compiler"], request["level"])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    import torch
    import torch._inductor
    from torch._inductor import config

    config.cpp.cxx = ("g++",)  # type: ignore[assignment]  # a tuple of another length is declared
    known = config.get_config_copy()
    program = torch.export.load(folder / PROGRAM)
    options = {name: value for name, value in OPTIONS.items() if name in known}
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED), inductor_configs=options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
