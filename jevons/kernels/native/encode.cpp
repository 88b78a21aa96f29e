// Weights into the tiles that product.cpp reads, quantised where the format says so. kernels/quantize.py decodes them again.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "pool.hpp"
#include "product.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

static inline bf16 round_bf16(float x) { return bf16(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0)); }
static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// 128 weights -> scale and codes around 128
void fit_int8(const float* w, bf16* scale, uint8_t* codes) {
    __m512 largest = _mm512_setzero_ps();
    for (int i = 0; i < 128; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(w + i)));
    *scale = round_bf16(_mm512_reduce_max_ps(largest) / 127.0f);
    float step = widen(*scale);
    __m512 divisor = _mm512_set1_ps(step == 0 ? 1.0f : step);
    for (int i = 0; i < 128; i += 16) {
        __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(w + i), divisor));
        q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
    }
}

// 32 weights -> scale, least value and codes 0 .. 15. Of several shares of the group's range, the one with the lowest squared error.
void fit_int4(const float* w, bf16* scale, bf16* least, uint8_t* codes) {
    __m512 w0 = _mm512_loadu_ps(w), w1 = _mm512_loadu_ps(w + 16);
    float low = _mm512_reduce_min_ps(_mm512_min_ps(w0, w1)), high = _mm512_reduce_max_ps(_mm512_max_ps(w0, w1));
    float middle = (low + high) / 2, half = (high - low) / 2, lowest = INFINITY;
    for (float share : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f}) {
        bf16 s = round_bf16(half * share * 2 / 15), m = round_bf16(middle - half * share);
        __m512 step = _mm512_set1_ps(widen(s)), start = _mm512_set1_ps(widen(m)), inverse = _mm512_set1_ps(widen(s) == 0 ? 0.0f : 1.0f / widen(s));
        __m512i q[2];
        __m512 error = _mm512_setzero_ps();
        for (int i = 0; i < 2; i++) {
            __m512 x = i ? w1 : w0;
            q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, start), inverse));
            q[i] = _mm512_max_epi32(_mm512_min_epi32(q[i], _mm512_set1_epi32(15)), _mm512_setzero_si512());
            __m512 off = _mm512_sub_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(q[i]), step, start), x);
            error = _mm512_fmadd_ps(off, off, error);
        }
        float sum = _mm512_reduce_add_ps(error);
        if (sum < lowest) {
            lowest = sum, *scale = s, *least = m;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(q[0]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(q[1]));
        }
    }
}

// one group of 32 rows, (32, 128) fp32 with zeros as padding
void encode(int format, const float (*w)[128], uint8_t* to) {
    alignas(64) uint8_t codes[32][128];
    bf16 *scale = reinterpret_cast<bf16*>(to), *least = scale + 32;
    for (int n = 0; n < 32; n++) {
        if (format == F32) std::memcpy(to + n * 4, w[n], 4);
        if (format == BFLOAT)
            for (int k = 0; k < 2; k++) reinterpret_cast<bf16*>(to)[n * 2 + k] = round_bf16(w[n][k]);
        if (format == INT8) fit_int8(w[n], scale + n, codes[n]);
        if (format == INT4) fit_int4(w[n], scale + n, least + n, codes[n]);
    }
    if (format == INT8)
        for (int q = 0; q < 32; q++)
            for (int n = 0; n < 32; n++) std::memcpy(to + 64 + (q * 32 + n) * 4, codes[n] + q * 4, 4);
    if (format == INT4)
        for (int q = 0; q < 8; q++)
            for (int n = 0; n < 16; n++)
                for (int k = 0; k < 4; k++) to[128 + (q * 16 + n) * 4 + k] = uint8_t(codes[n][q * 4 + k] | codes[n + 16][q * 4 + k] << 4);
}

}  // namespace

// rows: the address of each packed row's K weights, or 0 for padding; 32 rows a tile. Returns 0 where a quantised weight is not finite.
extern "C" int jevons_encode(int format, int dtype, const int64_t* rows, int tiles, int K, uint8_t* data, int threads) {
    long group = group_of(format), G = (K + group - 1) / group;
    std::atomic<bool> finite{true};
    int chunks = tiles < 1024 ? tiles : 1024;
    Pool::instance().run(threads, chunks, [&](int chunk) {
        alignas(64) float w[32][128];
        for (long tile = long(tiles) * chunk / chunks; tile < long(tiles) * (chunk + 1) / chunks; tile++)
            for (long g = 0; g < G; g++) {
                for (int n = 0; n < 32; n++) {
                    auto row = reinterpret_cast<const void*>(rows[tile * 32 + n]);
                    for (long i = 0; i < group; i += 16) {
                        __m512 x = _mm512_setzero_ps();
                        if (row) x = load(row, dtype, g * group + i, mask_of(std::min(group - i, K - g * group - i)));
                        // x - x is 0 unless x is infinite or NaN
                        if (format >= INT8 && _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_NEQ_UQ)) finite = false;
                        _mm512_store_ps(&w[n][i], x);
                    }
                }
                encode(format, w, data + (tile * G + g) * group_bytes(format));
            }
    });
    return finite;
}

}  // namespace jevons
