// The optimizer's step in one pass over memory: the clipped gradient is read, moments and master weight are updated, the model's rounded.
//
// Memory is all that it costs: 28 bytes a parameter with gradients in bf16, where separate passes take twice that. Sums of squares are
// made of pieces of equal size, so neither result depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

template <class F>
void each_piece(long count, int threads, const F& f) {
    long size = std::max(1l << 15, (count / 8192 + 1023) & ~1023l);
    Pool::instance().run(threads, int((count + size - 1) / size), [&](int i) { f(i, i * size, std::min(count, (i + 1) * size)); });
}

}  // namespace

extern "C" void jevons_squares(const void* x, int dtype, long count, double* sum, int threads) {
    std::vector<double> parts(8193);
    each_piece(count, threads, [&](int piece, long begin, long end) {
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long i = begin; i < end; i += 64)
            for (int j = 0; j < 4; j++) {
                __m512 value = load(x, dtype, i + 16 * j, mask_of(end - i - 16 * j));
                sums[j] = _mm512_fmadd_ps(value, value, sums[j]);
            }
        parts[piece] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    });
    *sum = 0;
    for (double part : parts) *sum += part;
}

// `rate` is lr over the first moment's correction, `root` the square root of the second's; `rounded` may be null
extern "C" void jevons_adamw(float* master, const void* gradient, int dtype, float* first, float* second, bf16* rounded, long count, float scale,
                             float keep, float rate, float beta1, float beta2, float root, float eps, int threads) {
    __m512 clip = _mm512_set1_ps(scale), kept = _mm512_set1_ps(keep), step = _mm512_set1_ps(rate), correct = _mm512_set1_ps(1 / root);
    __m512 b1 = _mm512_set1_ps(beta1), a1 = _mm512_set1_ps(1 - beta1), b2 = _mm512_set1_ps(beta2), a2 = _mm512_set1_ps(1 - beta2);
    __m512 tiny = _mm512_set1_ps(eps);
    auto update = [&](long i, auto mask) {
        __m512 g = _mm512_mul_ps(load(gradient, dtype, i, mask), clip);
        __m512 m = _mm512_fmadd_ps(a1, g, _mm512_mul_ps(b1, load(first + i, mask)));
        __m512 v = _mm512_fmadd_ps(_mm512_mul_ps(a2, g), g, _mm512_mul_ps(b2, load(second + i, mask)));
        __m512 size = _mm512_fmadd_ps(_mm512_sqrt_ps(v), correct, tiny);
        __m512 w = _mm512_fnmadd_ps(step, _mm512_div_ps(m, size), _mm512_mul_ps(load(master + i, mask), kept));
        store(first + i, mask, m);
        store(second + i, mask, v);
        store(master + i, mask, w);
        if (rounded) store(rounded + i, mask, w);
    };
    each_piece(count, threads, [&](int, long begin, long end) {
        long i = begin;
        for (; i + 16 <= end; i += 16) update(i, All());
        if (i < end) update(i, mask_of(end - i));
    });
}

}  // namespace jevons
