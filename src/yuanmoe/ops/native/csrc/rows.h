// The steps that linear layers and mixtures share: tokens into tiles, blocks of weights times tiles.
#pragma once
#include <vector>

#include "operations.h"
#include "threads.h"

namespace yuanmoe {

// Quantizes the rows row(0) .. row(width - 1) of x into a tile.
template <class Row>
void quantize_tile(const Call& call, const Quantized& weight, const void* x, const Row& row, const Tile& tile) {
    const int32_t bias = call.kernels->bias(weight.bits);
    float values[kMaxGroup];
    for (int token = 0; token < tile.width; ++token)
        for (int64_t g = 0; g < weight.groups(); ++g) {
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

// Rows of x in float32, padded with zeros to whole steps of the bf16 kernel.
constexpr int64_t kColumnsAtOnce = 32;
constexpr int64_t kRowsAtOnce = 16;

class FloatRows {
  public:
    FloatRows(const Call& call, const void* x, int64_t rows, int64_t columns) : FloatRows(rows, columns) {
        parallel_for(call.threads, rows,
                     [&](int64_t row) { read_values(x, call.dtype, row * columns, columns, at(row)); });
    }
    FloatRows(int64_t rows, int64_t columns)
        : stride_((columns + kColumnsAtOnce - 1) / kColumnsAtOnce * kColumnsAtOnce), values_(rows * stride_) {}

    float* at(int64_t row) { return values_.data() + row * stride_; }
    const float* at(int64_t row) const { return values_.data() + row * stride_; }

  private:
    int64_t stride_;
    std::vector<float> values_;
};

}  // namespace yuanmoe
