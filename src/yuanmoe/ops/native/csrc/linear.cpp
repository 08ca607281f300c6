#include "operations.h"
#include "rows.h"
#include "machine/threads.h"

namespace yuanmoe {

void linear(const Call& call, const Quantized& weight, const void* x, int64_t tokens, void* out) {
    const Cut tiles = Cut::of(tokens, call.kernels->tile);
    const Cut parts = work_parts(weight.blocks(), weight.block_bytes(), call.threads);
    const Activations activations(tokens, weight);
    const auto tile = [&](int64_t t) { return activations.tile(tiles.begin(t), tiles.size(t)); };
    const int64_t group_units = group_parts(weight).parts;
    const auto quantize = [&](int64_t unit) {
        const int64_t t = unit / group_units;
        const auto row = [&](int token) { return tiles.begin(t) + token; };
        quantize_tile(call, weight, x, row, unit % group_units, tile(t));
    };
    const auto product = [&](int64_t part) {
        for (int64_t t = 0; t < tiles.parts; ++t)
            for (int64_t block = parts.begin(part); block < parts.end(part); ++block) {
                float rows[kMaxTile * kBlockRows];
                multiply(call, weight, 0, block, tile(t), rows);
                const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, weight.rows - first);
                for (int64_t i = 0; i < tiles.size(t); ++i)
                    write_values(out, call.dtype, (tiles.begin(t) + i) * weight.rows + first, count,
                                 rows + i * kBlockRows);
            }
    };
    run(call.threads, {phase(tiles.parts * group_units, quantize), phase(parts.parts, product)});
}

void linear(const Call& call, const Whole& weight, const void* x, int64_t tokens, void* out) {
    FloatRows rows(tokens, weight.columns, weight.dtype);
    const Cut tiles = Cut::of(tokens, call.kernels->tile_whole);
    // Many tokens pass over a part as large as half of a core's second cache, so that they are not read again too often.
    const int64_t passes = std::clamp<int64_t>(tiles.parts, 1, 16);
    const Cut parts = work_parts(weight.rows, weight.columns * weight.value_bytes() / passes, call.threads);
    const auto fill = [&](int64_t token) { rows.fill(token, call, x, token); };
    const auto product = [&](int64_t part) {
        float sums[kMaxTile * kRowsAtOnce];
        for (int64_t t = 0; t < tiles.parts; ++t)
            for (int64_t row = parts.begin(part); row < parts.end(part); row += kRowsAtOnce) {
                const int64_t count = std::min<int64_t>(kRowsAtOnce, parts.end(part) - row);
                rows.dots(call, weight.row(0, row), count, tiles.begin(t), tiles.size(t), sums);
                for (int64_t i = 0; i < tiles.size(t); ++i)
                    write_values(out, call.dtype, (tiles.begin(t) + i) * weight.rows + row, count,
                                 sums + i * kRowsAtOnce);
            }
    };
    run(call.threads, {phase(tokens, fill), phase(parts.parts, product)});
}

}  // namespace yuanmoe
