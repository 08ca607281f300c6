// Rows of float32 or bfloat16 in and out, and activations quantized tile by tile.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "layout.h"

namespace yuanmoe {

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// `count` values of a row-major matrix from element `first` on.
inline void read_values(const void* data, Dtype dtype, int64_t first, int64_t count, float* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, static_cast<const float*>(data) + first, count * sizeof(float));
        return;
    }
    const uint16_t* values = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
        std::memcpy(out + i, &bits, 4);
    }
}

// To the nearest, ties to even, as torch does; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void write_values(void* data, Dtype dtype, int64_t first, int64_t count, const float* values) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(static_cast<float*>(data) + first, values, count * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(values[i]);
}

// Cuts `total` things into equal parts of at most `most`.
struct Cut {
    int64_t total, parts;

    static Cut of(int64_t total, int64_t most) { return {total, (total + most - 1) / most}; }
    int64_t begin(int64_t part) const { return total * part / parts; }
    int64_t end(int64_t part) const { return begin(part + 1); }
    int64_t size(int64_t part) const { return end(part) - begin(part); }
};

// The blocks or rows that one thread takes at a time: at most 32 KiB of weights, which stay in its first cache while the
// tokens pass, and at least four parts a thread. The last part keeps the others waiting: 3 us, with 128 KiB 10.
inline Cut work_parts(int64_t count, int64_t bytes_each, int threads) {
    const int64_t fit = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, bytes_each));
    return Cut::of(count, std::clamp<int64_t>(count / (4 * threads), 1, fit));
}

// Quantized activations of `tokens` rows, stored tile after tile.
class Activations {
  public:
    Activations(int64_t tokens, const Quantized& weight)
        : groups_(weight.groups()),
          group_(weight.group),
          codes_(new int8_t[tokens * groups_ * group_]),
          scales_(new float[tokens * groups_]),
          offsets_(new int32_t[tokens * groups_]) {}

    // The tile of `width` tokens that starts at token `first`.
    Tile tile(int64_t first, int64_t width) const {
        return {codes_.get() + first * groups_ * group_, scales_.get() + first * groups_,
                offsets_.get() + first * groups_, static_cast<int>(width)};
    }

  private:
    int64_t groups_;
    int group_;
    std::unique_ptr<int8_t[]> codes_;
    std::unique_ptr<float[]> scales_;
    std::unique_ptr<int32_t[]> offsets_;
};

}  // namespace yuanmoe
