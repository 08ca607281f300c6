// What is done to one token at a time: norm and routing, over the lanes of a variant; part of kernels.h.
#pragma once

namespace yuanmoe {
namespace {

// 16 sums of squares added as a tree; the last step is padded with zeros.
template <class Lanes>
void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
    auto squares = Lanes::fill(0.0f);
    const auto step = [&](const float* values) {
        const auto v = Lanes::load(values);
        squares = Lanes::add(squares, Lanes::mul(v, v));
    };
    const int64_t whole = count / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) step(x + i);
    alignas(64) float lanes[16] = {};
    std::memcpy(lanes, x + whole, (count - whole) * sizeof *x);
    step(lanes);
    Lanes::store(lanes, squares);
    const float factor = 1.0f / __builtin_sqrtf(tree_sum(lanes) / static_cast<float>(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

// Sums run over j one after the other, for all i at once, so that they are vectors of one order. The largest product of
// q[i] is that with the largest or the smallest k.
inline void relate(const float* q, const float* k, const float* v, int64_t count, float* out) {
    float high = k[0], low = k[0];
    for (int64_t j = 1; j < count; ++j) high = k[j] > high ? k[j] : high, low = k[j] < low ? k[j] : low;
    float maximum[kMaxExperts], total[kMaxExperts], sum[kMaxExperts];
    for (int64_t i = 0; i < count; ++i) maximum[i] = q[i] * (q[i] > 0.0f ? high : low), total[i] = sum[i] = 0.0f;
    for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < count; ++i) {
            const float share = exponential(below(q[i] * k[j] - maximum[i], -87.0f));
            total[i] += share;
            sum[i] += share * v[j];
        }
    for (int64_t i = 0; i < count; ++i) out[i] = sum[i] / total[i];
}

inline void softmax(float* values, int64_t count) {
    const float maximum = values[0];
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += values[i] = exponential(below(values[i] - maximum, -87.0f));
    for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

}  // namespace
}  // namespace yuanmoe
