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
// Weights can also stay where a model has them, row by row, so that what a trainer has just changed is sampled from without a copy: a tile
// is 32 addresses, a row of x lies in one piece too, and an output is summed over 16 or 32 columns at a time and across at the end.
// Not done: AMX.
#include "product.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "loop.hpp"
#include "pool.hpp"

namespace jevons {
namespace {

constexpr long CACHE = 384 * 1024;  // bytes of x that pass while a tile waits in the second-level cache
constexpr int AHEAD = 6144;         // bytes asked for before they are needed, where one block is all there is; 2 to 12 KiB measured

struct Block {
    int row, rows;
};

// Rows of x, ready for the loops: unit u of row r of a block at units[block.row * U + u * block.rows + r]; for weights in place
// at units[(block.row + r) * U + u].
struct Rows {
    long bytes;     // of a weight's row, in place
    uint32_t* units;
    float* scale;   // of each group of a row, same order; integer formats only
    float* offset;  // int4: scale times the sum of the group's values
    int32_t* zero;  // int8: -128 times that sum, where accumulators start
    long U, G;
};

template <int FORMAT, int M>
void multiply(const uint8_t* tile, const Rows& x, const Block& block, Ahead ahead, float* out) {
    const uint32_t* units = x.units + block.row * x.U;
    if constexpr (in_place(FORMAT)) {
        multiply_rows<FORMAT == BFLOAT_ROWS, M>(reinterpret_cast<const char* const*>(tile), units, x.U, x.bytes, ahead.next, out);
    } else if constexpr (is_integer(FORMAT)) {
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
        case F32_ROWS: return multiply_of<F32_ROWS>(rows);
        case BFLOAT_ROWS: return multiply_of<BFLOAT_ROWS>(rows);
        default: return multiply_of<INT4>(rows);
    }
}

// One row in fp32 (zeros up to a whole group) -> its place in a block.
void place(const float* row, int format, const Rows& to, const Block& block, int r) {
    bool along = in_place(format);
    uint32_t* units = to.units + block.row * to.U + (along ? r * to.U : r);
    long step = along ? 1 : block.rows;
    if (per_unit_of_x(format) == 1) {
        for (long u = 0; u < to.U; u++) units[u * step] = reinterpret_cast<const uint32_t*>(row)[u];
        return;
    }
    if (per_unit_of_x(format) == 2) {
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

    long group = group_of(m.format), G = (m.K + group - 1) / group, U = G * group / per_unit_of_x(m.format);
    int tiles = m.swiglu ? (m.N + 15) / 16 : (m.N + 31) / 32, rows = segments.rows;
    long row_bytes = m.K * 4l / per_unit(m.format), read = in_place(m.format) ? 32 * row_bytes : G * group_bytes(m.format);
    long tile_bytes = in_place(m.format) ? 32 * sizeof(void*) : read;

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
    x.U = U, x.G = G, x.bytes = row_bytes;
    x.units = units_memory.get<uint32_t>(size_t(rows) * U + 64);
    size_t sides = is_integer(m.format) ? size_t(rows) * G : 0;
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
    int per_chunk = std::max((tiles + wanted - 1) / wanted, int((32768 + read - 1) / read));
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
                // one block: shortly ahead; more: the first ones ask for the next tile
                int number = b - unit.begin, count = unit.end - unit.begin;
                auto record = reinterpret_cast<const char* const*>(here);
                Ahead ahead{here + AHEAD, 128, {record + 4, 0, 4}};
                if (count > 1) {
                    ahead = {here + tile_bytes + number * tile_bytes / 2, number < 2 ? 64 : 0};
                    ahead.next = {record + 32, number * 4 / count, (number + 1) * 4 / count};
                }
                multiply_of(m.format, block.rows)(here, x, block, ahead, values);
                finish(m, tile, block, values, m.bias ? m.bias + (size_t(unit.which) * tiles + tile) * 32 : nullptr, output);
            }
    });
}

extern "C" void jevons_linear(const Matrix* m, const void* x, int dtype, long rows, long stride, const float* norm, float eps, void* y,
                              int y_dtype, long y_stride, const void* residual, long residual_stride, int threads) {
    Segment all{0, 0, int(rows)};
    product(*m, {x, dtype, stride, nullptr, norm, eps}, {&all, 1, int(rows)}, {y, y_dtype, y_stride, nullptr, residual, dtype, residual_stride},
            threads);
}

}  // namespace jevons
