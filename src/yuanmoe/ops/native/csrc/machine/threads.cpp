// A pool of our own rather than torch's OpenMP: that one ends every region by waiting for all its threads, also for one
// that another program keeps from its core (measured on busy cores: 154 us for a product of 56 us, here 82). torch's
// threads sleep meanwhile, as ours do in its operations, so there are never more at work than asked for.
#include "machine/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace yuanmoe {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

constexpr int kSpins = 2000;  // some microseconds: phases end together unless a core is taken away

// Each thread takes the units of its own share one by one, so that it reads memory front to back and shares no counter,
// and then helps where others, slowed down by another process, have not come yet.
class Work {
  public:
    Work(int threads, std::initializer_list<Phase> phases) : shares_(std::min(threads, kMaxShares)), phases_(phases) {
        Progress* progress = progress_;
        for (const Phase& phase : phases_) {
            for (int share = 0; share < shares_; ++share) progress->next[share].unit = begin(phase, share);
            ++progress;
        }
    }

    // What each thread does.
    void join() {
        const int mine = joined_++ % shares_;
        Progress* progress = progress_;
        for (const Phase& phase : phases_) {
            int64_t done = 0;
            for (int i = 0; i < shares_; ++i) done += take(phase, (mine + i) % shares_, progress);
            progress->done += done;
            for (int turns = 0; progress->done < phase.units; ++turns)
                turns < kSpins ? pause() : std::this_thread::yield();
            ++progress;
        }
    }

  private:
    static constexpr int kMaxShares = 64;

    struct alignas(64) Next {
        std::atomic<int64_t> unit;
    };
    struct Progress {
        Next next[kMaxShares];
        alignas(64) std::atomic<int64_t> done{0};
    };

    int64_t begin(const Phase& phase, int share) const { return phase.units * share / shares_; }

    // Does what is left of a share; returns how many units.
    int64_t take(const Phase& phase, int share, Progress* progress) {
        int64_t done = 0;
        for (const int64_t end = begin(phase, share + 1);; ++done) {
            const int64_t unit = progress->next[share].unit++;
            if (unit >= end) return done;
            phase.body(phase.context, unit);
        }
    }

    int shares_;
    std::atomic<int> joined_{0};
    std::initializer_list<Phase> phases_;
    Progress progress_[kMaxPhases];
};

// Workers live as long as the process; after a fork the child has none and works alone.
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
        {
            const std::lock_guard<std::mutex> lock(state_);
            work_ = nullptr;
        }
        for (int turns = 0; active_ && turns < kSpins; ++turns) pause();  // to sleep and wake would take as long
        std::unique_lock<std::mutex> lock(state_);
        idle_.wait(lock, [&] { return active_ == 0; });
    }

  private:
    // Until the next operation of a token usually comes; a thread asleep takes as long to wake.
    static constexpr std::chrono::microseconds kAwake{50};

    void serve(int index) {
        for (uint64_t seen = 0;;) {
            if (index < wanted_) stay_awake(seen);
            std::unique_lock<std::mutex> lock(state_);
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (!work_ || index >= wanted_) continue;
            Work& work = *work_;
            ++active_;
            lock.unlock();
            work.join();
            lock.lock();
            if (--active_ == 0) idle_.notify_one();
        }
    }

    void stay_awake(uint64_t seen) const {
        const auto end = std::chrono::steady_clock::now() + kAwake;
        while (round_ == seen && std::chrono::steady_clock::now() < end) pause();
    }

    std::mutex turn_, state_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> workers_;
    Work* work_ = nullptr;
    std::atomic<int> active_{0};
    std::atomic<int> wanted_{0};
    std::atomic<uint64_t> round_{0};
};

}  // namespace

void run(int threads, std::initializer_list<Phase> phases) {
    int64_t most = 1;
    for (const Phase& phase : phases) most = std::max(most, phase.units);
    threads = static_cast<int>(std::clamp<int64_t>(threads, 1, most));
    Work work(threads, phases);
    if (threads == 1) return work.join();
    static Pool* const pool = new Pool;  // never destroyed: a static destructor would join threads of a forked parent
    pool->run(threads, work);
}

}  // namespace yuanmoe
