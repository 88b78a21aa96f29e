// From logits to a token, its log-probabilities, and the words that it was drawn from: engine/sampling.py's rules, one row a chunk.
//
// Problem: a vocabulary of 150,000 words goes a dozen times through memory in operators, which takes longer than a small model's layers.
// Approach: one pass for the largest logit of every 64 words, one for the sums of exponentials, and what a filter keeps is looked for
// only where the largest of 64 can be kept. For top-p that is where a word is likely enough: all W words below a probability of
// (1 - p) / W together are less than 1 - p, so none of them is needed. A row's result depends on nothing but the row.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

namespace jevons {
namespace {

constexpr long PIECE = 64, STRETCH = 1024;  // words: of a maximum; of a sum
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Wish {
    float temperature, top_p, min_p;  // temperature 0: the likeliest
    int32_t top_k;
    double uniform;
};

static inline __m512 words(const float* x, long i, long W) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(LOWEST), mask_of(W - i), x + i);
}

// The largest of all, and of every PIECE words.
float maxima(const float* x, long W, std::vector<float>& largest) {
    largest.resize((W + PIECE - 1) / PIECE);
    float top = LOWEST;
    for (long i = 0; i < W; i += PIECE) {
        __m512 a = _mm512_max_ps(words(x, i, W), words(x, i + 16, W)), b = _mm512_max_ps(words(x, i + 32, W), words(x, i + 48, W));
        top = std::max(top, largest[i / PIECE] = _mm512_reduce_max_ps(_mm512_max_ps(a, b)));
    }
    return top;
}

// The sum of e^((x - top) * inverse) over words [begin, end), in one order.
float sum_of(const float* x, long begin, long end, float top, float inverse) {
    __m512 sum[4], t = _mm512_set1_ps(top), scale = _mm512_set1_ps(inverse);
    for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_ps();
    for (long w = begin; w < end; w += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[i] = _mm512_add_ps(sum[i], exp(_mm512_mul_ps(_mm512_sub_ps(words(x, w + 16 * i, end), t), scale)));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

// The same over all; `sums` of every STRETCH words.
double sums_of(const float* x, long W, float top, float inverse, std::vector<float>& sums) {
    sums.clear();
    double total = 0;
    for (long i = 0; i < W; i += STRETCH) total += sums.emplace_back(sum_of(x, i, std::min(W, i + STRETCH), top, inverse));
    return total;
}

// Where the sum of e^values, from the first on, first exceeds the threshold; a word of probability 0 is never it.
long invert(const float* values, long n, double threshold) {
    double sum = 0;
    long last = 0;
    for (long i = 0; i < n; i += 16) {
        alignas(64) float e[16];
        _mm512_store_ps(e, exp(words(values, i, n)));
        for (long j = i; j < std::min(n, i + 16); j++) {
            sum += e[j - i];
            if (e[j - i] > 0) last = j;
            if (sum > threshold) return j;
        }
    }
    return last;
}

// What is left of a row: words in order, and their logits over the temperature, the best one's 0.
struct Kept {
    std::vector<int32_t> ids;
    std::vector<float> values, order;

    long size() const { return long(ids.size()); }

    void add(const float* x, long begin, long end, float floor, float top, float inverse) {
        for (long i = begin; i < end; i += 16) {
            __m512 v = words(x, i, end);
            __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(std::max(floor, std::numeric_limits<float>::lowest())), _CMP_GE_OQ);
            if (!mask) continue;
            size_t at = ids.size(), more = __builtin_popcount(mask);
            ids.resize(at + 16), values.resize(at + 16);
            __m512i id = _mm512_add_epi32(_mm512_set1_epi32(int(i)), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
            _mm512_storeu_si512(ids.data() + at, _mm512_maskz_compress_epi32(mask, id));
            __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(top)), _mm512_set1_ps(inverse));
            _mm512_storeu_ps(values.data() + at, _mm512_maskz_compress_ps(mask, scaled));
            ids.resize(at + more), values.resize(at + more);
        }
    }

    void cut(float floor) {
        long n = 0;
        for (long i = 0; i < size(); i++)
            if (values[i] >= floor) ids[n] = ids[i], values[n++] = values[i];
        ids.resize(n), values.resize(n);
    }

    double total() const { return sum_of(values.data(), 0, size(), 0, 1); }

    float nth(long n) {
        order = values;
        std::nth_element(order.begin(), order.begin() + n - 1, order.end(), std::greater<float>());
        return order[n - 1];
    }

    // the value of the last of the fewest best words that have a share `top_p` of the total
    float nucleus(double total, float top_p) {
        order = values;
        double sum = 0;
        for (long sorted = 0, most = 32; sorted < size(); most *= 16) {
            long end = std::min(size(), most);
            std::partial_sort(order.begin() + sorted, order.begin() + end, order.end(), std::greater<float>());
            for (; sorted < end; sorted++)
                if ((sum += std::exp(order[sorted])) >= top_p * total) return order[sorted];
        }
        return LOWEST;  // rounding: all of them
    }
};

struct Drawn {
    int64_t token;
    float logp, raw_logp;
    int32_t kept;  // words; -1 where nothing was cut
};

// logits: the model's; allowed: the same after rules, or the very same
bool draw(const float* logits, const float* allowed, long W, const Wish& wish, bool record, int32_t* ids, Drawn& out) {
    static thread_local std::vector<float> largest, sums, bounds;
    static thread_local Kept kept;
    float raw_top = maxima(logits, W, largest), inverse = wish.temperature > 0 ? 1 / wish.temperature : 1;
    double raw_total = sums_of(logits, W, raw_top, 1, sums), total = raw_total;
    float top = allowed == logits ? raw_top : maxima(allowed, W, largest);
    auto done = [&](long token, double logp) {
        out.token = token, out.logp = float(logp), out.raw_logp = float(double(logits[token] - raw_top) - std::log(raw_total));
        return std::isfinite(raw_total) && std::isfinite(raw_top);
    };
    out.kept = -1;
    if (!std::isfinite(raw_total) || !std::isfinite(raw_top) || !std::isfinite(top)) return false;
    if (wish.temperature == 0) {
        long piece = std::find(largest.begin(), largest.end(), top) - largest.begin();
        long token = std::find(allowed + piece * PIECE, allowed + W, top) - allowed;
        out.kept = 1;
        if (record) ids[0] = int32_t(token);
        return done(token, 0);
    }
    bool by_count = wish.top_k > 0 && wish.top_k < W, by_mass = wish.top_p < 1, by_share = wish.min_p > 0;
    if (!by_count && (by_mass || !by_share) && (allowed != logits || inverse != 1)) total = sums_of(allowed, W, top, inverse, sums);
    if (!by_count && !by_mass && !by_share) {
        double threshold = wish.uniform * total, before = 0;
        long piece = 0, last = 0;
        for (; piece < long(sums.size()); before += sums[piece++]) {
            if (sums[piece] > 0) last = piece;
            if (before + sums[piece] > threshold) break;
        }
        if (piece == long(sums.size())) piece = last;
        long begin = piece * STRETCH, end = std::min(W, begin + STRETCH);
        float values[STRETCH];
        for (long i = begin; i < end; i++) values[i - begin] = (allowed[i] - top) * inverse;
        long token = begin + invert(values, end - begin, threshold - before);
        if (record && std::find(allowed, allowed + W, LOWEST) != allowed + W) {
            out.kept = 0;
            for (long i = 0; i < W; i++)
                if (allowed[i] != LOWEST) ids[out.kept++] = int32_t(i);
        }
        return done(token, (allowed[token] - top) * inverse - std::log(total));
    }
    float floor = LOWEST;
    if (by_count) {
        if (wish.top_k <= long(largest.size())) {  // as many words at least are as large
            bounds = largest;
            std::nth_element(bounds.begin(), bounds.begin() + wish.top_k - 1, bounds.end(), std::greater<float>());
            floor = bounds[wish.top_k - 1];
        }
    } else if (by_mass) {
        floor = top + (std::log((1 - wish.top_p) * float(total) / float(W)) - 0.01f) / inverse;
    } else {
        floor = top + (std::log(wish.min_p) - 0.01f) / inverse;
    }
    kept.ids.clear(), kept.values.clear();
    for (long piece = 0; piece < long(largest.size()); piece++)
        if (largest[piece] >= floor) kept.add(allowed, piece * PIECE, std::min(W, (piece + 1) * PIECE), floor, top, inverse);
    if (by_count) {
        if (wish.top_k < kept.size()) kept.cut(kept.nth(wish.top_k));
        total = kept.total();
    }
    if (by_mass) kept.cut(kept.nucleus(total, wish.top_p));
    if (by_share) kept.cut(std::log(wish.min_p));
    total = kept.total();
    long at = invert(kept.values.data(), kept.size(), wish.uniform * total);
    if (record && kept.size() < W) {
        out.kept = int32_t(kept.size());
        std::copy(kept.ids.begin(), kept.ids.end(), ids);
    }
    return done(kept.ids[at], kept.values[at] - std::log(total));
}

}  // namespace

// logits and allowed (rows, W); of each row a wish, whether it wants its words, and what was drawn; ids (rows, W) if any wants them.
// Returns 0 where logits are not finite.
extern "C" int jevons_sample(const float* logits, const float* allowed, long rows, long W, const Wish* wishes, const uint8_t* record, int32_t* ids,
                             Drawn* drawn, int threads) {
    std::atomic<bool> finite{true};
    Pool::instance().run(threads, int(rows), [&](int row) {
        if (!draw(logits + row * W, allowed + row * W, W, wishes[row], record[row], ids + (ids ? row * W : 0), drawn[row])) finite = false;
    });
    return finite;
}

}  // namespace jevons
