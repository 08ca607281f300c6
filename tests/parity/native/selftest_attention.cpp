// Attention over stored keys and values, and how they are stored.
#include "selftest.h"

namespace selftest {
namespace {

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
                const auto code = static_cast<int8_t>(uniform(-127, 127));  // char has no sign on arm64
                storage[which][i] = static_cast<char>(code);
                value = scales[which][i / channels] * code;
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

void check_attention() {
    for (const Stored stored : {Stored::kFloat32, Stored::kBfloat16, Stored::kInt8}) test_store(stored);
    for (const Stored stored : {Stored::kFloat32, Stored::kBfloat16, Stored::kInt8})
        for (const int64_t channels : {1, 12, 16, 80, 96, 288}) test_attention(stored, uniform(1, 3), channels);
}

}  // namespace selftest
