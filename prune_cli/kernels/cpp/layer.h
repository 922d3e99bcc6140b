// What is prepared once per layer: the surviving stripes in the order in which they are multiplied.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <vector>
#include "vector.h"

struct Shape {  // of the layer; filled in by Python, all fields 64 bits
    int64_t channels, filters, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

struct Tuning {  // how it is computed; what is best is measured
    int64_t layout;         // 0: pixels are the lanes, 1: images are the lanes; 2, 3: the same in matrix tiles
    int64_t block;          // sums held in registers: 12 filters x 1 register, 6 x VECTORS, 3 x 2 VECTORS for one
                            // position after the other; or 1 x 2 VECTORS for all positions of a filter.
                            // Matrix tiles hold 32 filters x 32 lanes, for one position (0) or for all (3)
    int64_t tile;           // pixels of a tile
    int64_t channel_block;  // input channels multiplied between loading and storing the sums; matrix tiles take all
    int64_t filter_blocks;  // parts of the filters that threads share

    bool in_images() const { return layout & 1; }
    bool in_tiles() const { return layout & 2; }
};

struct Images {  // one call
    int64_t number, height, width, out_height, out_width, channels_last, relu, type, threads;  // type: 0 float, 1 bfloat16, 2 float16
    vec least() const { return vec{} + (relu ? 0.f : -std::numeric_limits<float>::infinity()); }
};

// AVX-512 has 32 registers, for 24 sums; the others have 16, for 12.
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int LARGEST = 32;
constexpr int64_t BY_FILTER = 3;
static int64_t filters_of_block(const Tuning& t) { return t.in_tiles() ? 32 : t.block == 0 ? 12 : t.block == 1 ? 6 : t.block == 2 ? 3 : 1; }
static int64_t registers_of_block(const Tuning& t) { return t.in_tiles() ? 2 : t.block == 0 ? 1 : t.block == 1 ? VECTORS : 2 * VECTORS; }

struct Group {  // filters that share a kernel position
    int position, size;
    int64_t rows[LARGEST];  // of the block
    uint32_t first, last;   // bit k: before, or behind, this group there is none with filter k

    bool has_rows_of(const Group& other) const { return size == other.size && std::equal(rows, rows + size, other.rows); }
};

// A row of a matrix tile: one filter's weights of 16 pairs of channels.
struct alignas(64) TileRow { Bfloat16 channels[32]; };

struct TileRun { size_t begin, end; };  // groups that follow each other and have the same filters

// The pairs of channels of a layer, cut into tiles of equal height.
struct TilePairs {
    int64_t tiles, rows;  // rows: pairs of a tile
    explicit TilePairs(int64_t channels) : tiles((channels + 31) / 32), rows(((channels + 1) / 2 + tiles - 1) / tiles) {}
    int64_t pairs() const { return tiles * rows; }  // the last ones may be zeros
};

struct Block {  // a range of filters
    int64_t first, last;
    std::vector<Group> groups;             // by position, or by filter and position
    std::vector<int64_t> empty;            // filters without a stripe
    std::vector<float> weights;            // [channel block][group][channel][filter of the group]
    std::vector<int64_t> of_channel_block; // where each starts
    std::vector<TileRow> tile_rows;        // [group][tile of pairs][16 or 32 filters], instead
    std::vector<int64_t> of_group;         // where each starts
    std::vector<TileRun> tile_runs;
};

struct Layer {
    Shape shape;
    Tuning tuning;
    std::vector<float> bias;
    std::vector<Block> blocks;
};

static void mark_ends(Block& block) {
    const int64_t filters = block.last - block.first, none = -1;
    std::vector<int64_t> first(filters, none), last(filters, none);
    for (size_t i = 0; i < block.groups.size(); ++i)
        for (int k = 0; k < block.groups[i].size; ++k) {
            const int64_t row = block.groups[i].rows[k];
            if (first[row] == none) first[row] = i;
            last[row] = i;
        }
    for (size_t i = 0; i < block.groups.size(); ++i)
        for (int k = 0; k < block.groups[i].size; ++k) {
            Group& group = block.groups[i];
            group.first |= (uint32_t)(first[group.rows[k]] == (int64_t)i) << k;
            group.last |= (uint32_t)(last[group.rows[k]] == (int64_t)i) << k;
        }
    for (int64_t row = 0; row < filters; ++row)
        if (first[row] == none) block.empty.push_back(row);
}

// The surviving stripes: values [stripe][channel] ordered by (position, filter), pattern [filter][position].
struct Stripes {
    const Shape& shape;
    const float* values;
    const int64_t positions;
    std::vector<int64_t> numbers;  // [filter][position], -1 where a stripe is gone

    Stripes(const Shape& s, const uint8_t* pattern, const float* values)
        : shape(s), values(values), positions(s.kernel_h * s.kernel_w), numbers(s.filters * positions, -1) {
        for (int64_t p = 0, next = 0; p < positions; ++p)
            for (int64_t o = 0; o < s.filters; ++o)
                if (pattern[o * positions + p]) numbers[o * positions + p] = next++;
    }
    bool has(int64_t filter, int64_t position) const { return numbers[filter * positions + position] >= 0; }
    bool has(int64_t filter) const { return std::any_of(&numbers[filter * positions], &numbers[filter * positions] + positions, [](int64_t k) { return k >= 0; }); }
    const float* of(int64_t filter, int64_t position) const { return values + numbers[filter * positions + position] * shape.channels; }
};

static void add_group(Block& block, int position, const int64_t* filters, int64_t size) {
    Group group{position, (int)size, {}, 0, 0};
    for (int k = 0; k < size; ++k) group.rows[k] = filters[k] - block.first;
    block.groups.push_back(group);
}

// Nearly equal groups: eight filters are 4 + 4, not 6 + 2; but matrix tiles are full or cost as much.
static void group_by_position(const Tuning& tuning, const Stripes& stripes, Block& block) {
    const int64_t largest = filters_of_block(tuning);
    for (int64_t p = 0; p < stripes.positions; ++p) {
        std::vector<int64_t> alive;
        for (int64_t o = block.first; o < block.last; ++o)
            if (stripes.has(o, p)) alive.push_back(o);
        const int64_t n = alive.size(), groups = (n + largest - 1) / largest;
        for (int64_t g = 0, start = 0; g < groups; ++g) {
            const int64_t size = tuning.in_tiles() ? std::min(largest, n - start) : (n - start + groups - g - 1) / (groups - g);
            add_group(block, p, &alive[start], size);
            start += size;
        }
    }
}

// The same filters at one position after the other; some may have no stripe there.
static void group_by_filter(const Tuning& tuning, const Stripes& stripes, Block& block) {
    std::vector<int64_t> alive;
    for (int64_t o = block.first; o < block.last; ++o)
        if (stripes.has(o)) alive.push_back(o);
    for (int64_t start = 0, n = alive.size(); start < n; start += filters_of_block(tuning)) {
        const int64_t *filters = &alive[start], size = std::min(filters_of_block(tuning), n - start);
        for (int64_t p = 0; p < stripes.positions; ++p)
            if (std::any_of(filters, filters + size, [&](int64_t o) { return stripes.has(o, p); })) add_group(block, p, filters, size);
    }
}

static void pack_weights(const Tuning& tuning, const Stripes& stripes, Block& block) {
    const int64_t channels = stripes.shape.channels, most = tuning.block == BY_FILTER ? channels : tuning.channel_block;
    for (int64_t c0 = 0; c0 < channels; c0 += most) {
        block.of_channel_block.push_back(block.weights.size());
        const int64_t end = std::min(channels, c0 + most);
        for (const Group& group : block.groups)
            for (int64_t c = c0; c < end; ++c)
                for (int k = 0; k < group.size; ++k)
                    block.weights.push_back(stripes.of(group.rows[k] + block.first, group.position)[c]);
    }
}

#ifdef HAS_TILES
static void pack_tile_rows(const Stripes& stripes, Block& block) {
    const TilePairs pairs(stripes.shape.channels);
    for (size_t k = 0; k < block.groups.size(); ++k)
        if (k > 0 && block.groups[k].has_rows_of(block.groups[k - 1])) block.tile_runs.back().end = k + 1;
        else block.tile_runs.push_back({k, k + 1});
    for (const Group& group : block.groups) {
        block.of_group.push_back(block.tile_rows.size());
        for (int64_t c0 = 0; c0 < 2 * pairs.pairs(); c0 += 2 * pairs.rows)
            for (int k = 0; k < (group.size > 16 ? 32 : 16); ++k) {
                TileRow row{};
                const int64_t channels = std::min(2 * pairs.rows, stripes.shape.channels - c0);
                if (k < group.size && stripes.has(group.rows[k] + block.first, group.position))
                    copy(stripes.of(group.rows[k] + block.first, group.position) + c0, row.channels, channels);
                block.tile_rows.push_back(row);
            }
    }
}
#endif

static void pack(Layer& layer, Block& block, const Stripes& stripes) {
    if (layer.tuning.block == BY_FILTER) group_by_filter(layer.tuning, stripes, block);
    else group_by_position(layer.tuning, stripes, block);
    mark_ends(block);
#ifdef HAS_TILES
    if (layer.tuning.in_tiles()) return pack_tile_rows(stripes, block);
#endif
    pack_weights(layer.tuning, stripes, block);
}

// Memory of one thread, kept between calls, aligned to cache lines.
struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    float* of(size_t floats) {
        if (floats > size) {
            free(data);
            size = (floats + 1023) / 1024 * 1024;
            data = static_cast<float*>(aligned_alloc(4096, size * sizeof(float)));
            memset(data, 0, size * sizeof(float));
        }
        return data;
    }
    ~Scratch() { free(data); }
};
