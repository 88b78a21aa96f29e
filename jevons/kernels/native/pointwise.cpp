// What stands between the products of a training step, one pass over memory forward and one backward: SwiGLU and RMSNorm.
//
// Rows may lie apart; all is computed in fp32 and rounded once. Sums over rows (a norm's weight) are made of pieces of equal size, so no
// result depends on the number of threads.
#include <algorithm>
#include <cmath>

#include "pool.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

constexpr long PIECE = 64;  // rows

template <class F>
void each_piece(long rows, long width, int threads, const F& f) {
    long pieces = (rows + PIECE - 1) / PIECE, most = 60000;  // more than the pool counts: in turns
    for (long first = 0; first < pieces; first += most)
        Pool::instance().run(rows * width < 16384 ? 1 : threads, int(std::min(most, pieces - first)), [&](int i) {
            long piece = first + i;
            f(piece, piece * PIECE, std::min(rows, (piece + 1) * PIECE));
        });
}

template <class F>
void each_word(long width, const F& f) {
    long k = 0;
    for (; k + 16 <= width; k += 16) f(k, All());
    if (k < width) f(k, mask_of(width - k));
}

void store(void* p, int dtype, long i, All all, __m512 x) {
    dtype == BF16 ? store(static_cast<bf16*>(p) + i, all, x) : store(static_cast<float*>(p) + i, all, x);
}

float scalar(const void* p, int dtype, long i) { return _mm512_reduce_add_ps(load(p, dtype, i, mask_of(1))); }

__m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace

// out (rows, width) = silu(gate) * up, times a row's `scale` where that is given
extern "C" void jevons_swiglu(const void* gate, long gate_stride, const void* up, long up_stride, int dtype, long rows, long width,
                              const void* scale, void* out, int threads) {
    each_piece(rows, width, threads, [&](long, long begin, long end) {
        for (long t = begin; t < end; t++) {
            __m512 factor = _mm512_set1_ps(scale ? scalar(scale, dtype, t) : 1.0f);
            each_word(width, [&](long k, auto m) {
                __m512 y = _mm512_mul_ps(silu(load(gate, dtype, t * gate_stride + k, m)), load(up, dtype, t * up_stride + k, m));
                store(out, dtype, t * width + k, m, _mm512_mul_ps(y, factor));
            });
        }
    });
}

// From the gradient of `out`: those of gate and up (rows as far apart as theirs), and with `scale` also its own and `out` once more
extern "C" void jevons_swiglu_backward(const void* grad, const void* gate, long gate_stride, const void* up, long up_stride, int dtype,
                                       long rows, long width, const void* scale, void* grad_gate, void* grad_up, long grad_stride,
                                       float* grad_scale, void* out, int threads) {
    each_piece(rows, width, threads, [&](long, long begin, long end) {
        for (long t = begin; t < end; t++) {
            __m512 factor = _mm512_set1_ps(scale ? scalar(scale, dtype, t) : 1.0f), sum = _mm512_setzero_ps();
            each_word(width, [&](long k, auto m) {
                __m512 g = load(gate, dtype, t * gate_stride + k, m), u = load(up, dtype, t * up_stride + k, m);
                __m512 d = load(grad, dtype, t * width + k, m), s = sigmoid(g), swish = _mm512_mul_ps(g, s);
                if (scale) {
                    __m512 y = _mm512_mul_ps(swish, u);
                    sum = _mm512_fmadd_ps(d, y, sum);
                    store(out, dtype, t * width + k, m, _mm512_mul_ps(y, factor));
                    d = _mm512_mul_ps(d, factor);
                }
                store(grad_up, dtype, t * grad_stride + k, m, _mm512_mul_ps(d, swish));
                // d silu(g) / dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
                __m512 slope = _mm512_add_ps(s, _mm512_fnmadd_ps(swish, s, swish));
                store(grad_gate, dtype, t * grad_stride + k, m, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
            });
            if (scale) grad_scale[t] = _mm512_reduce_add_ps(sum);
        }
    });
}

// Gradients of y = x r weight, r = 1 / sqrt(mean(x^2) + eps): of x (rows, width), and of the weight a row of sums for each piece
extern "C" void jevons_rms_norm_backward(const void* grad, const void* x, long stride, int dtype, long rows, long width, const float* weight,
                                         float eps, void* grad_x, float* sums, int threads) {
    each_piece(rows, width, threads, [&](long piece, long begin, long end) {
        float* total = sums + piece * width;
        std::fill(total, total + width, 0.0f);
        for (long t = begin; t < end; t++) {
            __m512 squares = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            each_word(width, [&](long k, auto m) {
                __m512 v = load(x, dtype, t * stride + k, m), d = load(grad, dtype, t * width + k, m);
                squares = _mm512_fmadd_ps(v, v, squares);
                along = _mm512_fmadd_ps(_mm512_mul_ps(d, load(weight + k, m)), v, along);
            });
            float r = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
            float back = _mm512_reduce_add_ps(along) * r * r * r / width;
            __m512 scale = _mm512_set1_ps(r), less = _mm512_set1_ps(back);
            each_word(width, [&](long k, auto m) {
                __m512 v = load(x, dtype, t * stride + k, m), d = _mm512_mul_ps(load(grad, dtype, t * width + k, m), scale);
                store(grad_x, dtype, t * width + k, m, _mm512_fnmadd_ps(v, less, _mm512_mul_ps(d, load(weight + k, m))));
                store(total + k, m, _mm512_fmadd_ps(d, v, load(total + k, m)));
            });
        }
    });
}

}  // namespace jevons
