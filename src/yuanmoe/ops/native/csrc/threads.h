// Units of work over the threads of one pool.
#pragma once
#include <cstdint>

namespace yuanmoe {

// GOMP_parallel(function, data, threads, flags): what a compiler makes of `#pragma omp parallel`.
using OpenmpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Threads come from this OpenMP runtime from now on (torch's own, so that there is one pool), or from a pool of ours.
void use_openmp(OpenmpParallel parallel);

// body(context, unit) for every unit in [0, units), on at most `threads` threads; returns when all are done.
void run_units(int threads, int64_t units, void (*body)(const void*, int64_t), const void* context);

// The same for a callable.
template <class Body>
void parallel_for(int threads, int64_t units, const Body& body) {
    run_units(threads, units, [](const void* context, int64_t unit) { (*static_cast<const Body*>(context))(unit); }, &body);
}

}  // namespace yuanmoe
