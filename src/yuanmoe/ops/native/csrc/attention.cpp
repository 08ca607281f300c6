#include <algorithm>
#include <cmath>
#include <vector>

#include "operations.h"
#include "machine/threads.h"

namespace yuanmoe {
namespace {

constexpr int64_t kQueriesAtOnce = 16;  // that meet keys and values widened once
constexpr int64_t kWidenFrom = 2;       // fewer queries read them as they are stored

// Consecutive new tokens of a sequence: `token` is the first of all tokens, `visible` the slots that it sees.
struct Queries {
    int64_t sequence, token, count, visible;
};

std::vector<Queries> cut(const int64_t* past, const int64_t* counts, int64_t sequences) {
    std::vector<Queries> out;
    for (int64_t sequence = 0, token = 0; sequence < sequences; token += counts[sequence++])
        for (int64_t first = 0; first < counts[sequence]; first += kQueriesAtOnce)
            out.push_back({sequence, token + first, std::min(kQueriesAtOnce, counts[sequence] - first),
                           past[sequence] + first + 1});
    return out;
}

// What one thread needs for one head: a block of keys and of values, queries and their sums, all in float32, and one
// vector more.
struct Workspace {
    explicit Workspace(int64_t padded) : padded(padded), data((2 * (kKeysAtOnce + kQueriesAtOnce) + 1) * padded) {}

    float* keys() { return data.data(); }
    float* values() { return keys() + kKeysAtOnce * padded; }
    float* query(int64_t t) { return values() + (kKeysAtOnce + t) * padded; }
    float* sum(int64_t t) { return query(kQueriesAtOnce + t); }
    float* one() { return sum(kQueriesAtOnce); }

    int64_t padded;
    std::vector<float> data;
};

Vectors widened(const Kernels& kernels, const Vectors& from, int64_t count, int64_t channels, int64_t padded,
                float* to) {
    kernels.widen(from, count, channels, padded, to);
    return {to, from.scales, Stored::kFloat32, nullptr};
}

void attend_head(const Call& call, const KeyValues& cache, const Queries& queries, int64_t head, const void* q,
                 void* out) {
    const bool split = cache.stored == Stored::kBfloat16;
    const int64_t channels = cache.channels, step = split ? kDotColumns : 16;
    const int64_t padded = (channels + step - 1) / step * step;
    static thread_local Workspace reused(0);
    if (reused.padded != padded) reused = Workspace(padded);
    Workspace& space = reused;
    Softmax states[kQueriesAtOnce];
    const float scale = 1.0f / std::sqrt(static_cast<float>(channels));
    for (int64_t t = 0; t < queries.count; ++t) {
        float *query = space.query(t), *read = split ? space.one() : query;
        std::fill_n(read, padded, 0.0f);
        read_values(q, call.dtype, ((queries.token + t) * cache.heads + head) * channels, channels, read);
        for (int64_t i = 0; i < channels; ++i) read[i] *= scale;
        for (int64_t i = 0; split && i < padded; i += step) split_step(read + i, query + i);
        std::fill_n(space.sum(t), padded, 0.0f);
        states[t] = {-INFINITY, 0.0f, space.sum(t)};
    }
    const int64_t last = queries.visible + queries.count - 1;
    for (int64_t start = 0; start < last; start += kKeysAtOnce) {
        const int64_t count = std::min<int64_t>(kKeysAtOnce, last - start);
        const int64_t first = cache.vector(queries.sequence, head, start);
        Vectors keys = cache.vectors(false, first), values = cache.vectors(true, first);
        const bool ends = start + kKeysAtOnce >= last;
        if (!ends || head + 1 < cache.heads) {
            const int64_t next = cache.vector(queries.sequence, head + ends, ends ? 0 : start + kKeysAtOnce);
            keys.next = cache.vectors(false, next).data;
            values.next = cache.vectors(true, next).data;
        }
        if (channels < padded || (queries.count >= kWidenFrom && cache.stored != Stored::kFloat32)) {
            keys = widened(*call.kernels, keys, count, channels, padded, space.keys());
            values = widened(*call.kernels, values, count, channels, padded, space.values());
        }
        for (int64_t t = 0; t < queries.count; ++t) {
            const int64_t seen = std::min(count, queries.visible + t - start);
            if (seen > 0) call.kernels->attend(space.query(t), keys, values, seen, padded, &states[t]);
        }
    }
    for (int64_t t = 0; t < queries.count; ++t) {
        float *sum = space.sum(t), *mean = split ? space.one() : sum;
        for (int64_t i = 0; i < padded; ++i) sum[i] /= states[t].total;
        for (int64_t i = 0; split && i < padded; i += step) join_step(sum + i, mean + i);
        write_values(out, call.dtype, ((queries.token + t) * cache.heads + head) * channels, channels, mean);
    }
}

}  // namespace

Vectors KeyValues::vectors(bool of_values, int64_t first) const {
    const int64_t bytes = stored == Stored::kFloat32 ? 4 : stored == Stored::kBfloat16 ? 2 : 1;
    const float* scales = of_values ? value_scales : key_scales;
    return {static_cast<const char*>(of_values ? values : keys) + first * channels * bytes,
            stored == Stored::kInt8 ? scales + first : nullptr, stored, nullptr};
}

bool KeyValues::has_pages(const int64_t* past, const int64_t* counts, int64_t sequences) const {
    for (int64_t sequence = 0; sequence < sequences; ++sequence)
        for (int64_t slot = 0; counts[sequence] && slot < past[sequence] + counts[sequence]; slot += slots)
            if (page(sequence, slot) < 0 || page(sequence, slot) >= pages) return false;
    return true;
}

bool attention(const Call& call, const KeyValues& cache, const int64_t* past, const int64_t* counts, int64_t sequences,
               const void* q, void* out) {
    if (!cache.has_pages(past, counts, sequences)) return false;
    const std::vector<Queries> all = cut(past, counts, sequences);
    const int64_t units = all.size() * cache.heads;
    const auto unit = [&](int64_t i) { attend_head(call, cache, all[i / cache.heads], i % cache.heads, q, out); };
    run(call.threads, {phase(units, unit)});
    return true;
}

}  // namespace yuanmoe
