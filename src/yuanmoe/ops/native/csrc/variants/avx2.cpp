// The variant for x86-64 CPUs with AVX2: the only functions compiled for it, all private to this file.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"
#include "lanes_avx2.h"

namespace yuanmoe {
const Kernels kAvx2 = kernels<Avx2Lanes>();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
