// Pixels are the lanes. The output pixels of all images form one row; a tile is a part of it. The input is
// laid beside it once per column of the kernel (and per row of the stride), shifted so that a kernel
// position is a whole number of image rows away: registers are loaded where cache lines begin, and the
// padding to the left and right costs nothing. Images share the rows of padding between them.
#pragma once
#include "micro.h"

struct PixelGrid {
    int64_t width, height;  // of an image, with the rows of padding that are not shared with the next one
    int64_t rows, images;   // of a tile: some rows of one image, or all rows of several
    int64_t tiles;          // that make up one image, or `images` of them
    int64_t length;         // pixels of a tile, whole register blocks
    int64_t halo;           // pixels that the last row of the kernel reads behind a tile
    int64_t planes;         // shifted copies of the input

    PixelGrid(const Shape& s, const Images& im, int64_t pixels, int64_t block) {
        const int64_t reach = (s.kernel_h - 1) / s.stride_h;
        const int64_t shared = s.stride_h == 1 ? std::min(s.padding_h, s.kernel_h - 1) : 0;
        width = im.out_width;
        height = im.out_height + reach - shared;
        images = std::clamp<int64_t>(pixels / (height * width), 1, im.number);
        rows = images > 1 ? images * height : std::clamp<int64_t>(pixels / width, 1, im.out_height);
        tiles = images > 1 ? 1 : (im.out_height + rows - 1) / rows;
        length = (rows * width + block - 1) / block * block;
        halo = (reach * width + LANES - 1) / LANES * LANES;
        planes = s.stride_h * s.kernel_w;
    }
};

// LANES pixels of a plane, or those of them that `lanes` names: they lie beside each other in the input
// (stride_w apart) from `source` on, even where a row of the image ends. Pixels of no piece are zero.
struct Piece {
    int64_t at, source;  // in the plane, and in the input from its first number
    uint32_t lanes;
    bool first;          // of those that fill the register at `at`
};

// Adds pixels [at, at + n) whose input starts at `source` and goes on in steps of `step`.
static void add_pixels(std::vector<Piece>& pieces, int64_t at, int64_t n, int64_t source, int64_t step) {
    while (n > 0) {
        const int64_t lane = at % LANES, here = std::min(n, LANES - lane), origin = source - lane * step;
        const uint32_t lanes = ((1u << here) - 1) << lane;
        Piece& last = pieces.back();
        if (last.at == at - lane && (last.lanes == 0 || last.source == origin)) last.source = origin, last.lanes |= lanes;
        else pieces.push_back({at - lane, origin, lanes, last.at != at - lane});
        at += here, n -= here, source += here * step;
    }
}

// The pieces of one plane of the tile that begins with row `first` of the first image; every register has
// one, if only to be zero.
static void add_plane(std::vector<Piece>& pieces, const PixelGrid& grid, const Shape& s, const Images& im,
                      int64_t plane, int64_t first, int64_t images) {
    const int64_t a = plane / s.kernel_w, shift = plane % s.kernel_w - s.padding_w, size = im.height * im.width;
    // Columns whose input lies inside the image: 0 <= column * stride + shift < width.
    const int64_t begin = shift < 0 ? (-shift + s.stride_w - 1) / s.stride_w : 0;
    const int64_t end = im.width - shift > 0 ? std::min(grid.width, (im.width - shift - 1) / s.stride_w + 1) : 0;
    const int64_t step = im.channels_last ? s.channels : 1, length = grid.length + grid.halo, origin = plane * length;
    auto blank = [&](int64_t until) {
        while (pieces.back().at + LANES < until) pieces.push_back({pieces.back().at + LANES, 0, 0, true});
    };
    pieces.push_back({origin, 0, 0, true});
    for (int64_t at = 0, image = 0, r = first; at < length && image < images; at += grid.width) {
        const int64_t h = r * s.stride_h + a - s.padding_h, last = std::min(end, length - at);
        if (h >= 0 && h < im.height && begin < last) {
            blank(origin + (at + begin) / LANES * LANES);
            add_pixels(pieces, origin + at + begin, last - begin,
                       image * s.channels * size + (h * im.width + begin * s.stride_w + shift) * step, step * s.stride_w);
        }
        if (++r == grid.height && grid.images > 1) r = 0, ++image;
    }
    blank(origin + length);
}

static void find_pieces(std::vector<Piece>& pieces, const PixelGrid& grid, const Shape& s, const Images& im,
                        int64_t first, int64_t images) {
    pieces.clear();
    for (int64_t plane = 0; plane < grid.planes; ++plane) add_plane(pieces, grid, s, im, plane, first, images);
}

// tile[channel][lane] from the lanes' pixels, `step` apart, of channels that lie beside each other.
static void fill_lanes_transposed(const float* source, int64_t step, const Piece& piece, int64_t channels, float* tile, int64_t stride) {
    for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t n = std::min<int64_t>(LANES, channels - c);
        vec square[LANES];
        for (int k = 0; k < LANES; ++k) {
            if (!(piece.lanes >> k & 1)) square[k] = vec{};
            else square[k] = n == LANES ? load(source + k * step + c) : load(source + k * step + c, n);
        }
        transpose_square(square);
        for (int64_t j = 0; j < n; ++j) {
            float* target = tile + (c + j) * stride;
            store(target, piece.first ? square[j] : square[j] + load(target));
        }
    }
}

template <class Load>
static inline void fill_channel(const std::vector<Piece>& pieces, const float* source, float* tile, Load load_piece) {
    for (const Piece& piece : pieces) {
        float* target = tile + piece.at;
        const vec pixels = load_piece(source + piece.source, piece.lanes);
        store(target, piece.first ? pixels : pixels + load(target));
    }
}

// tile[channel][pixel] for channels [c0, c0 + channels).
static void fill_tile(const std::vector<Piece>& pieces, const Shape& s, const Images& im, const float* x,
                      int64_t c0, int64_t channels, float* tile, int64_t stride) {
    if (im.channels_last) {
        for (const Piece& piece : pieces)
            fill_lanes_transposed(x + piece.source + c0, s.channels * s.stride_w, piece, channels, tile + piece.at, stride);
        return;
    }
    for (int64_t c = 0; c < channels; ++c, tile += stride) {
        const float* source = x + (c0 + c) * im.height * im.width;
        if (s.stride_w == 1) fill_channel(pieces, source, tile, [](const float* p, uint32_t lanes) { return load_lanes(p, lanes); });
        else if (s.stride_w == 2) fill_channel(pieces, source, tile, [](const float* p, uint32_t lanes) { return load_even_lanes(p, lanes); });
        else fill_channel(pieces, source, tile, [&](const float* p, uint32_t lanes) {
            vec pixels = {};
            for (int k = 0; k < LANES; ++k)
                if (lanes >> k & 1) pixels[k] = p[k * s.stride_w];
            return pixels;
        });
    }
}

template <bool RELU>
static void write_tile(const PixelGrid& grid, const Shape& s, const Images& im, const Block& block, const float* tile,
                       int64_t first, int64_t images, float* y) {
    const int64_t plane = im.out_height * im.out_width, filters = block.last - block.first;
    const int64_t pixel = first * grid.width, n = std::min(grid.rows * grid.width, plane - pixel);
    for (int64_t image = 0; image < images; ++image, tile += grid.height * grid.width, y += s.filters * plane) {
        if (im.channels_last)
            transpose<RELU>(tile, grid.length, filters, n, y + pixel * s.filters + block.first, s.filters);
        else
            for (int64_t o = 0; o < filters; ++o)
                copy<RELU>(tile + o * grid.length, y + (block.first + o) * plane + pixel, n);
    }
}

struct PixelTask {
    const Layer& layer;
    const Images& im;
    const PixelGrid& grid;
    const std::vector<Piece>& pieces;  // of all planes, which lie beside each other for each channel

    const float* at_position(const float* planes, int position) const {
        const Shape& s = layer.shape;
        const int64_t i = position / s.kernel_w, j = position % s.kernel_w;
        return planes + (i % s.stride_h * s.kernel_w + j) * (grid.length + grid.halo) + i / s.stride_h * grid.width;
    }

    // Adds channels [c0, c0 + channels) to sums[filter][pixel], position after position.
    template <int V>
    void add(const Block& block, const float* planes, int64_t stride, const float* weights, int64_t channels, float* sums) const {
        for (int64_t at = 0; at < grid.length; at += V * LANES) {
            const float* w = weights;
            for (const Group& g : block.groups) {
                multiply<V>(g, at_position(planes, g.position) + at, stride, w, channels, sums + at, grid.length);
                w += channels * g.size;
            }
        }
    }

    // The same filter after filter: each is written once, to out[filter][pixel].
    template <int V, bool RELU>
    void add_by_filter(const Block& block, const float* planes, int64_t stride, float* out, int64_t out_stride, int64_t pixels) const {
        const float* w = block.weights.data();
        const int64_t channels = layer.shape.channels;
        auto group = block.groups.begin();
        for (int64_t o = 0; o < block.last - block.first; ++o) {
            auto end = group;
            while (end != block.groups.end() && end->rows[0] == o) ++end;
            for (int64_t at = 0; at < pixels; at += V * LANES) {
                vec sum[V];
                for (vec& v : sum) v = vec{} + layer.bias[block.first + o];
                const float* stripe = w;
                for (auto g = group; g != end; ++g, stripe += channels)
                    accumulate<V>(sum, at_position(planes, g->position) + at, stride, stripe, channels);
                if (RELU) for (vec& v : sum) v = relu(v);
                float* target = out + o * out_stride + at;
                for (int v = 0; v < V; ++v, target += LANES) {
                    const int64_t left = pixels - at - v * LANES;
                    if (left >= LANES) store(target, sum[v]);
                    else if (left > 0) store(target, sum[v], left);
                }
            }
            w += (end - group) * channels;
            group = end;
        }
    }

    // Rows from `first` of images that begin at x and y.
    template <int V, bool RELU>
    void run(const Block& block, const float* x, float* y, int64_t first, int64_t images, Scratch& scratch) const {
        const Shape& s = layer.shape;
        const bool by_filter = layer.tuning.block == BY_FILTER;
        const int64_t most = by_filter ? s.channels : std::min(layer.tuning.channel_block, s.channels);
        const int64_t filters = block.last - block.first, stride = grid.planes * (grid.length + grid.halo);
        float* sums = scratch.of(filters * grid.length + most * stride);
        float* planes = sums + filters * grid.length;
        if (by_filter) {
            fill_tile(pieces, s, im, x, 0, most, planes, stride);
            const int64_t plane = im.out_height * im.out_width, pixel = first * grid.width;
            if (grid.images == 1 && !im.channels_last)
                return add_by_filter<V, RELU>(block, planes, stride, y + block.first * plane + pixel, plane,
                                              std::min(grid.rows * grid.width, plane - pixel));
            add_by_filter<V, RELU>(block, planes, stride, sums, grid.length, grid.length);
            return write_tile<false>(grid, s, im, block, sums, first, images, y);
        }
        for (int64_t o = 0; o < filters; ++o) fill(sums + o * grid.length, layer.bias[block.first + o], grid.length);
        for (int64_t c0 = 0, b = 0; c0 < s.channels; c0 += most, ++b) {
            const int64_t channels = std::min(most, s.channels - c0);
            fill_tile(pieces, s, im, x, c0, channels, planes, stride);
            add<V>(block, planes, stride, block.weights.data() + block.of_channel_block[b], channels, sums);
        }
        write_tile<RELU>(grid, s, im, block, sums, first, images, y);
    }

    template <int V>
    void run(const Block& block, const float* x, float* y, int64_t first, int64_t images, Scratch& scratch) const {
        if (im.relu) run<V, true>(block, x, y, first, images, scratch);
        else run<V, false>(block, x, y, first, images, scratch);
    }
};

static void run_pixels(const Layer& layer, const float* x, float* y, const Images& im) {
    const Shape& s = layer.shape;
    const int64_t registers = registers_of_block(layer.tuning.block);
    const PixelGrid grid(s, im, layer.tuning.tile, registers * LANES);
    const int64_t blocks = layer.blocks.size(), groups = (im.number + grid.images - 1) / grid.images;
    const int64_t tasks = grid.tiles * groups * blocks;
#pragma omp parallel num_threads(std::min(im.threads, tasks))
    {
        static thread_local Scratch scratch;
        std::vector<Piece> pieces;
        int64_t known_row = -1, known_images = 0;  // of which tile the pieces are
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < tasks; ++k) {
            const int64_t row = k / (groups * blocks) * grid.rows, image = k / blocks % groups * grid.images;
            const int64_t images = std::min(grid.images, im.number - image);
            if (row != known_row || images != known_images)
                find_pieces(pieces, grid, s, im, row, images);
            known_row = row, known_images = images;
            const PixelTask task{layer, im, grid, pieces};
            const float* from = x + image * s.channels * im.height * im.width;
            float* to = y + image * s.filters * im.out_height * im.out_width;
            const Block& block = layer.blocks[k % blocks];
            if (registers == 1) task.run<1>(block, from, to, row, images, scratch);
            else if (registers == VECTORS) task.run<VECTORS>(block, from, to, row, images, scratch);
            else task.run<2 * VECTORS>(block, from, to, row, images, scratch);
        }
    }
}
