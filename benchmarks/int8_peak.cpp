// The most 8-bit multiply-adds that this CPU can do: independent sums in registers, no memory. Prints GOP/s of each run.
//   g++ -O2 -pthread int8_peak.cpp -o int8_peak && ./int8_peak THREADS RUNS
// AVX2 takes two instructions for 32 products (vpmaddubsw, vpaddw), AVX-512-VNNI one for 64 (vpdpbusd).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define SUMS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

static void avx2(long rounds) {
    for (long i = 0; i < rounds; ++i) {
#define STEP(n) "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpaddw %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
        __asm__ volatile(SUMS(STEP)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                         "xmm10", "xmm11", "xmm13");
#undef STEP
    }
}

static void avx512(long rounds) {
    for (long i = 0; i < rounds; ++i) {
#define STEP(n) "vpdpbusd %%zmm15, %%zmm14, %%zmm" #n "\n"
        __asm__ volatile(SUMS(STEP)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                         "xmm10", "xmm11");
#undef STEP
    }
}

int main(int, char** arguments) {
    const int threads = std::atoi(arguments[1]), runs = std::atoi(arguments[2]);
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (!vnni && !__builtin_cpu_supports("avx2")) return 1;
    const long rounds = 2000000;
    for (int run = 0; run < runs; ++run) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> workers;
        for (int i = 0; i < threads; ++i) workers.emplace_back(vnni ? avx512 : avx2, rounds);
        for (std::thread& worker : workers) worker.join();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        std::printf("%.1f\n", 2.0 * 12 * (vnni ? 64 : 32) * rounds * threads / taken.count() / 1e9);
    }
}
