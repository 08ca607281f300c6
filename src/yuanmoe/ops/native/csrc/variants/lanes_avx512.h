// 16 rows at a time in one 512-bit register. Needs avx512f, avx512bw and avx512vnni.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace yuanmoe {
namespace {

struct Avx512Lanes {
    // 12 integer and 12 float sums leave 8 of the 32 registers; vpdpbusd (latency 5, two a cycle) wants 10 chains.
    static constexpr int kTile = 12;
    static constexpr int kChannelsTogether = 256;  // of values that are weighed
    static constexpr int kWholeRows = 4, kWholeTile = 6;  // 24 sums, four rows and a token: 29 registers
    // How far ahead weights are asked for, in bytes: near into the first cache, and far into the second, which waits for
    // 48 lines at a time where the first waits for 16 (measured on Sapphire Rapids, two cores, 4-bit weights: 18 GB/s
    // without, 22 with the near one alone, 27 with both; past the second cache, as on AVX2, 18).
    static constexpr int kAhead = 1536, kFarAhead = 8192, kOnceLocality = 3;
    static int32_t bias(int bits) { return bits == 4 ? 8 : 128; }

    using Ints = __m512i;
    using Floats = __m512;

    static Ints fill(int32_t value) { return _mm512_set1_epi32(value); }
    static Floats fill(float value) { return _mm512_set1_ps(value); }
    static Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }
    static Floats even_bfloat16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
    }
    static Floats odd_bfloat16(const uint16_t* p) {
        const Ints high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
    }
    static Floats load_codes(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }

    // dot[t] += 16 rows x 32 columns of codes times token t; x is [8 steps][T][4].
    template <int Bits, int T>
    static void dot32(Ints (&dot)[T], const uint8_t* codes, const int8_t* x) {
        constexpr int kChains = T <= 4 ? 4 / T : 1;  // few tokens: more sums, so that the latency is hidden
        Ints sum[kChains][T];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            sum[0][t] = dot[t];
            for (int c = 1; c < kChains; ++c) sum[c][t] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int step = 0; step < 8; ++step) {
            const Ints weight = Bits == 4 ? nibbles(codes + 64 * (step / 2), step % 2) : unsigned_codes(codes + 64 * step);
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {
                Ints& chain = sum[step % kChains][t];
                chain = _mm512_dpbusd_epi32(chain, weight, activation(x + (step * T + t) * 4));
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            dot[t] = sum[0][t];
            for (int c = 1; c < kChains; ++c) dot[t] = _mm512_add_epi32(dot[t], sum[c][t]);
        }
    }

  private:
    static __m256i load256(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Ints activation(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    static Ints nibbles(const uint8_t* p, int high) {
        const Ints bytes = _mm512_loadu_si512(p);
        return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
    }
    static Ints unsigned_codes(const uint8_t* p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
    }
};

}  // namespace
}  // namespace yuanmoe
