#include <vector>

#include "operations.h"
#include "rows.h"
#include "machine/threads.h"

namespace yuanmoe {
namespace {

// The choices (token n, k-th expert: number nK + k) sorted by expert, those of one expert cut into tiles.
struct Plan {
    struct Tile {
        int64_t first, width;  // positions in `choices`
    };
    struct Job {
        int64_t expert, first_tile, last_tile;
    };
    std::vector<int64_t> choices;    // choice at a position
    std::vector<int64_t> positions;  // position of a choice
    std::vector<Tile> tiles;
    std::vector<Job> jobs;

    // False if an id is out of range.
    bool make(const Routing& routing, int64_t experts, int64_t widest) {
        const int64_t count = routing.tokens * routing.chosen;
        std::vector<int64_t> starts(experts + 1, 0);
        for (int64_t i = 0; i < count; ++i) {
            if (routing.experts[i] < 0 || routing.experts[i] >= experts) return false;
            ++starts[routing.experts[i] + 1];
        }
        for (int64_t e = 0; e < experts; ++e) {
            if (starts[e + 1]) add_job(e, starts[e], starts[e + 1], widest);
            starts[e + 1] += starts[e];
        }
        choices.resize(count);
        positions.resize(count);
        for (int64_t i = 0; i < count; ++i) {
            positions[i] = starts[routing.experts[i]]++;
            choices[positions[i]] = i;
        }
        return true;
    }

  private:
    void add_job(int64_t expert, int64_t first, int64_t count, int64_t widest) {
        const int64_t first_tile = tiles.size();
        const Cut cut = Cut::of(count, widest);
        for (int64_t t = 0; t < cut.parts; ++t) tiles.push_back({first + cut.begin(t), cut.size(t)});
        jobs.push_back({expert, first_tile, static_cast<int64_t>(tiles.size())});
    }
};

// Experts with quantized weights. A gated unit is one group of F: its gate and up rows, SwiGLU, and its quantization
// as input of the down matrix, so that the hidden values never leave the cache as floats.
class QuantizedExperts {
  public:
    QuantizedExperts(const Call& call, const Quantized& gate_up, const Quantized& down, const Plan& plan,
                     int64_t chosen, const void* x)
        : call_(call),
          gate_up_(gate_up),
          down_(down),
          plan_(plan),
          chosen_(chosen),
          x_(x),
          tokens_(plan.choices.size(), gate_up),
          hidden_(plan.choices.size(), down),
          parts_(work_parts(down.blocks(), down.block_bytes(), call.threads)) {}

    int64_t gated_units() const { return down_.groups(); }
    int64_t down_units() const { return parts_.parts; }

    int64_t prepare_units() const { return group_parts(gate_up_).parts; }

    void prepare(const Plan::Tile& span, int64_t unit) const {
        const auto row = [&](int token) { return plan_.choices[span.first + token] / chosen_; };
        quantize_tile(call_, gate_up_, x_, row, unit, tokens_.tile(span.first, span.width));
    }

    void gated(const Plan::Job& job, int64_t unit) const {
        const int64_t group = down_.group, first = unit * group;
        const int64_t count = std::min(group, down_.columns - first);
        for (int64_t t = job.first_tile; t < job.last_tile; ++t) {
            const auto [position, width] = plan_.tiles[t];
            const Tile x = tokens_.tile(position, width), hidden = hidden_.tile(position, width);
            float gate[kMaxTile * kMaxGroup], up[kMaxTile * kMaxGroup];
            for (int64_t row = 0; row < count; row += kBlockRows) {
                scatter(2 * job.expert, (first + row) / kBlockRows, x, gate + row);
                scatter(2 * job.expert + 1, (first + row) / kBlockRows, x, up + row);
            }
            for (int token = 0; token < width; ++token) {
                float* values = gate + token * kMaxGroup;
                call_.kernels->swiglu(values, up + token * kMaxGroup, count);
                call_.kernels->quantize(values, count, group, unit, token, call_.kernels->bias(down_.bits), hidden);
            }
        }
    }

    // y[position][D]
    void down(const Plan::Job& job, int64_t unit, float* y) const {
        for (int64_t t = job.first_tile; t < job.last_tile; ++t)
            for (int64_t block = parts_.begin(unit); block < parts_.end(unit); ++block) {
                const auto [position, width] = plan_.tiles[t];
                float rows[kMaxTile * kBlockRows];
                multiply(call_, down_, job.expert, block, hidden_.tile(position, width), rows);
                const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, down_.rows - first);
                for (int64_t i = 0; i < width; ++i)
                    std::copy_n(rows + i * kBlockRows, count, y + (position + i) * down_.rows + first);
            }
    }

  private:
    // One block of gate or up times a tile, a token's rows kMaxGroup apart.
    void scatter(int64_t matrix, int64_t block, const Tile& x, float* out) const {
        float rows[kMaxTile * kBlockRows];
        multiply(call_, gate_up_, matrix, block, x, rows);
        for (int i = 0; i < x.width; ++i) std::copy_n(rows + i * kBlockRows, kBlockRows, out + i * kMaxGroup);
    }

    const Call& call_;
    const Quantized &gate_up_, &down_;
    const Plan& plan_;
    const int64_t chosen_;
    const void* const x_;
    const Activations tokens_, hidden_;
    const Cut parts_;
};

// Experts with whole weights, for a few tokens.
class WholeExperts {
  public:
    WholeExperts(const Call& call, const Whole& gate_up, const Whole& down, const Plan& plan, int64_t chosen,
                    const void* x)
        : call_(call),
          gate_up_(gate_up),
          down_(down),
          plan_(plan),
          chosen_(chosen),
          x_(x),
          tokens_(plan.choices.size(), gate_up.columns, gate_up.dtype),
          hidden_(plan.choices.size(), down.columns, down.dtype),
          gated_parts_(work_parts(down.columns, 2 * gate_up.columns * gate_up.value_bytes() / passes(plan), call.threads)),
          down_parts_(work_parts(down.rows, down.columns * down.value_bytes() / passes(plan), call.threads)) {}

    int64_t gated_units() const { return gated_parts_.parts; }
    int64_t down_units() const { return down_parts_.parts; }

    int64_t prepare_units() const { return 1; }

    void prepare(const Plan::Tile& span, int64_t) {
        for (int64_t position = span.first; position < span.first + span.width; ++position)
            tokens_.fill(position, call_, x_, plan_.choices[position] / chosen_);
    }

    void gated(const Plan::Job& job, int64_t unit) {
        each_tile(job, gated_parts_, unit, [&](int64_t position, int64_t width, int64_t row, int64_t count) {
            float gate[kMaxTile * kRowsAtOnce], up[kMaxTile * kRowsAtOnce];
            tokens_.dots(call_, gate_up_.row(job.expert, row), count, position, width, gate);
            tokens_.dots(call_, gate_up_.row(job.expert, down_.columns + row), count, position, width, up);
            for (int64_t i = 0; i < width; ++i) {
                float* values = gate + i * kRowsAtOnce;
                call_.kernels->swiglu(values, up + i * kRowsAtOnce, count);
                hidden_.put(position + i, row, count, values);
            }
        });
    }

    void down(const Plan::Job& job, int64_t unit, float* y) const {
        each_tile(job, down_parts_, unit, [&](int64_t position, int64_t width, int64_t row, int64_t count) {
            float sums[kMaxTile * kRowsAtOnce];
            hidden_.dots(call_, down_.row(job.expert, row), count, position, width, sums);
            for (int64_t i = 0; i < width; ++i)
                std::copy_n(sums + i * kRowsAtOnce, count, y + (position + i) * down_.rows + row);
        });
    }

  private:
    template <class Body>
    void each_tile(const Plan::Job& job, const Cut& parts, int64_t unit, const Body& body) const {
        const Plan::Tile &first = plan_.tiles[job.first_tile], &last = plan_.tiles[job.last_tile - 1];
        const Cut tiles = Cut::of(last.first + last.width - first.first, call_.kernels->tile_whole);
        for (int64_t t = 0; t < tiles.parts; ++t)
            for (int64_t row = parts.begin(unit); row < parts.end(unit); row += kRowsAtOnce)
                body(first.first + tiles.begin(t), tiles.size(t), row, std::min(kRowsAtOnce, parts.end(unit) - row));
    }
    // Experts that meet many tokens are cut into larger parts, so that the kernel has enough rows at once.
    static int64_t passes(const Plan& plan) {
        const int64_t jobs = plan.jobs.size(), choices = plan.choices.size();
        return std::clamp<int64_t>(choices / std::max<int64_t>(1, jobs), 1, 16);
    }

    const Call& call_;
    const Whole &gate_up_, &down_;
    const Plan& plan_;
    const int64_t chosen_;
    const void* const x_;
    FloatRows tokens_, hidden_;
    const Cut gated_parts_, down_parts_;
};

template <class Experts>
void mix(const Call& call, Experts& experts, const Plan& plan, const Routing& routing, int64_t width, void* out) {
    const int64_t jobs = plan.jobs.size(), gated_units = experts.gated_units(), down_units = experts.down_units();
    const std::unique_ptr<float[]> y(new float[plan.choices.size() * width]);
    const int64_t prepare_units = experts.prepare_units();
    const auto prepare = [&](int64_t i) { experts.prepare(plan.tiles[i / prepare_units], i % prepare_units); };
    const auto gated = [&](int64_t i) { experts.gated(plan.jobs[i / gated_units], i % gated_units); };
    const auto down = [&](int64_t i) { experts.down(plan.jobs[i / down_units], i % down_units, y.get()); };
    // Summed in the order of the router's ranking, whatever the order of the experts.
    const auto combine = [&](int64_t token) {
        constexpr int64_t kStep = 256;
        for (int64_t first = 0; first < width; first += kStep) {
            const int64_t count = std::min(kStep, width - first);
            float sum[kStep] = {};
            for (int64_t k = 0; k < routing.chosen; ++k) {
                const int64_t choice = token * routing.chosen + k;
                const float* part = y.get() + plan.positions[choice] * width + first;
                for (int64_t i = 0; i < count; ++i) sum[i] += routing.weights[choice] * part[i];
            }
            write_values(out, call.dtype, token * width + first, count, sum);
        }
    };
    const int64_t tiles = plan.tiles.size();
    run(call.threads, {phase(tiles * prepare_units, prepare), phase(jobs * gated_units, gated),
                       phase(jobs * down_units, down), phase(routing.tokens, combine)});
}

}  // namespace

bool mixture(const Call& call, const Quantized& gate_up, const Quantized& down, const Routing& routing, const void* x,
             void* out) {
    Plan plan;
    if (!plan.make(routing, down.matrices, call.kernels->tile)) return false;
    QuantizedExperts experts(call, gate_up, down, plan, routing.chosen, x);
    mix(call, experts, plan, routing, down.rows, out);
    return true;
}

bool mixture(const Call& call, const Whole& gate_up, const Whole& down, const Routing& routing, const void* x,
             void* out) {
    Plan plan;
    if (!plan.make(routing, down.matrices, call.kernels->tile)) return false;
    WholeExperts experts(call, gate_up, down, plan, routing.chosen, x);
    mix(call, experts, plan, routing, down.rows, out);
    return true;
}

}  // namespace yuanmoe
