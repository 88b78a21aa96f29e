// The loop that attention's products share: 6 rows by N vectors of 16 columns, words along the depth that are bf16 pairs or fp32, fp32 sums.
#pragma once
#include "vector.hpp"

namespace jevons {

constexpr int TILE = 6;  // rows
#ifdef __AVX512F__
constexpr int ACROSS = 4;  // vectors that fill the registers
#else
constexpr int ACROSS = 1;
#endif

// sum[r][c] += row r times the right side: `depth` words, `step` between a row's, N vectors wide with `stride` between words
#ifdef __AVX512F__
template <bool PAIRS, int N>
static inline void multiply(__m512 (*sum)[N], const uint32_t* const* left, long step, const uint32_t* right, long stride, int depth) {
    for (int k = 0; k < depth; k++) {
        __m512i column[N];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) column[c] = _mm512_loadu_si512(right + k * stride + 16 * c);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            __m512i x = _mm512_set1_epi32(int(left[r][k * step]));
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) sum[r][c] = dot<PAIRS>(sum[r][c], x, column[c]);
        }
    }
}
#else
template <bool PAIRS, int N>
static inline void multiply(__m512 (*sum)[N], const uint32_t* const* left, long step, const uint32_t* right, long stride, int depth) {
    for (int c = 0; c < N; c++) {  // 16 columns at a time: 12 sums of 8
        __m256 acc[TILE][2];
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) acc[r][0] = sum[r][c].a, acc[r][1] = sum[r][c].b;
        for (int k = 0; k < depth; k++) {
            __m512i column = _mm512_loadu_si512(right + k * stride + 16 * c);
            __m256 a = PAIRS ? even(column.a) : _mm256_castsi256_ps(column.a), b = PAIRS ? even(column.b) : _mm256_castsi256_ps(column.b);
#pragma GCC unroll 6
            for (int r = 0; r < TILE; r++) {
                __m256i word = _mm256_set1_epi32(int(left[r][k * step]));
                __m256 x = PAIRS ? even(word) : _mm256_castsi256_ps(word);
                acc[r][0] = _mm256_fmadd_ps(x, a, acc[r][0]), acc[r][1] = _mm256_fmadd_ps(x, b, acc[r][1]);
            }
            if (!PAIRS) continue;
            a = odd(column.a), b = odd(column.b);
#pragma GCC unroll 6
            for (int r = 0; r < TILE; r++) {
                __m256 x = odd(_mm256_set1_epi32(int(left[r][k * step])));
                acc[r][0] = _mm256_fmadd_ps(x, a, acc[r][0]), acc[r][1] = _mm256_fmadd_ps(x, b, acc[r][1]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) sum[r][c].a = acc[r][0], sum[r][c].b = acc[r][1];
    }
}
#endif

}  // namespace jevons
