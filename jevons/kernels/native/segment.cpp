// Attention in training: causal inside each segment and to the prefix that it continues, forward and backward, in bf16 or fp32.
//
// Approach: as in prompt.cpp all products run on tiles of 6 rows by 64 columns, with words (bf16 pairs, or fp32) and fp32 sums; queries come 48 at a
// time and meet their whole context, so a row of the softmax is complete before its gradient is made. Nothing is padded. A group is a prompt and
// what continues it: its keys and values are laid out once, and what all its members push onto them adds up in fp32. A task is a group and
// one key head with all its query heads, so tasks never write to the same place. Nothing but the inputs is kept for the backward pass.
// Not done: tasks smaller than that, for many cores and few prompts.
//
//     columns  [width / 2][tokens][2]: pairs along the width        pairs  [tokens / 2][width padded][2]: pairs of tokens
//     in fp32  [width][tokens]                                             [tokens][width padded]
#include <algorithm>
#include <limits>

#include "pool.hpp"
#include "tile.hpp"

namespace jevons {
namespace {

constexpr int BLOCK = 48;  // queries

// A group: its prefix (length 0: none) and the members [first, first + count) of the table of members.
struct Group {
    int64_t prefix, prefix_length, first, count;
};

struct Member {
    int64_t start, length;
};

// (T, heads, width), rows `stride` elements apart
template <class T>
struct Rows {
    T* x;
    long stride;
    int width;

    T* at(long token, int head) const { return x + token * stride + long(head) * width; }
};

struct Sizes {
    int heads, key_heads;
    float scale;
};

template <class T>
constexpr int PER = 4 / int(sizeof(T));  // elements of a word
template <class T>
constexpr bool PAIRS = PER<T> == 2;

constexpr long COLUMNS = ACROSS * 16;

long padded(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

// tokens [begin, begin + count) of a head -> columns [at, at + count)
template <class T>
void lay_columns(const Rows<T>& x, long begin, long count, int head, uint32_t* out, long stride, long at) {
    int words = x.width / PER<T>;
    for (long t = 0; t < count; t += 16)
        for (int u = 0; u < words; u += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = _mm512_maskz_loadu_epi32(mask_of(words - u), x.at(begin + std::min(t + i, count - 1), head) + PER<T> * u);
            transpose(rows);
            for (int i = 0; i < std::min(16, words - u); i++) _mm512_mask_storeu_epi32(out + (u + i) * stride + at + t, mask_of(count - t), rows[i]);
        }
}

// tokens first, first + 1, ... of a context -> pairs, from the one that holds `first`; zeros stand for what is missing
template <class T, class F>
void lay_pairs(const F& row, long first, long end, int width, uint32_t* out) {
    long wide = padded(width);
    for (long t = first / PER<T> * PER<T>; t < end; t += PER<T>) {
        const T *even = row(t), *odd = PAIRS<T> && t + 1 < end ? row(t + 1) : nullptr;
        for (int d = 0; d < wide; d += 16) {
            __mmask16 mask = mask_of(width - d);
            __m512i word;
            if constexpr (PAIRS<T>) {
                word = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + d));
                if (odd) word = _mm512_or_si512(word, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + d)), 16));
            } else {
                word = _mm512_maskz_loadu_epi32(mask, even + d);
            }
            _mm512_storeu_si512(out + t / PER<T> * wide + d, word);
        }
    }
}

// `rows` rows of words, row r's k-th at left[r * row_step + k * step], times a right side; emit(row, column, vectors)
template <bool PAIRS, class F>
void product(int rows, const uint32_t* left, long row_step, long step, int depth, const uint32_t* right, long stride, long columns, const F& emit) {
    for (int row = 0; row < rows; row += TILE) {
        const uint32_t* from[TILE];
        for (int r = 0; r < TILE; r++) from[r] = left + std::min(row + r, rows - 1) * row_step;
        for (long c = 0; c < columns; c += COLUMNS) {
            __m512 sum[TILE][ACROSS];
            for (auto& s : sum)
                for (auto& x : s) x = _mm512_setzero_ps();
            multiply<PAIRS>(sum, from, step, right + c, stride, depth);
            for (int r = 0; r < TILE && row + r < rows; r++) emit(row + r, c, sum[r]);
        }
    }
}

// scores -> probabilities of the first n columns, times their sum: returns that sum
float exponentials(float* score, long n, float scale) {
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), total = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (long c = 0; c < n; c += 16) top = _mm512_mask_max_ps(top, mask_of(n - c), top, _mm512_loadu_ps(score + c));
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top) * scale);
    for (long c = 0; c < n; c += 16) {
        __m512 e = _mm512_maskz_mov_ps(mask_of(n - c), exp(_mm512_fmsub_ps(_mm512_loadu_ps(score + c), factor, most)));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(score + c, e);
    }
    return _mm512_reduce_add_ps(total);
}

void to_pairs(const float* even, const float* odd, uint32_t* out) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even)));
    if (odd) low = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd))), 16));
    _mm512_storeu_si512(out, low);
}

template <class T>
void store_wide(T* out, int width, long column, const __m512* value, __m512 factor) {
    for (int i = 0; i < ACROSS; i++) store(out + column + 16 * i, mask_of(width - column - 16 * i), _mm512_mul_ps(value[i], factor));
}

// (width, stride) in fp32 of one head, columns [at, at + count) -> tokens from `begin`
template <class T>
void write_columns(const float* sums, long stride, long at, const Rows<T>& out, long begin, long count, int head) {
    for (long t = 0; t < count; t += 16)
        for (int d = 0; d < out.width; d += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(sums + std::min(d + i, out.width - 1) * stride + at + t);
            transpose(rows);
            for (int i = 0; i < std::min(16l, count - t); i++)
                store(out.at(begin + t + i, head) + d, mask_of(out.width - d), _mm512_castsi512_ps(rows[i]));
        }
}

// Memory of one task, for contexts of up to `columns` tokens. In fp32 nothing is rounded or paired: `row` and the pairs of scores are the scores.
template <class T>
struct Bench {
    long columns;
    uint32_t *keys, *values, *across;  // columns of keys; of values, or pairs; pairs of keys
    float *score, *push;               // (BLOCK, columns)
    T* row;                            // one of them, rounded
    uint32_t *score_pairs, *push_pairs, *query_pairs, *grad_pairs;
    float *key_sums, *value_sums;  // (width, columns)

    Bench(Scratch& memory, long context, int width, int value_width, bool backward) {
        columns = padded(context) + 64;
        constexpr int P = PER<T>;
        long rounded = PAIRS<T> ? BLOCK / 2 * columns : 0;
        long sizes[] = {width / P * columns, std::max(value_width / P * columns, columns / P * padded(value_width)), columns / P * padded(width),
                        BLOCK * columns, BLOCK * columns, rounded, rounded, rounded,
                        BLOCK / P * padded(width), BLOCK / P * padded(value_width), width * columns, value_width * columns};
        int parts = backward ? 12 : 6;
        long total = 0;
        for (int i = 0; i < parts; i++) total += sizes[i];
        uint32_t* p = memory.get<uint32_t>(size_t(total) + 64);
        void** fields[] = {(void**)&keys, (void**)&values, (void**)&across, (void**)&score, (void**)&push, (void**)&row,
                           (void**)&score_pairs, (void**)&push_pairs, (void**)&query_pairs, (void**)&grad_pairs, (void**)&key_sums, (void**)&value_sums};
        for (int i = 0; i < parts; i++) *fields[i] = p, p += sizes[i];
        if constexpr (!PAIRS<T>) row = backward ? push : score, score_pairs = (uint32_t*)score, push_pairs = (uint32_t*)push;
    }
};

// calls visit(member's start, length, tokens before it) for a group's prompt, if it has one, and all its members
template <class F>
void each_member(const Group& group, const Member* members, const F& visit) {
    if (group.prefix_length) visit(group.prefix, group.prefix_length, 0l);
    for (long i = group.first; i < group.first + group.count; i++) visit(members[i].start, members[i].length, group.prefix_length);
}

long longest(const Group& group, const Member* members) {
    long most = 0;
    for (long i = group.first; i < group.first + group.count; i++) most = std::max<long>(most, members[i].length);
    return group.prefix_length + most;
}

template <class F>
void each_task(long groups, int key_heads, int threads, const F& f) {
    Pool::instance().run(threads, int(groups) * key_heads, [&](int i) { f(i / key_heads, i % key_heads); });
}

template <class T>
void forward(const T* q, long q_stride, const T* k, long k_stride, const T* v, long v_stride, int heads, int key_heads, int width, int value_width,
             const Group* groups, long count, const Member* members, float scale, T* out, int threads) {
    Rows<T> Q{const_cast<T*>(q), q_stride, width}, K{const_cast<T*>(k), k_stride, width}, V{const_cast<T*>(v), v_stride, value_width};
    Rows<T> O{out, long(heads) * value_width, value_width};
    constexpr int P = PER<T>;
    each_task(count, key_heads, threads, [&](int g, int key_head) {
        static thread_local Scratch memory;
        const Group& group = groups[g];
        Bench<T> b(memory, longest(group, members), width, value_width, false);
        each_member(group, members, [&](long start, long length, long before) {
            auto value = [&](long t) { return V.at(t < before ? group.prefix + t : start + t - before, key_head); };
            lay_columns(K, start, length, key_head, b.keys, b.columns, before);
            lay_pairs<T>(value, before, before + length, value_width, b.values);
            for (int head = key_head * (heads / key_heads); head < (key_head + 1) * (heads / key_heads); head++)
                for (long first = 0; first < length; first += BLOCK) {
                    int rows = int(std::min<long>(BLOCK, length - first));
                    long seen = before + first + rows, wide = padded(seen);
                    float share[BLOCK];
                    product<PAIRS<T>>(rows, (const uint32_t*)Q.at(start + first, head), q_stride / P, 1, width / P, b.keys, b.columns, wide,
                            [&](int r, long c, const __m512* s) {
                                for (int i = 0; i < ACROSS; i++) _mm512_storeu_ps(b.score + r * b.columns + c + 16 * i, s[i]);
                            });
                    for (int r = 0; r < rows; r++) {
                        float* score = b.score + r * b.columns;
                        long n = before + first + r + 1;
                        share[r] = 1 / exponentials(score, n, scale);
                        for (long c = 0; c < wide; c += 16)
                            store(b.row + r * b.columns + c, All(), _mm512_maskz_loadu_ps(mask_of(n - c), score + c));
                    }
                    product<PAIRS<T>>(rows, (const uint32_t*)b.row, b.columns / P, 1, int(seen + P - 1) / P, b.values, padded(value_width), padded(value_width),
                            [&](int r, long c, const __m512* s) {
                                store_wide(O.at(start + first + r, head), value_width, c, s, _mm512_set1_ps(share[r]));
                            });
                }
        });
    });
}

template <class T>
void backward(const T* grad, long grad_stride, const T* q, long q_stride, const T* k, long k_stride, const T* v, long v_stride, int heads,
              int key_heads, int width, int value_width, const Group* groups, long count, const Member* members, float scale, T* grad_q, T* grad_k,
              T* grad_v, int threads) {
    Rows<T> Q{const_cast<T*>(q), q_stride, width}, K{const_cast<T*>(k), k_stride, width}, V{const_cast<T*>(v), v_stride, value_width};
    Rows<T> G{const_cast<T*>(grad), grad_stride, value_width}, dQ{grad_q, long(heads) * width, width};
    Rows<T> dK{grad_k, long(key_heads) * width, width}, dV{grad_v, long(key_heads) * value_width, value_width};
    constexpr int P = PER<T>;
    each_task(count, key_heads, threads, [&](int g, int key_head) {
        static thread_local Scratch memory;
        const Group& group = groups[g];
        Bench<T> b(memory, longest(group, members), width, value_width, true);
        auto clear = [&](long from, long to) {
            for (int d = 0; d < width; d++) std::fill(b.key_sums + d * b.columns + from, b.key_sums + d * b.columns + to, 0.0f);
            for (int d = 0; d < value_width; d++) std::fill(b.value_sums + d * b.columns + from, b.value_sums + d * b.columns + to, 0.0f);
        };
        clear(0, b.columns);
        each_member(group, members, [&](long start, long length, long before) {
            bool prompt = start == group.prefix && group.prefix_length && !before;
            auto key = [&](long t) { return K.at(t < before ? group.prefix + t : start + t - before, key_head); };
            lay_columns(K, start, length, key_head, b.keys, b.columns, before);
            lay_columns(V, start, length, key_head, b.values, b.columns, before);
            lay_pairs<T>(key, before, before + length, width, b.across);
            for (int head = key_head * (heads / key_heads); head < (key_head + 1) * (heads / key_heads); head++)
                for (long first = 0; first < length; first += BLOCK) {
                    int rows = int(std::min<long>(BLOCK, length - first)), pairs = (rows + P - 1) / P;
                    long seen = before + first + rows, wide = padded(seen);
                    auto keep = [&](float* to) {
                        return [&b, to](int r, long c, const __m512* s) {
                            for (int i = 0; i < ACROSS; i++) _mm512_storeu_ps(to + r * b.columns + c + 16 * i, s[i]);
                        };
                    };
                    auto add = [&](float* to) {
                        return [&b, to](int r, long c, const __m512* s) {
                            float* p = to + r * b.columns + c;
                            for (int i = 0; i < ACROSS; i++) _mm512_storeu_ps(p + 16 * i, _mm512_add_ps(_mm512_loadu_ps(p + 16 * i), s[i]));
                        };
                    };
                    product<PAIRS<T>>(rows, (const uint32_t*)Q.at(start + first, head), q_stride / P, 1, width / P, b.keys, b.columns, wide, keep(b.score));
                    product<PAIRS<T>>(rows, (const uint32_t*)G.at(start + first, head), grad_stride / P, 1, value_width / P, b.values, b.columns, wide, keep(b.push));
                    for (int r = 0; r < rows; r++) {
                        float *score = b.score + r * b.columns, *push = b.push + r * b.columns;
                        long n = before + first + r + 1;
                        __m512 share = _mm512_set1_ps(1 / exponentials(score, n, scale)), mean = _mm512_setzero_ps();
                        for (long c = 0; c < n; c += 16) {
                            __m512 p = _mm512_mul_ps(_mm512_loadu_ps(score + c), share);  // 0 past the n-th, to the end of the vector
                            mean = _mm512_mask3_fmadd_ps(p, _mm512_loadu_ps(push + c), mean, mask_of(n - c));
                            _mm512_storeu_ps(score + c, p);
                        }
                        __m512 middle = _mm512_set1_ps(_mm512_reduce_add_ps(mean)), factor = _mm512_set1_ps(scale);
                        for (long c = 0; c < wide; c += 16) {
                            __mmask16 mask = mask_of(n - c);
                            __m512 p = _mm512_maskz_loadu_ps(mask, score + c);
                            __m512 s = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p, factor), _mm512_sub_ps(_mm512_loadu_ps(push + c), middle));
                            _mm512_storeu_ps(score + c, p);
                            _mm512_storeu_ps(push + c, s);
                            if (PAIRS<T>) store(b.row + r * b.columns + c, All(), s);
                        }
                    }
                    for (int r = 0; r < (PAIRS<T> ? rows : 0); r += 2)
                        for (long c = 0; c < wide; c += 16) {
                            long at = r * b.columns + c, to = r / P * b.columns + c;
                            to_pairs(b.score + at, r + 1 < rows ? b.score + at + b.columns : nullptr, b.score_pairs + to);
                            to_pairs(b.push + at, r + 1 < rows ? b.push + at + b.columns : nullptr, b.push_pairs + to);
                        }
                    lay_pairs<T>([&](long r) { return Q.at(start + first + r, head); }, 0, rows, width, b.query_pairs);
                    lay_pairs<T>([&](long r) { return G.at(start + first + r, head); }, 0, rows, value_width, b.grad_pairs);
                    product<PAIRS<T>>(rows, (const uint32_t*)b.row, b.columns / P, 1, int(seen + P - 1) / P, b.across, padded(width), padded(width),
                            [&](int r, long c, const __m512* s) { store_wide(dQ.at(start + first + r, head), width, c, s, _mm512_set1_ps(1.0f)); });
                    product<PAIRS<T>>(width, b.query_pairs, 1, padded(width), pairs, b.push_pairs, b.columns, wide, add(b.key_sums));
                    product<PAIRS<T>>(value_width, b.grad_pairs, 1, padded(value_width), pairs, b.score_pairs, b.columns, wide, add(b.value_sums));
                }
            if (prompt) return;  // others will push on it
            write_columns(b.key_sums, b.columns, before, dK, start, length, key_head);
            write_columns(b.value_sums, b.columns, before, dV, start, length, key_head);
            clear(before, std::min(b.columns, padded(before + length)));
        });
        if (group.prefix_length) {
            write_columns(b.key_sums, b.columns, 0, dK, group.prefix, group.prefix_length, key_head);
            write_columns(b.value_sums, b.columns, 0, dV, group.prefix, group.prefix_length, key_head);
        }
    });
}

}  // namespace

// q (T, N, H), k (T, M, H), v (T, M, V) -> out (T, N, V), all of one dtype
extern "C" void jevons_segments(int dtype, const void* q, long q_stride, const void* k, long k_stride, const void* v, long v_stride, int heads,
                                int key_heads, int width, int value_width, const Group* groups, long count, const Member* members, float scale,
                                void* out, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        forward<T>((const T*)q, q_stride, (const T*)k, k_stride, (const T*)v, v_stride, heads, key_heads, width, value_width, groups, count,
                   members, scale, (T*)out, threads);
    };
    dtype == BF16 ? run(bf16()) : run(float());
}

// gradients of q, k and v, contiguous, from that of the output, with its own stride
extern "C" void jevons_segments_backward(int dtype, const void* grad, long grad_stride, const void* q, long q_stride, const void* k, long k_stride,
                                         const void* v, long v_stride, int heads, int key_heads, int width, int value_width, const Group* groups,
                                         long count, const Member* members, float scale, void* grad_q, void* grad_k, void* grad_v, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        backward<T>((const T*)grad, grad_stride, (const T*)q, q_stride, (const T*)k, k_stride, (const T*)v, v_stride, heads, key_heads, width,
                    value_width, groups, count, members, scale, (T*)grad_q, (T*)grad_k, (T*)grad_v, threads);
    };
    dtype == BF16 ? run(bf16()) : run(float());
}

}  // namespace jevons
