// The AVX-512 instructions that lanes_avx512.h uses, one lane at a time, after Intel's intrinsics guide: on a CPU
// without them the same kernel source is compiled against this file instead of the compiler's header.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __m128i {
    uint8_t bytes[16];
};
struct __m256i {
    uint8_t bytes[32];
};
struct __m512i {
    uint8_t bytes[64];
};
struct __m512 {
    float at[16];
};

namespace emulated {

template <class Lane, class Vector>
Lane get(const Vector& v, int i) {
    Lane lane;
    std::memcpy(&lane, v.bytes + i * sizeof lane, sizeof lane);
    return lane;
}
template <class Lane, class Function>
__m512i make(Function lane) {
    __m512i out;
    for (int i = 0; i < static_cast<int>(64 / sizeof(Lane)); ++i) {
        const Lane value = static_cast<Lane>(lane(i));
        std::memcpy(out.bytes + i * sizeof value, &value, sizeof value);
    }
    return out;
}
template <class Function>
__m512 floats(Function lane) {
    __m512 out;
    for (int i = 0; i < 16; ++i) out.at[i] = lane(i);
    return out;
}
inline float half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

}  // namespace emulated

inline __m256i _mm256_loadu_si256(const __m256i* p) {
    __m256i out;
    std::memcpy(&out, static_cast<const void*>(p), 32);
    return out;
}
inline __m512i _mm512_loadu_si512(const void* p) {
    __m512i out;
    std::memcpy(&out, p, 64);
    return out;
}
inline __m128i _mm_loadu_si128(const __m128i* p) {
    __m128i out;
    std::memcpy(&out, static_cast<const void*>(p), 16);
    return out;
}
inline __m512 _mm512_loadu_ps(const void* p) {
    __m512 out;
    std::memcpy(&out, p, 64);
    return out;
}
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, 64); }
inline __m512i _mm512_setzero_si512() {
    return emulated::make<int32_t>([](int) { return 0; });
}
inline __m512i _mm512_set1_epi32(int32_t a) {
    return emulated::make<int32_t>([=](int) { return a; });
}
inline __m512i _mm512_set1_epi8(char a) {
    return emulated::make<int8_t>([=](int) { return a; });
}
inline __m512 _mm512_set1_ps(float a) {
    return emulated::floats([=](int) { return a; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return emulated::make<uint8_t>([&](int i) { return a.bytes[i] & b.bytes[i]; });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    return emulated::make<uint8_t>([&](int i) { return a.bytes[i] ^ b.bytes[i]; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
    return emulated::make<uint16_t>([&](int i) { return emulated::get<uint16_t>(a, i) >> count; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
    return emulated::make<uint32_t>([&](int i) { return emulated::get<uint32_t>(a, i) << count; });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return emulated::make<uint32_t>([&](int i) { return emulated::get<uint32_t>(a, i) + emulated::get<uint32_t>(b, i); });
}
// Four products of an unsigned and a signed byte, added to a 32-bit lane without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return emulated::make<int32_t>([&](int i) {
        int32_t lane = emulated::get<int32_t>(sum, i);
        for (int j = 4 * i; j < 4 * i + 4; ++j) lane += a.bytes[j] * static_cast<int8_t>(b.bytes[j]);
        return lane;
    });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    return emulated::floats([&](int i) { return emulated::half(emulated::get<uint16_t>(a, i)); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return emulated::floats([&](int i) { return static_cast<float>(emulated::get<int32_t>(a, i)); });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return emulated::make<int32_t>([&](int i) { return emulated::get<uint16_t>(a, i); });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return emulated::make<int32_t>([&](int i) { return emulated::get<int8_t>(a, i); });
}
inline __m512 _mm512_castsi512_ps(__m512i a) {
    return emulated::floats([&](int i) { return emulated::get<float>(a, i); });
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return emulated::floats([&](int i) { return a.at[i] + b.at[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return emulated::floats([&](int i) { return a.at[i] * b.at[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::floats([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
