// Many new tokens of one sequence against its context, causal: what reading a prompt spends besides products.
//
// Approach: both products of attention are small matrix products, so both run on tiles of 6 query rows by 64 columns with bf16 pairs and
// fp32 sums. Keys and values of a head are first laid out for that, once for all queries that use them, wherever they lie (in the paged
// cache by a block table, or in rows); then each task takes 24 queries of one head through the context 64 keys at a time with a running
// maximum and sum (flash attention, arXiv 2205.14135). A query's result does not depend on its neighbours.
//
//     keys of a block     [H/2 pairs][64 keys][2]           values of a block     [32 pairs of keys][V padded to 64][2]
#include <algorithm>
#include <cmath>
#include <limits>

#include "pool.hpp"
#include "tile.hpp"

namespace jevons {
namespace {

constexpr int KEYS = 64, ROWS = TILE, TASK = 24;

struct Rows {
    const bf16 *keys, *values;
    long key_stride, value_stride;  // elements between rows
    const int32_t* table;           // blocks of `block_size` rows, or null: row j is context token j
    int block_size;

    long row(long token) const { return table ? long(table[token / block_size]) * block_size + token % block_size : token; }
};

void lay_out(const Rows& rows, long start, long context, int head, int width, int value_width, uint32_t* keys, uint32_t* values) {
    int pairs = width / 2, padded = (value_width + 63) / 64 * 64;
    for (int t = 0; t < KEYS; t++) {
        if (start + t >= context) {
            for (int u = 0; u < pairs; u++) keys[u * KEYS + t] = 0;
            continue;
        }
        const bf16* key = rows.keys + rows.row(start + t) * rows.key_stride + long(head) * width;
        for (int u = 0; u < pairs; u++) keys[u * KEYS + t] = uint32_t(key[2 * u]) | uint32_t(key[2 * u + 1]) << 16;
    }
    for (int p = 0; p < KEYS / 2; p++) {
        const bf16* pair[2];
        bool there[2];
        for (int i = 0; i < 2; i++) {
            long token = start + 2 * p + i;
            there[i] = token < context;
            pair[i] = there[i] ? rows.values + rows.row(token) * rows.value_stride + long(head) * value_width : nullptr;
        }
        for (int v = 0; v < padded; v += 16) {
            __mmask16 mask = mask_of(value_width - v);
            __m512i low = _mm512_setzero_si512(), high = low;
            if (there[0]) low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, pair[0] + v));
            if (there[1]) high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, pair[1] + v)), 16);
            _mm512_storeu_si512(values + long(p) * padded + v, _mm512_or_si512(low, high));
        }
    }
}

}  // namespace

extern "C" void jevons_causal(const bf16* q, long q_stride, const bf16* keys, long key_stride, const bf16* values, long value_stride,
                              int queries, int context, int heads, int key_heads, int width, int value_width, const int32_t* table,
                              int block_size, float scale, bf16* out, int threads) {
    static thread_local Scratch kept;
    Rows rows{keys, values, key_stride, value_stride, table, block_size};
    int blocks = (context + KEYS - 1) / KEYS, pairs = width / 2, padded = (value_width + 63) / 64 * 64, group = heads / key_heads;
    size_t key_size = size_t(pairs) * KEYS, value_size = size_t(KEYS / 2) * padded;
    uint32_t* laid_keys = kept.get<uint32_t>((key_size + value_size) * blocks * key_heads);
    uint32_t* laid_values = laid_keys + key_size * blocks * key_heads;
    Pool::instance().run(threads, blocks * key_heads, [&](int i) {
        lay_out(rows, long(i % blocks) * KEYS, context, i / blocks, width, value_width, laid_keys + key_size * i, laid_values + value_size * i);
    });
    int parts = (queries + TASK - 1) / TASK;
    Pool::instance().run(threads, parts * heads, [&](int task) {
        static thread_local Scratch scratch;
        int head = task % heads, first = (parts - 1 - task / heads) * TASK;  // the longest contexts first
        int count = std::min(TASK, queries - first), past = context - queries;
        float* sums = scratch.get<float>(size_t(TASK) * (padded + 2));
        float *most = sums + size_t(TASK) * padded, *total = most + TASK;
        std::fill(sums, most, 0.0f);
        std::fill(most, total, -std::numeric_limits<float>::infinity());
        std::fill(total, total + TASK, 0.0f);
        const uint32_t* head_keys = laid_keys + key_size * blocks * (head / group);
        const uint32_t* head_values = laid_values + value_size * blocks * (head / group);
        alignas(64) bf16 weight[ROWS][KEYS];
        for (int block = 0; block * KEYS <= past + first + count - 1; block++) {
            int start = block * KEYS;
            for (int row = 0; row < count; row += ROWS) {
                int last = past + first + std::min(row + ROWS, count) - 1;  // what the group's last query sees
                if (start > last) continue;
                const uint32_t* left[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    long query = first + std::min(row + r, count - 1);  // a missing row repeats the last, and is thrown away
                    left[r] = reinterpret_cast<const uint32_t*>(q + query * q_stride + long(head) * width);
                }
                __m512 sum[ROWS][4];
                for (auto& s : sum) s[0] = s[1] = s[2] = s[3] = _mm512_setzero_ps();
                multiply<true>(sum, left, 1, head_keys + key_size * block, KEYS, pairs);
                float shrink[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    int sees = past + first + std::min(row + r, count - 1) + 1 - start;  // keys of this block
                    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
                    for (int c = 0; c < 4; c++) {
                        sum[r][c] = _mm512_mul_ps(sum[r][c], _mm512_set1_ps(scale));
                        if (sees < 16 * (c + 1)) sum[r][c] = _mm512_mask_blend_ps(mask_of(sees - 16 * c), _mm512_set1_ps(-INFINITY), sum[r][c]);
                        top = _mm512_max_ps(top, sum[r][c]);
                    }
                    int at = row + std::min(r, count - 1 - row);
                    float before = most[at], now = std::max(before, _mm512_reduce_max_ps(top));
                    __m512 added = _mm512_setzero_ps();
                    for (int c = 0; c < 4; c++) {
                        sum[r][c] = exp(_mm512_sub_ps(sum[r][c], _mm512_set1_ps(now)));
                        added = _mm512_add_ps(added, sum[r][c]);
                    }
                    _mm512_store_si512(weight[r], (__m512i)_mm512_cvtne2ps_pbh(sum[r][1], sum[r][0]));
                    _mm512_store_si512(weight[r] + 32, (__m512i)_mm512_cvtne2ps_pbh(sum[r][3], sum[r][2]));
                    shrink[r] = before == now ? 1.0f : std::exp(before - now);
                    if (r < count - row) {
                        most[at] = now;
                        total[at] = total[at] * shrink[r] + _mm512_reduce_add_ps(added);
                    }
                }
                for (int r = 0; r < ROWS; r++) left[r] = reinterpret_cast<const uint32_t*>(weight[r]);
                int depth = std::min(KEYS, last + 1 - start + 1) / 2;
                for (int v = 0; v < padded; v += 64) {
                    for (int r = 0; r < ROWS; r++) {
                        const float* from = sums + size_t(row + std::min(r, count - 1 - row)) * padded + v;
                        for (int c = 0; c < 4; c++) sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(from + 16 * c), _mm512_set1_ps(shrink[r]));
                    }
                    multiply<true>(sum, left, 1, head_values + value_size * block + v, padded, depth);
                    for (int r = 0; r < ROWS && row + r < count; r++)
                        for (int c = 0; c < 4; c++) _mm512_storeu_ps(sums + size_t(row + r) * padded + v + 16 * c, sum[r][c]);
                }
            }
        }
        for (int r = 0; r < count; r++) {
            bf16* to = out + (long(first + r) * heads + head) * value_width;
            __m512 share = _mm512_set1_ps(1.0f / total[r]);
            for (int v = 0; v < value_width; v += 16)
                store(to + v, mask_of(value_width - v), _mm512_mul_ps(_mm512_loadu_ps(sums + size_t(r) * padded + v), share));
        }
    });
}

}  // namespace jevons
