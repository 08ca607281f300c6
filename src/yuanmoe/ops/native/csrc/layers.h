// Whole decoder layers out of the operations of this library, one after the other without leaving it: what
// model/decoder.py computes, bit for bit. Between two products Python takes as long as 10 MB of weights, because the
// weights that went by have taken its place in the caches.
#pragma once
#include "operations.h"

namespace yuanmoe {

// A weight in few bits, or whole in bf16 or float32, whichever has rows; none has where a layer does without.
struct Matrix {
    Quantized packed;
    Whole whole;
    const void* bias;  // in the dtype of the tokens, or null

    int64_t rows() const { return packed.codes ? packed.rows : whole.rows; }
    bool is_there() const { return packed.codes || whole.values; }
};

struct LayerWeights {
    const void *input_norm, *post_norm, *filter_norm;  // the last is null without Localized Filtering
    Matrix conv1, conv2, q, k, v, o, router;
    Matrix gate_up, down;              // of all experts
    Matrix dense_gate_up, dense_down;  // of a dense layer, or of shared experts
    int32_t relates;                   // whether the router is the Attention Router
};

// What a layer remembers: keys and values, and the last filter input and hidden value of each sequence.
struct LayerState {
    Slots keys, values;
    void* tails[2];
};

// What the router of a layer decided: weights and experts [N, K], logits [N, E].
struct Routed {
    float* weights;
    int64_t* experts;
    float* logits;
};

// The new tokens of each sequence, flat, and where their state is.
struct Pass {
    int64_t tokens, sequences, width, half, chosen;
    float epsilon;
    const int64_t *past, *counts;      // of each sequence
    const int32_t* table;              // its pages, or null
    int64_t table_width;
    const int64_t *pages, *slots;      // where the keys and values of each token go
    const int64_t* tails;              // the tail that a sequence continues
    const int64_t *kept, *kept_in;     // tokens that leave a tail, and which
    int64_t num_kept;
    const float *cosines, *sines;
};

// Takes tokens x [N, width] through the layers, in place. False if a page or slot does not exist.
bool run_layers(const Call& call, const LayerWeights* weights, const LayerState* states, const Routed* routed,
                int64_t layers, const Pass& pass, void* x);

}  // namespace yuanmoe
