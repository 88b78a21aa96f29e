// Products x W^T with W packed, rows of x meeting one weight each or one of a stack.
//
// Problem: a decoding step reads every weight once and must do so at the memory's speed, with one row or with fifty; a
// prompt has hundreds of rows and is bound by arithmetic. Approach: W is packed in tiles of 32 outputs by all of K, in the
// order in which the innermost loop reads; rows of x are copied (normed, rounded or quantised) into blocks of up to
// 14 rows, K-major, so that the loop loads two vectors of weights, and multiplies them with each row's broadcast pair or
// quad. A tile stays in the second-level cache while all blocks pass. One accumulator an output, K in order, whatever the number of
// rows: results do not depend on the batch. Integer weights meet activations rounded to 8 bits for each group along K.
//
// A tile of 32 rows n by K, `unit` = the 4 bytes of x that one instruction takes:
//   fp32   [K]     [32] float
//   bf16   [K / 2] [2] [16 n] [2 k] bf16
//   int8   [K / 128] { scale [32] bf16, [32 quads] [2] [16 n] [4 k] uint8, 128 is zero }
//   int4   [K / 32]  { scale [32] bf16, least [32] bf16, [8 quads] [16 n] [4 k] uint8: low nibble n < 16, high nibble n + 16 }
// Not done: AMX, and processors without AVX-512 (kernels/native.py declines there).
#include "product.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pool.hpp"

namespace jevons {
namespace {

constexpr int ROWS = 14;            // of a block at most: 28 accumulators of the 32 registers
constexpr long CACHE = 384 * 1024;  // bytes of x that pass while a tile waits in the second-level cache
constexpr int AHEAD = 6144;         // bytes asked for before they are needed, where one block is all there is; 2 to 12 KiB measured

// rows of a block where one block is all (a weight crosses memory once), and where there are more (the fastest loops)
constexpr int alone(int format) { return format == INT4 ? 8 : ROWS; }
constexpr int several(int format) { return format == INT4 ? 7 : format == INT8 ? 8 : ROWS; }

struct Block {
    int row, rows;
};

// Rows of x, ready for the loops: unit u of row r of a block at units[block.row * U + u * block.rows + r].
struct Rows {
    uint32_t* units;
    float* scale;   // of each group of a row, same order; integer formats only
    float* offset;  // int4: scale times the sum of the group's values
    int32_t* zero;  // int8: -128 times that sum, where accumulators start
    long U, G;
};

static inline __m512 pair_of_scales(const uint8_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// What to ask for, into the second-level cache, while a tile is read, so that memory works while the arithmetic units do.
struct Ahead {
    const uint8_t* p;
    long step;  // for 128 bytes read: 128, or 64 where two blocks share the asking, or 0

    template <int BYTES>
    void ask() {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
        if (BYTES == 128) _mm_prefetch(reinterpret_cast<const char*>(p + step / 2), _MM_HINT_T1);
        p += BYTES == 128 ? step : step / 2;
    }
};

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

template <int FORMAT, int M>
void multiply(const uint8_t* tile, const Rows& x, const Block& block, Ahead ahead, float* out) {
    const uint32_t* units = x.units + block.row * x.U;
    if constexpr (FORMAT >= INT8) {
        long at = block.row * x.G;
        multiply_int<FORMAT, M>(tile, units, x.scale + at, x.offset + at, x.zero + at, x.G, ahead, out);
    } else {
        multiply_float<FORMAT, M>(tile, units, x.U, ahead, out);
    }
}

using Multiply = void (*)(const uint8_t*, const Rows&, const Block&, Ahead, float*);

template <int FORMAT, int... M>
Multiply multiply_of(int rows, std::integer_sequence<int, M...>) {
    static constexpr Multiply TABLE[] = {multiply<FORMAT, M + 1>...};
    return TABLE[rows - 1];
}

template <int FORMAT>
Multiply multiply_of(int rows) {
    return multiply_of<FORMAT>(rows, std::make_integer_sequence<int, alone(FORMAT)>());
}

Multiply multiply_of(int format, int rows) {
    switch (format) {
        case F32: return multiply_of<F32>(rows);
        case BFLOAT: return multiply_of<BFLOAT>(rows);
        case INT8: return multiply_of<INT8>(rows);
        default: return multiply_of<INT4>(rows);
    }
}

// One row in fp32 (zeros up to a whole group) -> its place in a block.
void place(const float* row, int format, const Rows& to, const Block& block, int r) {
    uint32_t* units = to.units + block.row * to.U + r;
    long step = block.rows;
    if (format == F32) {
        for (long u = 0; u < to.U; u++) units[u * step] = reinterpret_cast<const uint32_t*>(row)[u];
        return;
    }
    if (format == BFLOAT) {
        for (long u = 0; u < to.U; u += 16) {
            long left = to.U - u;
            __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 2 * u + 16), _mm512_loadu_ps(row + 2 * u));
            if (step == 1) {
                _mm512_mask_storeu_epi32(units + u, mask_of(left), pairs);
            } else {
                alignas(64) uint32_t some[16];
                _mm512_store_si512(some, pairs);
                for (long i = 0; i < std::min(left, 16L); i++) units[(u + i) * step] = some[i];
            }
        }
        return;
    }
    long group = group_of(format), at = block.row * to.G + r;
    for (long g = 0; g < to.G; g++, row += group, units += group / 4 * step, at += step) {
        __m512 largest = _mm512_setzero_ps();
        for (long i = 0; i < group; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
        float most = _mm512_reduce_max_ps(largest), scale = most / 127.0f, inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        __m512i total = _mm512_setzero_si512();
        alignas(64) uint32_t some[32];
        for (long i = 0; i < group; i += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(inverse)));
            total = _mm512_add_epi32(total, q);
            _mm_store_si128(reinterpret_cast<__m128i*>(some + i / 4), _mm512_cvtsepi32_epi8(q));
        }
        for (long i = 0; i < group / 4; i++) units[i * step] = some[i];
        int sum = _mm512_reduce_add_epi32(total);
        to.scale[at] = scale, to.offset[at] = scale * float(sum), to.zero[at] = -128 * sum;
    }
}

void finish(const Matrix& m, int tile, const Block& block, const float* values, const float* bias, const Output& out) {
    for (int r = 0; r < block.rows; r++, values += 32) {
        long row = out.index ? out.index[block.row + r] : block.row + r;
        __m512 v[2] = {_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16)};
        if (bias) v[0] = _mm512_add_ps(v[0], _mm512_loadu_ps(bias)), v[1] = _mm512_add_ps(v[1], _mm512_loadu_ps(bias + 16));
        int parts = 2;
        if (m.swiglu) v[0] = _mm512_mul_ps(silu(v[0]), v[1]), parts = 1;
        for (int i = 0; i < parts; i++) {
            long n = (long(tile) * parts + i) * 16;
            __mmask16 mask = mask_of(m.N - n);
            if (out.residual) v[i] = _mm512_add_ps(v[i], load(out.residual, out.residual_dtype, row * out.residual_stride + n, mask));
            store(out.y, out.dtype, row * out.stride + n, mask, v[i]);
        }
    }
}

}  // namespace

void norm_row(const Input& input, long row, long width, float* out) {
    long at = (input.index ? input.index[row] : row) * input.stride;
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512 x = load(input.x, input.dtype, at + i, mask_of(width - i));
        squares = _mm512_fmadd_ps(x, x, squares);
        _mm512_storeu_ps(out + i, x);
    }
    if (!input.norm) return;
    __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(width) + input.eps));
    for (long i = 0; i < width; i += 16) {
        __m512 weight = load(input.norm + i, mask_of(width - i));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(out + i), scale), weight));
    }
}

void product(const Matrix& m, const Input& input, const Segments& segments, const Output& output, int threads) {
    static thread_local Scratch units_memory, side_memory;
    static thread_local std::vector<Block> blocks;
    static thread_local std::vector<Segment> units;  // which, and a range of blocks
    static thread_local std::vector<int> block_of;

    long group = group_of(m.format), G = (m.K + group - 1) / group, U = G * group / per_unit(m.format);
    int tiles = m.swiglu ? (m.N + 15) / 16 : (m.N + 31) / 32, rows = segments.rows;
    long tile_bytes = G * group_bytes(m.format);

    blocks.clear(), units.clear(), block_of.clear();
    long together = std::max(1L, CACHE / (U * 4 * several(m.format)));  // blocks whose rows fit the cache beside a tile
    for (int s = 0; s < segments.count; s++) {
        const Segment& segment = segments.data[s];
        int count = segment.end - segment.begin, row = segment.begin, first = int(blocks.size());
        int pieces = count <= alone(m.format) ? 1 : (count + several(m.format) - 1) / several(m.format);
        for (int i = 0; i < pieces; i++) {
            int size = count / pieces + (i < count % pieces);
            block_of.insert(block_of.end(), size, int(blocks.size()));
            blocks.push_back({row, size});
            row += size;
        }
        for (int i = 0; i < pieces; i += int(together))
            units.push_back({segment.which, first + i, first + int(std::min<long>(pieces, i + together))});
    }
    if (units.empty()) return;

    Rows x;
    x.U = U, x.G = G;
    x.units = units_memory.get<uint32_t>(size_t(rows) * U + 64);
    size_t sides = m.format >= INT8 ? size_t(rows) * G : 0;
    x.scale = side_memory.get<float>(3 * sides + 64), x.offset = x.scale + sides, x.zero = reinterpret_cast<int32_t*>(x.offset + sides);

    const Block* block_data = blocks.data();
    const int* block_index = block_of.data();
    const Segment* unit_data = units.data();
    int first_row = segments.data[0].begin;
    long padded = G * group;
    auto prepare = [&](int chunk, int chunks) {
        static thread_local Scratch row_memory;
        float* row = row_memory.get<float>(size_t(padded) + 64);
        long begin = long(rows) * chunk / chunks, end = long(rows) * (chunk + 1) / chunks;
        for (long i = begin; i < end; i++) {
            const Block& block = block_data[block_index[i]];
            long number = first_row + i;
            std::fill(row + m.K / 16 * 16, row + padded + 32, 0.0f);
            norm_row(input, number, m.K, row);
            place(row, m.format, x, block, int(number - block.row));
        }
    };
    int parts = long(rows) * padded < 8192 ? 1 : std::min(rows, 2 * threads);
    Pool::instance().run(threads, parts, [&](int chunk) { prepare(chunk, parts); });

    // about 8 chunks a thread, of neighbouring tiles
    int wanted = std::max(1, (8 * threads + int(units.size()) - 1) / int(units.size()));
    int per_chunk = std::max((tiles + wanted - 1) / wanted, int((32768 + tile_bytes - 1) / tile_bytes));
    int chunks = (tiles + per_chunk - 1) / per_chunk, total = chunks * int(units.size());
    Pool::instance().run(threads, total, [&](int index) {
        const Segment& unit = unit_data[index / chunks];
        int begin = index % chunks * per_chunk, end = std::min(tiles, begin + per_chunk);
        alignas(64) float values[ROWS * 32];
        const uint8_t* data = m.data + size_t(unit.which) * tiles * tile_bytes;
        for (int tile = begin; tile < end; tile++)
            for (int b = unit.begin; b < unit.end; b++) {
                const Block& block = block_data[b];
                const uint8_t* here = data + tile * tile_bytes;
                // one block: shortly ahead; more: the first two ask for the next tile
                Ahead ahead{here + AHEAD, 128};
                if (unit.end - unit.begin > 1) ahead = {here + tile_bytes + (b - unit.begin) * tile_bytes / 2, b - unit.begin < 2 ? 64 : 0};
                multiply_of(m.format, block.rows)(here, x, block, ahead, values);
                finish(m, tile, block, values, m.bias ? m.bias + (size_t(unit.which) * tiles + tile) * 32 : nullptr, output);
            }
    });
}

}  // namespace jevons

using namespace jevons;

extern "C" void jevons_linear(const Matrix* m, const void* x, int dtype, long rows, long stride, const float* norm, float eps, void* y,
                              int y_dtype, long y_stride, const void* residual, long residual_stride, int threads) {
    Segment all{0, 0, int(rows)};
    product(*m, {x, dtype, stride, nullptr, norm, eps}, {&all, 1, int(rows)}, {y, y_dtype, y_stride, nullptr, residual, dtype, residual_stride},
            threads);
}
