// The multiplication: F filters times V registers of pixels (or images), over a block of channels.
#pragma once
#include "layer.h"

// y[row f][v] += sum over c of w[c][f] * x[c][v]; V registers beside each other, sums in F x V registers.
template <int F, int V>
static void multiply(const float* x, long x_stride, const float* w, long channels, float* y, long y_stride, const int64_t* rows) {
    vec sum[F][V];
#pragma GCC unroll 12
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) sum[f][v] = load(y + rows[f] * y_stride + v * LANES);
    for (long c = 0; c < channels; ++c, x += x_stride, w += F) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) {
            const vec pixels = load(x + v * LANES);
#pragma GCC unroll 12
            for (int f = 0; f < F; ++f) sum[f][v] += w[f] * pixels;
        }
    }
#pragma GCC unroll 12
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) store(y + rows[f] * y_stride + v * LANES, sum[f][v]);
}

// The filters of a group; V registers allow 12, 6 or 3 of them.
template <int V>
static inline void multiply(const Group& g, const float* x, long x_stride, const float* w, long channels, float* y, long y_stride) {
#define SIZE(F) case F: return multiply<F, V>(x, x_stride, w, channels, y, y_stride, g.rows);
    switch (g.size) { SIZE(1) SIZE(2) SIZE(3) }
    if constexpr (V <= VECTORS) switch (g.size) { SIZE(4) SIZE(5) SIZE(6) }
    if constexpr (V == 1) switch (g.size) { SIZE(7) SIZE(8) SIZE(9) SIZE(10) SIZE(11) SIZE(12) }
#undef SIZE
}

// sum[v] += sum over c of w[c] * x[c][v]: one filter at one position, the sums stay in registers.
template <int V>
static inline void accumulate(vec (&sum)[V], const float* x, long x_stride, const float* w, long channels) {
    for (long c = 0; c < channels; ++c, x += x_stride)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[v] += w[c] * load(x + v * LANES);
}
