// The words of AVX-512 that the kernels use, for processors that have AVX2 and FMA only: a vector of 16 is two halves of 8.
//
// Problem: kernels written twice drift apart. Approach: inside namespace jevons these names come before the compiler's own, which are of
// no use here, so one source serves both; only loops whose sums would not fit 16 registers of 8 are written again (loop_avx2.hpp,
// tile.hpp). Masks are always the first n elements, as mask_of makes them, unless said otherwise; stores under a mask copy,
// because AMD takes tens of cycles for the instruction. Products of bf16 pairs are two FMAs of widened halves.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _mm512_cmp_ps_mask  // macros in some compilers
#undef _mm512_roundscale_ps

namespace jevons {

struct __m512 {
    __m256 a, b;
};
struct __m512i {
    __m256i a, b;
};
using __m512bh = __m512i;

// lane by lane
#define JEVONS_BOTH(type, name, one) \
    static inline type name(type x, type y) { return {one(x.a, y.a), one(x.b, y.b)}; }
JEVONS_BOTH(__m512, _mm512_add_ps, _mm256_add_ps)
JEVONS_BOTH(__m512, _mm512_sub_ps, _mm256_sub_ps)
JEVONS_BOTH(__m512, _mm512_mul_ps, _mm256_mul_ps)
JEVONS_BOTH(__m512, _mm512_div_ps, _mm256_div_ps)
JEVONS_BOTH(__m512, _mm512_max_ps, _mm256_max_ps)
JEVONS_BOTH(__m512, _mm512_min_ps, _mm256_min_ps)
JEVONS_BOTH(__m512i, _mm512_add_epi32, _mm256_add_epi32)
JEVONS_BOTH(__m512i, _mm512_max_epi32, _mm256_max_epi32)
JEVONS_BOTH(__m512i, _mm512_min_epi32, _mm256_min_epi32)
JEVONS_BOTH(__m512i, _mm512_and_si512, _mm256_and_si256)
JEVONS_BOTH(__m512i, _mm512_or_si512, _mm256_or_si256)
#undef JEVONS_BOTH
static inline __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline __m512 _mm512_fmsub_ps(__m512 x, __m512 y, __m512 z) { return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)}; }
static inline __m512 _mm512_fnmadd_ps(__m512 x, __m512 y, __m512 z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
static inline __m512 _mm512_sqrt_ps(__m512 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline __m512i _mm512_slli_epi32(__m512i x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
static inline __m512 _mm512_abs_ps(__m512 x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline __m512 _mm512_roundscale_ps(__m512 x, int) {  // to the nearest whole number, as all callers ask
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 times_power(__m256 x, __m256 n) {  // in two steps: 2^128 is no float
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    auto power = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
static inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) { return {times_power(x.a, n.a), times_power(x.b, n.b)}; }

// constants, casts, conversions
static inline __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline __m512i _mm512_set_epi32(int p, int o, int n, int m, int l, int k, int j, int i, int h, int g, int f, int e, int d, int c, int b, int a) {
    return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}
static inline __m512 _mm512_castsi512_ps(__m512i x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
static inline __m512 _mm512_cvtepi32_ps(__m512i x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline __m512i _mm512_cvtps_epi32(__m512 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
static inline __m256i even_halves(__m256i x) { return _mm256_slli_epi32(x, 16); }
static inline __m256i odd_halves(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))); }
static inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(even_halves(pairs)); }
static inline __m256 odd(__m256i pairs) { return _mm256_castsi256_ps(odd_halves(pairs)); }
static inline __m256i round_bf16(__m256 x) {  // into the low halves; to the nearest, halves to even; a NaN stays one
    __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
static inline __m256i _mm512_cvtneps_pbh(__m512 x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b)), 0xd8);
}
static inline __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) { return {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)}; }
static inline __m128i _mm_cvtneps_pbh(__m128 x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(round_bf16(_mm256_castps128_ps256(x))), _mm_setzero_si128());
}
static inline __m128i _mm512_cvtsepi32_epi8(__m512i x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
static inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
    __m256i byte = _mm256_set1_epi32(255);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(x.a, byte), _mm256_and_si256(x.b, byte)), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
    return {_mm256_fmadd_ps(odd(x.a), odd(y.a), _mm256_fmadd_ps(even(x.a), even(y.a), sum.a)),
            _mm256_fmadd_ps(odd(x.b), odd(y.b), _mm256_fmadd_ps(even(x.b), even(y.b), sum.b))};
}

// sums and extremes of all lanes
template <class Join>
static inline float reduce(__m256 x, const Join& join) {
    __m128 y = join(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = join(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(join(y, _mm_movehdup_ps(y)));
}
static inline float _mm512_reduce_add_ps(__m512 x) {
    return reduce(_mm256_add_ps(x.a, x.b), [](__m128 u, __m128 v) { return _mm_add_ps(u, v); });
}
static inline float _mm512_reduce_max_ps(__m512 x) {
    return reduce(_mm256_max_ps(x.a, x.b), [](__m128 u, __m128 v) { return _mm_max_ps(u, v); });
}
static inline float _mm512_reduce_min_ps(__m512 x) {
    return reduce(_mm256_min_ps(x.a, x.b), [](__m128 u, __m128 v) { return _mm_min_ps(u, v); });
}
static inline int _mm512_reduce_add_epi32(__m512i x) {
    alignas(32) int lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(x.a, x.b));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

// memory
static inline __m512 _mm512_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline __m512 _mm512_load_ps(const float* p) { return _mm512_loadu_ps(p); }
static inline void _mm512_storeu_ps(float* p, __m512 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
static inline void _mm512_store_ps(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline __m512i _mm512_loadu_si512(const void* p) {
    auto q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
static inline void _mm512_storeu_si512(void* p, __m512i x) {
    auto q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a), _mm256_storeu_si256(q + 1, x.b);
}
static inline void _mm512_store_si512(void* p, __m512i x) { _mm512_storeu_si512(p, x); }

// under a mask; these four lanes' worth of masks may be any
static inline __m256i spread(unsigned mask) {
    __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bit), bit);
}
static inline __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 x, __m512 y) {
    return {_mm256_blendv_ps(x.a, y.a, _mm256_castsi256_ps(spread(m))), _mm256_blendv_ps(x.b, y.b, _mm256_castsi256_ps(spread(m >> 8)))};
}
static inline __m512 _mm512_mask_mov_ps(__m512 x, __mmask16 m, __m512 y) { return _mm512_mask_blend_ps(m, x, y); }
static inline __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 x) {
    return {_mm256_and_ps(x.a, _mm256_castsi256_ps(spread(m))), _mm256_and_ps(x.b, _mm256_castsi256_ps(spread(m >> 8)))};
}
static inline __m512 _mm512_maskz_mul_ps(__mmask16 m, __m512 x, __m512 y) { return _mm512_maskz_mov_ps(m, _mm512_mul_ps(x, y)); }
static inline __m512 _mm512_mask_max_ps(__m512 kept, __mmask16 m, __m512 x, __m512 y) { return _mm512_mask_blend_ps(m, kept, _mm512_max_ps(x, y)); }
static inline __m512 _mm512_mask3_fmadd_ps(__m512 x, __m512 y, __m512 sum, __mmask16 m) {
    return _mm512_mask_blend_ps(m, sum, _mm512_fmadd_ps(x, y, sum));
}
static inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
    auto one = [&](__m256 u, __m256 v) {
        switch (how) {
            case _CMP_LT_OQ: return _mm256_movemask_ps(_mm256_cmp_ps(u, v, _CMP_LT_OQ));
            case _CMP_GE_OQ: return _mm256_movemask_ps(_mm256_cmp_ps(u, v, _CMP_GE_OQ));
            case _CMP_NEQ_UQ: return _mm256_movemask_ps(_mm256_cmp_ps(u, v, _CMP_NEQ_UQ));
            default: __builtin_trap();
        }
    };
    return __mmask16(one(x.a, y.a) | one(x.b, y.b) << 8);
}
static inline __m512i _mm512_maskz_compress_epi32(__mmask16 m, __m512i x) {
    uint32_t from[16], to[16] = {};
    _mm512_storeu_si512(from, x);
    for (int n = 0; m; m &= m - 1) to[n++] = from[__builtin_ctz(m)];
    return _mm512_loadu_si512(to);
}
static inline __m512 _mm512_maskz_compress_ps(__mmask16 m, __m512 x) {
    __m512i bits = _mm512_maskz_compress_epi32(m, {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)});
    return _mm512_castsi512_ps(bits);
}

// under masks of the first n elements
static inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const float* p) {
    if (m == 0xffff) return _mm512_loadu_ps(p);
    return {_mm256_maskload_ps(p, spread(m)), _mm256_maskload_ps(p + 8, spread(m >> 8))};
}
static inline __m512 _mm512_mask_loadu_ps(__m512 otherwise, __mmask16 m, const float* p) {
    return m == 0xffff ? _mm512_loadu_ps(p) : _mm512_mask_blend_ps(m, otherwise, _mm512_maskz_loadu_ps(m, p));
}
static inline void _mm512_mask_storeu_ps(float* p, __mmask16 m, __m512 x) {
    if (m == 0xffff) return _mm512_storeu_ps(p, x);
    float lanes[16];
    _mm512_storeu_ps(lanes, x);
    std::memcpy(p, lanes, 4 * __builtin_popcount(m));
}
static inline __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* p) {
    if (m == 0xffff) return _mm512_loadu_si512(p);
    auto q = static_cast<const int*>(p);
    return {_mm256_maskload_epi32(q, spread(m)), _mm256_maskload_epi32(q + 8, spread(m >> 8))};
}
static inline void _mm512_mask_storeu_epi32(void* p, __mmask16 m, __m512i x) {
    if (m == 0xffff) return _mm512_storeu_si512(p, x);
    uint32_t lanes[16];
    _mm512_storeu_si512(lanes, x);
    std::memcpy(p, lanes, 4 * __builtin_popcount(m));
}
static inline __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void* p) {
    if (m == ~0ull) return _mm512_loadu_si512(p);
    uint8_t bytes[64] = {};
    std::memcpy(bytes, p, __builtin_popcountll(m));
    return _mm512_loadu_si512(bytes);
}
static inline __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
    if (m == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    uint16_t halves[16] = {};
    std::memcpy(halves, p, 2 * __builtin_popcount(m));
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
}
static inline void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i x) {
    if (m == 0xffff) return _mm256_storeu_si256(static_cast<__m256i*>(p), x);
    uint16_t halves[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), x);
    std::memcpy(p, halves, 2 * __builtin_popcount(m));
}

// in[i] are 16 vectors of 32-bit elements; afterwards in[j] holds element j of all: four blocks of 8 by 8
static inline void transpose_eight(__m256i* x) {
    __m256i t[8], u[8];
    for (int i = 0; i < 4; i++) t[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]), t[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            u[4 * i + 2 * j] = _mm256_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
            u[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
        }
    for (int i = 0; i < 4; i++) x[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20), x[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
}
static inline void transpose(__m512i* in) {
    __m256i block[2][2][8];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 8; k++) block[i][0][k] = in[8 * i + k].a, block[i][1][k] = in[8 * i + k].b;
    for (auto& row : block)
        for (auto& b : row) transpose_eight(b);
    for (int j = 0; j < 2; j++)
        for (int k = 0; k < 8; k++) in[8 * j + k] = {block[0][j][k], block[1][j][k]};
}

}  // namespace jevons
