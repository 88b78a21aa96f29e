// product.cpp's loops with AVX-512 and its products of bf16 pairs and of bytes.
#pragma once
#include "loop.hpp"
#include "rows.hpp"

namespace jevons {

constexpr int ROWS = 14;  // of a block at most: 28 accumulators of the 32 registers
// rows of a block where one block is all (a weight crosses memory once), and where there are more (the fastest loops)
constexpr int alone(int format) { return format == INT4 ? 8 : ROWS; }
constexpr int several(int format) { return in_place(format) ? 6 : format == INT4 ? 7 : format == INT8 ? 8 : ROWS; }
constexpr long per_unit_of_x(int format) { return per_unit(format); }  // numbers of a row of x in a unit of 4 bytes

template <int FORMAT, int M>
void multiply_float(const uint8_t* w, const uint32_t* x, long U, Ahead ahead, float* out) {
    __m512 acc[M][2];
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (long u = 0; u < U; u++, w += 128, x += M) {
        ahead.ask<128>();
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) {
            __m512i v = _mm512_set1_epi32(int(x[r]));
            if (FORMAT == BFLOAT) {
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], (__m512bh)w0, (__m512bh)v);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], (__m512bh)w1, (__m512bh)v);
            } else {
                acc[r][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(w0), _mm512_castsi512_ps(v), acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(w1), _mm512_castsi512_ps(v), acc[r][1]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
        _mm512_storeu_ps(out + r * 32, acc[r][0]);
        _mm512_storeu_ps(out + r * 32 + 16, acc[r][1]);
    }
}

// the intrinsic in other words: with it GCC 12 keeps moving accumulators between registers and the stack
static inline void add_quads(__m512i& sum, __m512i w, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

template <int FORMAT, int M>
void multiply_int(const uint8_t* w, const uint32_t* x, const float* scale, const float* offset, const int32_t* zero, long G, Ahead ahead,
                  float* out) {
    constexpr int QUADS = group_of(FORMAT) / 4, HEAD = FORMAT == INT4 ? 128 : 64;
    const __m512i low = _mm512_set1_epi8(15);
    constexpr bool KEPT = M <= 7;  // scaled sums find registers beside the integer sums; else they stay in `out`, first-level cache
    __m512 sum[KEPT ? M : 1][2];
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
        if (KEPT) {
            sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        } else {
            _mm512_store_ps(out + r * 32, _mm512_setzero_ps());
            _mm512_store_ps(out + r * 32 + 16, _mm512_setzero_ps());
        }
    }
    for (long g = 0; g < G; g++, scale += M, offset += M, zero += M) {
        const uint8_t* head = w;
        w += HEAD;
        __m512i acc[M][2];
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) acc[r][0] = acc[r][1] = FORMAT == INT8 ? _mm512_set1_epi32(zero[r]) : _mm512_setzero_si512();
#pragma GCC unroll 1
        for (int q = 0; q < QUADS; q++, x += M) {
            __m512i w0, w1;
            ahead.ask<FORMAT == INT8 ? 128 : 64>();
            if (FORMAT == INT8) {
                w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
                w += 128;
            } else {
                __m512i both = _mm512_loadu_si512(w);
                w0 = _mm512_and_si512(both, low), w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                w += 64;
            }
#pragma GCC unroll 16
            for (int r = 0; r < M; r++) {
                __m512i v = _mm512_set1_epi32(int(x[r]));
                add_quads(acc[r][0], w0, v);
                add_quads(acc[r][1], w1, v);
            }
        }
        __m512 s[2] = {pair_of_scales(head), pair_of_scales(head + 32)}, least[2];
        if (FORMAT == INT4) least[0] = pair_of_scales(head + 64), least[1] = pair_of_scales(head + 96);
#pragma GCC unroll 16
        for (int r = 0; r < M; r++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                __m512 before = KEPT ? sum[KEPT ? r : 0][i] : _mm512_load_ps(out + r * 32 + i * 16);
                __m512 after = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][i]), s[i]), _mm512_set1_ps(scale[r]), before);
                if (FORMAT == INT4) after = _mm512_fmadd_ps(least[i], _mm512_set1_ps(offset[r]), after);
                if (KEPT)
                    sum[KEPT ? r : 0][i] = after;
                else
                    _mm512_store_ps(out + r * 32 + i * 16, after);
            }
    }
    if (KEPT)
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) {
            _mm512_store_ps(out + r * 32, sum[r][0]);
            _mm512_store_ps(out + r * 32 + 16, sum[r][1]);
        }
}

}  // namespace jevons
