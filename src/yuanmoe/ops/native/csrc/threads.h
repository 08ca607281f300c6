// Units of work over the threads of one pool.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace yuanmoe {

// GOMP_parallel(function, data, threads, flags): what a compiler makes of `#pragma omp parallel`.
using OpenmpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Threads come from this OpenMP runtime from now on (torch's own, so that there is one pool), or from a pool of ours.
void use_openmp(OpenmpParallel parallel);

// body(context, unit) for every unit in [0, units).
struct Phase {
    int64_t units;
    void (*body)(const void* context, int64_t unit);
    const void* context;
};

// A phase out of a callable, which must outlive it.
template <class Body>
Phase phase(int64_t units, const Body& body) {
    return {units, [](const void* context, int64_t unit) { (*static_cast<const Body*>(context))(unit); }, &body};
}

constexpr int kMaxPhases = 4;

// Runs the phases on at most `threads` threads, each phase after all units of the one before; returns when all are
// done. The threads are woken once, and nobody waits for one that wakes late.
void run(int threads, std::initializer_list<Phase> phases);

}  // namespace yuanmoe
