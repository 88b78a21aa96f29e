// Rows of a table far larger than any cache: looked up and weighed, and the way back to weights, rows and the optimizer.
//
// Problem: a memory layer reads some hundred rows of a kilobyte each for a token, every one somewhere else. Memory answers after a hundred
// nanoseconds, so a loop that waits for a row before it asks for the next gets a tenth of the bandwidth. Approach: while a row is summed,
// the lines of the row four picks ahead are asked for. Sums are fp32, each in the order of the picks, whatever stands beside and however
// many threads there are. Gradients of rows: picks are sorted by row (radix, some bits of the row at a time), then every touched row is
// written once, with the sum over its picks. Plain C++ with the compiler's vectors, so that every x86-64 processor runs it.
#include <algorithm>
#include <vector>

#include "memory.hpp"
#include "pool.hpp"
#include "wide.hpp"

namespace jevons {
namespace {

// f(c, begin, end): the elements of share c that lie in [from, to) of a row.
template <class F>
void each_share(const Picks& p, long from, long to, const F& f) {
    long size = p.V / p.C;
    for (long c = from / size; c * size < to; c++) f(c, std::max(from, c * size), std::min(to, (c + 1) * size));
}

bool inside(const Picks& p, long Z) {
    for (long i = 0; i < p.T * p.X; i++)
        if (p.rows[i] < 0 || p.rows[i] >= Z || p.bucket(i) < 0 || p.bucket(i) >= p.E) return false;
    return true;
}

// f(token, from, to): tokens over the threads; of few tokens the threads take columns [from, to) of the rows
template <class F>
void each_token(long T, long V, int threads, const F& f) {
    long columns = T >= 2l * threads ? 1 : std::max(1l, std::min<long>(threads, V / 64));
    long chunks = columns > 1 ? T * columns : std::min(T, 8l * threads);
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        if (columns > 1) {
            long part = chunk % columns, step = (V / columns + 15) / 16 * 16;
            f(chunk / columns, std::min(V, part * step), part + 1 == columns ? V : std::min(V, (part + 1) * step));
            return;
        }
        for (long t = T * chunk / chunks; t < T * (chunk + 1) / chunks; t++) f(t, 0, V);
    });
}

template <class T>
void gather(const T* values, const Picks& p, T* out, int threads) {
    each_token(p.T, p.V, threads, [&](long t, long from, long to) {
        static thread_local Scratch memory;
        float* sums = memory.get<float>(p.E * p.V);
        for (long e = 0; e < p.E; e++) std::fill(sums + e * p.V + from, sums + e * p.V + to, 0.0f);
        const int64_t* rows = p.rows + t * p.X;
        for (long x = 0; x < std::min(AHEAD, p.X); x++) ask(values + rows[x] * p.V + from, to - from);
        for (long x = 0; x < p.X; x++) {
            const T* row = values + rows[x] * p.V;
            float* into = sums + p.bucket(t * p.X + x) * p.V;
            if (x + AHEAD < p.X) ask(values + rows[x + AHEAD] * p.V + from, to - from);
            each_share(p, from, to, [&](long c, long begin, long end) {
                float weight = p.weights[(t * p.X + x) * p.C + c];
                each_wide(end - begin, [&](long i, auto get, auto put) {
                    i += begin;
                    put(into + i, get(into + i) + get(row + i) * weight);
                });
            });
        }
        for (long e = 0; e < p.E; e++)
            each_wide(to - from, [&](long i, auto get, auto put) {
                i += e * p.V + from;
                put(out + t * p.E * p.V + i, get(sums + i));
            });
    });
}

template <class T>
void dots(const T* values, const Picks& p, const T* grad, float* out, int threads) {
    long chunks = std::min(p.T, 8l * threads), size = p.V / p.C;
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        for (long t = p.T * chunk / chunks; t < p.T * (chunk + 1) / chunks; t++) {
            const int64_t* rows = p.rows + t * p.X;
            for (long x = 0; x < std::min(AHEAD, p.X); x++) ask(values + rows[x] * p.V, p.V);
            for (long x = 0; x < p.X; x++) {
                if (x + AHEAD < p.X) ask(values + rows[x + AHEAD] * p.V, p.V);
                const T *row = values + rows[x] * p.V, *push = grad + (t * p.E + p.bucket(t * p.X + x)) * p.V;
                for (long c = 0; c < p.C; c++) out[(t * p.X + x) * p.C + c] = dot(row + c * size, push + c * size, size);
            }
        }
    });
}

template <class T>
void scatter(const Picks& p, const int32_t* order, const int64_t* starts, long count, const T* grad, T* out, int threads) {
    long chunks = std::min(count, 16l * threads);
    auto push = [&](long pick) { return grad + (pick / p.X * p.E + p.bucket(pick)) * p.V; };
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        static thread_local Scratch memory;
        float* sums = memory.get<float>(p.V);
        for (long u = count * chunk / chunks; u < count * (chunk + 1) / chunks; u++) {
            std::fill(sums, sums + p.V, 0.0f);
            for (long i = starts[u]; i < starts[u + 1]; i++) {
                if (i + AHEAD < starts[count]) ask(push(order[i + AHEAD]), p.V);
                const T* from = push(order[i]);
                each_share(p, 0, p.V, [&](long c, long begin, long end) {
                    float weight = p.weights[order[i] * p.C + c];
                    each_wide(end - begin, [&](long j, auto get, auto put) {
                        j += begin;
                        put(sums + j, get(sums + j) + get(from + j) * weight);
                    });
                });
            }
            each_wide(p.V, [&](long j, auto get, auto put) { put(out + u * p.V + j, get(sums + j)); });
        }
    });
}

// Row u is row from_a[u] of a plus row from_b[u] of b, where these are not -1.
template <class A, class B>
void add(const A* a, const int64_t* from_a, const B* b, const int64_t* from_b, long count, long V, float* out, int threads) {
    long chunks = std::min(count, 16l * threads);
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        for (long u = count * chunk / chunks; u < count * (chunk + 1) / chunks; u++) {
            const A* x = a + from_a[u] * V;
            const B* y = b + from_b[u] * V;
            bool both = from_a[u] >= 0 && from_b[u] >= 0, first = from_a[u] >= 0;
            each_wide(V, [&](long i, auto get, auto put) { put(out + u * V + i, both ? get(x + i) + get(y + i) : first ? get(x + i) : get(y + i)); });
        }
    });
}

// The step of native/adamw.cpp on some rows.
struct Step {
    float scale, keep, rate, beta1, beta2, root, eps;
};

template <class T>
void adamw(float* master, const T* gradient, float* first, float* second, bf16* rounded, const int64_t* rows, long count, long V, Step s,
           int threads) {
    float correct = 1 / s.root;
    long chunks = std::min(count, 16l * threads);
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        for (long u = count * chunk / chunks, end = count * (chunk + 1) / chunks; u < end; u++) {
            if (u + 2 < end)
                for (const float* p : {master, first, second}) ask(p + rows[u + 2] * V, V);
            float *w = master + rows[u] * V, *m = first + rows[u] * V, *v = second + rows[u] * V;
            each_wide(V, [&](long i, auto get, auto put) {
                auto g = get(gradient + u * V + i) * s.scale;
                auto a = g * (1 - s.beta1) + get(m + i) * s.beta1;
                auto b = g * (1 - s.beta2) * g + get(v + i) * s.beta2;
                auto next = get(w + i) * s.keep - a / (root(b) * correct + s.eps) * s.rate;
                put(m + i, a), put(v + i, b), put(w + i, next);
                if (rounded) put(rounded + rows[u] * V + i, next);
            });
        }
    });
}

}  // namespace

int gather(const void* values, int dtype, long Z, const Picks& p, void* out, int threads) {
    if (!inside(p, Z)) return 0;
    dtype == BF16 ? gather(static_cast<const bf16*>(values), p, static_cast<bf16*>(out), threads)
                  : gather(static_cast<const float*>(values), p, static_cast<float*>(out), threads);
    return 1;
}

}  // namespace jevons

using namespace jevons;

// out (T, E * V); 0 where a row or bucket is out of range
extern "C" int jevons_memory_gather(const void* values, int dtype, long Z, long V, const int64_t* rows, const int64_t* blocks,
                                    const float* weights, long T, long X, long C, long E, void* out, int threads) {
    return gather(values, dtype, Z, {rows, blocks, weights, T, X, C, E, V}, out, threads);
}

// out (T, X, C): each share of a picked row times the same place of its bucket in grad (T, E * V)
extern "C" int jevons_memory_dots(const void* values, int dtype, long Z, long V, const int64_t* rows, const int64_t* blocks, const void* grad,
                                  long T, long X, long C, long E, float* out, int threads) {
    Picks p{rows, blocks, nullptr, T, X, C, E, V};
    if (!inside(p, Z)) return 0;
    dtype == BF16 ? dots(static_cast<const bf16*>(values), p, static_cast<const bf16*>(grad), out, threads)
                  : dots(static_cast<const float*>(values), p, static_cast<const float*>(grad), out, threads);
    return 1;
}

// Sort picks by row: order (count,) of picks, the touched rows in ascending order and where each one's picks begin; how many rows
extern "C" long jevons_memory_sort(const int64_t* rows, long count, long Z, int32_t* order, int64_t* touched, int64_t* starts) {
    constexpr int BITS = 11;
    std::vector<uint64_t> a(count), b(count);
    for (long i = 0; i < count; i++) a[i] = uint64_t(rows[i]) << 32 | uint64_t(i);
    for (int shift = 0; shift < 32 && Z >> shift; shift += BITS) {
        long place[(1 << BITS) + 1] = {};
        auto digit = [&](uint64_t x) { return x >> (32 + shift) & ((1 << BITS) - 1); };
        for (uint64_t x : a) place[digit(x) + 1]++;
        for (int i = 0; i < 1 << BITS; i++) place[i + 1] += place[i];
        for (uint64_t x : a) b[place[digit(x)]++] = x;
        a.swap(b);
    }
    long found = 0;
    for (long i = 0; i < count; i++) {
        order[i] = int32_t(a[i]);
        if (i == 0 || a[i] >> 32 != a[i - 1] >> 32) touched[found] = int64_t(a[i] >> 32), starts[found++] = i;
    }
    starts[found] = count;
    return found;
}

// out (count, V): the sum over a touched row's picks of weight times the bucket's gradient
extern "C" void jevons_memory_scatter(const int32_t* order, const int64_t* starts, long count, const int64_t* blocks, const float* weights,
                                      const void* grad, int dtype, long T, long X, long C, long E, long V, void* out, int threads) {
    Picks p{nullptr, blocks, weights, T, X, C, E, V};
    dtype == BF16 ? scatter(p, order, starts, count, static_cast<const bf16*>(grad), static_cast<bf16*>(out), threads)
                  : scatter(p, order, starts, count, static_cast<const float*>(grad), static_cast<float*>(out), threads);
}

// The rows that a or b names, each ascending, and where in both they stand (-1: not there); how many
extern "C" long jevons_memory_merge(const int64_t* a, long count_a, const int64_t* b, long count_b, int64_t* rows, int64_t* from_a, int64_t* from_b) {
    long i = 0, j = 0, found = 0;
    for (; i < count_a || j < count_b; found++) {
        bool in_a = j == count_b || (i < count_a && a[i] <= b[j]), in_b = i == count_a || (j < count_b && b[j] <= a[i]);
        rows[found] = in_a ? a[i] : b[j];
        from_a[found] = in_a ? i++ : -1, from_b[found] = in_b ? j++ : -1;
    }
    return found;
}

// out (count, V) fp32: the sums of the rows that `jevons_memory_merge` found
extern "C" void jevons_memory_add(const void* a, int a_dtype, const int64_t* from_a, const void* b, int b_dtype, const int64_t* from_b, long count,
                                  long V, float* out, int threads) {
    auto with = [&](auto x) {
        b_dtype == BF16 ? add(x, from_a, static_cast<const bf16*>(b), from_b, count, V, out, threads)
                        : add(x, from_a, static_cast<const float*>(b), from_b, count, V, out, threads);
    };
    a_dtype == BF16 ? with(static_cast<const bf16*>(a)) : with(static_cast<const float*>(a));
}

// native/adamw.cpp's step on rows `rows` of (Z, V) weights and moments; gradient (count, V)
extern "C" void jevons_adamw_rows(float* master, const void* gradient, int dtype, float* first, float* second, bf16* rounded,
                                  const int64_t* rows, long count, long V, float scale, float keep, float rate, float beta1, float beta2,
                                  float root, float eps, int threads) {
    Step step{scale, keep, rate, beta1, beta2, root, eps};
    dtype == BF16 ? adamw(master, static_cast<const bf16*>(gradient), first, second, rounded, rows, count, V, step, threads)
                  : adamw(master, static_cast<const float*>(gradient), first, second, rounded, rows, count, V, step, threads);
}
