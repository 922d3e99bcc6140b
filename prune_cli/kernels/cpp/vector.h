// A SIMD register of floats, written once for AVX-512, AVX2 and everything else (GCC and Clang
// vector extensions), with what the kernels need on it: partial loads and stores, a transposition.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t Mask;  // bit k: lane k

constexpr Mask ALL = (Mask)((1u << LANES) - 1);
static inline Mask first_lanes(int64_t n) { return n >= LANES ? ALL : (Mask)((1u << n) - 1); }

static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec at_least(vec v, vec least) { return v < least ? least : v; }  // NaN stays NaN

// The lanes of `mask`; the others are zero, or left alone in memory, which is not touched there.
struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#if defined(__AVX512F__)
#define HAS_HALVES 1  // inputs and outputs of 16 bits are converted in registers
#if defined(__linux__) && defined(__x86_64__) && __has_include(<amxbf16intrin.h>)
#define HAS_TILES 1  // matrix tiles can be compiled; whether the processor has them is asked when the program runs
#endif
static inline vec load(const float* p, Mask mask) { return (vec)_mm512_maskz_loadu_ps(mask, p); }
static inline void store(float* p, vec v, Mask mask) { _mm512_mask_storeu_ps(p, mask, (__m512)v); }
static inline vec load(const Bfloat16* p, Mask mask = ALL) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}
static inline void store(Bfloat16* p, vec v, Mask mask = ALL) {  // to the nearest, ties to even
    const __m512i bits = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
static inline vec load(const Float16* p, Mask mask = ALL) { return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
static inline void store(Float16* p, vec v, Mask mask = ALL) {
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Two channels as one of 32 bits, the first in the low half: what matrix tiles multiply. Here each channel's
// pixels follow each other; the second channel may not exist, and is then zero.
struct Pairs {
    const Bfloat16 *first, *second;
    Mask exists;  // ALL, or none of the second
    Pairs operator+(int64_t pixels) const { return {first + pixels, second + pixels, exists}; }
};
static inline vec load(Pairs p, Mask mask = ALL) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask & p.exists, p.second));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline Pairs pair_of_planes(const Bfloat16* x, int64_t pair, int64_t channels, int64_t plane) {
    const Bfloat16* first = x + 2 * pair * plane;
    return 2 * pair + 1 < channels ? Pairs{first, first + plane, ALL} : Pairs{first, first, 0};
}
// Here the channels of a pixel follow each other; nothing behind the last of `channels` is touched.
static inline vec load_pairs(const Bfloat16* p, int64_t channels) {
    return (vec)_mm512_maskz_loadu_epi16(channels >= 32 ? ~0u : (1u << channels) - 1, p);
}
#else
static inline vec load(const float* p, Mask mask) {
    vec v = {};
    for (int k = 0; k < LANES; ++k)
        if (mask >> k & 1) v[k] = p[k];
    return v;
}
static inline void store(float* p, vec v, Mask mask) {
    for (int k = 0; k < LANES; ++k)
        if (mask >> k & 1) p[k] = v[k];
}
#endif

// A mask as a register operand: what it names can be loaded from memory that is readable as a whole.
#if defined(__AVX512F__)
typedef Mask LaneMask;
static inline LaneMask lane_mask(Mask mask) { return mask; }
static inline vec load_readable(const float* p, LaneMask mask) { return load(p, mask); }
#else
typedef ivec LaneMask;
static inline LaneMask lane_mask(Mask mask) {
    ivec lanes;
    for (int k = 0; k < LANES; ++k) lanes[k] = -(mask >> k & 1);
    return lanes;
}
static inline vec load_readable(const float* p, LaneMask mask) { return (vec)((ivec)load(p) & mask); }
#endif

#if LANES == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#endif

// n numbers that lie STEP (0: `step`) apart; nothing behind the last is touched.
template <int STEP, class From>
static inline vec load_every(From p, int64_t step, int64_t n) {
    if (STEP == 1) return n >= LANES ? load(p) : load(p, first_lanes(n));
    if (STEP == 2) return EVEN(2 * n > LANES ? load(p) : load(p, first_lanes(2 * n - 1)), load(p + LANES, first_lanes(2 * n > LANES ? 2 * n - 1 - LANES : 0)));
    vec v = {};
    for (int64_t k = 0; k < n && k < LANES; ++k) v[k] = load(p + k * step, first_lanes(1))[0];
    return v;
}

// LANES registers as the rows of a square: log2(LANES) perfect shuffles transpose it.
static inline void transpose_square(vec* rows) {
    vec next[LANES];
    for (int step = 1; step < LANES; step *= 2) {
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = LOW(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = HIGH(rows[i], rows[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

// to[j * to_stride + i] = row(i, 0)[j], at least `least`, for i < rows, j < columns; row(i, j) loads what
// follows from column j on, and touches nothing behind the last column.
template <bool BOUNDED = false, class Row, class To>
static void transpose_rows(const Row& row, int64_t rows, int64_t columns, To* to, int64_t to_stride, vec least = vec{}) {
    for (int64_t i0 = 0; i0 < rows; i0 += LANES)
        for (int64_t j0 = 0; j0 < columns; j0 += LANES) {
            const int64_t height = rows - i0, width = columns - j0;
            To* target = to + j0 * to_stride + i0;
            vec square[LANES];
            for (int i = 0; i < LANES; ++i)
                square[i] = i >= height ? vec{} : row(i0 + i, j0);
            transpose_square(square);
            for (int j = 0; j < LANES && j < width; ++j) {
                const vec v = BOUNDED ? at_least(square[j], least) : square[j];
                if (height >= LANES) store(target + j * to_stride, v);
                else store(target + j * to_stride, v, first_lanes(height));
            }
        }
}

// to[j * to_stride + i] = from[i * from_stride + j], at least `least`, for i < rows, j < columns.
template <bool BOUNDED = false, class From, class To>
static void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride, vec least = vec{}) {
    const auto row = [=](int64_t i, int64_t j) {
        const From* p = from + i * from_stride + j;
        return columns - j >= LANES ? load(p) : load(p, first_lanes(columns - j));
    };
    transpose_rows<BOUNDED>(row, rows, columns, to, to_stride, least);
}

// Copy n numbers of 32 bits that lie STEP (0: `step`) apart.
template <int STEP, class From>
static inline void copy_every(From from, int64_t step, float* to, int64_t n) {
    for (; n >= LANES; n -= LANES, from = from + LANES * step, to += LANES) store(to, load_every<STEP>(from, step, LANES));
    if (n > 0) store(to, load_every<STEP>(from, step, n), first_lanes(n));
}

// Copy n floats, at least `least`.
template <class T>
static inline void copy(const float* from, T* to, int64_t n, vec least = vec{} - std::numeric_limits<float>::infinity()) {
    for (; n >= LANES; n -= LANES, from += LANES, to += LANES) store(to, at_least(load(from), least));
    if (n > 0) store(to, at_least(load(from, first_lanes(n)), least), first_lanes(n));
}

static inline void fill(float* to, float value, int64_t n) {
    const vec v = vec{} + value;
    for (; n >= LANES; n -= LANES, to += LANES) store(to, v);
    if (n > 0) store(to, v, first_lanes(n));
}
