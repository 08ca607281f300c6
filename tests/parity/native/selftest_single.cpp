// Norms, relations, choices and rotations of single tokens.
#include "selftest.h"

namespace selftest {
namespace {

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

}  // namespace

void check_single() {
    for (const int64_t tokens : {0, 1, 40}) {
        test_single(tokens, uniform(1, 70), uniform(1, 40));
        test_rotate(tokens, uniform(1, 3), 24, uniform(0, 12));
    }
}

}  // namespace selftest
