// Products with 4-bit, 8-bit and bfloat16 weights, alone and in mixtures of experts. The packing here follows the text
// of layout.h, not the Python packer.
#include "selftest.h"

namespace selftest {
namespace {

double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const double magnitude = std::ldexp((exponent ? 1024 : 0) + (bits & 1023), (exponent ? exponent : 1) - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
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

float stored(float value, float*) { return value; }
uint16_t stored(float value, uint16_t*) { return to_bfloat16(value); }
double value_of(float value) { return value; }
double value_of(uint16_t value) { return bfloat16_value(value); }

// Values as a whole matrix stores them.
template <class Value>
Whole whole(const std::vector<Value>& values, int64_t matrices, int64_t rows, int64_t columns) {
    return {values.data(), matrices, rows, columns, sizeof(Value) == 4 ? Dtype::kFloat32 : Dtype::kBfloat16};
}

template <class Value>
void test_linear_whole(int64_t tokens, int64_t rows, int64_t columns) {
    std::vector<Value> weight(rows * columns);
    std::vector<float> x(tokens * columns), first;
    for (Value& value : weight) value = stored(normal(), &value);
    for (float& value : x) value = normal();
    for (const Call& call : calls()) {
        std::vector<float> out(tokens * rows);
        linear(call, whole(weight, 1, rows, columns), x.data(), tokens, out.data());
        if (first.empty()) first = out;
        REQUIRE(same(out, first), "variants differ: %ld %ld %ld\n", long(tokens), long(rows), long(columns));
        if (tokens == 0) continue;
        std::vector<float> alone(rows);
        linear(call, whole(weight, 1, rows, columns), x.data() + (tokens - 1) * columns, 1, alone.data());
        REQUIRE(std::memcmp(alone.data(), out.data() + (tokens - 1) * rows, rows * 4) == 0, "batch matters\n");
    }
    for (int64_t i = 0; i < tokens * rows; ++i) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < columns; ++c) {
            const double product = value_of(weight[i % rows * columns + c]) * double(x[i / rows * columns + c]);
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

template <class Value>
void test_whole() {
    for (int i = 0; i < 4; ++i) test_linear_whole<Value>(i, uniform(1, 40), uniform(1, 200));
    test_linear_whole<Value>(17, uniform(1, 40), uniform(1, 200));
    const int64_t width = uniform(1, 90), expert = uniform(1, 90);
    std::vector<Value> values(3 * 2 * expert * width);
    for (Value& value : values) value = stored(normal(), &value);
    const Whole gate_up = whole(values, 3, 2 * expert, width), down = whole(values, 3, width, expert);
    test_mixture(gate_up, down, 3, 2, false);
    test_mixture(gate_up, down, 14, 1, true);
}

}  // namespace

void check_products() {
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
    test_whole<uint16_t>();
    test_whole<float>();
}

}  // namespace selftest
