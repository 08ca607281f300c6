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
class Work {
  public:
    explicit Work(std::initializer_list<Phase> phases) : phases_(phases) {}

    // What each thread does.
    void join() {
        Progress* progress = progress_;
        for (const Phase& phase : phases_) {
            for (int64_t unit = progress->next++; unit < phase.units; unit = progress->next++) {
                phase.body(phase.context, unit);
                ++progress->done;
            }
            for (int turns = 0; progress->done < phase.units; ++turns)
                if (turns > kSpins) std::this_thread::yield();
            ++progress;
        }
    }

  private:
    static constexpr int kSpins = 2000;  // some microseconds: phases end together unless a core is taken away

    struct alignas(64) Progress {
        std::atomic<int64_t> next{0}, done{0};
    };
    std::initializer_list<Phase> phases_;
    Progress progress_[kMaxPhases];
};

// Used where torch has no OpenMP. Workers live as long as the process; after a fork the child has none and works alone.
class Pool {
  public:
    void run(int threads, Work& work) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return work.join();  // another caller has the workers
        {
            const std::lock_guard<std::mutex> lock(state_);
            while (static_cast<int>(workers_.size()) < threads - 1)
                workers_.emplace_back(&Pool::serve, this, static_cast<int>(workers_.size()));
            work_ = &work;
            wanted_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        work.join();
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
            work.join();
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

void run(int threads, std::initializer_list<Phase> phases) {
    Work work(phases);
    int64_t most = 0;
    for (const Phase& phase : phases) most = std::max(most, phase.units);
    threads = static_cast<int>(std::min<int64_t>(threads, most));
    if (threads <= 1) return work.join();
    if (const OpenmpParallel parallel = openmp)
        return parallel([](void* data) { static_cast<Work*>(data)->join(); }, &work, threads, 0);
    static Pool* const pool = new Pool;  // never destroyed: a static destructor would join threads of a forked parent
    pool->run(threads, work);
}

}  // namespace yuanmoe
