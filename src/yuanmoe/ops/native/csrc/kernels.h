// The kernels, written once over the lanes of a variant.
//
// Every sum has one order, whatever the tile, the thread or the variant: integers are exact within a group, groups are
// added in float32 from the first to the last with separate multiplications and additions (compile with
// -ffp-contract=off). So a token's result is the same number alone, in any batch, and on any CPU.
#pragma once
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace yuanmoe {
namespace {

inline float as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int32_t as_int(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

constexpr float kRound = 0x1.8p23f;  // x + kRound holds the integer next to x (ties to even) in its lowest bits
constexpr int32_t kRoundBits = 0x4b400000;
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kNanBits = 0x7fc00000;
constexpr float kSmallest = 1e-30f;  // below it 127 / maximum leaves float32; such a group counts as zeros

// Symmetric 8 bits: scale = maximum / 127, codes within 127 to the nearest, ties to even. A group with an infinity or a
// NaN gets the scale NaN, so that its results are NaN and not plausible numbers.
inline void quantize(const float* x, int64_t count, int group, int64_t index, int token, int32_t bias, const Tile& tile) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = as_int(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float maximum = as_float(largest);
    const bool finite = largest < kInfinityBits;
    const bool empty = !finite || maximum < kSmallest;
    const float inverse = empty ? 0.0f : 127.0f / maximum;
    alignas(64) int8_t codes[kMaxGroup] = {};
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t code = empty ? 0 : as_int(x[i] * inverse + kRound) - kRoundBits;
        codes[i] = static_cast<int8_t>(code);
        sum += code;
    }
    int8_t* out = tile.codes + index * group * tile.width + 4 * token;
    for (int i = 0; i < group; i += 4) std::memcpy(out + i * tile.width, codes + i, 4);
    tile.scales[index * tile.width + token] = !finite ? as_float(kNanBits) : empty ? 0.0f : maximum / 127.0f;
    tile.offsets[index * tile.width + token] = -bias * sum;
}

template <class Lanes, int Bits, int T>
void block(const uint8_t* codes, const uint16_t* scales, const Tile& x, int64_t groups, int group, float* out) {
    typename Lanes::Floats total[T];
    for (int t = 0; t < T; ++t) total[t] = Lanes::fill(0.0f);
    const int8_t* tokens = x.codes;
    for (int64_t g = 0; g < groups; ++g) {
        typename Lanes::Ints dot[T];
        for (int t = 0; t < T; ++t) dot[t] = Lanes::fill(x.offsets[g * T + t]);
        for (int i = 0; i < group; i += 32) {
            Lanes::template dot32<Bits, T>(dot, codes, tokens);
            codes += 32 * kBlockRows * Bits / 8;
            tokens += 32 * T;
        }
        const auto scale = Lanes::load_half(scales + g * kBlockRows);
        for (int t = 0; t < T; ++t) {
            const auto factor = Lanes::mul(scale, Lanes::fill(x.scales[g * T + t]));
            total[t] = Lanes::add(total[t], Lanes::mul(Lanes::to_float(dot[t]), factor));
        }
    }
    for (int t = 0; t < T; ++t) Lanes::store(out + t * kBlockRows, total[t]);
}

// Calls the kernel compiled for the width of the tile.
template <class Lanes, int Bits, int T = Lanes::kTile>
void block_of_width(const uint8_t* codes, const uint16_t* scales, const Tile& x, int64_t groups, int group, float* out) {
    if (x.width == T) return block<Lanes, Bits, T>(codes, scales, x, groups, group, out);
    if constexpr (T > 1) block_of_width<Lanes, Bits, T - 1>(codes, scales, x, groups, group, out);
}

// e^x within 2 units in the last place for -87 <= x <= 88: x = n ln 2 + r (ln 2 in two parts, the first with zeros at
// the end so that n times it is exact), e^r by its Taylor polynomial of degree 7, |r| <= ln 2 / 2.
inline float exponential(float x) {
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_float((as_int(shifted) - kRoundBits + 127) << 23);
}

inline void swiglu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = -gate[i];
        const float above = x < -87.0f ? -87.0f : x;
        const float power = exponential(above > 88.0f ? 88.0f : above);
        gate[i] = gate[i] / (1.0f + power) * up[i];
    }
}

// 32 columns of kRows rows a step; two sums of 16 lanes a row, added as a tree at the end.
constexpr int kDotColumns = 32;

template <class Lanes, int Rows>
void dot_rows(const uint16_t* weight, int64_t columns, const float* x, float* out) {
    typename Lanes::Floats sum[Rows][2];
    for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = Lanes::fill(0.0f);
    const auto step = [&](const uint16_t* w, int64_t stride, const float* values) {
        for (int half = 0; half < 2; ++half) {
            const auto token = Lanes::load(values + 16 * half);
            for (int r = 0; r < Rows; ++r) {
                const auto row = Lanes::load_bfloat16(w + r * stride + 16 * half);
                sum[r][half] = Lanes::add(sum[r][half], Lanes::mul(row, token));
            }
        }
    };
    const int64_t whole = columns / kDotColumns * kDotColumns;
    for (int64_t i = 0; i < whole; i += kDotColumns) step(weight + i, columns, x + i);
    if (whole < columns) {
        uint16_t rest[Rows][kDotColumns] = {};
        for (int r = 0; r < Rows; ++r) std::memcpy(rest[r], weight + r * columns + whole, (columns - whole) * 2);
        step(rest[0], kDotColumns, x + whole);
    }
    for (int r = 0; r < Rows; ++r) {
        alignas(64) float lanes[16];
        Lanes::store(lanes, Lanes::add(sum[r][0], sum[r][1]));
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        out[r] = lanes[0];
    }
}

template <class Lanes>
void dot_bf16(const uint16_t* weight, int64_t rows, int64_t columns, const float* x, float* out) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) dot_rows<Lanes, 2>(weight + r * columns, columns, x, out + r);
    if (r < rows) dot_rows<Lanes, 1>(weight + r * columns, columns, x, out + r);
}

inline uint64_t read(const uint8_t* bytes, int64_t count) {
    uint64_t sum[16] = {};
    const int64_t whole = count / sizeof sum * sizeof sum;
    for (int64_t i = 0; i < whole; i += sizeof sum) {
        uint64_t words[16];
        std::memcpy(words, bytes + i, sizeof words);
        for (int j = 0; j < 16; ++j) sum[j] ^= words[j];
    }
    for (int64_t i = whole; i < count; ++i) sum[0] ^= bytes[i];
    for (int j = 1; j < 16; ++j) sum[0] ^= sum[j];
    return sum[0];
}

template <class Lanes>
constexpr Kernels kernels() {
    static_assert(Lanes::kTile <= kMaxTile);
    return {Lanes::kTile,
            Lanes::bias,
            quantize,
            block_of_width<Lanes, 4>,
            block_of_width<Lanes, 8>,
            swiglu,
            dot_bf16<Lanes>,
            read};
}

}  // namespace
}  // namespace yuanmoe
