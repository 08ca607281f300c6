// The variant for x86-64 CPUs with AVX-512-VNNI: the only functions compiled for it, all private to this file.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vnni")
#endif
#include "kernels.h"
#include "lanes_avx512.h"

namespace yuanmoe {
const Kernels kAvx512 = kernels<Avx512Lanes>();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
