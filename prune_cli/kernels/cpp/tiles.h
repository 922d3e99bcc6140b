// The multiplication in matrix tiles (Intel AMX): 32 filters times 32 pixels (or images) over pairs of
// channels, bfloat16 summed in float32. A tile is 16 rows of 64 bytes: of weights, 16 filters x 32 channels;
// of the input, 16 pairs of channels x 16 pixels; of sums, 16 filters x 16 pixels.
#pragma once
#include "micro.h"

#ifdef HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))

// Whether the processor has the tiles and the system lets this process use them.
static bool tiles_allowed() {
    constexpr long REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned TILES = 1u << 24, BFLOAT16 = 1u << 22;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES) == 0 || (d & BFLOAT16) == 0) return false;
    return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
}

static inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }  // the intrinsics do not say what they read

// The shapes of this thread's tiles for a layer, while it lives. What was set before is set again afterwards:
// other libraries remember what they have set and do not look.
class TileShapes {
    struct alignas(64) Registers {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Registers) == 64, "as the processor reads it");
    const bool used;
    Registers before{};

    WITH_TILES static void save(Registers& to) { _tile_storeconfig(&to); compiler_barrier(); }
    WITH_TILES static void set(const Registers& from) { compiler_barrier(); _tile_loadconfig(&from); }

public:
    explicit TileShapes(const Layer& layer) : used(layer.tuning.in_tiles()) {
        if (!used) return;
        const TilePairs pairs(layer.shape.channels);
        Registers wanted{1, 0, {}, {64, 64, 64, 64}, {16, 16, 16, 16}};
        for (int k : {4, 5}) wanted.row_bytes[k] = 4 * pairs.rows, wanted.rows[k] = 16;
        for (int k : {6, 7}) wanted.row_bytes[k] = 64, wanted.rows[k] = pairs.rows;
        save(before);
        set(wanted);
    }
    ~TileShapes() {
        if (used) set(before);
    }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;
};

constexpr size_t WEIGHTS_AT_HAND = 512 << 10;  // bytes of weights that stay in the cache for the next pixels
constexpr int64_t TILE_LANES = 32;  // that are multiplied at once

// What the tiles sum up until they are stored: [filter][lane].
struct TileSums {
    alignas(64) float sums[32 * TILE_LANES];

    WITH_TILES static void clear() { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }

    // Adds 16 or 32 filters' weights times low[pair][16 lanes] and high[pair][16 lanes], with x_stride between pairs.
    WITH_TILES static void multiply(const TileRow* weights, int64_t filters, const float* low, const float* high, int64_t x_stride, const TilePairs& pairs) {
        const int64_t bytes = x_stride * sizeof(float);
        compiler_barrier();
        for (int64_t k = 0; k < pairs.tiles; ++k, low += pairs.rows * x_stride, high += pairs.rows * x_stride) {
            _tile_loadd(6, low, bytes);
            _tile_loadd(4, weights, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, high, bytes);
            _tile_dpbf16ps(1, 4, 7);
            weights += 16;
            if (filters <= 16) continue;
            _tile_loadd(5, weights, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            weights += 16;
        }
    }

    WITH_TILES void keep(int64_t filters) {
        constexpr int64_t bytes = TILE_LANES * sizeof(float);
        _tile_stored(0, sums, bytes);
        _tile_stored(1, sums + 16, bytes);
        if (filters <= 16) return;
        _tile_stored(2, sums + 16 * TILE_LANES, bytes);
        _tile_stored(3, sums + 16 * TILE_LANES + 16, bytes);
    }
};

// The sums of a run of groups, added to what other runs have left.
template <class Y>
static inline void add(const TileSums& tiles, const Block& block, const TileRun& run, const Sums<Y>& sums) {
    const Group& g = block.groups[run.begin];
    const uint32_t first = sums.bias ? g.first : 0, last = sums.y ? block.groups[run.end - 1].last : 0;
    for (int f = 0; f < g.size; ++f)
        for (int v = 0; v < 2; ++v) {
            float* kept = sums.tile + g.rows[f] * sums.pitch + v * LANES;
            const vec sum = load(tiles.sums + f * TILE_LANES + v * LANES) + (first >> f & 1 ? vec{} + sums.bias[g.rows[f]] : load(kept));
            if (last >> f & 1) write(sums, g.rows[f], v, sum);
            else store(kept, sum);
        }
}
#else
struct TileShapes { explicit TileShapes(const Layer&) {} };
#endif
