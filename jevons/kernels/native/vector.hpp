// Vectors of 16 over arrays of fp32 or bf16 (kept as uint16_t), always computing in fp32: AVX-512, or two halves in avx2.hpp's words.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>

#include "type.hpp"
#ifndef __AVX512F__
#include "avx2.hpp"
#endif

namespace jevons {

static inline __mmask16 mask_of(long left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1); }

static inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 load(const bf16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
static inline void store(float* p, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(p, m, x); }
static inline void store(bf16* p, __mmask16 m, __m512 x) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x)); }

// the same with the dtype known at run time, i in elements
static inline __m512 load(const void* p, int dtype, long i, __mmask16 m) {
    return dtype == BF16 ? load(static_cast<const bf16*>(p) + i, m) : load(static_cast<const float*>(p) + i, m);
}
static inline void store(void* p, int dtype, long i, __mmask16 m, __m512 x) {
    dtype == BF16 ? store(static_cast<bf16*>(p) + i, m, x) : store(static_cast<float*>(p) + i, m, x);
}

// instead of a mask, where all 16 elements are there: a store under a mask takes several times a plain one
struct All {};
static inline __m512 load(const float* p, All) { return _mm512_loadu_ps(p); }
static inline __m512 load(const bf16* p, All) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline void store(float* p, All, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, All, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x)); }
static inline __m512 load(const void* p, int dtype, long i, All all) {
    return dtype == BF16 ? load(static_cast<const bf16*>(p) + i, all) : load(static_cast<const float*>(p) + i, all);
}

#ifdef __AVX512F__
// in[i] are 16 vectors of 32-bit elements; afterwards in[j] holds element j of all
static inline void transpose(__m512i* in) {
    __m512i t[16], u[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        in[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        in[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        in[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        in[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

// sum += a * b, lane by lane, of fp32 or of pairs of bf16
template <bool PAIRS>
static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    if (PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// e^x to 2 units in the last place: 2^round(x log2 e) times a polynomial on [-ln2/2, ln2/2]; 0 below -87.3, inf above 88.7
static inline __m512 exp(__m512 x) {
    __m512 low = _mm512_set1_ps(-87.33654f), high = _mm512_set1_ps(88.72283f);
    __mmask16 under = _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_max_ps(_mm512_min_ps(x, high), low), _mm512_set1_ps(1.442695041f)), 8);
    __m512 clamped = _mm512_max_ps(low, _mm512_min_ps(high, x));  // in this order a NaN in x survives
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0f));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), under, _mm512_setzero_ps());
}

static inline __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace jevons
