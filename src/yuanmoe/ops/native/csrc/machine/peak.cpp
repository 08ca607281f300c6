// The most 8-bit multiply-adds that a core can do: independent sums in registers, no memory.
#include "operations.h"

namespace yuanmoe {

#if defined(__x86_64__)
namespace {

#define YUANMOE_SUMS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define YUANMOE_REGISTERS                                                                                       \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm13"

// Two instructions for 32 products, as in lanes_avx2.h.
void avx2(int64_t rounds) {
#define YUANMOE_STEP(n) "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpaddw %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
    for (int64_t i = 0; i < rounds; ++i) __asm__ volatile(YUANMOE_SUMS(YUANMOE_STEP)::: YUANMOE_REGISTERS);
#undef YUANMOE_STEP
}

// One for 64.
void avx512(int64_t rounds) {
#define YUANMOE_STEP(n) "vpdpbusd %%zmm15, %%zmm14, %%zmm" #n "\n"
    for (int64_t i = 0; i < rounds; ++i) __asm__ volatile(YUANMOE_SUMS(YUANMOE_STEP)::: YUANMOE_REGISTERS);
#undef YUANMOE_STEP
}

}  // namespace

int64_t multiply_adds(const Call& call, int64_t rounds) {
    if (call.kernels != &kAvx2 && call.kernels != &kAvx512) return 0;
    const bool wide = call.kernels == &kAvx512;
    wide ? avx512(rounds) : avx2(rounds);
    return rounds * 12 * (wide ? 64 : 32);
}
#else
int64_t multiply_adds(const Call&, int64_t) { return 0; }
#endif

}  // namespace yuanmoe
