// What all kernels agree on: element types, and memory for intermediate results.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace jevons {

using bf16 = uint16_t;
enum DType { FLOAT = 0, BF16 = 1 };

static inline const void* at(const void* p, int dtype, long i) { return static_cast<const char*>(p) + i * (dtype == BF16 ? 2 : 4); }
static inline void* at(void* p, int dtype, long i) { return static_cast<char*>(p) + i * (dtype == BF16 ? 2 : 4); }

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
