// The kernels, written once over the lanes of a variant.
//
// Every sum has one order, whatever the tile, the thread or the variant: integers are exact within a group, groups are
// added in float32 from the first to the last with separate multiplications and additions (compile with
// -ffp-contract=off), sums over whole weights with fused ones. So a token's result is the same number alone, in any batch, and on any CPU.
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
// NaN gets the scale NaN, so that its results are NaN and not plausible numbers. Returns the scale.
inline float encode(const float* x, int64_t count, int8_t* codes) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = as_int(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float maximum = as_float(largest);
    const bool finite = largest < kInfinityBits;
    const bool empty = !finite || maximum < kSmallest;
    const float inverse = empty ? 0.0f : 127.0f / maximum;
    for (int64_t i = 0; i < count; ++i)
        codes[i] = static_cast<int8_t>(empty ? 0 : as_int(x[i] * inverse + kRound) - kRoundBits);
    return !finite ? as_float(kNanBits) : empty ? 0.0f : maximum / 127.0f;
}

inline void quantize(const float* x, int64_t count, int group, int64_t index, int token, int32_t bias, const Tile& tile) {
    alignas(64) int8_t codes[kMaxGroup] = {};
    tile.scales[index * tile.width + token] = encode(x, count, codes);
    int32_t sum = 0;
    for (int i = 0; i < group; ++i) sum += codes[i];
    int8_t* out = tile.codes + index * group * tile.width + 4 * token;
    for (int i = 0; i < group; i += 4) std::memcpy(out + i * tile.width, codes + i, 4);
    tile.offsets[index * tile.width + token] = -bias * sum;
}

// Asks for the cache line `ahead` bytes on; past the end of a tensor it does nothing. `kLocality` 3 brings it into all
// caches, 2 into all but the first, 0 into the first alone.
template <int kLocality = 3>
inline void prefetch(const void* p, int ahead) {
    __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, kLocality);
}

// Asks for what a sequential stream of weights reaches next: the hardware stops at the end of a page and looks less far
// (measured on Zen 3: 13 against 17 GB/s). How is the variant's to say.
template <class Lanes, bool kOnce = false>
inline void stream(const void* weights) {
    if constexpr (Lanes::kFarAhead != 0) prefetch<2>(weights, Lanes::kFarAhead);
    prefetch<kOnce ? Lanes::kOnceLocality : 3>(weights, Lanes::kAhead);
}

template <class Lanes, int Bits, int T>
void block(const uint8_t* codes, const uint16_t* scales, const Tile& x, int64_t groups, int group, float* out) {
    typename Lanes::Floats total[T];
    for (int t = 0; t < T; ++t) total[t] = Lanes::fill(0.0f);
    const int8_t* tokens = x.codes;
    constexpr bool kOnce = T <= 2;  // wider tiles may be followed by others
    for (int64_t g = 0; g < groups; ++g) {
        typename Lanes::Ints dot[T];
        for (int t = 0; t < T; ++t) dot[t] = Lanes::fill(x.offsets[g * T + t]);
        for (int i = 0; i < group; i += 32) {
            constexpr int kBytes = 32 * kBlockRows * Bits / 8;
            for (int line = 0; line < kBytes; line += 64) stream<Lanes, kOnce>(codes + line);
            Lanes::template dot32<Bits, T>(dot, codes, tokens);
            codes += kBytes;
            tokens += 32 * T;
        }
        prefetch<3>(scales + g * kBlockRows, 256);
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

// 16 lanes added as a tree: in vectors as long as they last, where gcc 12 would take them apart.
inline float tree_sum(const float* lanes) {
    typedef float Four __attribute__((vector_size(16)));
    Four four[4];
    std::memcpy(four, lanes, sizeof four);
    const Four sum = (four[0] + four[2]) + (four[1] + four[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The columns of half a step: of bf16 the even ones before the odd ones.
template <class Lanes>
typename Lanes::Floats half_step(const uint16_t* weight, int half) {
    return half ? Lanes::odd_bfloat16(weight) : Lanes::even_bfloat16(weight);
}
template <class Lanes>
typename Lanes::Floats half_step(const float* weight, int half) {
    return Lanes::load(weight + 16 * half);
}

// R rows times T tokens: sums of 16 lanes, 32 columns a step in two halves, added as a tree at the end.
// Fused multiply-adds, which every variant has or imitates.
template <class Lanes, int R, int T, class Weight>
void dots(const Weight* weight, int64_t columns, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    typename Lanes::Floats sum[T][R];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) sum[t][r] = Lanes::fill(0.0f);
    const auto step = [&](const Weight* w, int64_t w_stride, const float* values) {
        typename Lanes::Floats row[R];
        const auto add = [&](int half) {
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                const auto value = Lanes::load(values + t * x_stride + 16 * half);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[t][r] = Lanes::fma(row[r], value, sum[t][r]);
            }
        };
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = half_step<Lanes>(w + r * w_stride, 0);
        add(0);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = half_step<Lanes>(w + r * w_stride, 1);
        add(1);
    };
    const int64_t whole = columns / kDotColumns * kDotColumns;
    for (int64_t i = 0; i < whole; i += kDotColumns) {
        // One token waits for weights, a stream; with several there is time to bring the rows after these into the cache.
        for (int r = 0; r < R; ++r)
            for (int64_t line = 0; line < kDotColumns; line += 64 / sizeof(Weight)) {
                if constexpr (T < 3) stream<Lanes>(weight + r * columns + i + line);
                else prefetch<2>(weight + (r + R) * columns + i + line, 0);
            }
        step(weight + i, columns, x + i);
    }
    if (whole < columns) {
        Weight rest[R * kDotColumns] = {};
        for (int r = 0; r < R; ++r)
            std::memcpy(rest + r * kDotColumns, weight + r * columns + whole, (columns - whole) * sizeof *weight);
        step(rest, kDotColumns, x + whole);
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            alignas(64) float lanes[16];
            Lanes::store(lanes, sum[t][r]);
            out[t * out_stride + r] = tree_sum(lanes);
        }
}

template <class Lanes, class Weight, int T = Lanes::kWholeTile>
void dots_of(const Weight* weight, int64_t rows, int64_t columns, const float* x, int64_t x_stride, int64_t tokens,
             float* out, int64_t out_stride) {
    if constexpr (T > 1)
        if (tokens < T) return dots_of<Lanes, Weight, T - 1>(weight, rows, columns, x, x_stride, tokens, out, out_stride);
    constexpr int R = Lanes::kWholeRows;
    int64_t r = 0;
    for (; r + R <= rows; r += R) dots<Lanes, R, T>(weight + r * columns, columns, x, x_stride, out + r, out_stride);
    for (; r < rows; ++r) dots<Lanes, 1, T>(weight + r * columns, columns, x, x_stride, out + r, out_stride);
}

template <class Lanes>
uint64_t read(const uint8_t* bytes, int64_t count) {
    typedef uint64_t Words __attribute__((vector_size(32), aligned(1), may_alias));
    Words sum[4] = {};
    const int64_t step = sizeof sum, whole = count / step * step;
    for (int64_t i = 0; i < whole; i += step) {
        for (int64_t line = 0; line < step; line += 64) stream<Lanes>(bytes + i + line);
        const Words* words = reinterpret_cast<const Words*>(bytes + i);
        for (int j = 0; j < 4; ++j) sum[j] ^= words[j];
    }
    sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
    uint64_t total = sum[0][0] ^ sum[0][1] ^ sum[0][2] ^ sum[0][3];
    for (int64_t i = whole; i < count; ++i) total ^= bytes[i];
    return total;
}

}  // namespace
}  // namespace yuanmoe

#include "attend.h"
#include "single.h"

namespace yuanmoe {
namespace {

template <class Lanes>
constexpr Kernels kernels() {
    static_assert(Lanes::kTile <= kMaxTile);
    return {Lanes::kTile,
            Lanes::kWholeTile,
            Lanes::bias,
            quantize,
            block_of_width<Lanes, 4>,
            block_of_width<Lanes, 8>,
            swiglu,
            dots_of<Lanes, uint16_t>,
            dots_of<Lanes, float>,
            widen<Lanes>,
            attend<Lanes>,
            encode,
            rms_norm<Lanes>,
            relate,
            softmax,
            read<Lanes>};
}

}  // namespace
}  // namespace yuanmoe
