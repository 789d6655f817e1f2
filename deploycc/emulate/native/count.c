// Counts the instructions that an arm64 program executes between two marks, by kind. A plug-in of qemu-aarch64: -plugin count.so,out=FILE
//
// The program marks with a system call that Linux does not have: syscall(4242, 0) begins, syscall(4242, 1) ends and writes a line of JSON.
// Each translated block adds one to its own counter when it runs; what is in a block is known from its translation.
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin_api.h"

enum { MARK = 4242, BEGIN = 0, END = 1 };

enum kind { INTEGER, MEMORY, BRANCH, FLOAT, FMA, DOT, MMLA, WIDENING, VECTOR, VECTOR_MEMORY, SVE, KINDS };
static const char *const names[KINDS] = {"integer", "memory", "branch", "float", "fma",          "dot",
                                         "mmla",    "widening", "vector", "vector_memory", "sve"};

struct rule {
  uint32_t mask, value;
  enum kind kind;
};

#define RULE(mask, value, kind) {mask, value, kind},
static const struct rule rules[] = {
#include "rules.h"
};

struct block {
  uint64_t runs, before;  // in all, and at the last mark
  uint64_t size;
  uint16_t of[KINDS];
  struct block *next;
};

static struct block *blocks;
static FILE *out;

static enum kind kind_of(uint32_t word) {
  for (size_t i = 0; i < sizeof rules / sizeof *rules; ++i) {
    if ((word & rules[i].mask) == rules[i].value) return rules[i].kind;
  }
  return INTEGER;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *translation) {
  (void)id;
  struct block *block = calloc(1, sizeof *block);
  if (!block) abort();
  block->size = qemu_plugin_tb_n_insns(translation);
  for (size_t i = 0; i < block->size; ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(translation, i)), sizeof word);
    ++block->of[kind_of(word)];
  }
  block->next = __atomic_load_n(&blocks, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(&blocks, &block->next, block, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
  qemu_plugin_register_vcpu_tb_exec_inline(translation, QEMU_PLUGIN_INLINE_ADD_U64, &block->runs, 1);
}

static void report(void) {
  uint64_t total = 0, of[KINDS] = {0};
  for (const struct block *block = blocks; block; block = block->next) {
    const uint64_t runs = block->runs - block->before;
    total += runs * block->size;
    for (int kind = 0; kind < KINDS; ++kind) of[kind] += runs * block->of[kind];
  }
  fprintf(out, "{\"instructions\": %" PRIu64, total);
  for (int kind = 0; kind < KINDS; ++kind) fprintf(out, ", \"%s\": %" PRIu64, names[kind], of[kind]);
  fprintf(out, "}\n");
  fflush(out);
}

static void called(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t tag, uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5,
                   uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != MARK) return;
  if (tag == END) report();
  for (struct block *block = blocks; block; block = block->next) block->before = block->runs;
}

EXPORTED int qemu_plugin_version = 1;

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int count, char **arguments) {
  (void)info;
  for (int i = 0; i < count; ++i) {
    if (!strncmp(arguments[i], "out=", 4)) out = fopen(arguments[i] + 4, "w");
  }
  if (!out) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
