#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace yuanmoe {
namespace {

// Units are taken one by one, so a thread that another process slows down takes fewer.
struct Work {
    int64_t units;
    void (*body)(const void*, int64_t);
    const void* context;
    std::atomic<int64_t> next{0};

    void drain() {
        for (int64_t unit = next++; unit < units; unit = next++) body(context, unit);
    }
};

// Used where torch has no OpenMP. Workers live as long as the process; after a fork the child has none and works alone.
class Pool {
  public:
    void run(int threads, Work& work) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return work.drain();  // another caller has the workers
        {
            const std::lock_guard<std::mutex> lock(state_);
            while (static_cast<int>(workers_.size()) < threads - 1)
                workers_.emplace_back(&Pool::serve, this, static_cast<int>(workers_.size()));
            work_ = &work;
            wanted_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        work.drain();
        std::unique_lock<std::mutex> lock(state_);
        work_ = nullptr;
        idle_.wait(lock, [&] { return active_ == 0; });
    }

  private:
    void serve(int index) {
        std::unique_lock<std::mutex> lock(state_);
        for (uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return work_ && round_ != seen; });
            seen = round_;
            if (index >= wanted_) continue;
            Work& work = *work_;
            ++active_;
            lock.unlock();
            work.drain();
            lock.lock();
            if (--active_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_, state_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> workers_;
    Work* work_ = nullptr;
    int wanted_ = 0, active_ = 0;
    uint64_t round_ = 0;
};

std::atomic<OpenmpParallel> openmp{nullptr};

}  // namespace

void use_openmp(OpenmpParallel parallel) { openmp = parallel; }

void run_units(int threads, int64_t units, void (*body)(const void*, int64_t), const void* context) {
    Work work{units, body, context};
    threads = static_cast<int>(std::min<int64_t>(threads, units));
    if (threads <= 1) return work.drain();
    if (const OpenmpParallel parallel = openmp)
        return parallel([](void* data) { static_cast<Work*>(data)->drain(); }, &work, threads, 0);
    static Pool* const pool = new Pool;  // never destroyed: a static destructor would join threads of a forked parent
    pool->run(threads, work);
}

}  // namespace yuanmoe
