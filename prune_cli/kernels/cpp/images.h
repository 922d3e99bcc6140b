// Images are the lanes: a pixel of up to VECTORS x LANES images lies beside each other, so that every
// kernel position and stride is a whole register away, and positions in the padding cost nothing.
#pragma once
#include "micro.h"

template <class T>
struct ImageTask {
    const Layer& layer;
    const Images& im;
    const float* packed;  // [pixel][channel][lanes], pixels `pitch` apart
    T* y;
    int64_t first_image, lanes;  // lanes: images rounded up to registers
    int64_t images, pitch;

    template <int V>
    void multiply_pixel(const Block& block, int64_t row, int64_t column, float* sums, int64_t y_stride) const {
        const Shape& s = layer.shape;
        const Tuning& t = layer.tuning;
        for (int64_t c0 = 0, b = 0; c0 < s.channels; c0 += t.channel_block, ++b) {
            const int64_t channels = std::min(t.channel_block, s.channels - c0);
            const float* w = block.weights.data() + block.of_channel_block[b];
            for (const Group& g : block.groups) {
                const int64_t h = row * s.stride_h + g.position / s.kernel_w - s.padding_h;
                const int64_t k = column * s.stride_w + g.position % s.kernel_w - s.padding_w;
                if (h >= 0 && h < im.height && k >= 0 && k < im.width)
                    multiply<V, false>(g, packed + (h * im.width + k) * pitch + c0 * V * LANES, V * LANES, nullptr, w, channels, Sums{sums, y_stride});
                w += channels * g.size;
            }
        }
    }

    void multiply_pixel(const Block& block, int64_t pixel, float* sums) const {
        const int64_t row = pixel / im.out_width, column = pixel % im.out_width;
        switch (lanes / LANES) {
            case 1: return multiply_pixel<1>(block, row, column, sums, lanes);
            case 2: return multiply_pixel<2>(block, row, column, sums, lanes);
        }
        if constexpr (VECTORS >= 4) switch (lanes / LANES) {
            case 3: return multiply_pixel<3>(block, row, column, sums, lanes);
            case 4: return multiply_pixel<4>(block, row, column, sums, lanes);
        }
    }

    // Output pixels [first, first + pixels) of the block's filters.
    void run(const Block& block, int64_t first, int64_t pixels, Scratch& scratch) const {
        const int64_t filters = block.last - block.first, plane = im.out_height * im.out_width, all = layer.shape.filters;
        float* sums = scratch.of(pixels * filters * lanes);  // [pixel][filter][lanes]
        for (int64_t p = 0; p < pixels; ++p) {
            float* sum = sums + p * filters * lanes;
            for (int64_t o = 0; o < filters; ++o) fill(sum + o * lanes, layer.bias[block.first + o], lanes);
            multiply_pixel(block, first + p, sum);
        }
        T* target = y + first_image * all * plane;
        auto write = [&](const float* from, int64_t stride, int64_t rows, T* to) {
            transpose<true>(from, stride, rows, images, to, all * plane, im.least());
        };
        if (im.channels_last)
            for (int64_t p = 0; p < pixels; ++p)
                write(sums + p * filters * lanes, lanes, filters, target + (first + p) * all + block.first);
        else
            for (int64_t o = 0; o < filters; ++o)
                write(sums + o * lanes, filters * lanes, pixels, target + (block.first + o) * plane + first);
    }
};

// [pixel][channel][lanes] from images that start at x. The pitch between pixels is no power of two, or they
// would fall on the same few lines of the cache.
template <class T>
static void pack_pixels(const Layer& layer, const Images& im, const T* x, int64_t images, int64_t lanes, float* packed, int64_t pitch) {
    const int64_t plane = im.height * im.width, channels = layer.shape.channels;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < (im.channels_last ? plane : channels); ++k) {
        if (im.channels_last) transpose(x + k * channels, plane * channels, images, channels, packed + k * pitch, lanes);
        else transpose(x + k * plane, plane * channels, images, plane, packed + k * lanes, pitch);
    }
}

template <class T>
static void run_images(const Layer& layer, const Images& im, const T* x, T* y) {
    const int64_t most = std::min<int64_t>(registers_of_block(layer.tuning.block), VECTORS) * LANES, plane = im.out_height * im.out_width, channels = layer.shape.channels;
    const int64_t in_size = channels * im.height * im.width;
    static thread_local Scratch shared;
    float* packed = shared.of(im.height * im.width * (channels * most + LANES));
    const int64_t blocks = layer.blocks.size(), pixels = std::min(layer.tuning.tile, plane), tiles = (plane + pixels - 1) / pixels;
#pragma omp parallel num_threads(im.threads)
    {
        static thread_local Scratch scratch;
        for (int64_t n = 0; n < im.number; n += most) {
            const int64_t images = std::min(most, im.number - n), lanes = (images + LANES - 1) / LANES * LANES;
            const int64_t pitch = channels * lanes + LANES;
            pack_pixels(layer, im, x + n * in_size, images, lanes, packed, pitch);
            const ImageTask<T> task{layer, im, packed, y, n, lanes, images, pitch};
#pragma omp for schedule(dynamic)
            for (int64_t k = 0; k < blocks * tiles; ++k) {
                const int64_t first = k / blocks * pixels;
                task.run(layer.blocks[k % blocks], first, std::min(pixels, plane - first), scratch);
            }
        }
    }
}
