// The rest of a decoder layer: norms, rotary embedding, cache writes, SwiGLU blocks and experts, each as one call.
#include <algorithm>
#include <numeric>

#include "pool.hpp"
#include "product.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

// Per-head norm (if any) and rotation of one head of `width`, of which the last `rope` are rotated; in place.
// Input pairs are (j, j + rope/2), or with `interleave` (2j, 2j + 1); output pairs are always (j, j + rope/2).
void turn(void* x, int dtype, long i, int width, int rope, const float* norm, float eps, const float* cos, const float* sin, bool interleave) {
    static thread_local Scratch memory;
    float* a = memory.get<float>(size_t(width) * 2 + 64);
    float* b = a + width + 32;
    norm_row({at(x, dtype, i), dtype, 0, nullptr, norm, eps}, 0, width, a);
    int half = rope / 2, keep = width - rope;
    std::copy(a, a + keep, b);
    for (int j = 0; j < half; j++) {
        float u = interleave ? a[keep + 2 * j] : a[keep + j], v = interleave ? a[keep + 2 * j + 1] : a[keep + half + j];
        b[keep + j] = u * cos[j] - v * sin[j];
        b[keep + half + j] = v * cos[j] + u * sin[j];
    }
    for (long k = 0; k < width; k += 16) store(x, dtype, i + k, mask_of(width - k), _mm512_loadu_ps(b + k));
}

void copy_row(const void* from, void* to, int dtype, long elements) {
    std::copy_n(static_cast<const char*>(from), elements * (dtype == BF16 ? 2 : 4), static_cast<char*>(to));
}

int pieces(long rows, int threads) { return rows < 4 ? 1 : int(std::min<long>(rows, 4L * threads)); }

template <class F>
void each_row(long rows, int threads, const F& f) {
    int chunks = pieces(rows, threads);
    Pool::instance().run(threads, chunks, [&](int chunk) {
        for (long t = rows * chunk / chunks; t < rows * (chunk + 1) / chunks; t++) f(t);
    });
}

void linear(const Matrix& m, const Input& input, long rows, const Output& output, int threads) {
    Segment all{0, 0, int(rows)};
    product(m, input, {&all, 1, int(rows)}, output, threads);
}

}  // namespace

extern "C" void jevons_rms_norm(const void* x, int dtype, long rows, long stride, int width, const float* norm, float eps, void* y, int threads) {
    each_row(rows, rows * width < 16384 ? 1 : threads, [&](long t) {
        static thread_local Scratch memory;
        float* row = memory.get<float>(size_t(width) + 64);
        norm_row({x, dtype, stride, nullptr, norm, eps}, t, width, row);
        for (long k = 0; k < width; k += 16) store(y, dtype, t * width + k, mask_of(width - k), _mm512_loadu_ps(row + k));
    });
}

// qkv (T, N + 2M, H) = norm(x) W^T, then per-head norms and rope on queries and keys; keys and values go to their slots
extern "C" void jevons_gqa_project(const Matrix* m, const void* x, int dtype, long rows, long stride, const float* norm, float eps, void* qkv,
                                   int heads, int kv_heads, const float* q_norm, const float* k_norm, float head_eps, const float* cos,
                                   const float* sin, void* keys, void* values, const int64_t* slots, int threads) {
    int all = heads + 2 * kv_heads, width = m->N / all;
    linear(*m, {x, dtype, stride, nullptr, norm, eps}, rows, {qkv, dtype, m->N, nullptr, nullptr, 0, 0}, threads);
    each_row(rows, threads, [&](long t) {
        long row = t * m->N, kv = long(kv_heads) * width, half = width / 2;
        for (int n = 0; n < heads + kv_heads; n++)
            turn(qkv, dtype, row + long(n) * width, width, width, n < heads ? q_norm : k_norm, head_eps, cos + t * half, sin + t * half, false);
        copy_row(at(qkv, dtype, row + long(heads) * width), at(keys, dtype, slots[t] * kv), dtype, kv);
        copy_row(at(qkv, dtype, row + long(heads) * width + kv), at(values, dtype, slots[t] * kv), dtype, kv);
    });
}

// [a | kv] = norm(x) W_a^T; q = norm(a) W_q^T, or a itself without W_q; rope on the last `rope` of each head of q and of kv;
// the latent is normed; kv rows go to `row` and to their slots
extern "C" void jevons_mla_project(const Matrix* m, const Matrix* m_q, const void* x, int dtype, long rows, long stride, const float* norm,
                                   float eps, const float* q_norm, const float* kv_norm, float inner_eps, void* q, void* row, int heads, int nope,
                                   int rope, int latent, int interleave, const float* cos, const float* sin, void* memory, const int64_t* slots,
                                   int threads) {
    static thread_local Scratch first_memory;
    int kv = latent + rope, first = m->N - kv, head = nope + rope, half = rope / 2;
    void* a = first_memory.get<char>(size_t(rows) * m->N * (dtype == BF16 ? 2 : 4));
    linear(*m, {x, dtype, stride, nullptr, norm, eps}, rows, {a, dtype, m->N, nullptr, nullptr, 0, 0}, threads);
    if (m_q) linear(*m_q, {a, dtype, m->N, nullptr, q_norm, inner_eps}, rows, {q, dtype, m_q->N, nullptr, nullptr, 0, 0}, threads);
    each_row(rows, threads, [&](long t) {
        if (!m_q) copy_row(at(a, dtype, t * m->N), at(q, dtype, t * first), dtype, first);
        for (int n = 0; n < heads; n++)
            turn(q, dtype, (t * heads + n) * head, head, rope, nullptr, 0, cos + t * half, sin + t * half, interleave);
        long from = t * m->N + first;
        turn(a, dtype, from, latent, 0, kv_norm, inner_eps, nullptr, nullptr, false);
        turn(a, dtype, from + latent, rope, rope, nullptr, 0, cos + t * half, sin + t * half, interleave);
        copy_row(at(a, dtype, from), at(row, dtype, t * kv), dtype, kv);
        copy_row(at(a, dtype, from), at(memory, dtype, slots[t] * kv), dtype, kv);
    });
}

// y = down(swiglu(norm(x))) + residual
extern "C" void jevons_mlp(const Matrix* gate_up, const Matrix* down, const void* x, int dtype, long rows, long stride, const float* norm,
                           float eps, void* y, const void* residual, int threads) {
    static thread_local Scratch memory;
    void* inner = memory.get<char>(size_t(rows) * gate_up->N * (dtype == BF16 ? 2 : 4));
    linear(*gate_up, {x, dtype, stride, nullptr, norm, eps}, rows, {inner, dtype, gate_up->N, nullptr, nullptr, 0, 0}, threads);
    linear(*down, {inner, dtype, gate_up->N, nullptr, nullptr, 0}, rows, {y, dtype, down->N, nullptr, residual, dtype, down->N}, threads);
}

// y = residual + sum over the K chosen experts of weight * down(swiglu(x)); only chosen experts' weights are read
extern "C" void jevons_moe(const Matrix* gate_up, const Matrix* down, const void* x, int dtype, long rows, long stride, const int64_t* experts,
                           const float* weights, int top, void* y, const void* residual, int threads) {
    static thread_local Scratch inner_memory, outer_memory;
    static thread_local std::vector<int> start, token, place;
    static thread_local std::vector<Segment> segments;
    int E = gate_up->stack, X = int(rows) * top, D = down->N;
    start.assign(size_t(E) + 1, 0), token.resize(X), place.resize(X), segments.clear();
    for (int i = 0; i < X; i++) start[experts[i] + 1]++;
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (int e = 0; e < E; e++)
        if (start[e] < start[e + 1]) segments.push_back({e, start[e], start[e + 1]});
    for (int i = 0; i < X; i++) {
        place[i] = start[experts[i]]++;
        token[place[i]] = i / top;
    }
    void* inner = inner_memory.get<char>(size_t(X) * gate_up->N * (dtype == BF16 ? 2 : 4));
    float* outer = outer_memory.get<float>(size_t(X) * D);
    Segments all{segments.data(), int(segments.size()), X};
    product(*gate_up, {x, dtype, stride, token.data(), nullptr, 0}, all, {inner, dtype, gate_up->N, nullptr, nullptr, 0, 0}, threads);
    product(*down, {inner, dtype, gate_up->N, nullptr, nullptr, 0}, all, {outer, FLOAT, D, nullptr, nullptr, 0, 0}, threads);
    const int* where = place.data();
    each_row(rows, threads, [&](long t) {
        for (long d = 0; d < D; d += 16) {
            __mmask16 mask = mask_of(D - d);
            __m512 sum = _mm512_setzero_ps();
            for (int k = 0; k < top; k++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[t * top + k]), load(outer + long(where[t * top + k]) * D + d, mask), sum);
            if (residual) sum = _mm512_add_ps(sum, load(residual, dtype, t * D + d, mask));
            store(y, dtype, t * D + d, mask, sum);
        }
    });
}

}  // namespace jevons
