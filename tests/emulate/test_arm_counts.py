"""Costs, kinds of instructions, and the plug-in that counts."""

import json
import subprocess

import pytest

from deploycc.emulate import counts, kernels
from deploycc.emulate.counts import Cost, Count
from deploycc.errors import StoreError

# What an assembler makes of each (GNU as, -march=armv8.6-a+sve2+i8mm+bf16+fp16), and its kind.
WORDS = {
    "4e829420 sdot v0.4s, v1.16b, v2.16b": "dot",
    "2e829420 udot v0.2s, v1.8b, v2.8b": "dot",
    "4e829c20 usdot v0.4s, v1.16b, v2.16b": "dot",
    "4fa2e820 sdot v0.4s, v1.16b, v2.4b[3]": "dot",
    "6fa2e020 udot v0.4s, v1.16b, v2.4b[1]": "dot",
    "4fa2f020 usdot v0.4s, v1.16b, v2.4b[1]": "dot",
    "4f22f020 sudot v0.4s, v1.16b, v2.4b[1]": "dot",
    "44820020 sdot z0.s, z1.b, z2.b": "dot",
    "44f20420 udot z0.d, z1.h, z2.h[1]": "dot",
    "44827820 usdot z0.s, z1.b, z2.b": "dot",
    "44b21c20 sudot z0.s, z1.b, z2.b[2]": "dot",
    "4e82a420 smmla v0.4s, v1.16b, v2.16b": "mmla",
    "4e82ac20 usmmla v0.4s, v1.16b, v2.16b": "mmla",
    "6e42ec20 bfmmla v0.4s, v1.8h, v2.8h": "mmla",
    "45c29820 ummla z0.s, z1.b, z2.b": "mmla",
    "0e22c020 smull v0.8h, v1.8b, v2.8b": "widening",
    "6e628020 umlal2 v0.4s, v1.8h, v2.8h": "widening",
    "4f722820 smlal2 v0.4s, v1.8h, v2.h[7]": "widening",
    "0f52a020 smull v0.4s, v1.4h, v2.h[1]": "widening",
    "4e22cc20 fmla v0.4s, v1.4s, v2.4s": "fma",
    "4fa21820 fmla v0.4s, v1.4s, v2.s[3]": "fma",
    "4e420c20 fmla v0.8h, v1.8h, v2.8h": "fma",
    "4f121820 fmla v0.8h, v1.8h, v2.h[5]": "fma",
    "4e606820 sadalp v0.4s, v1.8h": "vector",
    "0e22e020 pmull v0.8h, v1.8b, v2.8b": "vector",
    "4ea29c20 mul v0.4s, v1.4s, v2.4s": "vector",
    "6e42fc20 bfdot v0.4s, v1.8h, v2.8h": "vector",
    "1f020c20 fmadd s0, s1, s2, s3": "float",
    "1e380020 fcvtzs w0, s1": "float",
    "f9400020 ldr x0, [x1]": "memory",
    "f8200041 ldadd x0, x1, [x2]": "memory",
    "4c407020 ld1 {v0.16b}, [x1]": "vector_memory",
    "bd000020 str s0, [x1]": "vector_memory",
    "9b020c20 madd x0, x1, x2, x3": "integer",
    "91000420 add x0, x1, #1": "integer",
    "d65f03c0 ret": "branch",
    "d4000001 svc #0": "branch",
    "a400a000 ld1b {z0.b}, p0/z, [x0]": "sve",
    "65a20020 fmla z0.s, p0/m, z1.s, z2.s": "sve",
}


@pytest.mark.parametrize(("text", "kind"), WORDS.items())
def test_every_kind_is_known_by_its_encoding(text, kind):
    assert kernels.kind_of(int(text[:8], 16)) == kind


def test_the_median_call_counts_and_the_spread_is_told():
    cost = counts.cost([Count(110, {"dot": 3}), Count(100, {"dot": 1}), Count(104, {"dot": 2})])
    assert (cost.instructions, cost.calls, cost.kinds) == (104, 3, {"dot": 2})
    assert cost.spread == pytest.approx(10 / 104)
    assert counts.cost([Count(7, {}), Count(7, {})]).spread == 0
    assert counts.cost([Count(2_500_000, {})]).minsn == 2.5


def test_what_a_model_is_multiplied_with_is_the_best_that_matters():
    def used(**kinds):
        return kernels.executed(Cost(1000, 0.0, 1, kinds))

    assert used(dot=300, widening=50) == ("dot product (sdot, udot)",)
    assert used(mmla=300, dot=50, sve=90) == ("i8mm (smmla, ummla)", "SVE")
    assert used(widening=500, dot=9) == ("no dot product (smull, smlal)",)
    assert used(fma=500) == ("float (fmla)",)
    assert used() == ()


def test_translated_code_is_scanned_line_by_line(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "IN: conv\n0x0000005500802a30:  4e829420          sdot\n0x0000005500802a34:  d65f03c0          ret\n\n0x40: 4e829420 sdot\n----\n"
    )
    assert kernels.scan(log) == {"dot": 2, "branch": 1}
    assert kernels.seen(kernels.scan(log)) == ("dot product (sdot, udot)",)
    assert kernels.options(log) == ["-d", "in_asm", "-D", str(log)]


def test_lines_of_the_plug_in_are_read(tmp_path):
    path = tmp_path / "counts"
    path.write_text(json.dumps({"instructions": 5, "dot": 2}) + "\n")
    assert counts.read(path) == [Count(5, {"dot": 2})]


def test_a_comma_in_a_path_is_doubled_for_qemu(tmp_path):
    assert counts.options(tmp_path / "a,b.so", tmp_path / "c,d")[1] == f"{tmp_path}/a,,b.so,out={tmp_path}/c,,d"


def test_it_is_compiled_once(qemu, cache):
    library, reason = counts.plugin()
    assert (reason, library.parent) == ("", cache / "emulate")
    made = library.stat().st_mtime_ns
    assert counts.plugin()[0].stat().st_mtime_ns == made


def test_without_a_compiler_nothing_is_counted(qemu, monkeypatch):
    monkeypatch.setattr(counts, "COMPILERS", ("no-such-compiler",))
    assert counts.plugin() == (None, f"counting needs a C compiler ({counts.INSTALL})")


def test_a_compiler_that_fails(qemu):
    (qemu.folder / "cc").write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'count.c:3: no such header' >&2\nexit 1\n")
    assert counts.plugin() == (None, "the plug-in that counts does not compile: count.c:3: no such header")


def test_a_qemu_without_plug_ins(qemu):
    qemu.plan(plugin_error="qemu-aarch64: unknown option 'plugin'")
    library, reason = counts.plugin()
    assert library is None
    assert reason == "qemu 7.2.22 does not load the plug-in that counts: qemu-aarch64: unknown option 'plugin'"


def test_a_cache_that_is_full(qemu, monkeypatch):
    real = subprocess.run

    def full(command, **options):
        if "-shared" in command:
            raise OSError(28, "No space left on device")
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", full)
    with pytest.raises(StoreError, match="No space left"):
        counts.plugin()
