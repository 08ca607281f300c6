// Whole operations over a variant's kernels: linear layers and mixtures of experts.
#pragma once
#include <cstdint>

#include "layout.h"
#include "tensors.h"

namespace yuanmoe {

// What every operation runs with.
struct Call {
    const Kernels* kernels;
    int threads;
    Dtype dtype;  // of the tokens in and out
};

// `matrices` equal row-major matrices as they were stored, bf16 or float32.
struct Whole {
    const void* values;
    int64_t matrices, rows, columns;
    Dtype dtype;

    int64_t value_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
    const void* row(int64_t matrix, int64_t index) const {
        return static_cast<const char*>(values) + (matrix * rows + index) * columns * value_bytes();
    }
};

// Tokens [N, D], `chosen` experts each: their ids and weights are [N, K].
struct Routing {
    int64_t tokens, chosen;
    const int64_t* experts;
    const float* weights;
};

// Keys and values [page, head, slot, channel], and where they are codes their scales [page, head, slot]. The slots of a
// sequence are those of its pages in the order of `table` [sequence, table_width]; without a table a sequence is a page.
// A page holds whole blocks of kKeysAtOnce keys, or all that its sequence can have.
struct KeyValues {
    const void *keys, *values;
    const float *key_scales, *value_scales;
    const int32_t* table;
    Stored stored;
    int64_t pages, heads, slots, channels, table_width;

    int64_t page(int64_t sequence, int64_t slot) const {
        return table ? table[sequence * table_width + slot / slots] : sequence;
    }
    // Where a slot of a sequence lies among all vectors.
    int64_t vector(int64_t sequence, int64_t head, int64_t slot) const {
        return (page(sequence, slot) * heads + head) * slots + slot % slots;
    }

    // Keys or values from vector `first` on.
    Vectors vectors(bool of_values, int64_t first) const;
    // Whether all pages that hold slots of these sequences exist.
    bool has_pages(const int64_t* past, const int64_t* counts, int64_t sequences) const;
};

// out[n, o] = sum over i of weight[o, i] x[n, i]
void linear(const Call& call, const Quantized& weight, const void* x, int64_t tokens, void* out);
void linear(const Call& call, const Whole& weight, const void* x, int64_t tokens, void* out);

// out[n] = sum over k of weights[n, k] down[e] (silu(gate[e] x[n]) * up[e] x[n]), e = experts[n, k].
// gate_up: [E, 2, F, D] when quantized, [E, 2F, D] when whole. False if an expert id is not in [0, E).
bool mixture(const Call& call, const Quantized& gate_up, const Quantized& down, const Routing& routing, const void* x,
             void* out);
bool mixture(const Call& call, const Whole& gate_up, const Whole& down, const Routing& routing, const void* x,
             void* out);

// Causal attention of the last counts[b] tokens of each sequence to all its past[b] + counts[b] slots; q and out are
// [token, head, channel], the tokens of a sequence together. Scores are scaled by 1 / sqrt(channels). False if a page
// that holds a slot is not in [0, pages).
bool attention(const Call& call, const KeyValues& cache, const int64_t* past, const int64_t* counts, int64_t sequences,
               const void* q, void* out);

// A vector for each slot of each head of each page, with a scale each where they are codes.
struct Slots {
    void* values;
    float* scales;
    Stored stored;
    int64_t pages, heads, slots, channels;
};
// Vector [page, head, slot] = x[n, head] for the page and the slot of each token. False if there is no such slot.
bool store(const Call& call, const Slots& to, const int64_t* pages, const int64_t* slots, int64_t tokens, const void* x);

// Does 8-bit multiply-adds on one thread, as fast as the variant's instructions allow; returns how many. The portable one
// has none to measure.
int64_t multiply_adds(const Call& call, int64_t rounds);

// out = x / sqrt(mean(x^2) + epsilon) * weight for each token; the weight has the tokens' dtype.
void rms_norm(const Call& call, const void* x, const void* weight, int64_t tokens, int64_t width, float epsilon,
              void* out);

// out = a + b for rows of `width`; add_bias adds one row to all.
void add(const Call& call, const void* a, const void* b, int64_t tokens, int64_t width, void* out);
void add_bias(const Call& call, const void* a, const void* bias, int64_t tokens, int64_t width, void* out);

// out = silu(first half) * second half of rows of 2 x `width`
void swiglu(const Call& call, const void* x, int64_t tokens, int64_t width, void* out);

// Channels i and i + half of each head [token, head, channel] turned by the token's angle i; `half` of them.
struct Heads {
    int64_t tokens, heads, channels, half;
};
void rotate(const Call& call, const Heads& shape, const void* x, const float* cosines, const float* sines, void* out);

// out[n, i] = sum over j of softmax_j(q[n, i] k[n, j]) v[n, j] for x[n] = [q; k; v], each `experts` wide.
void relate(const Call& call, const void* x, int64_t tokens, int64_t experts, float* out);

// The largest of each token's logits, the lowest index first among equals, and the softmax over them. A NaN counts as
// the largest, so that it is not lost.
void choose(const Call& call, const float* logits, int64_t tokens, int64_t experts, int64_t chosen, float* weights,
            int64_t* ids);

}  // namespace yuanmoe
