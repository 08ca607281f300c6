#include "layers.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace yuanmoe {
namespace {

// A buffer of rows in the dtype of the tokens; memory is taken once a pass.
class Rows {
  public:
    void reserve(int64_t bytes) {
        if (bytes <= size_) return;
        data_.reset(new char[bytes]);
        size_ = bytes;
    }
    char* data() const { return data_.get(); }

  private:
    std::unique_ptr<char[]> data_;
    int64_t size_ = 0;
};

class Layers {
  public:
    Layers(const Call& call, const Pass& pass)
        : call_(call), pass_(pass), bytes_(call.dtype == Dtype::kFloat32 ? 4 : 2) {}

    bool run(const LayerWeights& weights, const LayerState& state, const Routed& routed, void* x) {
        const int64_t N = pass_.tokens, D = pass_.width;
        norm(x, weights.input_norm, normed_);
        if (!attend(weights, state)) return false;
        add(call_, x, sum_.data(), N, D, x);
        norm(x, weights.post_norm, normed_);
        feed_forward(weights, routed);
        add(call_, x, sum_.data(), N, D, x);
        return true;
    }

  private:
    char* rows(Rows& buffer, int64_t columns) {
        buffer.reserve(pass_.tokens * columns * bytes_);
        return buffer.data();
    }

    void norm(const void* x, const void* weight, Rows& out) {
        rms_norm(call_, x, weight, pass_.tokens, pass_.width, pass_.epsilon, rows(out, pass_.width));
    }

    void multiply(const Matrix& weight, const void* x, Rows& out) {
        void* const to = rows(out, weight.rows());
        if (weight.packed.codes) linear(call_, weight.packed, x, pass_.tokens, to);
        else linear(call_, weight.whole, x, pass_.tokens, to);
        if (weight.bias) add_bias(call_, to, weight.bias, pass_.tokens, weight.rows(), to);
    }

    // Each token behind the one before it in its sequence, [N, 2 width]; the last ones are remembered.
    const void* with_previous(const void* x, int64_t width, void* tails) {
        const int64_t size = width * bytes_;
        char* const out = rows(pairs_, 2 * width);
        const auto at = [&](const void* base, int64_t row) { return static_cast<const char*>(base) + row * size; };
        for (int64_t sequence = 0, token = 0; sequence < pass_.sequences; ++sequence)
            for (int64_t i = 0; i < pass_.counts[sequence]; ++i, ++token) {
                std::memcpy(out + 2 * token * size, i ? at(x, token - 1) : at(tails, pass_.tails[sequence]), size);
                std::memcpy(out + (2 * token + 1) * size, at(x, token), size);
            }
        for (int64_t i = 0; i < pass_.num_kept; ++i)
            std::memcpy(static_cast<char*>(tails) + pass_.kept_in[i] * size, at(x, pass_.kept[i]), size);
        return out;
    }

    const void* filtered(const LayerWeights& weights, const LayerState& state) {
        if (!weights.filter_norm) return normed_.data();
        multiply(weights.conv1, with_previous(normed_.data(), pass_.width, state.tails[0]), hidden_);
        multiply(weights.conv2, with_previous(hidden_.data(), weights.conv1.rows(), state.tails[1]), sum_);
        add(call_, sum_.data(), normed_.data(), pass_.tokens, pass_.width, sum_.data());
        norm(sum_.data(), weights.filter_norm, filtered_);
        return filtered_.data();
    }

    bool attend(const LayerWeights& weights, const LayerState& state) {
        const Slots &keys = state.keys, &values = state.values;
        const Heads shape{pass_.tokens, keys.heads, keys.channels, pass_.half};
        const void* const x = filtered(weights, state);
        multiply(weights.q, x, q_);
        multiply(weights.k, x, k_);
        multiply(weights.v, normed_.data(), v_);
        rotate(call_, shape, q_.data(), pass_.cosines, pass_.sines, q_.data());
        rotate(call_, shape, k_.data(), pass_.cosines, pass_.sines, k_.data());
        if (!store(call_, keys, pass_.pages, pass_.slots, pass_.tokens, k_.data())) return false;
        if (!store(call_, values, pass_.pages, pass_.slots, pass_.tokens, v_.data())) return false;
        const KeyValues cache{keys.values, values.values, keys.scales, values.scales, pass_.table,   keys.stored,
                              keys.pages,  keys.heads,    keys.slots,  keys.channels, pass_.table_width};
        char* const out = rows(v_, keys.heads * keys.channels);
        if (!attention(call_, cache, pass_.past, pass_.counts, pass_.sequences, q_.data(), out)) return false;
        multiply(weights.o, out, sum_);
        return true;
    }

    void feed_forward(const LayerWeights& weights, const Routed& routed) {
        if (!weights.router.is_there()) return dense(weights, sum_);
        const int64_t N = pass_.tokens, E = weights.down.packed.codes ? weights.down.packed.matrices
                                                                      : weights.down.whole.matrices;
        multiply(weights.router, normed_.data(), q_);
        if (weights.relates) relate(call_, q_.data(), N, E, routed.logits);
        else read_values(q_.data(), call_.dtype, 0, N * E, routed.logits);
        choose(call_, routed.logits, N, E, pass_.chosen, routed.weights, routed.experts);
        const Routing routing{N, pass_.chosen, routed.experts, routed.weights};
        void* const out = rows(sum_, pass_.width);
        if (weights.down.packed.codes)
            mixture(call_, weights.gate_up.packed, weights.down.packed, routing, normed_.data(), out);
        else
            mixture(call_, weights.gate_up.whole, weights.down.whole, routing, normed_.data(), out);
        if (!weights.dense_down.is_there()) return;
        dense(weights, filtered_);
        add(call_, out, filtered_.data(), N, pass_.width, out);
    }

    void dense(const LayerWeights& weights, Rows& out) {
        const int64_t width = weights.dense_gate_up.rows() / 2;
        multiply(weights.dense_gate_up, normed_.data(), q_);
        swiglu(call_, q_.data(), pass_.tokens, width, rows(k_, width));
        multiply(weights.dense_down, k_.data(), out);
    }

    const Call& call_;
    const Pass& pass_;
    const int64_t bytes_;
    Rows normed_, pairs_, hidden_, filtered_, q_, k_, v_, sum_;
};

}  // namespace

bool run_layers(const Call& call, const LayerWeights* weights, const LayerState* states, const Routed* routed,
                int64_t layers, const Pass& pass, void* x) {
    Layers all(call, pass);
    for (int64_t layer = 0; layer < layers; ++layer)
        if (!all.run(weights[layer], states[layer], routed[layer], x)) return false;
    return true;
}

}  // namespace yuanmoe
