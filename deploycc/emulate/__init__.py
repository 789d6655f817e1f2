"""ARM without an ARM machine: the arm64 code of the real runtimes under qemu's user emulation, on any Cortex or Neoverse model it knows.

Answers are the device's own; time is not: nothing here is ever a latency. No chroot, no container, no binfmt_misc, no root account.
"""
