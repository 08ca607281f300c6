// Attention of one query to a block of keys, over the lanes of a variant; part of kernels.h.
//
// The softmax is computed block by block with a running maximum (arXiv 1805.02867). Blocks start at fixed positions and
// every sum has one order, so a query's result is the same number however many queries are computed with it.
#pragma once

namespace yuanmoe {
namespace {

inline float below(float x, float limit) { return x < limit ? limit : x; }

// `count` vectors of `channels` in float32, `padded` apart, zeros behind; codes times their scales where they are codes.
inline void widen(const void* from, Stored stored, const float* scales, int64_t count, int64_t channels, int64_t padded,
                  float* out) {
    for (int64_t j = 0; j < count; ++j, out += padded) {
        const int64_t first = j * channels;
        if (stored == Stored::kFloat32) {
            std::memcpy(out, static_cast<const float*>(from) + first, channels * sizeof(float));
        } else if (stored == Stored::kBfloat16) {
            const uint16_t* values = static_cast<const uint16_t*>(from) + first;
            for (int64_t i = 0; i < channels; ++i) out[i] = as_float(static_cast<int32_t>(uint32_t{values[i]} << 16));
        } else {
            const int8_t* codes = static_cast<const int8_t*>(from) + first;
            for (int64_t i = 0; i < channels; ++i) out[i] = scales[j] * codes[i];
        }
        for (int64_t i = channels; i < padded; ++i) out[i] = 0.0f;
    }
}

// out[k] = q times keys[k], 16 sums added as a tree.
template <class Lanes>
void scores(const float* q, const float* keys, int64_t padded, float* out) {
    typename Lanes::Floats sum[kKeysTogether];
    for (auto& s : sum) s = Lanes::fill(0.0f);
    for (int64_t i = 0; i < padded; i += 16) {
        const auto query = Lanes::load(q + i);
        for (int k = 0; k < kKeysTogether; ++k)
            sum[k] = Lanes::add(sum[k], Lanes::mul(query, Lanes::load(keys + k * padded + i)));
    }
    for (int k = 0; k < kKeysTogether; ++k) {
        alignas(64) float lanes[16];
        Lanes::store(lanes, sum[k]);
        out[k] = tree_sum(lanes);
    }
}

// sum = sum * shrink + values weighted with p, for kLanes x 16 channels.
template <class Lanes, int kLanes>
void weigh(const float* p, const float* values, int64_t count, int64_t padded, float shrink, float* sum) {
    typename Lanes::Floats total[kLanes];
    for (int l = 0; l < kLanes; ++l) total[l] = Lanes::mul(Lanes::load(sum + 16 * l), Lanes::fill(shrink));
    for (int64_t j = 0; j < count; ++j) {
        const auto weight = Lanes::fill(p[j]);
        for (int l = 0; l < kLanes; ++l)
            total[l] = Lanes::add(total[l], Lanes::mul(weight, Lanes::load(values + j * padded + 16 * l)));
    }
    for (int l = 0; l < kLanes; ++l) Lanes::store(sum + 16 * l, total[l]);
}

template <class Lanes>
void attend(const float* q, const float* keys, const float* values, int64_t count, int64_t padded, Softmax* state) {
    alignas(64) float p[kKeysAtOnce];
    for (int64_t j = 0; j < count; j += kKeysTogether) scores<Lanes>(q, keys + j * padded, padded, p + j);
    float maximum = state->maximum;
    for (int64_t j = 0; j < count; ++j) maximum = p[j] > maximum ? p[j] : maximum;
    for (int64_t j = count; j < kKeysAtOnce; ++j) p[j] = maximum;
    // Loops of their own and of fixed length, so that the compiler turns them into vectors.
    for (int j = 0; j < kKeysAtOnce; ++j) p[j] = below(p[j] - maximum, -87.0f);
    for (int j = 0; j < kKeysAtOnce; ++j) p[j] = exponential(p[j]);
    const float shrink = exponential(below(state->maximum - maximum, -87.0f));
    float total = state->total * shrink;
    for (int64_t j = 0; j < count; ++j) total += p[j];
    int64_t i = 0;
    for (; i + 64 <= padded; i += 64) weigh<Lanes, 4>(p, values + i, count, padded, shrink, state->sum + i);
    for (; i < padded; i += 16) weigh<Lanes, 1>(p, values + i, count, padded, shrink, state->sum + i);
    state->maximum = maximum;
    state->total = total;
}

}  // namespace
}  // namespace yuanmoe
