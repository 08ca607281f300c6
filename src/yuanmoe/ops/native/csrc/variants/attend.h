// Attention of one query to a block of keys, over the lanes of a variant; part of kernels.h.
//
// The softmax is computed block by block with a running maximum (arXiv 1805.02867). Blocks start at fixed positions and
// every sum has one order, so a query's result is the same number however many queries are computed with it.
#pragma once

namespace yuanmoe {
namespace {

inline float below(float x, float limit) { return x < limit ? limit : x; }

// `count` vectors of `channels` in float32, `padded` apart, zeros behind; codes without their scales, bfloat16 in the
// order of bf16_place.
template <class Lanes>
void widen(const Vectors& from, int64_t count, int64_t channels, int64_t padded, float* out) {
    for (int64_t j = 0; j < count; ++j, out += padded) {
        const int64_t first = j * channels;
        if (from.stored == Stored::kBfloat16) {
            const uint16_t* values = static_cast<const uint16_t*>(from.data) + first;
            for (int64_t i = 0; i < padded; i += kDotColumns) {
                uint16_t rest[kDotColumns] = {};
                const bool whole = i + kDotColumns <= channels;
                if (!whole) std::memcpy(rest, values + i, (channels - i) * sizeof *values);
                Lanes::store(out + i, Lanes::even_bfloat16(whole ? values + i : rest));
                Lanes::store(out + i + kDotColumns / 2, Lanes::odd_bfloat16(whole ? values + i : rest));
            }
            continue;
        }
        if (from.stored == Stored::kFloat32) {
            std::memcpy(out, static_cast<const float*>(from.data) + first, channels * sizeof(float));
        } else {
            const int8_t* codes = static_cast<const int8_t*>(from.data) + first;
            for (int64_t i = 0; i < channels; ++i) out[i] = codes[i];
        }
        for (int64_t i = channels; i < padded; ++i) out[i] = 0.0f;
    }
}

// What is stored, as `kParts` x 16 channels in float32 at a time.
template <class Lanes>
struct FloatVectors {
    using Value = float;
    static constexpr int kParts = 1;
    static void load(const float* values, typename Lanes::Floats (&out)[kParts]) { out[0] = Lanes::load(values); }
};

template <class Lanes>
struct Bfloat16Vectors {
    using Value = uint16_t;
    static constexpr int kParts = 2;
    static void load(const uint16_t* values, typename Lanes::Floats (&out)[kParts]) {
        out[0] = Lanes::even_bfloat16(values);
        out[1] = Lanes::odd_bfloat16(values);
    }
};

template <class Lanes>
struct CodeVectors {
    using Value = int8_t;
    static constexpr int kParts = 1;
    static void load(const int8_t* codes, typename Lanes::Floats (&out)[kParts]) { out[0] = Lanes::load_codes(codes); }
};

// Vectors of one kind, `stride` channels each. Each line that is read asks for the same one of the next block: a head's
// past is a short run of memory, where the hardware looks too little ahead. Into the second cache: the first, which waits
// for fewer lines at a time, gave 80 % of the speed (Sapphire Rapids, bf16).
template <class Lanes, template <class> class Kind>
struct Rows {
    using Floats = typename Lanes::Floats;
    using Value = typename Kind<Lanes>::Value;
    static constexpr int kParts = Kind<Lanes>::kParts, kStep = 16 * kParts;

    const Value* data;
    const Value* next;
    int64_t stride;

    Rows(const Vectors& from, int64_t stride)
        : data(static_cast<const Value*>(from.data)), next(static_cast<const Value*>(from.next)), stride(stride) {}

    void load(int64_t vector, int64_t channel, Floats (&out)[kParts]) const {
        const int64_t at = vector * stride + channel;
        if (channel * sizeof(Value) % 64 == 0 && next) prefetch<2>(next + at, 0);
        Kind<Lanes>::load(data + at, out);
    }
};

// out[k] = q times key first + k, 16 sums added as a tree; behind the last key that one again.
template <class Lanes, class Keys>
void scores(const float* q, const Keys& keys, int64_t first, int64_t count, float* out) {
    constexpr int kParts = Keys::kParts;
    int64_t key[kKeysTogether];
    typename Lanes::Floats sum[kKeysTogether];
    for (int k = 0; k < kKeysTogether; ++k) {
        key[k] = first + k < count ? first + k : count - 1;
        sum[k] = Lanes::fill(0.0f);
    }
    for (int64_t i = 0; i < keys.stride; i += Keys::kStep) {
        typename Lanes::Floats query[kParts], part[kParts];
        for (int h = 0; h < kParts; ++h) query[h] = Lanes::load(q + i + 16 * h);
        for (int k = 0; k < kKeysTogether; ++k) {
            keys.load(key[k], i, part);
            for (int h = 0; h < kParts; ++h) sum[k] = Lanes::fma(query[h], part[h], sum[k]);
        }
    }
    for (int k = 0; k < kKeysTogether; ++k) {
        alignas(64) float lanes[16];
        Lanes::store(lanes, sum[k]);
        out[k] = tree_sum(lanes);
    }
}

// sum = sum * shrink + values times their weights, for `kSteps` steps of channels from `channel` on.
template <class Lanes, int kSteps, class Values>
void weigh(const float* weights, const Values& values, int64_t channel, int64_t count, float shrink, float* sum) {
    constexpr int kParts = Values::kParts;
    typename Lanes::Floats total[kSteps * kParts];
    for (int l = 0; l < kSteps * kParts; ++l) total[l] = Lanes::mul(Lanes::load(sum + 16 * l), Lanes::fill(shrink));
    for (int64_t j = 0; j < count; ++j) {
        const auto weight = Lanes::fill(weights[j]);
        for (int l = 0; l < kSteps; ++l) {
            typename Lanes::Floats part[kParts];
            values.load(j, channel + Values::kStep * l, part);
            for (int h = 0; h < kParts; ++h)
                total[l * kParts + h] = Lanes::fma(weight, part[h], total[l * kParts + h]);
        }
    }
    for (int l = 0; l < kSteps * kParts; ++l) Lanes::store(sum + 16 * l, total[l]);
}

// The same for all channels from `channel` on, as many together as fit.
template <class Lanes, int kSteps, class Values>
void weigh_all(const float* weights, const Values& values, int64_t channel, int64_t count, float shrink, float* sum) {
    for (; channel + kSteps * Values::kStep <= values.stride; channel += kSteps * Values::kStep)
        weigh<Lanes, kSteps>(weights, values, channel, count, shrink, sum + channel);
    if constexpr (kSteps > 1) weigh_all<Lanes, kSteps / 2>(weights, values, channel, count, shrink, sum);
}

template <class Lanes, template <class> class Kind>
void attend_as(const float* q, const Vectors& stored_keys, const Vectors& stored_values, int64_t count,
               int64_t channels, Softmax* state) {
    const Rows<Lanes, Kind> keys(stored_keys, channels), values(stored_values, channels);
    alignas(64) float p[kKeysAtOnce];
    for (int64_t j = 0; j < count; j += kKeysTogether) scores<Lanes>(q, keys, j, count, p + j);
    if (stored_keys.scales)
        for (int64_t j = 0; j < count; ++j) p[j] *= stored_keys.scales[j];
    float maximum = state->maximum;
    for (int64_t j = 0; j < count; ++j) maximum = p[j] > maximum ? p[j] : maximum;
    for (int64_t j = count; j < kKeysAtOnce; ++j) p[j] = maximum;
    // Loops of their own and of fixed length, so that the compiler turns them into vectors.
    for (int j = 0; j < kKeysAtOnce; ++j) p[j] = below(p[j] - maximum, -87.0f);
    for (int j = 0; j < kKeysAtOnce; ++j) p[j] = exponential(p[j]);
    const float shrink = exponential(below(state->maximum - maximum, -87.0f));
    float total = state->total * shrink;
    for (int64_t j = 0; j < count; ++j) total += p[j];
    if (stored_values.scales)
        for (int64_t j = 0; j < count; ++j) p[j] *= stored_values.scales[j];
    weigh_all<Lanes, Lanes::kChannelsTogether / values.kStep>(p, values, 0, count, shrink, state->sum);
    state->maximum = maximum;
    state->total = total;
}

template <class Lanes>
void attend(const float* q, const Vectors& keys, const Vectors& values, int64_t count, int64_t channels,
            Softmax* state) {
    constexpr auto floats = attend_as<Lanes, FloatVectors>;
    constexpr auto bfloat16 = attend_as<Lanes, Bfloat16Vectors>;
    constexpr auto codes = attend_as<Lanes, CodeVectors>;
    const auto as = keys.stored == Stored::kFloat32 ? floats : keys.stored == Stored::kBfloat16 ? bfloat16 : codes;
    as(q, keys, values, count, channels, state);
}

}  // namespace
}  // namespace yuanmoe
