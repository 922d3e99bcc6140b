// Pixels are the lanes. The input of a tile is laid out once: per channel one or more planes whose rows
// follow each other without padding, so that a kernel position is an offset in a plane and one load serves
// any column; what lies outside the image is masked when it is loaded. A stride takes a plane per phase.
// Few channels are better served by shifted planes: one per column of the kernel, with zeros where the
// image ends, so that whole cache lines are loaded and nothing is masked. Matrix tiles cannot mask either: where
// their 16 pixels are always of one row, zeros stand between the rows instead, else planes are shifted.
#pragma once
#include <type_traits>
#include "tiles.h"

static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
static int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Plane { int64_t row, column; };            // of the input, where its first pixel lies; others a stride away
struct Position { int64_t plane, down, right; };  // of the kernel: what it reads for output pixel (0, 0)

// How the images of a call are cut into tiles. A unit is one image, or several small ones, as one row of pixels.
struct PixelGrid {
    const Shape shape;
    const Images im;
    int64_t registers;              // of a block of pixels
    bool shifted;                   // planes, see above
    bool padded;                    // planes have zeros where the image ends
    int64_t width, height, images;  // of a unit
    int64_t pitch;                  // between the rows of a plane; width, or more where rows are padded but not shifted
    std::vector<Plane> planes;
    std::vector<Position> positions;
    int64_t least = 0, most = 0;    // offsets of a position
    int64_t top = 0;                // first row that is read of an image's planes
    int64_t blocks, tile;           // blocks of a unit, and of a tile
    bool whole;                     // the pixels of an image are those of its output
    bool direct;                    // the registers that end a sum write it to the output
    std::vector<Mask> masks;        // [block][position][register]: lanes that lie inside the image
    std::vector<int64_t> at;        // [register]: where its pixels lie in the output

    PixelGrid(const Layer& layer, const Images& call)
        : shape(layer.shape), im(call), registers(registers_of_block(layer.tuning)),
          shifted(layer.tuning.in_tiles() ? call.out_width % LANES != 0 : layer.tuning.block == BY_FILTER),
          padded(shifted || layer.tuning.in_tiles()), width(call.out_width), height(call.out_height), pitch(call.out_width) {
        for (int64_t i = 0; i < shape.kernel_h; ++i)
            for (int64_t j = 0; j < shape.kernel_w; ++j) add_position(i - shape.padding_h, j - shape.padding_w);
        for (const Position& p : positions) least = std::min(least, offset(p)), most = std::max(most, offset(p));
        if (padded) {
            top = positions.front().down;  // rows of zeros lie between images
            height = im.out_height + positions.back().down - top;
        }
        const int64_t plane = width * height, block = registers * LANES;
        images = std::clamp<int64_t>(block / plane, 1, std::max<int64_t>(im.number, 1));
        blocks = ceil_div((images - 1) * plane + im.out_height * width, block);
        tile = ceil_div(blocks, ceil_div(blocks, std::max<int64_t>(layer.tuning.tile / block, 1)));
        whole = width == im.out_width && height == im.out_height;
        direct = im.type == (layer.tuning.in_tiles() ? 1 : 0) && !im.channels_last && (whole ? images == 1 || plane % LANES == 0 : images == 1 && width == im.out_width);
        for (int64_t r = 0; r < blocks * registers; ++r)
            at.push_back(r * LANES / plane * shape.filters * plane + r * LANES % plane);
        if (!padded) find_masks();
    }

    int64_t offset(const Position& p) const { return p.down * pitch + p.right; }
    int64_t offset(int64_t pixel) const { return pixel / width * pitch + pixel % width; }
    int64_t units() const { return ceil_div(im.number, images); }
    int64_t tiles() const { return ceil_div(blocks, tile); }

private:
    // The position that reads row h * stride_h + i and column w * stride_w + j.
    void add_position(int64_t i, int64_t j) {
        const int64_t down = floor_div(i, shape.stride_h), right = shifted ? 0 : floor_div(j, shape.stride_w);
        const Plane plane{i - down * shape.stride_h, j - right * shape.stride_w};
        int64_t k = 0;
        while (k < (int64_t)planes.size() && (planes[k].row != plane.row || planes[k].column != plane.column)) ++k;
        if (k == (int64_t)planes.size()) planes.push_back(plane);
        positions.push_back({k, down, right});
        if (!shifted) {
            const int64_t columns = ceil_div(im.width - plane.column, shape.stride_w);
            if (padded) pitch = std::max({pitch, columns - right, im.out_width + right});
            else pitch = width = std::max(width, columns);
        }
        height = std::max(height, ceil_div(im.height - plane.row, shape.stride_h));
    }

    void find_masks() {
        masks.assign(blocks * positions.size() * registers, 0);
        for (int64_t pixel = 0; pixel < blocks * registers * LANES; ++pixel) {
            const int64_t h = pixel / width % height * shape.stride_h - shape.padding_h;
            const int64_t w = pixel % width * shape.stride_w - shape.padding_w;
            Mask* mask = &masks[pixel / (registers * LANES) * positions.size() * registers + pixel / LANES % registers];
            for (int64_t i = h; i < h + shape.kernel_h; ++i)
                for (int64_t j = w; j < w + shape.kernel_w; ++j, mask += registers)
                    if (i >= 0 && i < im.height && j >= 0 && j < im.width) *mask |= 1u << pixel % LANES;
        }
    }
};

// Pixels of a plane that lie beside each other, with zeros before and behind them; `to` in the planes of a
// channel, `from` in the input.
struct Run { int64_t to, from, pixels, before, behind; };

// The input of some blocks of a unit.
struct Tile {
    const PixelGrid& grid;
    int64_t first, blocks, images;   // images of the unit that exist
    int64_t first_row, plane_size;
    int64_t stride;                  // between channels: an odd number of cache lines, or they would share few sets
    std::vector<Run> runs;
    std::vector<int64_t> offsets;    // of each position: what it reads for the first pixel, in the planes of a channel

    Tile(const PixelGrid& grid, int64_t unit, int64_t tile) : grid(grid), first(tile * grid.tile) {
        blocks = std::min(grid.tile, grid.blocks - first);
        images = std::min(grid.images, grid.im.number - unit * grid.images);
        const int64_t begin = first * grid.registers * LANES, end = begin + pixels();
        first_row = floor_div(grid.offset(begin) + grid.least, grid.pitch);
        const int64_t end_row = ceil_div(grid.offset(end - 1) + 1 + grid.most, grid.pitch);
        plane_size = ceil_div((end_row - first_row) * grid.pitch, LANES) * LANES;
        stride = (plane_size * grid.planes.size() / LANES | 1) * LANES;
        for (int64_t p = 0; p < (int64_t)grid.planes.size(); ++p)
            for (int64_t row = first_row; row < end_row; ++row) add_run(p, row);
        for (const Position& p : grid.positions) offsets.push_back(p.plane * plane_size + grid.offset(begin) + grid.offset(p) - first_row * grid.pitch);
    }

    int64_t pixels() const { return blocks * grid.registers * LANES; }
    int64_t size(int64_t channels) const { return channels * stride + LANES; }

    // planes[channel][plane][pixel] of channels [c0, c0 + channels) of the unit at x.
    template <class T>
    void fill(const T* x, int64_t c0, int64_t channels, float* planes) const {
        const Shape& s = grid.shape;
        if (grid.padded) add_zeros(channels, planes);
        if (grid.im.channels_last)
            for (const Run& run : runs)
                transpose(x + run.from + c0, s.stride_w * s.channels, run.pixels, channels, planes + run.to, stride);
        else copy_channels([=](int64_t c) { return x + (c0 + c) * channel_size(); }, channels, planes);
    }

#ifdef HAS_TILES
    // planes[pair][plane][pixel] of all channels; pairs behind the last are zeros.
    void fill_pairs(const Bfloat16* x, int64_t pairs, float* planes) const {
        const Shape& s = grid.shape;
        const int64_t exist = (s.channels + 1) / 2;
        add_zeros(exist, planes);
        ::fill(planes + exist * stride, 0, (pairs - exist) * stride);
        if (grid.im.channels_last)
            for (const Run& run : runs) {
                const auto pixel = [&](int64_t i, int64_t pair) { return load_pairs(x + run.from + i * s.stride_w * s.channels + 2 * pair, s.channels - 2 * pair); };
                transpose_rows(pixel, run.pixels, exist, planes + run.to, stride);
            }
        else copy_channels([=](int64_t pair) { return pair_of_planes(x, pair, s.channels, channel_size()); }, exist, planes);
    }
#endif

private:
    int64_t channel_size() const { return grid.im.height * grid.im.width; }

    // channel(c): where its pixels begin.
    template <class Channel>
    void copy_channels(const Channel& channel, int64_t channels, float* planes) const {
        switch (grid.shape.stride_w) {
            case 1: return copy_runs<1>(channel, channels, planes);
            case 2: return copy_runs<2>(channel, channels, planes);
            default: return copy_runs<0>(channel, channels, planes);
        }
    }

    template <int STEP, class Channel>
    void copy_runs(const Channel& channel, int64_t channels, float* planes) const {
        for (int64_t c = 0; c < channels; ++c)
            for (const Run& run : runs)
                copy_every<STEP>(channel(c) + run.from, grid.shape.stride_w, planes + c * stride + run.to, run.pixels);
    }

    void add_zeros(int64_t channels, float* planes) const {
        for (int64_t c = 0; c < channels; ++c, planes += stride)
            for (const Run& run : runs) {
                if (run.before) ::fill(planes + run.to - run.before, 0, run.before);
                if (run.behind) ::fill(planes + run.to + run.pixels, 0, run.behind);
            }
    }

    void add_run(int64_t p, int64_t row) {
        const Shape& s = grid.shape;
        const Images& im = grid.im;
        const Plane& plane = grid.planes[p];
        const int64_t image = floor_div(row - grid.top, grid.height), h = (row - image * grid.height) * s.stride_h + plane.row;
        const int64_t step = im.channels_last ? s.channels : 1, to = p * plane_size + (row - first_row) * grid.pitch;
        if (image < 0 || image >= images || h < 0 || h >= im.height) {
            if (grid.padded) runs.push_back({to, 0, 0, 0, grid.pitch});
            return;
        }
        const int64_t begin = std::clamp<int64_t>(ceil_div(-plane.column, s.stride_w), 0, grid.pitch);
        const int64_t end = std::clamp(ceil_div(im.width - plane.column, s.stride_w), begin, grid.pitch);
        const int64_t first = image * s.channels * im.height * im.width;
        Run run{to + begin, first + (h * im.width + begin * s.stride_w + plane.column) * step, end - begin,
                grid.padded ? begin : 0, grid.padded ? grid.pitch - end : 0};
        if (!runs.empty() && s.stride_w == 1 && run.before == 0) {
            Run& previous = runs.back();
            if (previous.behind == 0 && previous.to + previous.pixels == run.to && previous.from + previous.pixels * step == run.from) {
                previous.pixels += run.pixels, previous.behind = run.behind;
                return;
            }
        }
        runs.push_back(run);
    }
};

static bool all(const Mask* masks, int64_t registers) {
    for (int64_t r = 0; r < registers; ++r)
        if (masks[r] != ALL) return false;
    return true;
}

// Some filters of a tile, for outputs that are written directly if they are of type Y.
template <class Y>
struct PixelTask {
    const Layer& layer;
    const Block& block;
    const Tile& tile;
    Y* direct;  // of the output, where the unit begins with the block's filters; null where sums are written later

    // Sums are kept in the tile, [filter][pixel].
    int64_t pitch() const { return (tile.pixels() / LANES | 1) * LANES; }

    Sums<Y> sums_at(int64_t k, float* sums) const {
        const PixelGrid& grid = tile.grid;
        const int64_t size = grid.registers * LANES, plane = grid.im.out_height * grid.im.out_width;
        return {sums + k * size, pitch(), layer.bias.data() + block.first, direct, plane,
                &grid.at[(tile.first + k) * grid.registers],
                (grid.images == 1 ? plane : tile.images * plane) - (tile.first + k) * size, grid.im.least()};
    }

    // Adds channels [c0, c0 + channels), position after position.
    template <int V>
    void add(const float* planes, const float* weights, int64_t channels, bool first, bool last, float* sums) const {
        const PixelGrid& grid = tile.grid;
        for (int64_t k = 0; k < tile.blocks; ++k) {
            const float* w = weights;
            const Mask* masks = &grid.masks[(tile.first + k) * grid.positions.size() * V];
            Sums<Y> kept = sums_at(k, sums);
            if (!first) kept.bias = nullptr;
            if (!last) kept.y = nullptr;
            for (const Group& g : block.groups) {
                const Mask* inside = masks + g.position * V;
                const float* from = planes + tile.offsets[g.position] + k * V * LANES;
                if (all(inside, V)) multiply<V, false>(g, from, tile.stride, inside, w, channels, kept);
                else multiply<V, true>(g, from, tile.stride, inside, w, channels, kept);
                w += channels * g.size;
            }
        }
    }

    // The same filter after filter: each is written once.
    template <int V>
    void add_by_filter(const float* planes, float* sums) const {
        const int64_t channels = layer.shape.channels;
        const float* w = block.weights.data();
        for (auto group = block.groups.begin(); group != block.groups.end();) {
            auto end = group;
            while (end != block.groups.end() && end->rows[0] == group->rows[0]) ++end;
            for (int64_t k = 0; k < tile.blocks; ++k) {
                const Sums<Y> kept = sums_at(k, sums);
                vec sum[V];
                for (vec& v : sum) v = vec{} + kept.bias[group->rows[0]];
                const float* stripe = w;
                for (auto g = group; g != end; ++g, stripe += channels)
                    accumulate<V>(sum, planes + tile.offsets[g->position] + k * V * LANES, tile.stride, stripe, channels);
                for (int v = 0; v < V; ++v)
                    if (kept.y) write(kept, group->rows[0], v, sum[v]);
                    else store(kept.tile + group->rows[0] * kept.pitch + v * LANES, sum[v]);
            }
            w += (end - group) * channels;
            group = end;
        }
    }

#ifdef HAS_TILES
    // Where register v of block k reads, from what the tile's first pixel reads on.
    int64_t reads(int64_t k, int64_t v) const {
        const PixelGrid& grid = tile.grid;
        const int64_t begin = tile.first * TILE_LANES;
        return grid.offset(begin + k * TILE_LANES + v * LANES) - grid.offset(begin);
    }

    // Adds all channels in matrix tiles. Few weights stay in the cache while the sums of some pixels are
    // completed; many are loaded once for all pixels of the tile.
    void add_tiles(const float* planes, float* sums) const {
        const TilePairs pairs(layer.shape.channels);
        const int64_t together = block.tile_rows.size() * sizeof(TileRow) < WEIGHTS_AT_HAND ? 1 : tile.blocks;
        TileSums tiles;
        for (int64_t k0 = 0; k0 < tile.blocks; k0 += together)
            for (const TileRun& run : block.tile_runs)
                for (int64_t k = k0; k < k0 + together; ++k) {
                    const int64_t low = reads(k, 0), high = reads(k, 1);
                    tiles.clear();
                    for (size_t g = run.begin; g < run.end; ++g) {
                        const float* from = planes + tile.offsets[block.groups[g].position];
                        tiles.multiply(&block.tile_rows[block.of_group[g]], block.groups[g].size, from + low, from + high, tile.stride, pairs);
                    }
                    tiles.keep(block.groups[run.begin].size);
                    ::add(tiles, block, run, sums_at(k, sums));
                }
    }

    void run_tiles(const Bfloat16* x, Bfloat16* y, Scratch& scratch) const {
        const int64_t pairs = TilePairs(layer.shape.channels).pairs();
        float* sums = scratch.of((block.last - block.first) * pitch() + tile.size(pairs));
        float* planes = sums + (block.last - block.first) * pitch();
        tile.fill_pairs(x, pairs, planes);
        add_tiles(planes, sums);
        add_empty<2>(sums);
        if (!direct) write_tile(sums, y);
    }
#endif

    // Filters that no stripe is left of are their bias.
    template <int V>
    void add_empty(float* sums) const {
        for (int64_t row : block.empty)
            for (int64_t k = 0; k < tile.blocks; ++k) {
                const Sums<Y> kept = sums_at(k, sums);
                for (int v = 0; v < V; ++v)
                    if (kept.y) write(kept, row, v, vec{} + kept.bias[row]);
                    else store(kept.tile + row * kept.pitch + v * LANES, vec{} + kept.bias[row]);
            }
    }

    // Sums that could not be written where they ended.
    template <class T>
    void write_tile(const float* sums, T* y) const {
        const PixelGrid& grid = tile.grid;
        const Images& im = grid.im;
        const int64_t filters = block.last - block.first, plane = im.out_height * im.out_width, all = layer.shape.filters;
        const int64_t begin = tile.first * grid.registers * LANES;
        const int64_t piece = grid.whole ? grid.width * grid.height : grid.width, shown = grid.whole ? plane : im.out_width;
        for (int64_t k = begin / piece; k * piece < begin + tile.pixels(); ++k) {
            const int64_t image = k * piece / (grid.width * grid.height), h = k * piece / grid.width % grid.height;
            if (image >= tile.images || h >= im.out_height) continue;
            const int64_t from = std::max(begin, k * piece), until = std::min(begin + tile.pixels(), k * piece + shown);
            if (from >= until) continue;
            const int64_t pixel = h * im.out_width + from - k * piece;
            if (im.channels_last)
                transpose<true>(sums + from - begin, pitch(), filters, until - from, y + (image * plane + pixel) * all, all, im.least());
            else
                for (int64_t o = 0; o < filters; ++o)
                    copy(sums + o * pitch() + from - begin, y + (image * all + o) * plane + pixel, until - from, im.least());
        }
    }

    // From the first image of the unit to the block's filters of its output.
    template <int V, class T>
    void run(const T* x, T* y, Scratch& scratch) const {
        const Shape& s = layer.shape;
        const bool by_filter = layer.tuning.block == BY_FILTER;
        const int64_t most = by_filter ? s.channels : std::min(layer.tuning.channel_block, s.channels);
        float* sums = scratch.of((block.last - block.first) * pitch() + tile.size(most));
        float* planes = sums + (block.last - block.first) * pitch();
        for (int64_t c0 = 0, b = 0; c0 < s.channels; c0 += most, ++b) {
            const int64_t channels = std::min(most, s.channels - c0);
            tile.fill(x, c0, channels, planes);
            if (by_filter) add_by_filter<V>(planes, sums);
            else add<V>(planes, block.weights.data() + block.of_channel_block[b], channels, c0 == 0, c0 + channels == s.channels, sums);
        }
        add_empty<V>(sums);
        if (!direct) write_tile(sums, y);
    }
};

template <class T>
static float* as_floats(T*) { return nullptr; }
template <>
float* as_floats(float* y) { return y; }

template <class T>
static void run_pixels(const Layer& layer, const PixelGrid& grid, const T* x, T* y) {
    const Images& im = grid.im;
    const int64_t blocks = layer.blocks.size(), tiles = grid.tiles(), tasks = grid.units() * tiles * blocks;
    const int64_t in_size = layer.shape.channels * im.height * im.width, plane = im.out_height * im.out_width;
#pragma omp parallel num_threads(std::min(im.threads, tasks))
    {
        static thread_local Scratch scratch;
        const TileShapes shapes(layer);
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < tasks; ++k) {
            const int64_t unit = k / (tiles * blocks);
            const Block& block = layer.blocks[k % blocks];
            const Tile tile(grid, unit, k / blocks % tiles);
            const T* from = x + unit * grid.images * in_size;
            T* to = y + unit * grid.images * layer.shape.filters * plane + block.first * (im.channels_last ? 1 : plane);
#ifdef HAS_TILES
            if constexpr (std::is_same_v<T, Bfloat16>)
                if (layer.tuning.in_tiles()) {
                    PixelTask<T>{layer, block, tile, grid.direct ? to : nullptr}.run_tiles(from, to, scratch);
                    continue;
                }
#endif
            const PixelTask<float> task{layer, block, tile, grid.direct ? as_floats(to) : nullptr};
            if (grid.registers == 1) task.run<1>(from, to, scratch);
            else if (grid.registers == VECTORS) task.run<VECTORS>(from, to, scratch);
            else task.run<2 * VECTORS>(from, to, scratch);
        }
    }
}
