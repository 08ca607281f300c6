// Units of work over the threads of one pool.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace yuanmoe {

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
// done. The threads are woken once, and nobody waits for one that wakes late. Callers from several threads at once do
// not share the pool: one has it, the others work alone.
void run(int threads, std::initializer_list<Phase> phases);

}  // namespace yuanmoe
