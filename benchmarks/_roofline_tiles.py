"""What this CPU's int8 dot products alone make, in registers and without memory: the ceiling that no matrix product reaches.

A C program, compiled here with g++: TDPBUSD over tiles (AMX), else VPDPBUSD over 512-bit registers (VNNI). One thread.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from deploycc.runtime.machine import cpu_flags

AMX = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
int main(void) {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;  /* ARCH_REQ_XCOMP_PERM, tile data */
  struct { uint8_t palette, start, pad[14]; uint16_t bytes[16]; uint8_t rows[16]; } c;
  memset(&c, 0, sizeof c); c.palette = 1;
  for (int i = 0; i < 8; i++) { c.bytes[i] = 64; c.rows[i] = 16; }
  _tile_loadconfig(&c);
  static uint8_t d[1024]; memset(d, 1, sizeof d);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_loadd(4, d, 64); _tile_loadd(5, d, 64); _tile_loadd(6, d, 64); _tile_loadd(7, d, 64);
  double best = 1e9; const int n = 4000;
  for (int r = 0; r < 400; r++) {
    double s = now();
    for (int i = 0; i < n; i++) {
      _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7); _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
    }
    double t = now() - s; if (t < best) best = t;
  }
  _tile_release();
  printf("%.6g\n", 4.0 * n * 16 * 16 * 64 / best);
  return 0;
}
"""
VNNI = r"""
#include <immintrin.h>
#include <stdio.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
int main(void) {
  __m512i a[12], x = _mm512_set1_epi8(1), y = _mm512_set1_epi8(2);
  for (int i = 0; i < 12; i++) a[i] = _mm512_setzero_si512();
  double best = 1e9; const int n = 20000;
  for (int r = 0; r < 400; r++) {
    double s = now();
    for (int i = 0; i < n; i++) {
      for (int k = 0; k < 12; k++) a[k] = _mm512_dpbusd_epi32(a[k], x, y);
      __asm__ volatile("" : "+v"(a[0]), "+v"(x));
    }
    double t = now() - s; if (t < best) best = t;
  }
  int sum = 0; for (int i = 0; i < 12; i++) sum += _mm512_reduce_add_epi32(a[i]);
  printf("%.6g %d\n", 12.0 * n * 64 / best, sum);
  return 0;
}
"""
WAYS = (
    ("AMX, TDPBUSD", {"amx_int8"}, AMX, ["-mamx-tile", "-mamx-int8"]),
    ("AVX-512 VNNI, VPDPBUSD", {"avx512_vnni"}, VNNI, ["-mavx512f", "-mavx512vnni"]),
)


def instructions() -> dict[str, float | str]:
    """MACs per second by instruction, or why there are none."""
    compiler = shutil.which("g++")
    if compiler is None:
        return {"not measured": "there is no g++"}
    found: dict[str, float | str] = {}
    for name, flags, source, options in WAYS:
        if flags <= cpu_flags():
            found[name] = _run(compiler, source, options)
    return found or {"not measured": "this CPU has neither AMX nor AVX-512 VNNI"}


def _run(compiler: str, source: str, options: list[str]) -> float | str:
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder) / "tiles.cpp", Path(folder) / "tiles"
        code.write_text(source)
        built = subprocess.run([compiler, "-O3", *options, str(code), "-o", str(program)], capture_output=True, text=True, check=False)
        if built.returncode:
            return f"not measured: {re.sub(r'^.*?error: ', '', built.stderr.splitlines()[0])}"
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[0]) if done.returncode == 0 else f"not measured: exit status {done.returncode}"


if __name__ == "__main__":
    print(instructions())
