// Every variant against sums in double precision and against each other, on buffers of exactly the promised size, so
// that the sanitizers see any step outside them. The packing here follows the text of layout.h, not the Python packer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "operations.h"

using namespace yuanmoe;

namespace {

std::mt19937 generator(7);

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

#define REQUIRE(condition, ...)                                           \
    if (!(condition)) {                                                   \
        std::printf("line %d: %s: ", __LINE__, #condition);               \
        std::printf(__VA_ARGS__);                                         \
        std::exit(1);                                                     \
    }

double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const double magnitude = std::ldexp((exponent ? 1024 : 0) + (bits & 1023), (exponent ? exponent : 1) - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}
float bfloat16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Random codes over their whole range and fp16 scales, subnormal and negative ones too; padding as the packer leaves it.
struct Weight {
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales;
    std::vector<int> code;      // [matrix][row][column]
    std::vector<double> scale;  // [matrix][row][group]
    Quantized packed;

    Weight(int64_t matrices, int64_t rows, int64_t columns, int bits, int group) {
        packed = {nullptr, nullptr, matrices, rows, columns, bits, group};
        const int64_t blocks = packed.blocks(), groups = packed.groups();
        codes.assign(matrices * blocks * packed.block_bytes(), bits == 4 ? 0x88 : 0);
        scales.assign(matrices * blocks * groups * 16, 0);
        const int top = 1 << (bits - 1);
        for (int64_t m = 0; m < matrices; ++m)
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < columns; ++c) {
                    code.push_back(static_cast<int>(uniform(-top, top - 1)));
                    put(m, r, c, code.back());
                }
                for (int64_t g = 0; g < groups; ++g) {
                    const uint16_t bits16 = static_cast<uint16_t>(uniform(0, 1) << 15 | uniform(0, 0x2fff));
                    scales[((m * blocks + r / 16) * groups + g) * 16 + r % 16] = bits16;
                    scale.push_back(half_value(bits16));
                }
            }
        packed.codes = codes.data();
        packed.scales = scales.data();
    }

    void put(int64_t m, int64_t r, int64_t c, int value) {
        uint8_t* block = codes.data() + (m * packed.blocks() + r / 16) * packed.block_bytes();
        const int64_t columns = 32 / packed.bits;  // of a chunk
        uint8_t& byte = block[c / columns * 64 + r % 16 * 4 + c % 4];
        if (packed.bits == 8) byte = static_cast<uint8_t>(value);
        else if (c % 8 < 4) byte = static_cast<uint8_t>((byte & 0xf0) | (value + 8));
        else byte = static_cast<uint8_t>((byte & 0x0f) | (value + 8) << 4);
    }
};

// The sum and its bound: groups + 3 roundings of 2^-24 of the sum of magnitudes.
void check_row(const Weight& w, int64_t row, const float* x, float got) {
    const Quantized& q = w.packed;
    double sum = 0, magnitude = 0;
    for (int64_t g = 0; g < q.groups(); ++g) {
        const int64_t begin = g * q.group, end = std::min<int64_t>(begin + q.group, q.columns);
        float maximum = 0;
        for (int64_t c = begin; c < end; ++c) maximum = std::max(maximum, std::fabs(x[c]));
        const float scale = maximum / 127.0f, inverse = maximum > 0 ? 127.0f / maximum : 0.0f;
        for (int64_t c = begin; c < end; ++c) {
            const double product = w.code[row * q.columns + c] * w.scale[row * q.groups() + g] *
                                   (std::nearbyintf(x[c] * inverse) * static_cast<double>(scale));
            sum += product;
            magnitude += std::fabs(product);
        }
    }
    const double bound = (q.groups() + 3) * std::ldexp(magnitude, -24);
    REQUIRE(std::fabs(got - sum) <= bound, "%g, not %g within %g\n", got, sum, bound);
}

std::vector<Call> calls() {
    std::vector<Call> out;
    for (const int threads : {1, 3}) {
        out.push_back({&kPortable, threads, Dtype::kFloat32});
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
            out.push_back({&kAvx2, threads, Dtype::kFloat32});
#endif
        out.push_back({&kAvx512, threads, Dtype::kFloat32});
    }
    return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_linear(int64_t tokens, int64_t rows, int64_t columns, int bits, int group) {
    const Weight weight(1, rows, columns, bits, group);
    std::vector<float> x(tokens * columns), first;
    for (float& value : x) value = uniform(0, 9) ? normal() : 0;
    for (const Call& call : calls()) {
        std::vector<float> out(tokens * rows), alone(rows);
        linear(call, weight.packed, x.data(), tokens, out.data());
        if (first.empty()) {
            first = out;
            for (int64_t i = 0; i < tokens * rows; ++i)
                check_row(weight, i % rows, x.data() + i / rows * columns, out[i]);
        }
        REQUIRE(same(out, first), "variants differ: %ld %ld %ld\n", long(tokens), long(rows), long(columns));
        if (tokens == 0) continue;
        linear(call, weight.packed, x.data() + (tokens - 1) * columns, 1, alone.data());
        REQUIRE(std::memcmp(alone.data(), out.data() + (tokens - 1) * rows, rows * 4) == 0, "batch matters\n");
    }
}

void test_linear_bf16(int64_t tokens, int64_t rows, int64_t columns) {
    std::vector<uint16_t> weight(rows * columns);
    std::vector<float> x(tokens * columns), first;
    for (uint16_t& value : weight) value = to_bfloat16(normal());
    for (float& value : x) value = normal();
    for (const Call& call : calls()) {
        std::vector<float> out(tokens * rows);
        linear(call, Bfloat16{weight.data(), 1, rows, columns}, x.data(), tokens, out.data());
        if (first.empty()) first = out;
        REQUIRE(same(out, first), "variants differ: %ld %ld %ld\n", long(tokens), long(rows), long(columns));
    }
    for (int64_t i = 0; i < tokens * rows; ++i) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < columns; ++c) {
            const double product = bfloat16_value(weight[i % rows * columns + c]) * double(x[i / rows * columns + c]);
            sum += product;
            magnitude += std::fabs(product);
        }
        const double bound = (columns / 32 + 7) * std::ldexp(magnitude, -24);
        REQUIRE(std::fabs(first[i] - sum) <= bound, "%g, not %g\n", first[i], sum);
    }
}

template <class Weights>
void test_mixture(const Weights& gate_up, const Weights& down, int64_t tokens, int64_t chosen, bool all_on_one) {
    std::vector<float> x(tokens * gate_up.columns), weights(tokens * chosen), first;
    std::vector<int64_t> experts(tokens * chosen);
    for (float& value : x) value = normal();
    for (float& value : weights) value = normal();
    for (int64_t& id : experts) id = all_on_one ? down.matrices - 1 : uniform(0, down.matrices - 1);
    const Routing routing{tokens, chosen, experts.data(), weights.data()};
    for (const Call& call : calls()) {
        std::vector<float> out(tokens * down.rows), alone(down.rows);
        REQUIRE(mixture(call, gate_up, down, routing, x.data(), out.data()), "ids\n");
        if (first.empty()) first = out;
        REQUIRE(same(out, first), "variants differ: %ld tokens\n", long(tokens));
        for (const float value : out) REQUIRE(std::isfinite(value), "%g\n", value);
        if (tokens == 0) continue;
        const Routing last{1, chosen, &experts[(tokens - 1) * chosen], &weights[(tokens - 1) * chosen]};
        REQUIRE(mixture(call, gate_up, down, last, &x[(tokens - 1) * gate_up.columns], alone.data()), "ids\n");
        REQUIRE(std::memcmp(alone.data(), &out[(tokens - 1) * down.rows], down.rows * 4) == 0, "batch matters\n");
    }
    if (tokens == 0) return;
    std::vector<float> out(tokens * down.rows);
    for (const int64_t id : {int64_t(-1), down.matrices}) {
        experts[0] = id;
        REQUIRE(!mixture(calls()[0], gate_up, down, routing, x.data(), out.data()), "expert %ld\n", long(id));
    }
}

// The same slots in pages of `slots` each, the last one where the first would be; behind them a page that nobody has.
struct Paged {
    std::vector<char> storage[2];
    std::vector<float> scales[2];
    std::vector<int32_t> table;
    KeyValues cache;

    Paged(const KeyValues& whole, int64_t slots, int64_t bytes) : cache(whole) {
        cache.table_width = whole.slots / slots, cache.slots = slots;
        const int64_t used = whole.pages * cache.table_width, run = slots * whole.channels * bytes;
        cache.pages = used + 1;
        for (int64_t page = 0; page < used; ++page) table.push_back(static_cast<int32_t>(used - 1 - page));
        for (int which = 0; which < 2; ++which) {
            const char* from = static_cast<const char*>(which ? whole.values : whole.keys);
            const float* from_scales = which ? whole.value_scales : whole.key_scales;
            storage[which].resize(cache.pages * whole.heads * run);
            scales[which].resize(cache.pages * whole.heads * slots);
            for (int64_t page = 0; page < used; ++page)
                for (int64_t head = 0; head < whole.heads; ++head) {
                    const int64_t sequence = page / cache.table_width, part = page % cache.table_width;
                    const int64_t source = (sequence * whole.heads + head) * cache.table_width + part;
                    const int64_t target = table[page] * whole.heads + head;
                    std::memcpy(&storage[which][target * run], from + source * run, run);
                    std::memcpy(&scales[which][target * slots], from_scales + source * slots, slots * 4);
                }
        }
        cache.table = table.data(), cache.keys = storage[0].data(), cache.values = storage[1].data();
        cache.key_scales = scales[0].data(), cache.value_scales = scales[1].data();
    }
};

// Against the plain formula in double; each query alone, in any variant and beside any others gives the same number, in
// pages too.
void test_attention(Stored stored, int64_t heads, int64_t channels) {
    const std::vector<int64_t> past{0, 37, 5, 64}, counts{uniform(1, 40), 1, 0, uniform(1, 3)};
    const int64_t sequences = past.size(), slots = 96;
    int64_t tokens = 0;
    for (const int64_t count : counts) tokens += count;
    const int64_t bytes = stored == Stored::kFloat32 ? 4 : stored == Stored::kBfloat16 ? 2 : 1;
    const int64_t vectors = sequences * heads * slots;
    std::vector<char> storage[2];
    std::vector<float> scales[2], wide[2], q(tokens * heads * channels), first;
    for (float& value : q) value = 3 * normal();
    for (int which = 0; which < 2; ++which) {
        storage[which].resize(vectors * channels * bytes);
        for (int64_t v = 0; v < vectors; ++v) scales[which].push_back(std::fabs(normal()) / 60);
        for (int64_t i = 0; i < vectors * channels; ++i) {
            float value = normal();
            if (stored == Stored::kFloat32) {
                std::memcpy(&storage[which][i * 4], &value, 4);
            } else if (stored == Stored::kBfloat16) {
                const uint16_t bits = to_bfloat16(value);
                std::memcpy(&storage[which][i * 2], &bits, 2);
                value = bfloat16_value(bits);
            } else {
                storage[which][i] = static_cast<char>(uniform(-127, 127));
                value = scales[which][i / channels] * storage[which][i];
            }
            wide[which].push_back(value);
        }
    }
    const KeyValues cache{storage[0].data(), storage[1].data(), scales[0].data(), scales[1].data(), nullptr, stored,
                          sequences, heads, slots, channels, 1};
    Paged paged(cache, 32, bytes);
    for (const Call& call : calls()) {
        std::vector<float> out(tokens * heads * channels);
        REQUIRE(attention(call, cache, past.data(), counts.data(), sequences, q.data(), out.data()), "pages\n");
        if (first.empty()) first = out;
        REQUIRE(same(out, first), "variants differ: %ld heads, %ld channels\n", long(heads), long(channels));
        REQUIRE(attention(call, paged.cache, past.data(), counts.data(), sequences, q.data(), out.data()), "pages\n");
        REQUIRE(same(out, first), "pages matter: %ld heads, %ld channels\n", long(heads), long(channels));
        for (int64_t b = 0, token = 0; b < sequences; token += counts[b++])
            for (int64_t t = 0; t < counts[b]; ++t) {
                std::vector<int64_t> before(past), one(sequences, 0);
                before[b] += t, one[b] = 1;
                std::vector<float> alone(heads * channels);
                const int64_t at = (token + t) * heads * channels;
                attention(call, cache, before.data(), one.data(), sequences, &q[at], alone.data());
                REQUIRE(std::memcmp(alone.data(), &out[at], alone.size() * 4) == 0, "neighbours matter\n");
            }
    }
    for (const int64_t page : {int64_t(-1), paged.cache.pages}) {
        paged.table[1 * paged.cache.table_width + 1] = static_cast<int32_t>(page);
        std::vector<float> out(q.size());
        REQUIRE(!attention(calls()[0], paged.cache, past.data(), counts.data(), sequences, q.data(), out.data()), "page\n");
    }
    for (int64_t b = 0, token = 0; b < sequences; token += counts[b++])
        for (int64_t i = 0; i < counts[b] * heads; ++i) {
            const float *query = &q[(token * heads + i) * channels], *got = &first[(token * heads + i) * channels];
            const int64_t base = (b * heads + i % heads) * slots, seen = past[b] + i / heads + 1;
            std::vector<double> weights(seen), sum(channels);
            double maximum = -INFINITY, total = 0;
            for (int64_t j = 0; j < seen; ++j) {
                for (int64_t c = 0; c < channels; ++c) weights[j] += double(query[c]) * wide[0][(base + j) * channels + c];
                maximum = std::max(maximum, weights[j] /= std::sqrt(double(channels)));
            }
            for (int64_t j = 0; j < seen; ++j) {
                total += weights[j] = std::exp(weights[j] - maximum);
                for (int64_t c = 0; c < channels; ++c) sum[c] += weights[j] * wide[1][(base + j) * channels + c];
            }
            for (int64_t c = 0; c < channels; ++c)
                REQUIRE(std::fabs(got[c] - sum[c] / total) < 2e-5, "%g, not %g\n", got[c], sum[c] / total);
        }
}

template <class Operation>
std::vector<float> everywhere(int64_t size, const Operation& operation) {
    std::vector<float> first;
    for (const Call& call : calls()) {
        std::vector<float> out(size);
        operation(call, out.data());
        if (first.empty()) first = out;
        REQUIRE(same(out, first), "variants differ: %ld values\n", long(size));
    }
    return first;
}

// Norms, relations of experts and the choice among them, on buffers of exactly their size.
void test_single(int64_t tokens, int64_t width, int64_t experts) {
    std::vector<float> x(tokens * width), weight(width), projected(tokens * 3 * experts);
    for (auto* values : {&x, &weight, &projected})
        for (float& value : *values) value = 2 * normal();
    const auto normed = everywhere(tokens * width, [&](const Call& call, float* out) {
        rms_norm(call, x.data(), weight.data(), tokens, width, 1e-6f, out);
    });
    const auto logits = everywhere(tokens * experts, [&](const Call& call, float* out) {
        relate(call, projected.data(), tokens, experts, out);
    });
    for (int64_t n = 0; n < tokens; ++n) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += double(x[n * width + i]) * x[n * width + i];
        for (int64_t i = 0; i < width; ++i) {
            const double wanted = x[n * width + i] / std::sqrt(squares / width + 1e-6) * weight[i];
            REQUIRE(std::fabs(normed[n * width + i] - wanted) <= 1e-5 * std::fabs(wanted), "%g\n", wanted);
        }
        const float *q = &projected[n * 3 * experts], *k = q + experts, *v = k + experts;
        for (int64_t i = 0; i < experts; ++i) {
            double total = 0, sum = 0, maximum = -INFINITY;
            for (int64_t j = 0; j < experts; ++j) maximum = std::max(maximum, double(q[i]) * k[j]);
            for (int64_t j = 0; j < experts; ++j) {
                const double share = std::exp(double(q[i]) * k[j] - maximum);
                total += share, sum += share * v[j];
            }
            REQUIRE(std::fabs(logits[n * experts + i] - sum / total) < 1e-4, "%g\n", sum / total);
        }
    }
    for (const int64_t chosen : {int64_t(1), experts}) {
        std::vector<int64_t> ids(tokens * chosen);
        const auto weights = everywhere(tokens * chosen, [&](const Call& call, float* out) {
            choose(call, logits.data(), tokens, experts, chosen, out, ids.data());
        });
        for (int64_t i = 0; i + 1 < tokens * chosen; ++i)
            if ((i + 1) % chosen) REQUIRE(weights[i] >= weights[i + 1], "order\n");
    }
}

// Turned by an angle and back; what lies behind the turned channels stays.
void test_rotate(int64_t tokens, int64_t heads, int64_t channels, int64_t half) {
    const Heads shape{tokens, heads, channels, half};
    std::vector<float> x(tokens * heads * channels), cosines, sines, back(x.size());
    for (float& value : x) value = normal();
    for (int64_t i = 0; i < tokens * half; ++i) {
        const float angle = 3 * normal();
        cosines.push_back(std::cos(angle)), sines.push_back(std::sin(angle));
    }
    const auto turned = everywhere(x.size(), [&](const Call& call, float* out) {
        rotate(call, shape, x.data(), cosines.data(), sines.data(), out);
    });
    for (float& sine : sines) sine = -sine;
    rotate(calls()[0], shape, turned.data(), cosines.data(), sines.data(), back.data());
    for (size_t i = 0; i < x.size(); ++i) REQUIRE(std::fabs(back[i] - x[i]) < 1e-5, "%g, not %g\n", back[i], x[i]);
}

// What was stored is what attention reads: each vector in its slot, the others untouched.
void test_store(Stored stored) {
    const int64_t pages = 3, heads = 2, slots = 5, channels = 21, bytes = stored == Stored::kFloat32 ? 4 : 2;
    std::vector<char> storage(pages * heads * slots * channels * (stored == Stored::kInt8 ? 1 : bytes), 0);
    std::vector<float> scales(pages * heads * slots, 0), x(2 * heads * channels), wide(32);
    for (float& value : x) value = normal();
    const Slots to{storage.data(), scales.data(), stored, pages, heads, slots, channels};
    const int64_t in_page[] = {2, 0}, at[] = {4, 3};
    REQUIRE(store(calls()[0], to, in_page, at, 2, x.data()), "slots\n");
    for (int64_t n = 0; n < 2; ++n)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t vector = (in_page[n] * heads + head) * slots + at[n];
            const KeyValues cache{storage.data(), storage.data(), scales.data(), scales.data(), nullptr, stored,
                                  pages, heads, slots, channels, 1};
            kPortable.widen(cache.vectors(false, vector), 1, channels, 32, wide.data());
            for (int64_t i = 0; i < channels; ++i) {
                const float value = stored == Stored::kBfloat16 ? wide[bf16_place(i)]
                                    : stored == Stored::kInt8   ? wide[i] * scales[vector]
                                                                : wide[i];
                REQUIRE(std::fabs(value - x[(n * heads + head) * channels + i]) < 0.02, "%g\n", value);
            }
        }
    for (const auto& [page, slot] : {std::pair<int64_t, int64_t>{pages, 0}, {-1, 0}, {0, slots}, {0, -1}})
        REQUIRE(!store(calls()[0], to, &page, &slot, 1, x.data()), "%ld %ld\n", long(page), long(slot));
}

}  // namespace

int main() {
    for (const int64_t tokens : {0, 1, 40}) {
        test_single(tokens, uniform(1, 70), uniform(1, 40));
        test_rotate(tokens, uniform(1, 3), 24, uniform(0, 12));
    }
    for (const Stored stored : {Stored::kFloat32, Stored::kBfloat16, Stored::kInt8}) test_store(stored);
    for (const Stored stored : {Stored::kFloat32, Stored::kBfloat16, Stored::kInt8})
        for (const int64_t channels : {1, 12, 16, 80, 96, 288}) test_attention(stored, uniform(1, 3), channels);
    for (const int bits : {4, 8})
        for (const int group : {32, 64, 128}) {
            test_linear(1, 1, 1, bits, group);
            test_linear(0, 5, 70, bits, group);
            for (int i = 0; i < 4; ++i) test_linear(uniform(1, 30), uniform(1, 70), uniform(1, 300), bits, group);
            const int64_t width = uniform(1, 150), expert = uniform(1, 200);
            const Weight gate_up(6, expert, width, bits, group), down(3, width, expert, 12 - bits, 32);
            test_mixture(gate_up.packed, down.packed, uniform(2, 40), 2, false);
            test_mixture(gate_up.packed, down.packed, 14, 1, true);
            test_mixture(gate_up.packed, down.packed, 0, 2, false);
        }
    for (int i = 0; i < 4; ++i) test_linear_bf16(i, uniform(1, 40), uniform(1, 200));
    const int64_t width = uniform(1, 90), expert = uniform(1, 90);
    std::vector<uint16_t> values(3 * 2 * expert * width);
    for (uint16_t& value : values) value = to_bfloat16(normal());
    const Bfloat16 gate_up{values.data(), 3, 2 * expert, width}, down{values.data(), 3, width, expert};
    test_mixture(gate_up, down, 3, 2, false);
    std::puts("ok");
}
