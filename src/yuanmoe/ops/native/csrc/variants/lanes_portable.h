// 16 rows at a time in plain C++: for CPUs without AVX2, and the meaning of the other two.
#pragma once
#include <cstdint>
#include <cstring>

namespace yuanmoe {
namespace {

struct PortableLanes {
    static constexpr int kTile = 4;
    static constexpr int kChannelsTogether = 64;  // of values that are weighed
    static constexpr int kWholeRows = 1, kWholeTile = 1;
    static constexpr int kAhead = 1536, kFarAhead = 0, kOnceLocality = 0;  // as AVX2
    static int32_t bias(int bits) { return bits == 4 ? 8 : 0; }

    struct Ints {
        int32_t at[16];
    };
    struct Floats {
        float at[16];
    };

    template <class Lane>
    static Floats each(Lane lane) {
        Floats out;
        for (int i = 0; i < 16; ++i) out.at[i] = lane(i);
        return out;
    }
    static float bits_to_float(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    static Ints fill(int32_t value) {
        Ints out;
        for (int32_t& lane : out.at) lane = value;
        return out;
    }
    static Floats fill(float value) {
        return each([&](int) { return value; });
    }
    static Floats to_float(const Ints& a) {
        return each([&](int i) { return static_cast<float>(a.at[i]); });
    }
    static Floats add(const Floats& a, const Floats& b) {
        return each([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Floats mul(const Floats& a, const Floats& b) {
        return each([&](int i) { return a.at[i] * b.at[i]; });
    }
    // Rounded once. Without the instruction: the product is exact in double, the sum is rounded there to odd, so that
    // rounding it again to float is as good as rounding the exact one.
    static float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
        return __builtin_fmaf(a, b, c);
#else
        const double product = static_cast<double>(a) * b, sum = product + c, part = sum - product;
        const double lost = (product - (sum - part)) + (c - part);
        int64_t bits;
        std::memcpy(&bits, &sum, 8);
        if (lost == lost && lost != 0 && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : -1;
        double odd;
        std::memcpy(&odd, &bits, 8);
        return static_cast<float>(odd);
#endif
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each([&](int i) { return fma(a.at[i], b.at[i], c.at[i]); });
    }
    static Floats load(const float* p) {
        return each([&](int i) { return p[i]; });
    }
    // Exact for every finite fp16: the bits of the fraction and exponent, moved, are the value times 2^-112.
    static Floats load_half(const uint16_t* p) {
        return each([&](int i) {
            const float magnitude = bits_to_float((p[i] & 0x7fffu) << 13) * 0x1p112f;
            return p[i] & 0x8000u ? -magnitude : magnitude;
        });
    }
    static Floats even_bfloat16(const uint16_t* p) {
        return each([&](int i) { return bits_to_float(static_cast<uint32_t>(p[2 * i]) << 16); });
    }
    static Floats odd_bfloat16(const uint16_t* p) { return even_bfloat16(p + 1); }
    static Floats load_codes(const int8_t* p) {
        return each([&](int i) { return static_cast<float>(p[i]); });
    }
    static void store(float* p, const Floats& a) { std::memcpy(p, a.at, sizeof a.at); }

    // dot[t] += 16 rows x 32 columns of codes times token t; x is [8 steps][T][4].
    template <int Bits, int T>
    static void dot32(Ints (&dot)[T], const uint8_t* codes, const int8_t* x) {
        for (int step = 0; step < 8; ++step) {
            int16_t weight[64];
            for (int i = 0; i < 64; ++i) weight[i] = code<Bits>(codes, step, i);
            for (int t = 0; t < T; ++t) {
                const int8_t* token = x + (step * T + t) * 4;
                for (int row = 0; row < 16; ++row) {
                    const int16_t* w = weight + 4 * row;
                    dot[t].at[row] += w[0] * token[0] + w[1] * token[1] + w[2] * token[2] + w[3] * token[3];
                }
            }
        }
    }

  private:
    template <int Bits>
    static int16_t code(const uint8_t* codes, int step, int i) {
        if (Bits == 8) return static_cast<int8_t>(codes[64 * step + i]);
        return codes[64 * (step / 2) + i] >> (step % 2 * 4) & 15;
    }
};

}  // namespace
}  // namespace yuanmoe
