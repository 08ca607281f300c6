// The C interface that ops/native/library.py declares with ctypes: keep the two in step.
#include <atomic>
#include <new>

#include "layers.h"
#include "machine/threads.h"

using namespace yuanmoe;

namespace {

enum Variant : int32_t { kVariantPortable = 0, kVariantAvx2 = 1, kVariantAvx512 = 2 };
enum Status : int32_t { kDone = 0, kBadIndex = 1, kNoMemory = 2 };

const Kernels* kernels_of([[maybe_unused]] int32_t variant) {
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

    Call inner() const { return {kernels_of(variant), threads, static_cast<Dtype>(dtype)}; }
};

// Whether this CPU runs a variant.
YUANMOE_API int32_t yuanmoe_supports(int32_t variant) {
    if (variant == kVariantPortable) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (variant == kVariantAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (variant == kVariantAvx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return 0;
}

YUANMOE_API int32_t yuanmoe_linear(YuanmoeCall call, const Quantized* weight, const void* x, int64_t tokens, void* out) {
    return guarded([&] { return linear(call.inner(), *weight, x, tokens, out), true; });
}

YUANMOE_API int32_t yuanmoe_linear_whole(YuanmoeCall call, const Whole* weight, const void* x, int64_t tokens, void* out) {
    return guarded([&] { return linear(call.inner(), *weight, x, tokens, out), true; });
}

YUANMOE_API int32_t yuanmoe_mixture(YuanmoeCall call, const Quantized* gate_up, const Quantized* down, const Routing* routing,
                        const void* x, void* out) {
    return guarded([&] { return mixture(call.inner(), *gate_up, *down, *routing, x, out); });
}

YUANMOE_API int32_t yuanmoe_mixture_whole(YuanmoeCall call, const Whole* gate_up, const Whole* down, const Routing* routing,
                             const void* x, void* out) {
    return guarded([&] { return mixture(call.inner(), *gate_up, *down, *routing, x, out); });
}

YUANMOE_API int32_t yuanmoe_attention(YuanmoeCall call, const KeyValues* cache, const int64_t* past,
                                      const int64_t* counts, int64_t sequences, const void* q, void* out) {
    return guarded([&] { return attention(call.inner(), *cache, past, counts, sequences, q, out); });
}

YUANMOE_API int32_t yuanmoe_store(YuanmoeCall call, const Slots* to, const int64_t* pages, const int64_t* slots,
                                  int64_t tokens, const void* x) {
    return guarded([&] { return store(call.inner(), *to, pages, slots, tokens, x); });
}

YUANMOE_API int32_t yuanmoe_rms_norm(YuanmoeCall call, const void* x, const void* weight, int64_t tokens, int64_t width,
                                     float epsilon, void* out) {
    return guarded([&] { return rms_norm(call.inner(), x, weight, tokens, width, epsilon, out), true; });
}

YUANMOE_API int32_t yuanmoe_rotate(YuanmoeCall call, const Heads* shape, const void* x, const float* cosines,
                                   const float* sines, void* out) {
    return guarded([&] { return rotate(call.inner(), *shape, x, cosines, sines, out), true; });
}

YUANMOE_API int32_t yuanmoe_relate(YuanmoeCall call, const void* x, int64_t tokens, int64_t experts, float* out) {
    return guarded([&] { return relate(call.inner(), x, tokens, experts, out), true; });
}

YUANMOE_API int32_t yuanmoe_choose(YuanmoeCall call, const float* logits, int64_t tokens, int64_t experts,
                                   int64_t chosen, float* weights, int64_t* ids) {
    return guarded([&] { return choose(call.inner(), logits, tokens, experts, chosen, weights, ids), true; });
}

YUANMOE_API int32_t yuanmoe_swiglu(YuanmoeCall call, const void* x, int64_t tokens, int64_t width, void* out) {
    return guarded([&] { return swiglu(call.inner(), x, tokens, width, out), true; });
}

YUANMOE_API int32_t yuanmoe_layers(YuanmoeCall call, const LayerWeights* weights, const LayerState* states,
                                   const Routed* routed, int64_t layers, const Pass* pass, void* x) {
    return guarded([&] { return run_layers(call.inner(), weights, states, routed, layers, *pass, x); });
}

// multiply_adds on all threads.
YUANMOE_API int64_t yuanmoe_multiply_adds(YuanmoeCall call, int64_t rounds) {
    std::atomic<int64_t> total{0};
    const auto share = [&](int64_t) { total += multiply_adds(call.inner(), rounds); };
    run(call.threads, {phase(call.threads, share)});
    return total;
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
