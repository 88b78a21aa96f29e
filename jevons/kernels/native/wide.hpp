// Vectors of fp32 on whatever processor there is: 16 lanes with AVX-512, else 8. The compiler's own but for what it has no word for.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "type.hpp"

namespace jevons {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Wide __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) {
    uint32_t bits = uint32_t(*p) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {  // to the nearest, halves to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline Wide get_wide(const float* p) {
    Wide x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline Wide get_wide(const bf16* p) {
    Halves x;
    std::memcpy(&x, p, sizeof x);
    return (Wide)(__builtin_convertvector(x, Words) << 16);
}
static inline void put_wide(float* p, Wide x) { std::memcpy(p, &x, sizeof x); }
static inline void put_wide(bf16* p, Wide x) {
    Words bits = (Words)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = (Words)(x != x);
    Halves low = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
    std::memcpy(p, &low, sizeof low);
}

static inline float root(float x) { return std::sqrt(x); }
static inline Wide root(Wide x) {
#if defined(__AVX512F__)
    return (Wide)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    return (Wide)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

static inline float sum(Wide x) {  // in one order always
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);  // in this order
#endif
    float lanes[LANES];
    put_wide(lanes, x);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}
static inline void sums(const Wide* x, float* out) {  // of four
#if defined(__AVX__) && !defined(__AVX512F__)
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

// bit i: whether x[i] is at least `bound`
static inline uint32_t reached(Wide x, float bound) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GE_OQ);
#else
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(bound), _CMP_GE_OQ)));
#endif
}

template <class A, class B>
static inline float dot(const A* a, const B* b, long n) {
    Wide total = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES) total += get_wide(a + i) * get_wide(b + i);
    float all = sum(total);
    for (; i < n; i++) all += get(a + i) * get(b + i);
    return all;
}

// Ask memory for `count` elements.
template <class T>
static inline void ask(const T* p, long count) {
    for (long i = 0; i < count; i += 64 / long(sizeof(T))) __builtin_prefetch(p + i);
}

// f(i, get, put) for i in [0, n): in steps of a vector, what is left one by one; the two functions are given pointers to element i
template <class F>
static inline void each_wide(long n, const F& f) {
    long i = 0;
    auto many = [](auto p) { return get_wide(p); };
    auto one = [](auto p) { return get(p); };
    for (; i + LANES <= n; i += LANES) f(i, many, [](auto p, Wide x) { put_wide(p, x); });
    for (; i < n; i++) f(i, one, [](auto p, float x) { put(p, x); });
}

}  // namespace jevons
