// One new token of each sequence against its cached tokens, read where they lie in the paged cache.
//
// Problem: gathering the rows of every sequence into one padded tensor copies the cache at each layer of each step.
// Approach: block tables are followed in place. Context is cut into stretches of 256 tokens (flash decoding), each with its own
// maximum and sum, merged in order at the end: work for many threads even with one sequence, and results that depend on neither threads nor
// neighbours. Sixteen keys at a time are transposed, so that scores of sixteen tokens come out of one accumulator without
// any horizontal sum, and all query heads of a group use the transposed keys. MLA in latent space is the same with one key head whose first
// columns are the values.
#include <algorithm>
#include <cmath>
#include <limits>

#include "pool.hpp"
#include "product.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

constexpr int STRETCH = 256;  // tokens
constexpr int AHEAD = 32;     // tokens whose keys are asked for before they are read

struct Cache {
    const void *keys, *values;
    int dtype;
    long key_stride, value_stride;  // elements between slots
    int heads, width, value_width;  // key heads of a slot, each `width` wide
    const int32_t *tables, *lengths;
    long table_stride;
    int block_size;

    long slot(int sequence, int token) const {
        return long(tables[sequence * table_stride + token / block_size]) * block_size + token % block_size;
    }
};

// Asks memory for a row. A head's rows lie apart, so the processor sees no stream in them.
static inline void ask(const void* row, long bytes) {
    for (long i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T0);
}

// Scores of up to 16 tokens for `count` heads: key[t] their keys (bytes), query[g * units + u], out[g * STRETCH + t].
template <bool PAIRS>
void scores(const char* const* key, int tokens, long bytes, const uint32_t* query, long units, int count, float scale, __m512i* turned, float* out) {
    for (long u = 0; u < units; u += 16) {
        __m512i rows[16];
        long left = bytes - u * 4;
        __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
        for (int t = 0; t < 16; t++) rows[t] = _mm512_maskz_loadu_epi8(mask, key[t < tokens ? t : 0] + u * 4);
        transpose(rows);
        for (int t = 0; t < 16; t++) turned[u + t] = rows[t];
    }
    for (int g = 0; g < count; g++) {
        const uint32_t* q = query + g * units;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (long u = 0; u < units; u += 4) {  // units are padded to 16
            a = dot<PAIRS>(a, turned[u], _mm512_set1_epi32(int(q[u])));
            b = dot<PAIRS>(b, turned[u + 1], _mm512_set1_epi32(int(q[u + 1])));
            c = dot<PAIRS>(c, turned[u + 2], _mm512_set1_epi32(int(q[u + 2])));
            d = dot<PAIRS>(d, turned[u + 3], _mm512_set1_epi32(int(q[u + 3])));
        }
        __m512 sum = _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), _mm512_set1_ps(scale));
        _mm512_storeu_ps(out + g * STRETCH, sum);
    }
}

// out[g][v..v+32) = sum over tokens of weight[g][t] * value[t][v..]
template <class T, int COUNT>
void mix(const T* const* value, int tokens, long v, long width, const float* weight, float* out, long out_stride) {
    __m512 sum[COUNT][2];
    __mmask16 m0 = mask_of(width - v), m1 = mask_of(width - v - 16);
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; g++) sum[g][0] = sum[g][1] = _mm512_setzero_ps();
    for (int t = 0; t < tokens; t++) {
        __m512 a = load(value[t] + v, m0), b = load(value[t] + v + 16, m1);
#pragma GCC unroll 8
        for (int g = 0; g < COUNT; g++) {
            __m512 w = _mm512_set1_ps(weight[g * STRETCH + t]);
            sum[g][0] = _mm512_fmadd_ps(a, w, sum[g][0]);
            sum[g][1] = _mm512_fmadd_ps(b, w, sum[g][1]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; g++) {
        store(out + g * out_stride + v, m0, sum[g][0]);
        store(out + g * out_stride + v + 16, m1, sum[g][1]);
    }
}

template <class T>
void mix_heads(int heads, const T* const* value, int tokens, long width, const float* weight, float* out, long out_stride) {
    for (int g = 0; g < heads;) {
        int count = std::min(heads - g, 8);
        for (long v = 0; v < width; v += 32) {
            const float* w = weight + g * STRETCH;
            float* to = out + g * out_stride;
            switch (count) {
                case 1: mix<T, 1>(value, tokens, v, width, w, to, out_stride); break;
                case 2: mix<T, 2>(value, tokens, v, width, w, to, out_stride); break;
                case 3: mix<T, 3>(value, tokens, v, width, w, to, out_stride); break;
                case 4: mix<T, 4>(value, tokens, v, width, w, to, out_stride); break;
                case 5: mix<T, 5>(value, tokens, v, width, w, to, out_stride); break;
                case 6: mix<T, 6>(value, tokens, v, width, w, to, out_stride); break;
                case 7: mix<T, 7>(value, tokens, v, width, w, to, out_stride); break;
                default: mix<T, 8>(value, tokens, v, width, w, to, out_stride);
            }
        }
        g += count;
    }
}

// `group` query heads of one key head over tokens [begin, end): out (group, value_width) weighted sums, top and total of each
template <class T>
void stretch(const Cache& cache, int sequence, int head, int begin, int end, const T* query, int group, float scale, float* out, float* top, float* total) {
    constexpr bool PAIRS = sizeof(T) == 2;
    static thread_local Scratch score_memory, query_memory, turn_memory;
    const char* key[STRETCH];
    const T* value[STRETCH];
    long bytes = long(cache.width) * sizeof(T), units = (bytes + 63) / 64 * 16;
    long value_bytes = cache.values == cache.keys ? 0 : cache.value_width * long(sizeof(T));  // else keys are asked for already
    int tokens = end - begin;
    for (int t = 0; t < tokens; t++) {
        long slot = cache.slot(sequence, begin + t);
        key[t] = reinterpret_cast<const char*>(static_cast<const T*>(cache.keys) + slot * cache.key_stride + long(head) * cache.width);
        value[t] = static_cast<const T*>(cache.values) + slot * cache.value_stride + long(head) * cache.value_width;
        if (t < AHEAD) ask(key[t], bytes);
    }
    float* score = score_memory.get<float>(size_t(group) * STRETCH);
    uint32_t* q = query_memory.get<uint32_t>(size_t(group) * units);
    __m512i* turned = turn_memory.get<__m512i>(size_t(units));
    for (int g = 0; g < group; g++) {
        T* to = reinterpret_cast<T*>(q + g * units);
        std::copy(query + long(g) * cache.width, query + long(g + 1) * cache.width, to);
        std::fill(to + cache.width, to + units * 4 / sizeof(T), T(0));
    }
    for (int t = 0; t < tokens; t += 16) {
        for (int i = t; i < std::min(t + 16, tokens); i++) {
            ask(value[i], value_bytes);  // for later
            if (i + AHEAD < tokens) ask(key[i + AHEAD], bytes);
        }
        scores<PAIRS>(key + t, std::min(16, tokens - t), bytes, q, units, group, scale, turned, score + t);
    }
    for (int g = 0; g < group; g++) {
        float* s = score + g * STRETCH;
        __m512 high = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sum = _mm512_setzero_ps();
        for (int t = 0; t < tokens; t += 16) high = _mm512_mask_max_ps(high, mask_of(tokens - t), high, _mm512_loadu_ps(s + t));
        top[g] = _mm512_reduce_max_ps(high);
        for (int t = 0; t < tokens; t += 16) {
            __m512 e = _mm512_maskz_mov_ps(mask_of(tokens - t), exp(_mm512_sub_ps(_mm512_loadu_ps(s + t), _mm512_set1_ps(top[g]))));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(s + t, e);
        }
        total[g] = _mm512_reduce_add_ps(sum);
    }
    mix_heads<T>(group, value, tokens, cache.value_width, score, out, cache.value_width);
}

}  // namespace

// q (S, M * group, width) with `q_stride` elements between sequences -> out (S, M * group, value_width) contiguous
void attend(const Cache& cache, const void* q, long q_stride, int sequences, int group, float scale, void* out, int out_dtype, int threads) {
    static thread_local Scratch part_memory;
    static thread_local std::vector<int> first;  // the first stretch of each sequence
    first.assign(1, 0);
    for (int s = 0; s < sequences; s++) first.push_back(first.back() + (cache.lengths[s] + STRETCH - 1) / STRETCH);
    int stretches = first.back(), M = cache.heads;
    long width = cache.value_width, part = group * (width + 2);
    float* parts = part_memory.get<float>(size_t(stretches) * M * part);
    const int* begin = first.data();
    Pool::instance().run(threads, stretches * M, [&](int index) {
        int piece = index / M, head = index % M;
        int s = int(std::upper_bound(begin, begin + sequences + 1, piece) - begin) - 1;
        int from = (piece - begin[s]) * STRETCH, to = std::min(cache.lengths[s], from + STRETCH);
        float* mine = parts + index * part;
        float *top = mine + group * width, *total = top + group;
        long at_query = s * q_stride + long(head) * group * cache.width;
        if (cache.dtype == BF16)
            stretch<bf16>(cache, s, head, from, to, static_cast<const bf16*>(q) + at_query, group, scale, mine, top, total);
        else
            stretch<float>(cache, s, head, from, to, static_cast<const float*>(q) + at_query, group, scale, mine, top, total);
    });
    Pool::instance().run(sequences > 3 ? threads : 1, sequences, [&](int s) {
        for (int head = 0; head < M; head++)
            for (int g = 0; g < group; g++) {
                float high = -std::numeric_limits<float>::infinity(), sum = 0;
                for (int p = begin[s]; p < begin[s + 1]; p++) high = std::max(high, parts[(long(p) * M + head) * part + group * width + g]);
                for (int p = begin[s]; p < begin[s + 1]; p++) {
                    float* top = parts + (long(p) * M + head) * part + group * width + g;
                    *top = std::exp(*top - high);  // from here on its factor
                    sum += *top * top[group];
                }
                for (long v = 0; v < width; v += 16) {
                    __m512 x = _mm512_setzero_ps();
                    for (int p = begin[s]; p < begin[s + 1]; p++) {
                        const float* mine = parts + (long(p) * M + head) * part;
                        x = _mm512_fmadd_ps(_mm512_set1_ps(mine[group * width + g]), load(mine + g * width + v, mask_of(width - v)), x);
                    }
                    x = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / sum));
                    store(out, out_dtype, ((long(s) * M + head) * group + g) * width + v, mask_of(width - v), x);
                }
            }
    });
}

extern "C" void jevons_paged_gqa(const void* q, long q_stride, const void* keys, const void* values, int dtype, long sequences, int heads,
                                 int kv_heads, int width, int value_width, const int32_t* tables, long table_stride, const int32_t* lengths,
                                 int block_size, float scale, void* out, int threads) {
    Cache cache{keys, values, dtype, long(kv_heads) * width, long(kv_heads) * value_width, kv_heads, width, value_width, tables, lengths, table_stride, block_size};
    attend(cache, q, q_stride, int(sequences), heads / kv_heads, scale, out, dtype, threads);
}

// q (S, N, nope + R); the key half of kv_b goes into the query, the value half onto the output
extern "C" void jevons_paged_mla(const void* q, long q_stride, const void* memory, int dtype, long sequences, int heads, int nope, int rope,
                                 const int32_t* tables, long table_stride, const int32_t* lengths, int block_size, const Matrix* key,
                                 const Matrix* value, float scale, void* out, int threads) {
    static thread_local Scratch query_memory, latent_memory;
    static thread_local std::vector<int> from, to;
    static thread_local std::vector<Segment> segments;
    int latent = key->N, row = latent + rope, S = int(sequences), size = dtype == BF16 ? 2 : 4;
    char* absorbed = query_memory.get<char>(size_t(S) * heads * row * size);
    char* mixed = latent_memory.get<char>(size_t(S) * heads * latent * size);
    from.clear(), to.clear(), segments.clear();
    for (int n = 0; n < heads; n++) {
        segments.push_back({n, n * S, (n + 1) * S});
        for (int s = 0; s < S; s++) to.push_back(s * heads + n);
    }
    // rows in order (head, sequence); from their places in q, with q's own stride between sequences
    bool even = q_stride == long(heads) * (nope + rope);
    Scratch packed;
    if (!even) {
        char* copy = packed.get<char>(size_t(S) * heads * (nope + rope) * size);
        size_t bytes = size_t(heads) * (nope + rope) * size;
        for (int s = 0; s < S; s++) std::copy_n(static_cast<const char*>(q) + size_t(s) * q_stride * size, bytes, copy + s * bytes);
        q = copy;
    }
    Segments all{segments.data(), heads, heads * S};
    product(*key, {q, dtype, nope + rope, to.data(), nullptr, 0}, all, {absorbed, dtype, row, to.data(), nullptr, 0, 0}, threads);
    for (long i = 0; i < long(S) * heads; i++)
        std::copy_n(static_cast<const char*>(q) + (i * (nope + rope) + nope) * size, size_t(rope) * size, absorbed + (i * row + latent) * size);
    Cache cache{memory, memory, dtype, row, row, 1, row, latent, tables, lengths, table_stride, block_size};
    attend(cache, absorbed, long(heads) * row, S, heads, scale, mixed, dtype, threads);
    product(*value, {mixed, dtype, latent, to.data(), nullptr, 0}, all, {out, dtype, value->N, to.data(), nullptr, 0, 0}, threads);
}

}  // namespace jevons
