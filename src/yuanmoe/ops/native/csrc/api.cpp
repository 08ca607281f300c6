// The C interface that ops/native/library.py declares with ctypes: keep the two in step.
#include <atomic>
#include <new>

#include "operations.h"
#include "threads.h"

using namespace yuanmoe;

namespace {

enum Variant : int32_t { kVariantPortable = 0, kVariantAvx2 = 1, kVariantAvx512 = 2 };
enum Status : int32_t { kDone = 0, kBadIndex = 1, kNoMemory = 2 };

const Kernels* kernels_of(int32_t variant) {
#if defined(__x86_64__)
    if (variant == kVariantAvx512) return &kAvx512;
    if (variant == kVariantAvx2) return &kAvx2;
#endif
    return &kPortable;
}

template <class Operation>
int32_t guarded(const Operation& operation) {
    try {
        return operation() ? kDone : kBadIndex;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

#define YUANMOE_API __attribute__((visibility("default")))

extern "C" {

struct YuanmoeCall {
    int32_t variant, threads, dtype;
};

// Whether this CPU runs a variant.
YUANMOE_API int32_t yuanmoe_supports(int32_t variant) {
    if (variant == kVariantPortable) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (variant == kVariantAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (variant == kVariantAvx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return 0;
}

YUANMOE_API void yuanmoe_use_openmp(void* parallel) { use_openmp(reinterpret_cast<OpenmpParallel>(parallel)); }

YUANMOE_API int32_t yuanmoe_linear(YuanmoeCall call, const Quantized* weight, const void* x, int64_t tokens, void* out) {
    const Call inner{kernels_of(call.variant), call.threads, static_cast<Dtype>(call.dtype)};
    return guarded([&] { return linear(inner, *weight, x, tokens, out), true; });
}

YUANMOE_API int32_t yuanmoe_linear_bf16(YuanmoeCall call, const Bfloat16* weight, const void* x, int64_t tokens, void* out) {
    const Call inner{kernels_of(call.variant), call.threads, static_cast<Dtype>(call.dtype)};
    return guarded([&] { return linear(inner, *weight, x, tokens, out), true; });
}

YUANMOE_API int32_t yuanmoe_mixture(YuanmoeCall call, const Quantized* gate_up, const Quantized* down, const Routing* routing,
                        const void* x, void* out) {
    const Call inner{kernels_of(call.variant), call.threads, static_cast<Dtype>(call.dtype)};
    return guarded([&] { return mixture(inner, *gate_up, *down, *routing, x, out); });
}

YUANMOE_API int32_t yuanmoe_mixture_bf16(YuanmoeCall call, const Bfloat16* gate_up, const Bfloat16* down, const Routing* routing,
                             const void* x, void* out) {
    const Call inner{kernels_of(call.variant), call.threads, static_cast<Dtype>(call.dtype)};
    return guarded([&] { return mixture(inner, *gate_up, *down, *routing, x, out); });
}

YUANMOE_API int32_t yuanmoe_attention(YuanmoeCall call, const KeyValues* cache, const int64_t* past,
                                      const int64_t* counts, int64_t sequences, const void* q, void* out) {
    const Call inner{kernels_of(call.variant), call.threads, static_cast<Dtype>(call.dtype)};
    return guarded([&] { return attention(inner, *cache, past, counts, sequences, q, out); });
}

// Reads `count` bytes with all threads; the sum keeps the reading from being optimized away.
YUANMOE_API uint64_t yuanmoe_read(YuanmoeCall call, const uint8_t* bytes, int64_t count) {
    const Cut parts = Cut::of(count, 1 << 20);
    std::atomic<uint64_t> sum{0};
    const auto part = [&](int64_t i) { sum ^= kernels_of(call.variant)->read(bytes + parts.begin(i), parts.size(i)); };
    run(call.threads, {phase(parts.parts, part)});
    return sum;
}

}  // extern "C"
