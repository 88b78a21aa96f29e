// Looking rows up: what memory.cpp offers to select.cpp.
#pragma once
#include "type.hpp"

namespace jevons {

constexpr long AHEAD = 4;  // rows that are asked for before they are read; from 1 to 16 all take as long

// What is picked: T tokens, X rows each, of C equal shares of V elements, each share with a weight and into one of E buckets.
struct Picks {
    const int64_t* rows;
    const int64_t* blocks;  // null: all into bucket 0
    const float* weights;   // (T, X, C)
    long T, X, C, E, V;

    long bucket(long pick) const { return blocks ? blocks[pick] : 0; }
};

// out (T, E * V), in the table's dtype; 0 where a row or bucket is out of range
int gather(const void* values, int dtype, long Z, const Picks& picks, void* out, int threads);

}  // namespace jevons
