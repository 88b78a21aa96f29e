// Products of a few or many rows with packed weights; see product.cpp.
#pragma once
#include <vector>

#include "type.hpp"

namespace jevons {

enum Format { F32 = 0, BFLOAT = 1, INT8 = 2, INT4 = 3, F32_ROWS = 4, BFLOAT_ROWS = 5 };

constexpr bool is_integer(int format) { return format == INT8 || format == INT4; }
constexpr bool in_place(int format) { return format >= F32_ROWS; }
constexpr long group_of(int format) {
    return format == INT8 ? 128 : format == INT4 || format == BFLOAT_ROWS ? 32 : format == F32_ROWS ? 16 : format == BFLOAT ? 2 : 1;
}
constexpr long per_unit(int format) { return is_integer(format) ? 4 : format == BFLOAT || format == BFLOAT_ROWS ? 2 : 1; }
constexpr long group_bytes(int format) { return format == INT8 ? 64 + 4096 : format == INT4 ? 128 + 512 : 128; }

// One packed weight, or a stack of equal ones (experts, heads). Mirrored by a ctypes.Structure in kernels/native.py.
struct Matrix {
    const uint8_t* data;  // of the _ROWS formats: the address of each row, and of 32 more to be asked for in vain
    const float* bias;  // in packed order, or null
    int32_t format, N, K, stack;
    int32_t swiglu;  // tiles hold 16 rows of gate and 16 of up, outputs are silu(gate) * up, N is gate's rows
    int32_t reserved;
};

// Where rows come from: row i is x[index[i]] (or x[i]), RMS-normed where `norm` is given.
struct Input {
    const void* x;
    int dtype;
    long stride;  // in elements
    const int* index;
    const float* norm;
    float eps;
};

// Where rows go: row i to y[index[i]] (or y[i]), plus `residual` of the same place.
struct Output {
    void* y;
    int dtype;
    long stride;
    const int* index;
    const void* residual;
    int residual_dtype;
    long residual_stride;
};

// Rows [begin, end) meet matrix `which` of the stack.
struct Segment {
    int which, begin, end;
};

struct Segments {
    const Segment* data;
    int count, rows;
};

void product(const Matrix& matrix, const Input& input, const Segments& segments, const Output& output, int threads);
void norm_row(const Input& input, long row, long width, float* out);  // out: width rounded up to 16

}  // namespace jevons
