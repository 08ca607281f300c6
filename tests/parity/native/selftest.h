// What the parts of the self-test share: the drawing of numbers, the variants under test, and how a failure is told.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "operations.h"

namespace selftest {

using namespace yuanmoe;

void check_single();
void check_attention();
void check_products();

inline std::mt19937 generator(7);

inline int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline float normal() { return std::normal_distribution<float>()(generator); }

#define REQUIRE(condition, ...)                                           \
    if (!(condition)) {                                                   \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);       \
        std::printf(__VA_ARGS__);                                         \
        std::exit(1);                                                     \
    }

inline float bfloat16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline std::vector<Call> calls() {
    std::vector<Call> out;
    for (const int threads : {1, 3}) {
        out.push_back({&kPortable, threads, Dtype::kFloat32});
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
            out.push_back({&kAvx2, threads, Dtype::kFloat32});
#endif
        out.push_back({&kAvx512, threads, Dtype::kFloat32});
    }
    return out;
}

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace selftest
