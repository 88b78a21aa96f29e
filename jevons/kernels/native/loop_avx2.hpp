// product.cpp's loops with AVX2 and FMA: 16 registers of 8.
//
// Problem: a tile's 32 outputs are four registers a row, so three rows fill them, and there are neither products of bf16 nor of bytes. Approach:
// one or two rows take a tile as it comes; more take it in two passes over half of each line, the second out of the cache. bf16 is
// widened by a shift or a mask, once for all rows. Bytes: |w| times x with w's sign, in pairs, stays below 2^15 (128 * 127 * 2), and so
// do eight such pairs of 4-bit weights (15 * 127 * 16): those are added up in 16 bits. Sums are in one order whatever the number of rows.
#pragma once
#include <algorithm>

#include "loop.hpp"

namespace jevons {

constexpr int ROWS = 6;
// rows of a block where one block is all (a weight crosses memory once), and where there are more (the fastest loops)
constexpr int alone(int format) { return format == INT8 ? 4 : ROWS; }
constexpr int several(int format) { return alone(format); }
// numbers of a row of x in a unit of 4 bytes: with packed bf16 they stay fp32, so that each is widened once and not for every tile
constexpr long per_unit_of_x(int format) { return format == BFLOAT ? 1 : per_unit(format); }

static inline __m256i line_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline __m256 floats(__m256i x) { return _mm256_castsi256_ps(x); }
static inline __m256i spread_word(const uint32_t* x) { return _mm256_set1_epi32(int(*x)); }

// units of 128 bytes, of each the registers [FIRST, FIRST + PARTS) of four; x in fp32, two of its numbers for a unit of bf16
template <int FORMAT, int M, int FIRST, int PARTS>
void pass_float(const uint8_t* w, const float* x, long units, Ahead ahead, float* out) {
    __m256 acc[M][PARTS];
#pragma GCC unroll 6
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) acc[r][p] = _mm256_setzero_ps();
    auto add = [&](const float* row, auto weight) {
        if constexpr (PARTS == 4) {  // rows' numbers wait in registers, else weights do
            __m256 one[M];
#pragma GCC unroll 6
            for (int r = 0; r < M; r++) one[r] = _mm256_broadcast_ss(row + r);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                __m256 v = weight(line_at(w + (FIRST + p) * 32));
#pragma GCC unroll 6
                for (int r = 0; r < M; r++) acc[r][p] = _mm256_fmadd_ps(v, one[r], acc[r][p]);
            }
        } else {
            __m256 v[PARTS];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) v[p] = weight(line_at(w + (FIRST + p) * 32));
#pragma GCC unroll 6
            for (int r = 0; r < M; r++) {
                __m256 one = _mm256_broadcast_ss(row + r);
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) acc[r][p] = _mm256_fmadd_ps(v[p], one, acc[r][p]);
            }
        }
    };
    for (long u = 0; u < units; u++, w += 128) {
        if (FIRST == 0) ahead.ask<128>();
        if constexpr (FORMAT == BFLOAT) {
            add(x, [](__m256i v) { return even(v); });
            add(x + M, [](__m256i v) { return odd(v); });
            x += 2 * M;
        } else {
            add(x, [](__m256i v) { return floats(v); });
            x += M;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) _mm256_storeu_ps(out + r * 32 + (FIRST + p) * 8, acc[r][p]);
}

template <int FORMAT, int M>
void multiply_float(const uint8_t* w, const uint32_t* x, long U, Ahead ahead, float* out) {
    long units = FORMAT == BFLOAT ? U / 2 : U;
    auto rows = reinterpret_cast<const float*>(x);
    if constexpr (M <= 2) {
        pass_float<FORMAT, M, 0, 4>(w, rows, units, ahead, out);
    } else {
        pass_float<FORMAT, M, 0, 2>(w, rows, units, ahead, out);
        pass_float<FORMAT, M, 2, 2>(w, rows, units, ahead, out);
    }
}

// out += sum * scale of the outputs * scale of the row, + least * offset
template <int FORMAT>
static inline void add_scaled(float* out, __m256i sum, const uint8_t* head, int part, float scale, float offset) {
    auto eight = [&](const uint8_t* p) {
        return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + part)), 16));
    };
    __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), eight(head));
    __m256 all = _mm256_fmadd_ps(scaled, _mm256_set1_ps(scale), _mm256_loadu_ps(out + part * 8));
    if (FORMAT == INT4) all = _mm256_fmadd_ps(eight(head + 64), _mm256_set1_ps(offset), all);
    _mm256_storeu_ps(out + part * 8, all);
}

// a group of 128: quads of 128 bytes, of each the registers [FIRST, FIRST + PARTS)
template <int M, int FIRST, int PARTS>
void group_int8(const uint8_t* head, const uint32_t* x, const float* scale, Ahead& ahead, float* out) {
    const __m256i ones = _mm256_set1_epi16(1), center = _mm256_set1_epi8(char(128));
    const uint8_t* w = head + 64;
    __m256i acc[M][PARTS];
#pragma GCC unroll 4
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) acc[r][p] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int q = 0; q < 32; q++, w += 128, x += M) {
        if (FIRST == 0) ahead.ask<128>();
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            __m256i code = _mm256_xor_si256(line_at(w + (FIRST + p) * 32), center), size = _mm256_abs_epi8(code);
#pragma GCC unroll 4
            for (int r = 0; r < M; r++) {
                __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(spread_word(x + r), code));
                acc[r][p] = _mm256_add_epi32(acc[r][p], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) add_scaled<INT8>(out + r * 32, acc[r][p], head, FIRST + p, scale[r], 0);
}

// a group of 32: eight quads of 64 bytes, of each the registers [FIRST, FIRST + LINES) of two, each with outputs n and n + 16
template <int M, int FIRST, int LINES>
void group_int4(const uint8_t* head, const uint32_t* x, const float* scale, const float* offset, Ahead& ahead, float* out) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t* w = head + 128;
    __m256i acc[M][LINES][2];
#pragma GCC unroll 6
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
        for (int p = 0; p < LINES; p++) acc[r][p][0] = acc[r][p][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int q = 0; q < 8; q++, w += 64, x += M) {
        if (FIRST == 0) ahead.ask<64>();
#pragma GCC unroll 2
        for (int p = 0; p < LINES; p++) {
            __m256i both = line_at(w + (FIRST + p) * 32);
            __m256i near = _mm256_and_si256(both, low), far = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 6
            for (int r = 0; r < M; r++) {
                __m256i v = spread_word(x + r);
                acc[r][p][0] = _mm256_add_epi16(acc[r][p][0], _mm256_maddubs_epi16(near, v));
                acc[r][p][1] = _mm256_add_epi16(acc[r][p][1], _mm256_maddubs_epi16(far, v));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
        for (int p = 0; p < LINES; p++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
                add_scaled<INT4>(out + r * 32, _mm256_madd_epi16(acc[r][p][i], ones), head, FIRST + p + 2 * i, scale[r], offset[r]);
}

// `zero` is for loops that take codes as they are, around 128
template <int FORMAT, int M>
void multiply_int(const uint8_t* w, const uint32_t* x, const float* scale, const float* offset, const int32_t*, long G, Ahead ahead, float* out) {
    std::fill(out, out + M * 32, 0.0f);
    for (long g = 0; g < G; g++, w += group_bytes(FORMAT), x += group_of(FORMAT) / 4 * M, scale += M, offset += M) {
        if constexpr (FORMAT == INT8) {
            if constexpr (M <= 2) {
                group_int8<M, 0, 4>(w, x, scale, ahead, out);
            } else {
                group_int8<M, 0, 2>(w, x, scale, ahead, out);
                group_int8<M, 2, 2>(w, x, scale, ahead, out);
            }
        } else if constexpr (M <= 3) {
            group_int4<M, 0, 2>(w, x, scale, offset, ahead, out);
        } else {
            group_int4<M, 0, 1>(w, x, scale, offset, ahead, out);
            group_int4<M, 1, 1>(w, x, scale, offset, ahead, out);
        }
    }
}

// the sums of four accumulators' lanes
static inline __m128 sums(const __m256* x) {
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

// as rows.hpp's: out (M, 32) = M rows of x, `units` 4-byte units each and zeros past K, times 32 rows of weights of `bytes` bytes;
// four rows of weights by one or two of x in registers, or two by up to six
template <bool PAIRS, int M>
void multiply_rows(const char* const* record, const uint32_t* x, long units, long bytes, const Next& next, float* out) {
    constexpr int R = M <= 2 ? 4 : 2;
    long lines = bytes / 64, pieces = lines > LINES ? (lines + LINES - 1) / LINES : 1;
    alignas(32) __m256 kept[M * 32];  // accumulators between stretches
    for (long piece = 0; piece < pieces; piece++) {
        long begin = lines * piece / pieces * 64, end = lines * (piece + 1) / pieces * 64;
        bool last = piece + 1 == pieces;
        for (int n = 0; n < 32; n += R) {
            Reading<R> rows(record, n, next, begin);
            __m256 acc[M][R];
#pragma GCC unroll 6
            for (int r = 0; r < M; r++)
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) acc[r][i] = piece ? kept[r * 32 + n + i] : _mm256_setzero_ps();
            auto part = [&](const char* const* from, long at, const uint32_t* row, auto widen) {
                if constexpr (R == 2) {
                    __m256 v[R];
#pragma GCC unroll 2
                    for (int i = 0; i < R; i++) v[i] = widen(line_at(from[i] + at));
#pragma GCC unroll 6
                    for (int r = 0; r < M; r++) {
                        __m256 one = widen(line_at(row + r * units));
#pragma GCC unroll 2
                        for (int i = 0; i < R; i++) acc[r][i] = _mm256_fmadd_ps(v[i], one, acc[r][i]);
                    }
                } else {
                    __m256 one[M];
#pragma GCC unroll 3
                    for (int r = 0; r < M; r++) one[r] = widen(line_at(row + r * units));
#pragma GCC unroll 4
                    for (int i = 0; i < R; i++) {
                        __m256 v = widen(line_at(from[i] + at));
#pragma GCC unroll 3
                        for (int r = 0; r < M; r++) acc[r][i] = _mm256_fmadd_ps(v, one[r], acc[r][i]);
                    }
                }
            };
            auto add = [&](const char* const* from, long at, const uint32_t* row) {
                if constexpr (PAIRS) {
                    part(from, at, row, [](__m256i x) { return even(x); });
                    part(from, at, row, [](__m256i x) { return odd(x); });
                } else {
                    part(from, at, row, [](__m256i x) { return floats(x); });
                }
            };
            for (long at = begin; at < end; at += 64) {
                rows.ask(at);
                add(rows.w, at, x + at / 4);
                add(rows.w, at + 32, x + at / 4 + 8);
            }
            if (!last) {
#pragma GCC unroll 6
                for (int r = 0; r < M; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < R; i++) kept[r * 32 + n + i] = acc[r][i];
                continue;
            }
            if (long rest = bytes - end) {
                alignas(32) char copy[R][64] = {};
                const char* from[R];
                for (int i = 0; i < R; i++) std::memcpy(copy[i], rows.w[i] + end, size_t(rest)), from[i] = copy[i];
                add(from, 0, x + end / 4);
                add(from, 32, x + end / 4 + 8);
            }
#pragma GCC unroll 6
            for (int r = 0; r < M; r += 4 / R) {
                if constexpr (R == 4) {
                    _mm_storeu_ps(out + r * 32 + n, sums(acc[r]));
                } else {
                    int s = r + 1 < M ? r + 1 : r;
                    __m256 four[4] = {acc[r][0], acc[r][1], acc[s][0], acc[s][1]};
                    __m128 both = sums(four);
                    _mm_storel_pi(reinterpret_cast<__m64*>(out + r * 32 + n), both);
                    _mm_storeh_pi(reinterpret_cast<__m64*>(out + s * 32 + n), both);
                }
            }
        }
    }
}

}  // namespace jevons
