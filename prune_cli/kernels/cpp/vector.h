// A SIMD register of floats, written once for AVX-512, AVX2 and everything else (GCC and Clang
// vector extensions), with what the kernels need on it: partial loads and stores, a transposition.
#pragma once
#include <cstdint>
#include <cstring>
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

static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec relu(vec v) { ivec positive = v > 0; return (vec)((ivec)v & positive); }

// The first n < LANES floats; the other lanes are zero, or left alone in memory.
#if defined(__AVX512F__)
static inline vec load(const float* p, long n) { return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void store(float* p, vec v, long n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
#else
static inline vec load(const float* p, long n) { vec v = {}; for (long k = 0; k < n; ++k) v[k] = p[k]; return v; }
static inline void store(float* p, vec v, long n) { for (long k = 0; k < n; ++k) p[k] = v[k]; }
#endif

// The lanes of `mask`, the others zero; memory outside them is not touched.
static inline vec load_lanes(const float* p, uint32_t mask) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)mask, p);
#else
    vec v = {};
    for (int k = 0; k < LANES; ++k)
        if (mask >> k & 1) v[k] = p[k];
    return v;
#endif
}

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

// Every second number from p on: the lanes of `mask`, the others zero.
static inline vec load_even_lanes(const float* p, uint32_t mask) {
    uint32_t spread = mask & 0xffff;  // bit k moves to bit 2 k
    spread = (spread | spread << 8) & 0x00ff00ff;
    spread = (spread | spread << 4) & 0x0f0f0f0f;
    spread = (spread | spread << 2) & 0x33333333;
    spread = (spread | spread << 1) & 0x55555555;
    const uint32_t low = (1u << LANES) - 1;
    return EVEN(load_lanes(p, spread & low), load_lanes(p + LANES, spread >> LANES & low));
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

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns.
template <bool RELU = false>
static void transpose(const float* from, long from_stride, long rows, long columns, float* to, long to_stride) {
    for (long i0 = 0; i0 < rows; i0 += LANES)
        for (long j0 = 0; j0 < columns; j0 += LANES) {
            const long height = rows - i0 < LANES ? rows - i0 : LANES;
            const long width = columns - j0 < LANES ? columns - j0 : LANES;
            const float* source = from + i0 * from_stride + j0;
            float* target = to + j0 * to_stride + i0;
            vec square[LANES];
            if (height == LANES && width == LANES) {
                for (int i = 0; i < LANES; ++i) square[i] = load(source + i * from_stride);
                transpose_square(square);
                for (int j = 0; j < LANES; ++j) store(target + j * to_stride, RELU ? relu(square[j]) : square[j]);
                continue;
            }
            for (int i = 0; i < LANES; ++i)
                square[i] = i >= height ? vec{} : width == LANES ? load(source + i * from_stride) : load(source + i * from_stride, width);
            transpose_square(square);
            for (int j = 0; j < width; ++j) {
                vec v = RELU ? relu(square[j]) : square[j];
                if (height == LANES) store(target + j * to_stride, v);
                else store(target + j * to_stride, v, height);
            }
        }
}

// Copy n floats.
template <bool RELU = false>
static inline void copy(const float* from, float* to, long n) {
    long k = 0;
    for (; k + LANES <= n; k += LANES) store(to + k, RELU ? relu(load(from + k)) : load(from + k));
    if (k < n) store(to + k, RELU ? relu(load(from + k, n - k)) : load(from + k, n - k), n - k);
}

static inline void fill(float* to, float value, long n) {
    const vec v = vec{} + value;
    long k = 0;
    for (; k + LANES <= n; k += LANES) store(to + k, v);
    if (k < n) store(to + k, v, n - k);
}
