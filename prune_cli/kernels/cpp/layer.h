// What is prepared once per layer: the surviving stripes in the order in which they are multiplied.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>
#include "vector.h"

struct Shape {  // of the layer; filled in by Python, all fields 64 bits
    int64_t channels, filters, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

struct Tuning {  // how it is computed; what is best is measured
    int64_t layout;         // 0: pixels are the lanes, 1: images are the lanes
    int64_t block;          // sums held in registers: 12 filters x 1 register, 6 x VECTORS, 3 x 2 VECTORS for one
                            // position after the other; or 1 x 2 VECTORS for all positions of a filter
    int64_t tile;           // pixels of a tile
    int64_t channel_block;  // input channels multiplied between loading and storing the sums
    int64_t filter_blocks;  // parts of the filters that threads share
};

struct Images {  // one call
    int64_t number, height, width, out_height, out_width, channels_last, relu, type, threads;  // type: 0 float, 1 bfloat16, 2 float16
    vec least() const { return vec{} + (relu ? 0.f : -std::numeric_limits<float>::infinity()); }
};

// AVX-512 has 32 registers, for 24 sums; the others have 16, for 12.
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int LARGEST = 12;
constexpr int64_t BY_FILTER = 3;
static int64_t filters_of_block(int64_t block) { return block == 0 ? LARGEST : block == 1 ? 6 : block == 2 ? 3 : 1; }
static int64_t registers_of_block(int64_t block) { return block == 0 ? 1 : block == 1 ? VECTORS : 2 * VECTORS; }

struct Group {  // filters that share a kernel position
    int position, size;
    int64_t rows[LARGEST];  // of the block
    uint32_t first, last;   // bit k: before, or behind, this group there is none with filter k
};

struct Block {  // a range of filters
    int64_t first, last;
    std::vector<Group> groups;             // by position, or by filter and position
    std::vector<int64_t> empty;            // filters without a stripe
    std::vector<float> weights;            // [channel block][group][channel][filter of the group]
    std::vector<int64_t> of_channel_block; // where each starts
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

// Nearly equal groups: eight filters are 4 + 4, not 6 + 2.
static void add_groups(Block& block, int position, const std::vector<int64_t>& filters, int largest) {
    const int64_t n = filters.size(), groups = (n + largest - 1) / largest;
    for (int64_t g = 0, start = 0; g < groups; ++g) {
        Group group{position, (int)((n - start + groups - g - 1) / (groups - g)), {}, 0, 0};
        for (int k = 0; k < group.size; ++k) group.rows[k] = filters[start + k] - block.first;
        start += group.size;
        block.groups.push_back(group);
    }
}

// pattern [filter][position], stripes [stripe][channel] ordered by (position, filter).
static void pack(Layer& layer, Block& block, const uint8_t* pattern, const float* stripes) {
    const Shape& s = layer.shape;
    const int64_t positions = s.kernel_h * s.kernel_w;
    std::vector<int64_t> stripe(s.filters * positions, -1);
    for (int64_t p = 0, next = 0; p < positions; ++p)
        for (int64_t o = 0; o < s.filters; ++o)
            if (pattern[o * positions + p]) stripe[o * positions + p] = next++;
    for (int64_t p = 0; p < positions; ++p) {
        std::vector<int64_t> alive;
        for (int64_t o = block.first; o < block.last; ++o)
            if (pattern[o * positions + p]) alive.push_back(o);
        add_groups(block, p, alive, filters_of_block(layer.tuning.block));
    }
    const int64_t most = layer.tuning.block == BY_FILTER ? s.channels : layer.tuning.channel_block;
    if (layer.tuning.block == BY_FILTER)
        std::stable_sort(block.groups.begin(), block.groups.end(),
                         [](const Group& a, const Group& b) { return a.rows[0] < b.rows[0]; });
    mark_ends(block);
    for (int64_t c0 = 0; c0 < s.channels; c0 += most) {
        block.of_channel_block.push_back(block.weights.size());
        const int64_t end = std::min(s.channels, c0 + most);
        for (const Group& group : block.groups)
            for (int64_t c = c0; c < end; ++c)
                for (int k = 0; k < group.size; ++k) {
                    const int64_t o = group.rows[k] + block.first;
                    block.weights.push_back(stripes[stripe[o * positions + group.position] * s.channels + c]);
                }
    }
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
