// Pixels are the lanes. Every image is a row of padded pixels, the images one behind the other; images
// and rows share their zero padding, so that a kernel position is an offset. A stride splits the
// padded image into stride_h x stride_w phases, in each of which it is an offset again.
#pragma once
#include "micro.h"

struct PixelGrid {
    int64_t width, height;  // of a padded image in one phase, shared padding counted once
    int64_t halo;           // pixels that the last position reads behind a tile
    int64_t phases, length; // length: pixels of all images

    PixelGrid(const Shape& s, const Images& im) {
        const int64_t reach_w = (s.kernel_w - 1) / s.stride_w, reach_h = (s.kernel_h - 1) / s.stride_h;
        const int64_t shared_w = s.stride_w == 1 ? std::min(s.padding_w, s.kernel_w - 1) : 0;
        const int64_t shared_h = s.stride_h == 1 ? std::min(s.padding_h, s.kernel_h - 1) : 0;
        width = im.out_width + reach_w - shared_w;
        height = im.out_height + reach_h - shared_h;
        halo = (reach_h * width + reach_w + LANES - 1) / LANES * LANES;
        phases = s.stride_h * s.stride_w;
        length = im.number * height * width;
    }
};

// A run of pixels in the tile: copied from `source` (-1: zeros).
struct Run { int64_t at, source, length; };

// The runs of pixels [first, first + length) of one phase; `source` counts from the image's first pixel.
static void find_runs(std::vector<Run>& runs, const PixelGrid& grid, const Shape& s, const Images& im,
                      int64_t phase, int64_t first, int64_t length) {
    runs.clear();
    const int64_t a = phase / s.stride_w, b = phase % s.stride_w;
    const int64_t low = s.padding_w > b ? (s.padding_w - b + s.stride_w - 1) / s.stride_w : 0;
    const int64_t high = (im.width - 1 + s.padding_w - b >= 0) ? (im.width - 1 + s.padding_w - b) / s.stride_w + 1 : 0;
    const int64_t from = std::min(low, grid.width), to = std::min(high, grid.width);
    int64_t at = 0;
    auto zeros = [&](int64_t n) {
        if (n > 0) { runs.push_back({at, -1, n}); at += n; }
    };
    while (at < length) {
        const int64_t pixel = first + at, row = pixel / grid.width, column = pixel % grid.width;
        const int64_t image = row / grid.height, r = row % grid.height, left = std::min(grid.width - column, length - at);
        const int64_t h = r * s.stride_h + a - s.padding_h;
        if (image >= im.number) { zeros(length - at); break; }
        const int64_t begin = std::max(column, from), end = std::min(column + left, to);
        if (h < 0 || h >= im.height || begin >= end) { zeros(left); continue; }
        zeros(begin - column);
        const int64_t w = begin * s.stride_w + b - s.padding_w;
        const int64_t plane = im.height * im.width;
        const int64_t source = im.channels_last ? (image * plane + h * im.width + w) * s.channels
                                                : image * s.channels * plane + h * im.width + w;
        runs.push_back({at, source, end - begin});
        at += end - begin;
        zeros(column + left - end);
    }
}

// tile[channel][pixel] for channels [c0, c0 + channels).
static void fill_tile(const std::vector<Run>& runs, const Shape& s, const Images& im, const float* x,
                      int64_t c0, int64_t channels, float* tile, int64_t stride) {
    const int64_t plane = im.height * im.width;
    if (im.channels_last) {
        for (const Run& run : runs) {
            if (run.source < 0) for (int64_t c = 0; c < channels; ++c) fill(tile + c * stride + run.at, 0, run.length);
            else transpose(x + run.source + c0, s.channels * s.stride_w, run.length, channels, tile + run.at, stride);
        }
        return;
    }
    for (int64_t c = 0; c < channels; ++c, tile += stride)
        for (const Run& run : runs) {
            const float* source = x + run.source + (c0 + c) * plane;
            if (run.source < 0) fill(tile + run.at, 0, run.length);
            else if (s.stride_w == 1) copy(source, tile + run.at, run.length);
            else for (int64_t k = 0; k < run.length; ++k) tile[run.at + k] = source[k * s.stride_w];
        }
}

template <bool RELU>
static void write_tile(const PixelGrid& grid, const Shape& s, const Images& im, const Block& block, const float* tile,
                       int64_t stride, int64_t first, int64_t length, float* y) {
    const int64_t plane = im.out_height * im.out_width, filters = block.last - block.first;
    for (int64_t at = 0; at < length;) {
        const int64_t pixel = first + at, row = pixel / grid.width, column = pixel % grid.width;
        const int64_t image = row / grid.height, r = row % grid.height, left = std::min(grid.width - column, length - at);
        const int64_t n = std::min(left, im.out_width - column);
        if (image >= im.number) return;
        if (r < im.out_height && n > 0) {
            const int64_t target = r * im.out_width + column;
            if (im.channels_last)
                transpose<RELU>(tile + at, stride, filters, n, y + (image * plane + target) * s.filters + block.first, s.filters);
            else
                for (int64_t o = 0; o < filters; ++o)
                    copy<RELU>(tile + o * stride + at, y + (image * s.filters + block.first + o) * plane + target, n);
        }
        at += left;
    }
}

struct PixelTask {
    const Layer& layer;
    const Images& im;
    const PixelGrid& grid;
    const float* x;
    float* y;

    template <int V>
    void run(const Block& block, int64_t first, Scratch& scratch, std::vector<std::vector<Run>>& runs) const {
        const Shape& s = layer.shape;
        const Tuning& t = layer.tuning;
        const int64_t length = std::min(t.tile, (grid.length - first + V * LANES - 1) / (V * LANES) * (V * LANES));
        const int64_t x_stride = t.tile + grid.halo, y_stride = t.tile, filters = block.last - block.first;
        const int64_t phase_size = std::min(t.channel_block, s.channels) * x_stride;
        float* sums = scratch.of(filters * y_stride + grid.phases * phase_size);
        float* pixels = sums + filters * y_stride;
        for (int64_t o = 0; o < filters; ++o) fill(sums + o * y_stride, layer.bias[block.first + o], length);
        for (int64_t p = 0; p < grid.phases; ++p) find_runs(runs[p], grid, s, im, p, first, length + grid.halo);
        for (int64_t c0 = 0, b = 0; c0 < s.channels; c0 += t.channel_block, ++b) {
            const int64_t channels = std::min(t.channel_block, s.channels - c0);
            for (int64_t p = 0; p < grid.phases; ++p)
                fill_tile(runs[p], s, im, x, c0, channels, pixels + p * phase_size, x_stride);
            const float* w = block.weights.data() + block.of_channel_block[b];
            for (const Group& g : block.groups) {
                const int64_t i = g.position / s.kernel_w, j = g.position % s.kernel_w;
                const int64_t phase = i % s.stride_h * s.stride_w + j % s.stride_w;
                const float* start = pixels + phase * phase_size + i / s.stride_h * grid.width + j / s.stride_w;
                for (int64_t at = 0; at < length; at += V * LANES)
                    multiply<V>(g, start + at, x_stride, w, channels, sums + at, y_stride);
                w += channels * g.size;
            }
        }
        if (im.relu) write_tile<true>(grid, s, im, block, sums, y_stride, first, length, y);
        else write_tile<false>(grid, s, im, block, sums, y_stride, first, length, y);
    }
};

static void run_pixels(const Layer& layer, const float* x, float* y, const Images& im) {
    const PixelGrid grid(layer.shape, im);
    const PixelTask task{layer, im, grid, x, y};
    const int64_t blocks = layer.blocks.size(), tiles = (grid.length + layer.tuning.tile - 1) / layer.tuning.tile;
#pragma omp parallel num_threads(std::min(im.threads, tiles * blocks))
    {
        static thread_local Scratch scratch;
        std::vector<std::vector<Run>> runs(grid.phases);
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < tiles * blocks; ++k) {
            const Block& block = layer.blocks[k % blocks];
            const int64_t first = k / blocks * layer.tuning.tile;
            if (layer.tuning.wide) task.run<2 * VECTORS>(block, first, scratch, runs);
            else task.run<VECTORS>(block, first, scratch, runs);
        }
    }
}
