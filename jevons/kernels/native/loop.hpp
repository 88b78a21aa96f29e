// What product.cpp's innermost loops share: how many rows they take, and what they ask memory for meanwhile.
//
// Each instruction set has loops of its own (loop_avx512.hpp and rows.hpp, loop_avx2.hpp), because what matters is how many sums fit its
// registers. A loop takes up to ROWS rows of x through one tile of 32 outputs; out is (M, 32) fp32.
#pragma once
#include "product.hpp"
#include "vector.hpp"

namespace jevons {

// Which lines of other rows to ask memory for meanwhile: of every R rows of the record those in [from, to).
struct Next {
    const char* const* record;
    int from, to;
};

constexpr long LINES = 40;  // of 64 bytes: a stretch of weights in place, of which four rows and six of x leave half of 48 KiB to the rest

// R rows of weights in place, from row n of a record on, and what is asked for while their bytes from `begin` on are read.
template <int R>
struct Reading {
    const char *w[R], *wanted[R];
    long step[R];

    Reading(const char* const* record, int n, const Next& next, long begin) {
        for (int i = 0; i < R; i++) {
            bool mine = i * 4 / R >= next.from && i * 4 / R < next.to;
            w[i] = record[n + i], wanted[i] = mine ? next.record[n + i] : w[i] + begin, step[i] = mine;
        }
    }

    void ask(long at) const {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) _mm_prefetch(wanted[i] + at * step[i], _MM_HINT_T1);
    }
};

// What to ask for, into the second-level cache, while a tile is read, so that memory works while the arithmetic units do.
struct Ahead {
    const uint8_t* p;
    long step;  // for 128 bytes read: 128, or 64 where two blocks share the asking, or 0
    Next next;  // for weights in place

    template <int BYTES>
    void ask() {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
        if (BYTES == 128) _mm_prefetch(reinterpret_cast<const char*>(p + step / 2), _MM_HINT_T1);
        p += BYTES == 128 ? step : step / 2;
    }
};

// scales of 16 outputs
static inline __m512 pair_of_scales(const uint8_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

}  // namespace jevons

#ifdef __AVX512F__
#include "loop_avx512.hpp"
#else
#include "loop_avx2.hpp"
#endif
