// What every part of the library agrees on: the packed layout of quantized weights and the tables of kernels.
//
// Letters: O output rows, I input columns, G group size, T tokens of a tile.
// A packed matrix is a sequence of blocks of 16 rows; a block is a sequence of groups of G columns; a group is a
// sequence of 64-byte chunks, each holding 16 rows x 4 columns (8 bits) or 16 rows x 8 columns (4 bits). Byte 4r+j of
// a chunk belongs to row r: at 8 bits it is the signed code of column j; at 4 bits its low half is the code plus 8 of
// column j, its high half that of column 4+j. So one chunk is one operand of vpdpbusd, or two of vpmaddubsw with rows
// 0..7 and 8..15, and a matrix-vector product reads memory front to back. Scales (fp16) lie beside, [block, group, 16].
// Nothing here assumes alignment: loads are unaligned, 64-byte aligned tensors are merely faster.
#pragma once
#include <cstdint>

namespace yuanmoe {

constexpr int kBlockRows = 16;
constexpr int kMaxTile = 12;    // the most tokens that any variant computes at once
constexpr int kMaxGroup = 128;
constexpr int kDotColumns = 32;  // columns of a bf16 row in one step
// Where a column goes in what meets such rows: in each step the even ones before the odd ones, as registers split them.
inline int64_t bf16_place(int64_t column) {
    const int64_t in_step = column % kDotColumns;
    return column - in_step + in_step % 2 * (kDotColumns / 2) + in_step / 2;
}
// A step of columns to their places, and back.
inline void split_step(const float* columns, float* places) {
    for (int i = 0; i < kDotColumns; ++i) places[bf16_place(i)] = columns[i];
}
inline void join_step(const float* places, float* columns) {
    for (int i = 0; i < kDotColumns; ++i) columns[i] = places[bf16_place(i)];
}

// `matrices` equal matrices in the packed layout, as the Python side describes them.
struct Quantized {
    const uint8_t* codes;
    const uint16_t* scales;
    int64_t matrices, rows, columns;
    int32_t bits, group;

    int64_t groups() const { return (columns + group - 1) / group; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    int64_t block_bytes() const { return groups() * group * kBlockRows * bits / 8; }
    const uint8_t* block_codes(int64_t matrix, int64_t block) const {
        return codes + (matrix * blocks() + block) * block_bytes();
    }
    const uint16_t* block_scales(int64_t matrix, int64_t block) const {
        return scales + (matrix * blocks() + block) * groups() * kBlockRows;
    }
};

// T tokens quantized to 8 bits, interleaved so that a kernel reads them front to back:
// codes [group][column / 4][token][4], scales and offsets [group][token].
struct Tile {
    int8_t* codes;
    float* scales;
    int32_t* offsets;  // minus the bias of the weight codes times the sum of the token's codes
    int width;         // T
};

// How keys and values are stored: floats, or codes with one float32 scale a vector.
enum class Stored : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

constexpr int kKeysAtOnce = 32;   // a block of keys: of 256 channels in float32 they fill a core's first cache
constexpr int kMaxExperts = 256;  // whose relations fit the stack
constexpr int kKeysTogether = 4;  // keys that meet a query in registers

// Equal vectors one after the other; codes with a scale each.
struct Vectors {
    const void* data;
    const float* scales;
    Stored stored;
    const void* next;  // the vectors that are read after these, to be asked for meanwhile; null if there are none
};

// A softmax on its way over blocks of keys: `sum` is the weighted sum of values, `total` that of the weights.
struct Softmax {
    float maximum, total;
    float* sum;
};

// One variant: the same arithmetic, bit for bit, for one instruction set.
struct Kernels {
    int tile;       // the widest tile of quantized tokens
    int tile_whole;  // and of those that meet a bf16 or float32 matrix
    int32_t (*bias)(int bits);  // what the kernel adds to a weight code to make it unsigned
    // One group of one token: x[0..count) (count <= group, the rest counts as zeros) into the tile.
    void (*quantize)(const float* x, int64_t count, int group, int64_t index, int token, int32_t bias, const Tile& tile);
    // out[T][16] = one block of weights times one tile.
    void (*block4)(const uint8_t* codes, const uint16_t* scales, const Tile& x, int64_t groups, int group, float* out);
    void (*block8)(const uint8_t* codes, const uint16_t* scales, const Tile& x, int64_t groups, int group, float* out);
    // gate[i] = silu(gate[i]) * up[i]
    void (*swiglu)(float* gate, const float* up, int64_t count);
    // out[t][r] = sum of weight[r][i] x[t][i] over a row-major bf16 or float32 matrix and up to tile_whole tokens, x and
    // out with so many floats a token; x is in steps of 32 values, under bf16 in each the even ones before the odd ones,
    // the last step padded with zeros.
    void (*dots_bf16)(const uint16_t* weight, int64_t rows, int64_t columns, const float* x, int64_t x_stride,
                      int64_t tokens, float* out, int64_t out_stride);
    void (*dots_f32)(const float* weight, int64_t rows, int64_t columns, const float* x, int64_t x_stride,
                     int64_t tokens, float* out, int64_t out_stride);
    // out[j] = vector j in float32, padded with zeros; codes without their scales, bf16 at its bf16_place.
    void (*widen)(const Vectors& from, int64_t count, int64_t channels, int64_t padded, float* out);
    // One query over up to kKeysAtOnce keys and values of a multiple of 16 channels; the same number whether they were
    // widened before or not. Over bf16 it is a multiple of kDotColumns, and q and the sum are at their bf16_place.
    void (*attend)(const float* q, const Vectors& keys, const Vectors& values, int64_t count, int64_t channels,
                   Softmax* state);
    // 8-bit codes of a vector; returns their scale.
    float (*encode)(const float* x, int64_t count, int8_t* codes);
    // out = x / sqrt(mean(x^2) + epsilon) * weight
    void (*rms_norm)(const float* x, const float* weight, int64_t count, float epsilon, float* out);
    // out[i] = sum over j of softmax_j(q[i] k[j]) v[j]; at most kMaxExperts
    void (*relate)(const float* q, const float* k, const float* v, int64_t count, float* out);
    // In place, over a few values of which the first is the largest.
    void (*softmax)(float* values, int64_t count);
    // Reads every byte once, at the speed of memory.
    uint64_t (*read)(const uint8_t* bytes, int64_t count);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace yuanmoe
