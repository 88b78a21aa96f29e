// Which rows a memory layer looks up, and the whole layer at decoding as one call.
//
// Problem: among n keys of each side and then m * m pairs the m best are wanted, thousands of times a step; sorting all is most of the time.
// Approach: the maxima of some 2 m interleaved groups are cheap, and the m-th largest of them is a bound that the m best all reach: what
// reaches it is little more than m, and only that is sorted. Equal scores count by their index.
//
// At decoding the keys are read more often than values: so what is scored for all keys is their sum by u (or v) of R vectors, made when weights
// change, and only the chosen m keys' R numbers are made of the keys themselves.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "memory.hpp"
#include "pool.hpp"
#include "product.hpp"
#include "wide.hpp"

namespace jevons {
namespace {

constexpr long BLOCK = 128;  // tokens whose scores are at work at once

// A score and its index as one number: larger where the score is, and of equal scores where the index is smaller.
uint64_t ranked(float score, long index) {
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(index));
}

// indices of the m largest of n scores, with `in_order` the largest first; those that are not numbers come last
void top(const float* scores, long n, long m, bool in_order, int32_t* out) {
    static thread_local std::vector<float> maxima;
    static thread_local std::vector<uint64_t> found;
    float bound = -INFINITY;
    long vectors = n / LANES, groups = (2 * m + LANES - 1) / LANES, each = vectors / groups;
    if (each >= 2) {
        maxima.resize(groups * LANES);
        for (long g = 0; g < groups; g++) {
            Wide best = Wide{} - INFINITY;
            for (long i = g * each; i < (g + 1) * each; i++) {
                Wide x = get_wide(scores + i * LANES);
                best = x > best ? x : best;
            }
            put_wide(maxima.data() + g * LANES, best);
        }
        std::nth_element(maxima.begin(), maxima.begin() + (m - 1), maxima.end(), [](float a, float b) { return a > b; });
        bound = maxima[m - 1];
    }
    found.clear();
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (uint32_t bits = reached(get_wide(scores + i), bound); bits; bits &= bits - 1) {
            long j = i + __builtin_ctz(bits);
            found.push_back(ranked(scores[j], j));
        }
    for (; i < n; i++)
        if (scores[i] >= bound) found.push_back(ranked(scores[i], i));
    for (long j = 0; j < n && long(found.size()) < m; j++)  // there are fewer numbers than m
        if (!(scores[j] >= bound)) found.push_back(0xffffffffu - uint32_t(j));
    if (long(found.size()) > m) std::nth_element(found.begin(), found.begin() + (m - 1), found.end(), std::greater<uint64_t>());
    if (in_order) std::sort(found.begin(), found.begin() + m, std::greater<uint64_t>());
    for (long j = 0; j < m; j++) out[j] = int32_t(0xffffffffu - uint32_t(found[j]));
}

// What choosing for one head needs beside scores.
struct Rule {
    long N, R, M;
    const float* core;  // (R, R), of the head
    bool in_order;
};

// a and b: the keys of the M best pairs. read(side, keys, to) writes R numbers of each of M keys; those of the chosen end up in left and right
// (M, R).
template <class Read>
void choose(const float* scores_row, const float* scores_column, const Rule& rule, const Read& read, int32_t* a, int32_t* b, float* left,
            float* right) {
    static thread_local Scratch memory;
    const long N = rule.N, R = rule.R, M = rule.M;  // no structured binding: clang captures none in C++17
    const float* core = rule.core;
    const bool in_order = rule.in_order;
    const long W = (M + LANES - 1) / LANES * LANES;  // a row of pairs is computed in whole vectors, what is too much below the next one
    float* pairs = memory.get<float>(M * M + LANES + 3 * M * R + R * W + 3 * M);
    float *rows = pairs + M * M + LANES, *columns = rows + M * R, *through = columns + R * W;  // through: rows core, (M, R); columns are (R, W)
    float* numbers = through + M * R;
    int32_t *keys_a = reinterpret_cast<int32_t*>(numbers + M * R), *keys_b = keys_a + M, *best = keys_b + M;
    top(scores_row, N, M, false, keys_a);
    top(scores_column, N, M, false, keys_b);
    read(0, keys_a, rows);
    read(1, keys_b, numbers);
    std::fill(columns, columns + R * W, 0.0f);
    for (long i = 0; i < M; i++) {
        for (long r = 0; r < R; r++) columns[r * W + i] = numbers[i * R + r];
        for (long s = 0; s < R; s++) {
            float total = 0;
            for (long r = 0; r < R; r++) total += rows[i * R + r] * core[r * R + s];
            through[i * R + s] = total;
        }
    }
    for (long i = 0; i < M; i++)
        for (long j = 0; j < M; j += LANES) {
            Wide total = get_wide(columns + j) * through[i * R];
            for (long s = 1; s < R; s++) total += get_wide(columns + s * W + j) * through[i * R + s];
            put_wide(pairs + i * M + j, total);
        }
    top(pairs, M * M, M, in_order, best);
    for (long i = 0; i < M; i++) {
        long x = best[i] / M, y = best[i] % M;
        a[i] = keys_a[x], b[i] = keys_b[y];
        for (long r = 0; r < R; r++) left[i * R + r] = rows[x * R + r], right[i * R + r] = numbers[y * R + r];
    }
}

template <class T>
void weigh(const T* x, const float* by, long N, long R, float* out) {
    if (R == 2)  // so that the compiler sees how long the inner loop is
        for (long n = 0; n < N; n++) out[n] = get(x + 2 * n) * by[0] + get(x + 2 * n + 1) * by[1];
    else
        for (long n = 0; n < N; n++) {
            float total = 0;
            for (long r = 0; r < R; r++) total += get(x + n * R + r) * by[r];
            out[n] = total;
        }
}

template <class T>
void select(const T* rows, const T* columns, long T_, long H, const Rule& all, const float* u, const float* v, int64_t* a, int64_t* b, int threads) {
    long N = all.N, R = all.R, M = all.M, units = T_ * H, chunks = std::min(units, 16l * threads);
    Pool::instance().run(threads, int(chunks), [&](int chunk) {
        static thread_local Scratch memory;
        float* scores = memory.get<float>(2 * N + 2 * M * R + 2 * M);
        float *left = scores + 2 * N, *right = left + M * R;
        int32_t *keys_a = reinterpret_cast<int32_t*>(right + M * R), *keys_b = keys_a + M;
        for (long i = units * chunk / chunks; i < units * (chunk + 1) / chunks; i++) {
            long h = i % H;
            const T *row = rows + i * N * R, *column = columns + i * N * R;
            weigh(row, u + h * R, N, R, scores);
            weigh(column, v + h * R, N, R, scores + N);
            auto read = [&](int side, const int32_t* keys, float* to) {
                for (long j = 0; j < M * R; j++) to[j] = get((side ? column : row) + keys[j / R] * R + j % R);
            };
            choose(scores, scores + N, {N, R, M, all.core + h * R * R, true}, read, keys_a, keys_b, left, right);
            for (long j = 0; j < M; j++) a[i * M + j] = keys_a[j], b[i * M + j] = keys_b[j];
        }
    });
}

}  // namespace

// A memory layer as one call takes it. Mirrored by a ctypes.Structure in engine/memory.py.
struct Memory {
    const Matrix *query, *row_keys, *column_keys, *out;  // D -> 2 Y; Y -> H N, by u and by v; E V -> D
    const float *norm, *core, *cores;                    // (Y,); (H, R, R), their sum; (C, H, R, R)
    const void *keys, *values;                           // (2, H, N, R, Y), normed; (Z, V)
    const int32_t* shuffle;                              // (N * N,): bucket * Z + row
    int64_t keys_dtype, values_dtype, D, Y, H, N, R, M, C, E, V, Z;
    double eps;
};

namespace {

void layer_norm(float* x, long n, const float* weight, float eps) {
    double total = 0, squares = 0;
    for (long i = 0; i < n; i++) total += x[i];
    float mean = float(total / n);
    for (long i = 0; i < n; i++) squares += double(x[i] - mean) * (x[i] - mean);
    float scale = float(1 / std::sqrt(squares / n + eps));
    for (long i = 0; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i];
}

void linear(const Matrix& m, const void* x, int dtype, long stride, long rows, void* y, int y_dtype, int threads) {
    Segment all{0, 0, int(rows)};
    product(m, {x, dtype, stride, nullptr, nullptr, 0}, {&all, 1, int(rows)}, {y, y_dtype, m.N, nullptr, nullptr, 0, 0}, threads);
}

// Rows, buckets and weights of (token, head) `i` of a block.
template <class T>
void pick(const Memory& m, const float* query, const float* row_scores, const float* column_scores, long h, int64_t* rows, int64_t* blocks,
          float* weights) {
    static thread_local Scratch memory;
    float* left = memory.get<float>(2 * m.M * m.R + 2 * m.M);
    float* right = left + m.M * m.R;
    int32_t *a = reinterpret_cast<int32_t*>(right + m.M * m.R), *b = a + m.M;
    auto read = [&](int side, const int32_t* keys, float* to) {
        const T* all = static_cast<const T*>(m.keys) + (side * m.H + h) * m.N * m.R * m.Y;
        for (long j = 0; j < m.M; j++) {
            if (j + AHEAD < m.M) ask(all + keys[j + AHEAD] * m.R * m.Y, m.R * m.Y);
            for (long r = 0; r < m.R; r++) to[j * m.R + r] = dot(query + side * m.Y, all + (keys[j] * m.R + r) * m.Y, m.Y);
        }
    };
    choose(row_scores, column_scores, {m.N, m.R, m.M, m.core + h * m.R * m.R, false}, read, a, b, left, right);
    for (long j = 0; j < m.M; j++) __builtin_prefetch(m.shuffle + a[j] * m.N + b[j]);
    for (long j = 0; j < m.M; j++) {
        int32_t slot = m.shuffle[a[j] * m.N + b[j]];
        rows[j] = slot % m.Z, blocks[j] = slot / m.Z;
        for (long c = 0; c < m.C; c++) {
            const float* core = m.cores + (c * m.H + h) * m.R * m.R;
            float total = 0;
            for (long r = 0; r < m.R; r++)
                for (long s = 0; s < m.R; s++) total += left[j * m.R + r] * core[r * m.R + s] * right[j * m.R + s];
            weights[j * m.C + c] = total;
        }
    }
}

}  // namespace
}  // namespace jevons

using namespace jevons;

// a, b (T, H, M): the keys of both sides' R numbers (T, H, N, R) whose pairs score best
extern "C" void jevons_memory_select(const void* rows, const void* columns, int dtype, long T, long H, long N, long R, const float* u,
                                     const float* v, const float* core, long M, int64_t* a, int64_t* b, int threads) {
    Rule rule{N, R, M, core, true};
    dtype == BF16 ? select(static_cast<const bf16*>(rows), static_cast<const bf16*>(columns), T, H, rule, u, v, a, b, threads)
                  : select(static_cast<const float*>(rows), static_cast<const float*>(columns), T, H, rule, u, v, a, b, threads);
}

// y (T, D) of x (T, D): query, norm, scores, choice, lookup, projection; the rows looked up go to `picked` (T, H M). 0 where the shuffle leads
// out of the table.
extern "C" int jevons_memory_layer(const Memory* layer, const void* x, int dtype, long rows, long stride, int64_t* picked, void* y, int threads) {
    static thread_local Scratch query_memory, row_memory, column_memory, pick_memory, found_memory;
    const Memory& m = *layer;
    long X = m.H * m.M, size = dtype == BF16 ? 2 : 4, most = std::min(rows, BLOCK);
    float* query = query_memory.get<float>(most * 2 * m.Y);
    float *row_scores = row_memory.get<float>(most * m.H * m.N), *column_scores = column_memory.get<float>(most * m.H * m.N);
    int64_t* blocks = pick_memory.get<int64_t>(most * X * (1 + (m.C + 1) / 2));
    float* weights = reinterpret_cast<float*>(blocks + most * X);
    void* found = found_memory.get<char>(most * m.E * m.V * size);
    for (long first = 0; first < rows; first += BLOCK, picked += BLOCK * X) {
        long T = std::min(BLOCK, rows - first);
        linear(*m.query, at(x, dtype, first * stride), dtype, stride, T, query, FLOAT, threads);
        for (long i = 0; i < 2 * T; i++) layer_norm(query + i * m.Y, m.Y, m.norm, float(m.eps));
        linear(*m.row_keys, query, FLOAT, 2 * m.Y, T, row_scores, FLOAT, threads);
        linear(*m.column_keys, query + m.Y, FLOAT, 2 * m.Y, T, column_scores, FLOAT, threads);
        long units = T * m.H, chunks = std::min(units, 16l * threads);
        Pool::instance().run(threads, int(chunks), [&](int chunk) {
            for (long i = units * chunk / chunks; i < units * (chunk + 1) / chunks; i++)
                (m.keys_dtype == BF16 ? pick<bf16> : pick<float>)(m, query + i / m.H * 2 * m.Y, row_scores + i * m.N, column_scores + i * m.N,
                                                                 i % m.H, picked + i * m.M, blocks + i * m.M, weights + i * m.M * m.C);
        });
        if (!gather(m.values, int(m.values_dtype), m.Z, {picked, blocks, weights, T, X, m.C, m.E, m.V}, found, threads)) return 0;
        linear(*m.out, found, int(m.values_dtype), m.E * m.V, T, at(y, dtype, first * m.out->N), dtype, threads);
    }
    return 1;
}
