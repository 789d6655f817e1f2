// Kinds of instructions by their encoding: bits under a mask, and what they are. The first that fits decides. kernels.py reads this file too.
// Source: Arm Architecture Reference Manual for A-profile (DDI 0487), C4 and, for SVE, C4.1.
RULE(0x9FE0FC00, 0x0E809400, DOT)         // SDOT, UDOT (vector)
RULE(0xBFE0FC00, 0x0E809C00, DOT)         // USDOT (vector)
RULE(0x9FC0F400, 0x0F80E000, DOT)         // SDOT, UDOT (by element)
RULE(0xBF40F400, 0x0F00F000, DOT)         // USDOT, SUDOT (by element)
RULE(0xFFA0F800, 0x44800000, DOT)         // SVE SDOT, UDOT (vectors)
RULE(0xFFA0F800, 0x44A00000, DOT)         // SVE SDOT, UDOT (indexed)
RULE(0xFFE0FC00, 0x44807800, DOT)         // SVE USDOT (vectors)
RULE(0xFFE0F800, 0x44A01800, DOT)         // SVE USDOT, SUDOT (indexed)
RULE(0xDFE0FC00, 0x4E80A400, MMLA)        // SMMLA, UMMLA
RULE(0xFFE0FC00, 0x4E80AC00, MMLA)        // USMMLA
RULE(0xFFE0FC00, 0x6E40EC00, MMLA)        // BFMMLA
RULE(0xFF20FC00, 0x45009800, MMLA)        // SVE SMMLA, USMMLA, UMMLA
RULE(0x9F20FC00, 0x0E20C000, WIDENING)    // SMULL, UMULL (vector)
RULE(0x9F20FC00, 0x0E208000, WIDENING)    // SMLAL, UMLAL (vector)
RULE(0x9F00F400, 0x0F00A000, WIDENING)    // SMULL, UMULL (by element)
RULE(0x9F00F400, 0x0F002000, WIDENING)    // SMLAL, UMLAL (by element)
RULE(0xBFA0FC00, 0x0E20CC00, FMA)         // FMLA (vector)
RULE(0xBF80F400, 0x0F801000, FMA)         // FMLA (by element)
RULE(0xBFE0FC00, 0x0E400C00, FMA)         // FMLA of half precision (vector)
RULE(0xBFC0F400, 0x0F001000, FMA)         // FMLA of half precision (by element)
RULE(0x1E000000, 0x04000000, SVE)         // op0 = 0010
RULE(0x1C000000, 0x10000000, INTEGER)     // op0 = 100x, immediate
RULE(0x1C000000, 0x14000000, BRANCH)      // op0 = 101x, and system instructions
RULE(0x0E000000, 0x0A000000, INTEGER)     // op0 = x101, register
RULE(0x0E000000, 0x0C000000, VECTOR_MEMORY)// op0 = x110
RULE(0x0A000000, 0x08000000, MEMORY)      // op0 = x100
RULE(0x5F000000, 0x1E000000, FLOAT)       // op0 = x111, scalar
RULE(0x5F000000, 0x1F000000, FLOAT)
RULE(0x0E000000, 0x0E000000, VECTOR)      // op0 = x111
