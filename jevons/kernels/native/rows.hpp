// Products with weights that lie as the model has them, row by row.
//
// Problem: packing copies weights, and weights that a trainer changes every few seconds cannot be copied each time. Approach: what is
// packed is only where each row begins. Weights and rows of x are read 64 bytes at a time along K and multiplied lane by lane, four rows
// of weights by up to six of x in registers (two by up to fourteen where those are all), each pair with an accumulator of its own whose
// lanes are added up at the end, in one order whatever is beside it. Long rows go in stretches that the first-level cache holds.
// Putting 32 rows at a time into packed order, for the loops of product.cpp, was tried and takes longer than memory does.
#pragma once
#include "loop.hpp"

namespace jevons {

// the sums of four accumulators' lanes
static inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out (M, 32) = M rows of x, `units` 4-byte units each and zeros past K, times 32 rows of weights of `bytes` bytes
template <bool PAIRS, int M>
void multiply_rows(const char* const* record, const uint32_t* x, long units, long bytes, const Next& next, float* out) {
    constexpr int R = M <= 6 ? 4 : 2;
    __mmask64 tail = bytes % 64 ? (1ull << bytes % 64) - 1 : 0;
    long lines = bytes / 64, pieces = lines > LINES ? (lines + LINES - 1) / LINES : 1;
    alignas(64) __m512 kept[M * 32];  // accumulators between stretches
    for (long piece = 0; piece < pieces; piece++) {
        long begin = lines * piece / pieces, end = lines * (piece + 1) / pieces;
        bool last = piece + 1 == pieces;
        for (int n = 0; n < 32; n += R) {
            Reading<R> rows(record, n, next, begin * 64);
            __m512 acc[M][R];
#pragma GCC unroll 16
            for (int r = 0; r < M; r++)
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) acc[r][i] = piece ? kept[r * 32 + n + i] : _mm512_setzero_ps();
            const uint32_t* at = x + begin * 16;
            for (long l = begin; l < end; l++, at += 16) {
                __m512i v[R];
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) v[i] = _mm512_loadu_si512(rows.w[i] + l * 64);
                rows.ask(l * 64);
#pragma GCC unroll 16
                for (int r = 0; r < M; r++) {
                    __m512i row = _mm512_loadu_si512(at + r * units);
#pragma GCC unroll 4
                    for (int i = 0; i < R; i++) acc[r][i] = dot<PAIRS>(acc[r][i], v[i], row);
                }
            }
            if (!last) {
#pragma GCC unroll 16
                for (int r = 0; r < M; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < R; i++) kept[r * 32 + n + i] = acc[r][i];
                continue;
            }
            if (tail) {
                __m512i v[R];
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) v[i] = _mm512_maskz_loadu_epi8(tail, rows.w[i] + lines * 64);
#pragma GCC unroll 16
                for (int r = 0; r < M; r++) {
                    __m512i row = _mm512_loadu_si512(at + r * units);
#pragma GCC unroll 4
                    for (int i = 0; i < R; i++) acc[r][i] = dot<PAIRS>(acc[r][i], v[i], row);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < M; r += 4 / R) {
                if constexpr (R == 4) {
                    _mm_storeu_ps(out + r * 32 + n, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
                } else {
                    int s = r + 1 < M ? r + 1 : r;
                    __m128 both = sums(acc[r][0], acc[r][1], acc[s][0], acc[s][1]);
                    _mm_storel_pi(reinterpret_cast<__m64*>(out + r * 32 + n), both);
                    _mm_storeh_pi(reinterpret_cast<__m64*>(out + s * 32 + n), both);
                }
            }
        }
    }
}

}  // namespace jevons
