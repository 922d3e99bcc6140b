// Images are the lanes: a pixel of up to VECTORS x LANES images lies beside each other, so that every
// kernel position and stride is a whole register away, and positions in the padding cost nothing.
#pragma once
#include <type_traits>
#include "tiles.h"

template <class T>
struct ImageTask {
    const Layer& layer;
    const Images& im;
    const float* packed;  // [pixel][channel][lanes], pixels `pitch` apart
    T* y;
    int64_t first_image, lanes;  // lanes: images rounded up to registers, or to what matrix tiles multiply at once
    int64_t images, pitch;

    template <int V>
    void multiply_pixel(const Block& block, int64_t row, int64_t column, float* sums, int64_t y_stride) const {
        const Shape& s = layer.shape;
        const Tuning& t = layer.tuning;
        for (int64_t c0 = 0, b = 0; c0 < s.channels; c0 += t.channel_block, ++b) {
            const int64_t channels = std::min(t.channel_block, s.channels - c0);
            const float* w = block.weights.data() + block.of_channel_block[b];
            for (const Group& g : block.groups) {
                if (const float* from = read(g.position, row, column))
                    multiply<V, false>(g, from + c0 * V * LANES, V * LANES, nullptr, w, channels, Sums<>{sums, y_stride});
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

    // Where position `position` of the kernel reads for an output pixel; null: in the padding.
    const float* read(int position, int64_t row, int64_t column) const {
        const Shape& s = layer.shape;
        const int64_t h = row * s.stride_h + position / s.kernel_w - s.padding_h;
        const int64_t k = column * s.stride_w + position % s.kernel_w - s.padding_w;
        return h >= 0 && h < im.height && k >= 0 && k < im.width ? packed + (h * im.width + k) * pitch : nullptr;
    }

    // The same for some pixels in matrix tiles, packed [pixel][pair][lanes].
    void add_tiles(const Block& block, int64_t first, int64_t pixels, float* sums) const {
#ifdef HAS_TILES
        const TilePairs pairs(layer.shape.channels);
        const int64_t filters = block.last - block.first;
        TileSums tiles;
        for (const TileRun& run : block.tile_runs)
            for (int64_t p = first; p < first + pixels; ++p)
                for (int64_t lane = 0; lane < lanes; lane += TILE_LANES) {
                    tiles.clear();
                    bool some = false;
                    for (size_t g = run.begin; g < run.end; ++g)
                        if (const float* from = read(block.groups[g].position, p / im.out_width, p % im.out_width)) {
                            tiles.multiply(&block.tile_rows[block.of_group[g]], block.groups[g].size, from + lane, from + lane + LANES, lanes, pairs);
                            some = true;
                        }
                    if (!some) continue;
                    tiles.keep(block.groups[run.begin].size);
                    add(tiles, block, run, Sums<>{sums + (p - first) * filters * lanes + lane, lanes});
                }
#endif
    }

    // Output pixels [first, first + pixels) of the block's filters.
    void run(const Block& block, int64_t first, int64_t pixels, Scratch& scratch) const {
        const int64_t filters = block.last - block.first, plane = im.out_height * im.out_width, all = layer.shape.filters;
        float* sums = scratch.of(pixels * filters * lanes);  // [pixel][filter][lanes]
        for (int64_t k = 0; k < pixels * filters; ++k) fill(sums + k * lanes, layer.bias[block.first + k % filters], lanes);
        if (layer.tuning.in_tiles()) add_tiles(block, first, pixels, sums);
        else
            for (int64_t p = 0; p < pixels; ++p) multiply_pixel(block, first + p, sums + p * filters * lanes);
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

#ifdef HAS_TILES
// [pixel][pair of channels][lanes]; pairs behind the last are zeros.
static void pack_pixel_pairs(const Layer& layer, const Images& im, const Bfloat16* x, int64_t images, int64_t lanes, float* packed, int64_t pitch) {
    const int64_t plane = im.height * im.width, channels = layer.shape.channels, exist = (channels + 1) / 2;
    const int64_t behind = TilePairs(channels).pairs() - exist;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < (im.channels_last ? plane : exist); ++k) {
        if (im.channels_last) {
            const auto image = [=](int64_t i, int64_t pair) { return load_pairs(x + (i * plane + k) * channels + 2 * pair, channels - 2 * pair); };
            transpose_rows(image, images, exist, packed + k * pitch, lanes);
        } else {
            const auto image = [=](int64_t i, int64_t pixel) { return load(pair_of_planes(x + i * plane * channels, k, channels, plane) + pixel, first_lanes(plane - pixel)); };
            transpose_rows(image, images, plane, packed + k * lanes, pitch);
        }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < plane; ++k) fill(packed + k * pitch + exist * lanes, 0, behind * lanes);
}
#endif

template <class T>
static void pack_images(const Layer& layer, const Images& im, const T* x, int64_t images, int64_t lanes, float* packed, int64_t pitch) {
#ifdef HAS_TILES
    if constexpr (std::is_same_v<T, Bfloat16>)
        if (layer.tuning.in_tiles()) return pack_pixel_pairs(layer, im, x, images, lanes, packed, pitch);
#endif
    pack_pixels(layer, im, x, images, lanes, packed, pitch);
}

template <class T>
static void run_images(const Layer& layer, const Images& im, const T* x, T* y) {
    const bool in_tiles = layer.tuning.in_tiles();
    const int64_t least = in_tiles ? 2 * LANES : LANES, most = in_tiles ? 2 * least : std::min<int64_t>(registers_of_block(layer.tuning), VECTORS) * LANES;
    const int64_t plane = im.out_height * im.out_width, in_size = layer.shape.channels * im.height * im.width;
    const int64_t rows = in_tiles ? TilePairs(layer.shape.channels).pairs() : layer.shape.channels;
    static thread_local Scratch shared;
    float* packed = shared.of(im.height * im.width * (rows * most + LANES));
    const int64_t blocks = layer.blocks.size(), pixels = std::min(layer.tuning.tile, plane), tiles = (plane + pixels - 1) / pixels;
#pragma omp parallel num_threads(im.threads)
    {
        static thread_local Scratch scratch;
        const TileShapes shapes(layer);
        for (int64_t n = 0; n < im.number; n += most) {
            const int64_t images = std::min(most, im.number - n), lanes = (images + least - 1) / least * least;
            const int64_t pitch = rows * lanes + LANES;
            pack_images(layer, im, x + n * in_size, images, lanes, packed, pitch);
            const ImageTask<T> task{layer, im, packed, y, n, lanes, images, pitch};
#pragma omp for schedule(dynamic)
            for (int64_t k = 0; k < blocks * tiles; ++k) {
                const int64_t first = k / blocks * pixels;
                task.run(layer.blocks[k % blocks], first, std::min(pixels, plane - first), scratch);
            }
        }
    }
}
