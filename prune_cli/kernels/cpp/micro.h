// The multiplication: F filters times V registers of pixels (or images), over a block of channels.
#pragma once
#include "layer.h"

// Where the sums of V registers are kept between positions, and where they end.
template <class Y = float>
struct Sums {
    float* tile;                  // [filter][pixel]
    int64_t pitch;                // between its filters
    const float* bias = nullptr;  // what a filter's first group begins with; null: with what the tile has
    Y* y = nullptr;               // [filter][pixel], what a filter's last group writes; null: the tile
    int64_t y_pitch = 0;          // between its filters
    const int64_t* at = nullptr;  // where each register lies in a filter of y
    int64_t lanes = 0;            // that exist in y
    vec least = {};               // 0 with ReLU
};

template <class Y>
static inline void write(const Sums<Y>& sums, int64_t row, int v, vec sum) {
    const int64_t left = sums.lanes - v * LANES;
    Y* to = sums.y + row * sums.y_pitch;
    if (left >= LANES) store(to + sums.at[v], at_least(sum, sums.least));
    else if (left > 0) store(to + sums.at[v], at_least(sum, sums.least), first_lanes(left));
}

// sum[row f][v] += sum over c of w[c][f] * x[c][v]; V registers beside each other, sums in F x V registers.
// MASKED: of register v only the lanes of masks[v] lie inside the image.
template <int F, int V, bool MASKED>
static void multiply(const Group& g, const float* x, int64_t x_stride, const Mask* masks, const float* w, int64_t channels, const Sums<>& sums) {
    vec sum[F][V];
    LaneMask inside[V];
    if constexpr (MASKED)
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) inside[v] = lane_mask(masks[v]);
    const uint32_t first = sums.bias ? g.first : 0, last = sums.y ? g.last : 0;
#pragma GCC unroll 12
    for (int f = 0; f < F; ++f) {
        const float* from = sums.tile + g.rows[f] * sums.pitch;
        if (first >> f & 1) {
            const vec bias = vec{} + sums.bias[g.rows[f]];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[f][v] = bias;
        } else
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[f][v] = load(from + v * LANES);
    }
    for (int64_t c = 0; c < channels; ++c, x += x_stride, w += F) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) {
            const vec pixels = MASKED ? load_readable(x + v * LANES, inside[v]) : load(x + v * LANES);
#pragma GCC unroll 12
            for (int f = 0; f < F; ++f) sum[f][v] += w[f] * pixels;
        }
    }
#pragma GCC unroll 12
    for (int f = 0; f < F; ++f) {
        if (last >> f & 1) {
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) write(sums, g.rows[f], v, sum[f][v]);
        } else
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) store(sums.tile + g.rows[f] * sums.pitch + v * LANES, sum[f][v]);
    }
}

// The filters of a group; V registers allow 12, 6 or 3 of them.
template <int V, bool MASKED>
static inline void multiply(const Group& g, const float* x, int64_t x_stride, const Mask* masks, const float* w, int64_t channels, const Sums<>& sums) {
#define SIZE(F) case F: return multiply<F, V, MASKED>(g, x, x_stride, masks, w, channels, sums);
    switch (g.size) { SIZE(1) SIZE(2) SIZE(3) }
    if constexpr (V <= VECTORS) switch (g.size) { SIZE(4) SIZE(5) SIZE(6) }
    if constexpr (V == 1) switch (g.size) { SIZE(7) SIZE(8) SIZE(9) SIZE(10) SIZE(11) SIZE(12) }
#undef SIZE
}

// sum[v] += sum over c of w[c] * x[c][v]: one filter at one position, the sums stay in registers.
template <int V>
static inline void accumulate(vec (&sum)[V], const float* x, int64_t x_stride, const float* w, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c, x += x_stride)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[v] += w[c] * load(x + v * LANES);
}
