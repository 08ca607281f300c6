// 16 rows at a time in two 256-bit registers. Needs avx2, fma and f16c.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace yuanmoe {
namespace {

struct Avx2Lanes {
    // 6 tokens x 2 sums, 2 weights, 1 activation and the mask are the 16 registers. Measured: 6 beats 4, 5 and 8.
    static constexpr int kTile = 6;
    static constexpr int kChannelsTogether = 64;  // of values that are weighed
    static constexpr int kWholeRows = 2, kWholeTile = 2;  // 8 registers of sums, 4 of rows, 2 of a token
    // How far ahead weights are asked for, in bytes. What is read once should not push everything else out of the caches
    // (measured on Zen 3: the code between two products then takes a fifth longer).
    static constexpr int kAhead = 1536, kFarAhead = 0, kOnceLocality = 0;
    static int32_t bias(int bits) { return bits == 4 ? 8 : 0; }

    struct Ints {
        __m256i half[2];
    };
    struct Floats {
        __m256 half[2];
    };

    static Ints fill(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
    static Floats fill(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
    static Floats to_float(const Ints& a) {
        return {{_mm256_cvtepi32_ps(a.half[0]), _mm256_cvtepi32_ps(a.half[1])}};
    }
    static Floats add(const Floats& a, const Floats& b) {
        return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
    }
    static Floats mul(const Floats& a, const Floats& b) {
        return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
    }
    static Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    static Floats load_half(const uint16_t* p) {
        return {{_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}};
    }
    static Floats even_bfloat16(const uint16_t* p) { return {{even(load256(p)), even(load256(p + 16))}}; }
    static Floats odd_bfloat16(const uint16_t* p) { return {{odd(load256(p)), odd(load256(p + 16))}}; }
    static Floats load_codes(const int8_t* p) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))}};
    }
    static void store(float* p, const Floats& a) {
        _mm256_storeu_ps(p, a.half[0]);
        _mm256_storeu_ps(p + 8, a.half[1]);
    }

    // dot[t] += 16 rows x 32 columns of codes times token t; x is [8 steps][T][4].
    template <int Bits, int T>
    static void dot32(Ints (&dot)[T], const uint8_t* codes, const int8_t* x) {
        if constexpr (Bits == 4) {
            dot32_4bit(dot, codes, x);
        } else {
            dot32_8bit(dot, codes, x);
        }
    }

  private:
    static __m128i load128(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static __m256 even(__m256i bfloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16, 16)); }
    static __m256 odd(__m256i bfloat16) {
        return _mm256_castsi256_ps(_mm256_and_si256(bfloat16, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    static __m256i activation(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }
    // Keeps the compiler from collecting all products before it adds them: with the sums spilled to the stack, gcc 12
    // reached 60 % of the speed.
    static void keep(__m256i& a, __m256i& b) { __asm__ volatile("" : "+x"(a), "+x"(b)); }

    // Codes are 0..15: 8 steps of two products fit 16 bits (8 * 2 * 15 * 127 = 30480), so widening waits for the end.
    template <int T>
    static void dot32_4bit(Ints (&dot)[T], const uint8_t* codes, const int8_t* x) {
        __m256i sum[T][2] = {};
#pragma GCC unroll 8
        for (int step = 0; step < 8; ++step) {
            const __m256i first = nibbles(codes + 64 * (step / 2), step % 2);
            const __m256i second = nibbles(codes + 64 * (step / 2) + 32, step % 2);
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                const __m256i token = activation(x + (step * T + t) * 4);
                sum[t][0] = _mm256_add_epi16(sum[t][0], _mm256_maddubs_epi16(first, token));
                sum[t][1] = _mm256_add_epi16(sum[t][1], _mm256_maddubs_epi16(second, token));
                keep(sum[t][0], sum[t][1]);
            }
        }
        for (int t = 0; t < T; ++t) accumulate(dot[t], sum[t][0], sum[t][1]);
    }

    // vpmaddubsw wants one unsigned side: the magnitude of the weight (up to 128), its sign moved to the activation
    // (within 127). Two products are at most 2 * 128 * 127 = 32512: nothing saturates.
    template <int T>
    static void dot32_8bit(Ints (&dot)[T], const uint8_t* codes, const int8_t* x) {
        for (int step = 0; step < 8; ++step) {
            const __m256i first = load256(codes + 64 * step), second = load256(codes + 64 * step + 32);
            const __m256i first_magnitude = _mm256_abs_epi8(first), second_magnitude = _mm256_abs_epi8(second);
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                const __m256i token = activation(x + (step * T + t) * 4);
                accumulate(dot[t], _mm256_maddubs_epi16(first_magnitude, _mm256_sign_epi8(token, first)),
                           _mm256_maddubs_epi16(second_magnitude, _mm256_sign_epi8(token, second)));
            }
        }
    }

    static __m256i nibbles(const uint8_t* p, int high) {
        const __m256i bytes = load256(p);
        return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
    }
    static void accumulate(Ints& dot, __m256i first, __m256i second) {
        const __m256i ones = _mm256_set1_epi16(1);
        dot.half[0] = _mm256_add_epi32(dot.half[0], _mm256_madd_epi16(first, ones));
        dot.half[1] = _mm256_add_epi32(dot.half[1], _mm256_madd_epi16(second, ones));
    }
};

}  // namespace
}  // namespace yuanmoe
