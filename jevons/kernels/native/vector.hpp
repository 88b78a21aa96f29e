// AVX-512 over arrays of fp32 or bf16 (kept as uint16_t), always computing in fp32.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace jevons {

using bf16 = uint16_t;
enum DType { FLOAT = 0, BF16 = 1 };

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
static inline const void* at(const void* p, int dtype, long i) { return static_cast<const char*>(p) + i * (dtype == BF16 ? 2 : 4); }
static inline void* at(void* p, int dtype, long i) { return static_cast<char*>(p) + i * (dtype == BF16 ? 2 : 4); }

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

// Memory that a thread keeps between calls, for intermediate results.
class Scratch {
public:
    ~Scratch() { std::free(data_); }
    template <class T>
    T* get(size_t n) {
        size_t bytes = (n * sizeof(T) + 64 + 4095) / 4096 * 4096;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(4096, bytes);
            size_ = data_ ? bytes : 0;
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace jevons
