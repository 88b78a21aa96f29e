// Worker threads for kernels that last microseconds.
//
// Work is cut into numbered chunks that threads take from one atomic word, so a worker that the system has put aside costs
// its chunk at most, and the caller never waits for a worker that has not woken: it would do all chunks itself. That also
// makes a forked child safe, where workers do not exist. Workers spin for some ten microseconds after a job, then sleep.
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <mutex>
#include <thread>

namespace jevons {

class Pool {
public:
    static Pool& instance() {
        static Pool* pool = new Pool;  // never destroyed: workers may be asleep in it when the process exits
        return *pool;
    }

    // calls f(chunk) for chunk in [0, chunks) on up to `threads` threads
    template <class F>
    void run(int threads, int chunks, const F& f) {
        if (threads > MAX) threads = MAX;
        if (threads > chunks) threads = chunks;
        // a second caller, at the same time or from within a job, works alone
        if (threads <= 1 || chunks >= 0xffff || !busy_.try_lock()) {
            for (int i = 0; i < chunks; i++) f(i);
            return;
        }
        std::lock_guard<std::mutex> hold(busy_, std::adopt_lock);
        grow(threads - 1);
        call_.store([](const void* g, int i) { (*static_cast<const F*>(g))(i); }, std::memory_order_relaxed);
        argument_.store(&f, std::memory_order_relaxed);
        limit_.store(threads - 1, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        epoch_++;
        // epoch, chunk count and next chunk in one word: a worker that comes late can neither mix two jobs nor invent a chunk
        state_.store(uint64_t(epoch_) << 32 | uint64_t(chunks) << 16, std::memory_order_seq_cst);
        bell_.store(epoch_, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst) > 0)
            syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAKE_PRIVATE, threads - 1, nullptr, nullptr, 0);
        work();
        for (long spins = 0; done_.load(std::memory_order_acquire) < chunks; spins++) {
            _mm_pause();
            if (spins > 2000) sched_yield();
        }
    }

private:
    static constexpr int MAX = 64;
    static constexpr long SPINS = 4000;

    void grow(int workers) {
        while (workers_ < workers) {
            int id = workers_++;
            std::thread([this, id] { loop(id); }).detach();
        }
    }

    void work() {
        for (;;) {
            uint64_t state = state_.load(std::memory_order_acquire);
            int next = int(state & 0xffff), chunks = int(state >> 16 & 0xffff);
            if (next >= chunks) return;
            auto call = call_.load(std::memory_order_relaxed);
            auto argument = argument_.load(std::memory_order_relaxed);
            // success proves that the job just read is still open: the next one is published only when all chunks are done
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
            call(argument, next);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    void loop(int id) {
        uint32_t seen = 0;
        for (;;) {
            for (long spins = 0; bell_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) _mm_pause();
            while (bell_.load(std::memory_order_acquire) == seen) {
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
                asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            seen = bell_.load(std::memory_order_acquire);
            if (id < limit_.load(std::memory_order_relaxed)) work();
        }
    }

    std::mutex busy_;
    int workers_ = 0;
    uint32_t epoch_ = 0;
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<uint32_t> bell_{0};
    std::atomic<int> asleep_{0}, limit_{0};
    std::atomic<void (*)(const void*, int)> call_{nullptr};
    std::atomic<const void*> argument_{nullptr};
};

}  // namespace jevons
