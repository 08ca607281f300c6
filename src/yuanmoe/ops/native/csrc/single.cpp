// What is done to one token at a time between matrix products: norms, rotations, storing, routing. torch takes several operations for each of these, and at
// one token each costs as much as reading 100 KB of weights.
#include <algorithm>
#include <cmath>
#include <vector>

#include "operations.h"
#include "machine/threads.h"

namespace yuanmoe {
namespace {

constexpr int64_t kTokensAtOnce = 16;  // that one thread takes; fewer are not worth waking another

template <class Body>
void each_token(const Call& call, int64_t tokens, const Body& body) {
    const Cut parts = Cut::of(tokens, kTokensAtOnce);
    const auto part = [&](int64_t i) {
        for (int64_t token = parts.begin(i); token < parts.end(i); ++token) body(token);
    };
    run(call.threads, {phase(parts.parts, part)});
}

// A buffer of this thread, kept from call to call.
float* buffer(int64_t size) {
    static thread_local std::vector<float> reused;
    if (static_cast<int64_t>(reused.size()) < size) reused.resize(size);
    return reused.data();
}

}  // namespace

void rms_norm(const Call& call, const void* x, const void* weight, int64_t tokens, int64_t width, float epsilon,
              void* out) {
    std::vector<float> factors(width);
    read_values(weight, call.dtype, 0, width, factors.data());
    each_token(call, tokens, [&](int64_t token) {
        float* values = buffer(2 * width);
        read_values(x, call.dtype, token * width, width, values);
        call.kernels->rms_norm(values, factors.data(), width, epsilon, values + width);
        write_values(out, call.dtype, token * width, width, values + width);
    });
}

static void add_rows(const Call& call, const void* a, const void* b, bool same_b, int64_t tokens, int64_t width,
                     void* out) {
    each_token(call, tokens, [&](int64_t token) {
        float *left = buffer(2 * width), *right = left + width;
        read_values(a, call.dtype, token * width, width, left);
        read_values(b, call.dtype, same_b ? 0 : token * width, width, right);
        for (int64_t i = 0; i < width; ++i) left[i] += right[i];
        write_values(out, call.dtype, token * width, width, left);
    });
}

void add(const Call& call, const void* a, const void* b, int64_t tokens, int64_t width, void* out) {
    add_rows(call, a, b, false, tokens, width, out);
}

void add_bias(const Call& call, const void* a, const void* bias, int64_t tokens, int64_t width, void* out) {
    add_rows(call, a, bias, true, tokens, width, out);
}

void swiglu(const Call& call, const void* x, int64_t tokens, int64_t width, void* out) {
    each_token(call, tokens, [&](int64_t token) {
        float* values = buffer(2 * width);
        read_values(x, call.dtype, 2 * token * width, 2 * width, values);
        call.kernels->swiglu(values, values + width, width);
        write_values(out, call.dtype, token * width, width, values);
    });
}

void rotate(const Call& call, const Heads& shape, const void* x, const float* cosines, const float* sines, void* out) {
    const auto [tokens, heads, channels, half] = shape;
    each_token(call, tokens, [&, heads = heads, channels = channels, half = half](int64_t token) {
        const float *cosine = cosines + token * half, *sine = sines + token * half;
        float *from = buffer(2 * channels), *to = from + channels;
        for (int64_t head = token * heads; head < (token + 1) * heads; ++head) {
            read_values(x, call.dtype, head * channels, channels, from);
            for (int64_t i = 0; i < half; ++i) to[i] = from[i] * cosine[i] - from[half + i] * sine[i];
            for (int64_t i = 0; i < half; ++i) to[half + i] = from[half + i] * cosine[i] + from[i] * sine[i];
            std::copy(from + 2 * half, from + channels, to + 2 * half);
            write_values(out, call.dtype, head * channels, channels, to);
        }
    });
}

bool store(const Call& call, const Slots& to, const int64_t* pages, const int64_t* slots, int64_t tokens,
           const void* x) {
    const auto inside = [](int64_t i, int64_t end) { return 0 <= i && i < end; };
    for (int64_t n = 0; n < tokens; ++n)
        if (!inside(pages[n], to.pages) || !inside(slots[n], to.slots)) return false;
    each_token(call, tokens, [&](int64_t token) {
        float* values = buffer(to.channels);
        for (int64_t head = 0; head < to.heads; ++head) {
            const int64_t vector = (pages[token] * to.heads + head) * to.slots + slots[token];
            const int64_t first = vector * to.channels;
            read_values(x, call.dtype, (token * to.heads + head) * to.channels, to.channels, values);
            if (to.stored == Stored::kInt8)
                to.scales[vector] = call.kernels->encode(values, to.channels, static_cast<int8_t*>(to.values) + first);
            else
                write_values(to.values, static_cast<Dtype>(to.stored), first, to.channels, values);
        }
    });
    return true;
}

void relate(const Call& call, const void* x, int64_t tokens, int64_t experts, float* out) {
    each_token(call, tokens, [&](int64_t token) {
        float* q = buffer(3 * experts);
        read_values(x, call.dtype, token * 3 * experts, 3 * experts, q);
        call.kernels->relate(q, q + experts, q + 2 * experts, experts, out + token * experts);
    });
}

void choose(const Call& call, const float* logits, int64_t tokens, int64_t experts, int64_t chosen, float* weights,
            int64_t* ids) {
    each_token(call, tokens, [&](int64_t token) {
        const float* scores = logits + token * experts;
        int64_t* mine = ids + token * chosen;
        const auto before = [&](int64_t a, int64_t b) {
            if (std::isnan(scores[a]) || std::isnan(scores[b])) return std::isnan(scores[a]) && !std::isnan(scores[b]);
            return scores[a] > scores[b];
        };
        for (int64_t place = 0; place < chosen; ++place) {
            const auto free = [&](int64_t i) { return std::find(mine, mine + place, i) == mine + place; };
            int64_t best = 0;
            while (!free(best)) ++best;
            for (int64_t i = best + 1; i < experts; ++i)
                if (before(i, best) && free(i)) best = i;
            mine[place] = best;
            weights[token * chosen + place] = scores[best];
        }
        call.kernels->softmax(weights + token * chosen, chosen);
    });
}

}  // namespace yuanmoe
