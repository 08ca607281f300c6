// Attention of one query to a block of keys, over the lanes of a variant; part of kernels.h.
//
// The softmax is computed block by block with a running maximum (arXiv 1805.02867). Blocks start at fixed positions and
// every sum has one order, so a query's result is the same number however many queries are computed with it.
#pragma once

namespace yuanmoe {
namespace {

inline float below(float x, float limit) { return x < limit ? limit : x; }

// `count` vectors of `channels` in float32, `padded` apart, zeros behind; codes times their scales where they are codes.
inline void widen(const Vectors& from, int64_t count, int64_t channels, int64_t padded, float* out) {
    for (int64_t j = 0; j < count; ++j, out += padded) {
        const int64_t first = j * channels;
        if (from.stored == Stored::kFloat32) {
            std::memcpy(out, static_cast<const float*>(from.data) + first, channels * sizeof(float));
        } else if (from.stored == Stored::kBfloat16) {
            const uint16_t* values = static_cast<const uint16_t*>(from.data) + first;
            for (int64_t i = 0; i < channels; ++i) out[i] = as_float(static_cast<int32_t>(uint32_t{values[i]} << 16));
        } else {
            const int8_t* codes = static_cast<const int8_t*>(from.data) + first;
            for (int64_t i = 0; i < channels; ++i) out[i] = from.scales[j] * codes[i];
        }
        for (int64_t i = channels; i < padded; ++i) out[i] = 0.0f;
    }
}

// 16 channels of a vector in float32, as they lie in memory.
template <class Lanes>
struct FloatVectors {
    const float* data;
    int64_t channels;

    explicit FloatVectors(const Vectors& from, int64_t channels)
        : data(static_cast<const float*>(from.data)), channels(channels) {}
    auto load(int64_t vector, int64_t channel) const { return Lanes::load(data + vector * channels + channel); }
};

template <class Lanes>
struct Bfloat16Vectors {
    const uint16_t* data;
    int64_t channels;

    explicit Bfloat16Vectors(const Vectors& from, int64_t channels)
        : data(static_cast<const uint16_t*>(from.data)), channels(channels) {}
    auto load(int64_t vector, int64_t channel) const { return Lanes::load_bfloat16(data + vector * channels + channel); }
};

template <class Lanes>
struct CodeVectors {
    const int8_t* data;
    const float* scales;
    int64_t channels;

    explicit CodeVectors(const Vectors& from, int64_t channels)
        : data(static_cast<const int8_t*>(from.data)), scales(from.scales), channels(channels) {}
    auto load(int64_t vector, int64_t channel) const {
        return Lanes::mul(Lanes::fill(scales[vector]), Lanes::load_codes(data + vector * channels + channel));
    }
};

// out[k] = q times key first + k, 16 sums added as a tree; behind the last key that one again.
template <class Lanes, class Keys>
void scores(const float* q, const Keys& keys, int64_t first, int64_t count, float* out) {
    int64_t key[kKeysTogether];
    typename Lanes::Floats sum[kKeysTogether];
    for (int k = 0; k < kKeysTogether; ++k) {
        key[k] = first + k < count ? first + k : count - 1;
        sum[k] = Lanes::fill(0.0f);
    }
    for (int64_t i = 0; i < keys.channels; i += 16) {
        const auto query = Lanes::load(q + i);
        for (int k = 0; k < kKeysTogether; ++k) sum[k] = Lanes::add(sum[k], Lanes::mul(query, keys.load(key[k], i)));
    }
    for (int k = 0; k < kKeysTogether; ++k) {
        alignas(64) float lanes[16];
        Lanes::store(lanes, sum[k]);
        out[k] = tree_sum(lanes);
    }
}

// sum = sum * shrink + values weighted with p, for kLanes x 16 channels.
template <class Lanes, int kLanes, class Values>
void weigh(const float* p, const Values& values, int64_t channel, int64_t count, float shrink, float* sum) {
    typename Lanes::Floats total[kLanes];
    for (int l = 0; l < kLanes; ++l) total[l] = Lanes::mul(Lanes::load(sum + 16 * l), Lanes::fill(shrink));
    for (int64_t j = 0; j < count; ++j) {
        const auto weight = Lanes::fill(p[j]);
        for (int l = 0; l < kLanes; ++l)
            total[l] = Lanes::add(total[l], Lanes::mul(weight, values.load(j, channel + 16 * l)));
    }
    for (int l = 0; l < kLanes; ++l) Lanes::store(sum + 16 * l, total[l]);
}

// Asks for vectors that are read soon: rows of a head's past are short runs, where the hardware looks too little ahead
// (measured on one busy core: 11 against 7 GB/s of keys and values in bfloat16).
template <class Source>
void prefetch_vectors(const Source& vectors, int64_t first, int64_t count) {
    const int64_t bytes = vectors.channels * static_cast<int64_t>(sizeof *vectors.data);
    const char* const begin = reinterpret_cast<const char*>(vectors.data) + first * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) prefetch(begin + i, 0);
}

template <class Lanes, class Source>
void attend_stored(const float* q, const Source& keys, const Source& values, int64_t count, bool cached,
                   Softmax* state) {
    alignas(64) float p[kKeysAtOnce];
    for (int64_t j = 0; j < count; j += kKeysTogether) {
        if (!cached) {
            prefetch_vectors(values, j, kKeysTogether);
            prefetch_vectors(keys, j + kKeysAtOnce, kKeysTogether);
        }
        scores<Lanes>(q, keys, j, count, p + j);
    }
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
    for (; i + 64 <= values.channels; i += 64) weigh<Lanes, 4>(p, values, i, count, shrink, state->sum + i);
    for (; i < values.channels; i += 16) weigh<Lanes, 1>(p, values, i, count, shrink, state->sum + i);
    state->maximum = maximum;
    state->total = total;
}

template <class Lanes>
void attend(const float* q, const Vectors& keys, const Vectors& values, int64_t count, int64_t channels,
            Softmax* state) {
    const auto as = [&](auto&& k, auto&& v) { attend_stored<Lanes>(q, k, v, count, keys.widened, state); };
    if (keys.stored == Stored::kFloat32) as(FloatVectors<Lanes>(keys, channels), FloatVectors<Lanes>(values, channels));
    if (keys.stored == Stored::kBfloat16)
        as(Bfloat16Vectors<Lanes>(keys, channels), Bfloat16Vectors<Lanes>(values, channels));
    if (keys.stored == Stored::kInt8) as(CodeVectors<Lanes>(keys, channels), CodeVectors<Lanes>(values, channels));
}

}  // namespace
}  // namespace yuanmoe
