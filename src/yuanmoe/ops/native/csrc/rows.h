// The steps that linear layers and mixtures share: tokens into tiles, blocks of weights times tiles.
#pragma once
#include <vector>

#include "operations.h"

namespace yuanmoe {

// The groups of a tile that one thread quantizes at a time: even one token is work for several.
constexpr int64_t kGroupsAtOnce = 32;
inline Cut group_parts(const Quantized& weight) { return Cut::of(weight.groups(), kGroupsAtOnce); }

// Quantizes part `part` of group_parts of the rows row(0) .. row(width - 1) of x into a tile.
template <class Row>
void quantize_tile(const Call& call, const Quantized& weight, const void* x, const Row& row, int64_t part,
                   const Tile& tile) {
    const Cut parts = group_parts(weight);
    const int32_t bias = call.kernels->bias(weight.bits);
    float values[kMaxGroup];
    for (int token = 0; token < tile.width; ++token)
        for (int64_t g = parts.begin(part); g < parts.end(part); ++g) {
            const int64_t first = g * weight.group;
            const int64_t count = std::min<int64_t>(weight.group, weight.columns - first);
            read_values(x, call.dtype, row(token) * weight.columns + first, count, values);
            call.kernels->quantize(values, count, weight.group, g, token, bias, tile);
        }
}

// out[T][16] = one block of one matrix times a tile.
inline void multiply(const Call& call, const Quantized& weight, int64_t matrix, int64_t block, const Tile& tile,
                     float* out) {
    const auto kernel = weight.bits == 4 ? call.kernels->block4 : call.kernels->block8;
    kernel(weight.block_codes(matrix, block), weight.block_scales(matrix, block), tile, weight.groups(), weight.group,
           out);
}

constexpr int64_t kRowsAtOnce = 16;

// Rows in float32 in the order of the kernel for a whole weight: as they are, or for bf16 at their bf16_place.
class FloatRows {
  public:
    FloatRows(int64_t rows, int64_t columns, Dtype weight)
        : columns_(columns),
          weight_(weight),
          // One step more than needed: rows a power of two apart would meet in the same places of the cache.
          stride_((columns + kDotColumns - 1) / kDotColumns * kDotColumns + kDotColumns),
          values_(rows * stride_) {}

    // Row `row` = row `source` of x.
    void fill(int64_t row, const Call& call, const void* x, int64_t source) {
        float values[kDotColumns];
        for (int64_t first = 0; first < columns_; first += kDotColumns) {
            const int64_t count = std::min<int64_t>(kDotColumns, columns_ - first);
            read_values(x, call.dtype, source * columns_ + first, count, values);
            put(row, first, count, values);
        }
    }
    // Columns [first, first + count) of a row.
    void put(int64_t row, int64_t first, int64_t count, const float* values) {
        float* const to = values_.data() + row * stride_;
        if (weight_ == Dtype::kFloat32) std::copy_n(values, count, to + first);
        else for (int64_t i = 0; i < count; ++i) to[bf16_place(first + i)] = values[i];
    }
    // out[i][kRowsAtOnce] = up to so many rows of a weight times rows [first, first + count), a tile.
    void dots(const Call& call, const void* weight, int64_t weight_rows, int64_t first, int64_t count,
              float* out) const {
        const float* const x = values_.data() + first * stride_;
        if (weight_ == Dtype::kFloat32)
            call.kernels->dots_f32(static_cast<const float*>(weight), weight_rows, columns_, x, stride_, count, out,
                                   kRowsAtOnce);
        else
            call.kernels->dots_bf16(static_cast<const uint16_t*>(weight), weight_rows, columns_, x, stride_, count, out,
                                    kRowsAtOnce);
    }

  private:
    int64_t columns_;
    Dtype weight_;
    int64_t stride_;
    std::vector<float> values_;
};

}  // namespace yuanmoe
