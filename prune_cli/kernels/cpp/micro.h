// The multiplication: F filters times V registers of pixels (or images), over a block of channels.
#pragma once
#include "layer.h"

// y[row f][v] += sum over c of w[c][f] * x[c][v]; V registers beside each other, sums in F x V registers.
template <int F, int V>
static void multiply(const float* x, long x_stride, const float* w, long channels, float* y, long y_stride, const int64_t* rows) {
    vec sum[F][V];
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[f][v] = load(y + rows[f] * y_stride + v * LANES);
    for (long c = 0; c < channels; ++c, x += x_stride, w += F) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const vec pixels = load(x + v * LANES);
#pragma GCC unroll 8
            for (int f = 0; f < F; ++f) sum[f][v] += w[f] * pixels;
        }
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(y + rows[f] * y_stride + v * LANES, sum[f][v]);
}

template <int V>
static inline void multiply(const Group& g, const float* x, long x_stride, const float* w, long channels, float* y, long y_stride) {
    switch (g.size) {
        case 1: return multiply<1, V>(x, x_stride, w, channels, y, y_stride, g.rows);
        case 2: return multiply<2, V>(x, x_stride, w, channels, y, y_stride, g.rows);
        case 3: return multiply<3, V>(x, x_stride, w, channels, y, y_stride, g.rows);
    }
    if constexpr (V <= VECTORS) switch (g.size) {
        case 4: return multiply<4, V>(x, x_stride, w, channels, y, y_stride, g.rows);
        case 5: return multiply<5, V>(x, x_stride, w, channels, y, y_stride, g.rows);
        case 6: return multiply<6, V>(x, x_stride, w, channels, y, y_stride, g.rows);
    }
}
