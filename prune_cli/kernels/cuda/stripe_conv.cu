// The stripe-wise convolution on a CUDA device; the operation is defined in kernels/reference.py.
//
// A stripe is a 1x1 convolution whose output is shifted and added to its filter ("Pruning Filter in
// Filter", section 3.2). So a block multiplies once for all kernel positions together,
//
//     partial[stripe][pixel] = sum over c of stripe[c] * x[pixel][c]
//
// for the pixels of its tile and the surviving stripes of its filters: a plain matrix product of
// whatever survives, with no position or filter padded, each pixel read once. The products stay in
// shared memory, where each output is gathered: the partial sums of its filter's stripes at the
// shifted pixels, then bias and ReLU. Nothing is scattered, so there are no races and no atomics,
// and every output is written once, by one thread, summed in a fixed order.
//
// Only pixels of the image are multiplied, padding never. Tiles overlap by the halo. With a stride, the
// image is taken apart into its phases (rows and columns of the same remainder): output (h, w) reads
// pixel (h + q) * stride + phase, with a phase and a shift q for each kernel position. The stripes of a
// phase are multiplied with that phase's pixels only.
//
// Compiled for one configuration at a time, by these macros:
//   MATH     FLOAT32 (FFMA), TF32, FLOAT16, BFLOAT16 (tensor cores); sums are float32
//   WARPS, M_TILES   a tile has WARPS * M_TILES * 16 pixels, M_TILES * 16 of them each warp's
//   STRIPES  most stripes of a block's filters, a multiple of 16
//   VECTOR   1: x is channels_last with rows of whole 16 bytes
#define FLOAT32 0
#define TF32 1
#define FLOAT16 2
#define BFLOAT16 3

#if MATH == FLOAT32 || MATH == TF32
typedef float Element;
#else
typedef half_bits Element;
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int PIXELS = 16 * M_TILES * WARPS;  // of a tile
constexpr int LANE_PIXELS = PIXELS >= 128 ? 4 : PIXELS >= 64 ? 2 : 1;  // that a thread gathers at once
constexpr int ROW = 64;  // bytes of a pixel or stripe in a stage of the pipeline
constexpr int PIECE = 16 / sizeof(Element);  // channels of 16 bytes
constexpr int CHUNK = ROW / sizeof(Element);  // channels of a stage
constexpr int STAGES = 4;
constexpr int STAGE = (PIXELS + STRIPES) * ROW;  // bytes
constexpr int PITCH = PIXELS + 4;  // of partial[stripe]: 4 more than a multiple of 16, so that no banks collide
constexpr int COPIES = PIXELS * (ROW / 16) / THREADS;  // 16-byte pieces of x that a thread copies per stage

// `Geometry` in kernels/cuda/layout.py: the same fields in the same order.
struct Geometry {
    int images, channels, filters, height, width, out_height, out_width, stride_h, stride_w;
    int stripes, groups, phases, positions, chunks;
    int tile_images, tile_rows, tile_columns, tiles_h, tiles_w;  // rows and columns of a phase
    int first_h, last_h, first_w, last_w;  // least and largest shift q
    int capacity;  // most outputs of a tile, rounded up to whole turns of a warp
    int sums_at, sources_at, targets_at;  // bytes into shared memory
    int x_channels_last, y_channels_last, relu;
};

// What `pack` in kernels/cuda/layout.py lays behind each other.
struct Tables {
    const int* groups;     // [group]: first filter, end, first row of the weights, then phases + 1 starts in it
    const int* starts;     // [filter + 1]: first entry of a filter
    const int* entries;    // [stripe]: row of the stripe in its group + (kernel position << 16)
    const int* positions;  // [kernel position]: q_h, q_w, phase_h, phase_w
    const int* phases;     // [phase]: phase_h, phase_w

    __device__ Tables(const int* tables, const Geometry& g) {
        groups = tables;
        starts = groups + g.groups * (4 + g.phases);
        entries = starts + g.filters + 1;
        positions = entries + g.stripes;
        phases = positions + 4 * g.positions;
    }
};

struct Tile {
    int image, row, column;  // the first: an image, a row and a column of the phases
    int top, bottom, left, right;  // outputs

    __device__ Tile(const Geometry& g, int index) {
        const int across = index % g.tiles_w, down = index / g.tiles_w % g.tiles_h;
        image = index / (g.tiles_w * g.tiles_h) * g.tile_images;
        range(down, g.tiles_h, g.tile_rows, g.first_h, g.last_h, g.out_height, row, top, bottom);
        range(across, g.tiles_w, g.tile_columns, g.first_w, g.last_w, g.out_width, column, left, right);
    }

    // Tile `index` of `tiles`, `size` wide: where it starts, and the outputs that need nothing outside of it.
    static __device__ void range(int index, int tiles, int size, int first, int last, int outputs,
                                 int& start, int& from, int& to) {
        start = index * (size - (last - first));
        from = index == 0 ? 0 : min(outputs, max(0, start - first));
        to = index == tiles - 1 ? outputs : min(outputs, max(0, start + size - last));
    }

    __device__ int outputs(const Geometry& g) const { return g.tile_images * (bottom - top) * (right - left); }
};

struct Source { int image, height, width; bool there; };

// The pixel of the image that row `row` of the matrix product reads in a phase.
__device__ Source source(const Geometry& g, const Tile& tile, int row, int phase_h, int phase_w) {
    const int plane = g.tile_rows * g.tile_columns;
    Source s = {tile.image + row / plane, (tile.row + row % plane / g.tile_columns) * g.stride_h + phase_h,
                (tile.column + row % g.tile_columns) * g.stride_w + phase_w, false};
    s.there = row < g.tile_images * plane && s.image < g.images && s.height < g.height && s.width < g.width;
    return s;
}

// Byte offset of a 16-byte piece of a row: eight rows at the same piece lie in different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * ROW + ((piece ^ (row >> 1 & 3)) << 4); }

// Which row and piece a thread copies: beside each other lie pieces, or pixels.
__device__ __forceinline__ int copied_row(int k) {
    const int v = threadIdx.x + k * THREADS;
    return VECTOR ? v >> 2 : v % PIXELS;
}
__device__ __forceinline__ int copied_piece(int k) {
    const int v = threadIdx.x + k * THREADS;
    return VECTOR ? v & 3 : v / PIXELS;
}

// One stage: CHUNK channels of the tile's pixels and of `count` stripes from row `first` of the weights on.
__device__ __forceinline__ void load(const Geometry& g, const Element* x, const long long (&offsets)[COPIES],
                                     const Element* weights, int first, int count, int chunk, unsigned char* stage) {
    if (chunk < g.chunks) {
#pragma unroll
        for (int k = 0; k < COPIES; ++k) {
            unsigned char* to = stage + swizzled(copied_row(k), copied_piece(k));
            const int c = chunk * CHUNK + copied_piece(k) * PIECE;
#if VECTOR
            const bool there = offsets[k] >= 0 && c < g.channels;
            copy16(to, there ? x + offsets[k] + c : x, there);
#else
            const long long apart = g.x_channels_last ? 1 : static_cast<long long>(g.height) * g.width;
            Element piece[PIECE];
#pragma unroll
            for (int e = 0; e < PIECE; ++e) {
                const bool there = offsets[k] >= 0 && c + e < g.channels;
                const Element* from = there ? x + offsets[k] + (c + e) * apart : x;
                if (sizeof(Element) == 4) copy4(to + 4 * e, from, there);
                else piece[e] = there ? *from : Element(0);
            }
            if (sizeof(Element) == 2) {  // no asynchronous copy is that short
                unsigned words[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    words[e] = static_cast<unsigned>(piece[2 * e % PIECE]) | static_cast<unsigned>(piece[(2 * e + 1) % PIECE]) << 16;
                *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
            }
#endif
        }
        const Element* from = weights + (static_cast<long long>(chunk) * g.stripes + first) * CHUNK;
#pragma unroll
        for (int v = threadIdx.x; v < STRIPES * 4; v += THREADS)
            if (v < count * 4) copy16(stage + PIXELS * ROW + swizzled(v >> 2, v & 3), from + v * PIECE, true);
    }
    copies_commit();
}

// sums[m][n] are those of tile m (16 pixels of this warp) and n (8 stripes): rows `lane_row` and 8 more,
// columns `lane_column` and the next, as the tensor cores hand them out.
typedef float Sums[M_TILES][STRIPES / 8][4];
#if MATH == FLOAT32
__device__ __forceinline__ int lane_row(int lane) { return lane % 8; }
__device__ __forceinline__ int lane_column(int lane) { return lane / 8 * 2; }

template <int COLUMNS>
__device__ __forceinline__ void multiply(Sums& sums, const unsigned char* pixels, const unsigned char* stripes) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M_TILES + lane_row(lane);
#pragma unroll 1  // or the loop outgrows the instruction cache
    for (int piece = 0; piece < 4; ++piece) {
        float4 a[2 * M_TILES];
#pragma unroll
        for (int i = 0; i < 2 * M_TILES; ++i)
            a[i] = *reinterpret_cast<const float4*>(pixels + swizzled(row + 8 * i, piece));
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const float4 b = *reinterpret_cast<const float4*>(stripes + swizzled(8 * n + lane_column(lane) + odd, piece));
#pragma unroll
                for (int i = 0; i < 2 * M_TILES; ++i) {
                    float& sum = sums[i / 2][n][i % 2 * 2 + odd];
                    sum = fmaf(a[i].x, b.x, sum);
                    sum = fmaf(a[i].y, b.y, sum);
                    sum = fmaf(a[i].z, b.z, sum);
                    sum = fmaf(a[i].w, b.w, sum);
                }
            }
    }
}
#else
__device__ __forceinline__ int lane_row(int lane) { return lane / 4; }
__device__ __forceinline__ int lane_column(int lane) { return lane % 4 * 2; }

template <int COLUMNS>
__device__ __forceinline__ void multiply(Sums& sums, const unsigned char* pixels, const unsigned char* stripes) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M_TILES + lane % 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // 32 bytes of channels
        unsigned a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            load_matrices(a[m], pixels + swizzled(row + 16 * m, 2 * step + lane / 16));
#if MATH == TF32
#pragma unroll
            for (int k = 0; k < 4; ++k) a[m][k] = to_tf32(a[m][k]);
#endif
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            unsigned b[4];
            load_matrices(b, stripes + swizzled(8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#if MATH == TF32
                    multiply_tf32(sums[m][n + half], a[m], b[2 * half], b[2 * half + 1]);
#elif MATH == FLOAT16
                    multiply_float16(sums[m][n + half], a[m], b[2 * half], b[2 * half + 1]);
#else
                    multiply_bfloat16(sums[m][n + half], a[m], b[2 * half], b[2 * half + 1]);
#endif
                }
        }
    }
}
#endif

// partial[first_row + stripe][pixel] for the stripes of one phase; all copies have arrived and are used up.
__device__ __forceinline__ void multiply_phase(const Geometry& g, const Tile& tile, const Element* x, const Element* weights,
                                               int phase_h, int phase_w, int first, int count, unsigned char* memory,
                                               float* partial) {
    long long offsets[COPIES];  // of the pixels that this thread copies, -1 outside the image
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
        const Source s = source(g, tile, copied_row(k), phase_h, phase_w);
        const long long plane = static_cast<long long>(g.height) * g.width, pixel = static_cast<long long>(s.height) * g.width + s.width;
        offsets[k] = !s.there ? -1
                   : g.x_channels_last ? (s.image * plane + pixel) * g.channels : s.image * plane * g.channels + pixel;
    }
    Sums sums;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < STRIPES / 8; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[m][n][k] = 0;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) load(g, x, offsets, weights, first, count, s, memory + s * STAGE);
    for (int chunk = 0; chunk < g.chunks; ++chunk) {
        copies_wait<STAGES - 2>();
        __syncthreads();  // the stage has arrived for all, and the one before it is used up
        const int next = chunk + STAGES - 1;
        load(g, x, offsets, weights, first, count, next, memory + next % STAGES * STAGE);
        const unsigned char* pixels = memory + chunk % STAGES * STAGE;
        // Columns of stripes that do not exist are multiplied with whatever lies there, and dropped below.
        if (STRIPES >= 32 && count <= STRIPES / 2) multiply<STRIPES / (STRIPES >= 32 ? 2 : 1)>(sums, pixels, pixels + PIXELS * ROW);
        else multiply<STRIPES>(sums, pixels, pixels + PIXELS * ROW);
    }
    copies_wait<0>();
    __syncthreads();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M_TILES + lane_row(lane);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < STRIPES / 8; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int stripe = 8 * n + lane_column(lane) + k % 2;
                if (stripe < count) partial[stripe * PITCH + row + 16 * m + k / 2 * 8] = sums[m][n][k];
            }
}

struct Target { int image, pixel; };  // image -1: no output

// sources[kernel position][output]: the pixel of the tile that it reads, or PIXELS, where partial is zero.
__device__ void find_pixels(const Geometry& g, const Tables& tables, const Tile& tile, unsigned short* sources, Target* targets) {
    const int rows = tile.bottom - tile.top, columns = tile.right - tile.left, outputs = tile.outputs(g);
    for (int v = threadIdx.x; v < (g.positions + 1) * g.capacity; v += THREADS) {
        const int position = v / g.capacity - 1, output = v % g.capacity;
        const bool exists = output < outputs;
        const int image = exists ? output / (rows * columns) : 0;
        const int h = exists ? tile.top + output / columns % rows : 0, w = exists ? tile.left + output % columns : 0;
        const bool written = exists && tile.image + image < g.images;
        if (position < 0) {
            targets[output] = {written ? tile.image + image : -1, h * g.out_width + w};
            continue;
        }
        const int* p = tables.positions + 4 * position;
        const int row = h + p[0], column = w + p[1], height = row * g.stride_h + p[2], width = column * g.stride_w + p[3];
        const bool inside = written && height >= 0 && height < g.height && width >= 0 && width < g.width;
        sources[position * g.capacity + output] =
            inside ? (image * g.tile_rows + row - tile.row) * g.tile_columns + column - tile.column : PIXELS;
    }
}

__device__ __forceinline__ void store(Element* y, float value) {
#if MATH == FLOAT16
    *y = to_float16(value);
#elif MATH == BFLOAT16
    *y = to_bfloat16(value);
#else
    *y = value;
#endif
}

__device__ __forceinline__ void store4(Element* y, const float (&values)[4]) {
    struct alignas(4 * sizeof(Element)) Four { Element values[4]; } four;
#pragma unroll
    for (int f = 0; f < 4; ++f) store(&four.values[f], values[f]);
    *reinterpret_cast<Four*>(y) = four;
}

// Outputs of the filters [first, end): a warp takes four filters and 32 * LANE_PIXELS outputs at a time.
__device__ __forceinline__ void gather(const Geometry& g, const Tables& tables, const float* bias, int first, int end,
                                       int outputs, const float* partial, const unsigned short* sources,
                                       const Target* targets, Element* y) {
    const int lane = threadIdx.x % 32, turns = (outputs + 32 * LANE_PIXELS - 1) / (32 * LANE_PIXELS);
    for (int item = threadIdx.x / 32; item < (end - first + 3) / 4 * turns; item += WARPS) {
        const int filter = first + item / turns * 4, output = item % turns * 32 * LANE_PIXELS + lane;
        float sums[LANE_PIXELS][4];
#pragma unroll
        for (int f = 0; f < 4; ++f) {
            const bool exists = filter + f < end;
            const float start = exists ? __ldg(bias + filter + f) : 0;
#pragma unroll
            for (int k = 0; k < LANE_PIXELS; ++k) sums[k][f] = start;
            const int last = exists ? __ldg(tables.starts + filter + f + 1) : 0;
            for (int e = exists ? __ldg(tables.starts + filter + f) : 0; e < last; ++e) {
                const int entry = __ldg(tables.entries + e);
                const float* row = partial + (entry & 0xffff) * PITCH;
                const unsigned short* from = sources + (entry >> 16) * g.capacity + output;
#pragma unroll
                for (int k = 0; k < LANE_PIXELS; ++k) sums[k][f] += row[from[32 * k]];
            }
        }
#pragma unroll
        for (int k = 0; k < LANE_PIXELS; ++k) {
            const Target target = targets[output + 32 * k];
            if (target.image < 0) continue;
            if (g.relu)
#pragma unroll
                for (int f = 0; f < 4; ++f) sums[k][f] = sums[k][f] < 0 ? 0 : sums[k][f];  // NaN stays
            const long long plane = static_cast<long long>(g.out_height) * g.out_width;
            if (g.y_channels_last) {
                Element* to = y + (target.image * plane + target.pixel) * g.filters + filter;
                if (g.filters % 4 == 0 && filter % 4 == 0 && filter + 4 <= end) {
                    store4(to, sums[k]);
                    continue;
                }
#pragma unroll
                for (int f = 0; f < 4; ++f)
                    if (filter + f < end) store(to + f, sums[k][f]);
            } else {
                Element* to = y + (static_cast<long long>(target.image) * g.filters + filter) * plane + target.pixel;
#pragma unroll
                for (int f = 0; f < 4; ++f)
                    if (filter + f < end) store(to + f * plane, sums[k][f]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) stripe_conv(
    const Element* x, Element* y, const Element* weights, const float* bias, const int* tables_of_layer,
    int images, int channels, int filters, int height, int width, int out_height, int out_width, int stride_h, int stride_w,
    int stripes, int groups, int phases, int positions, int chunks,
    int tile_images, int tile_rows, int tile_columns, int tiles_h, int tiles_w,
    int first_h, int last_h, int first_w, int last_w, int capacity,
    int sums_at, int sources_at, int targets_at, int x_channels_last, int y_channels_last, int relu) {
    const Geometry g = {images, channels, filters, height, width, out_height, out_width, stride_h, stride_w,
                        stripes, groups, phases, positions, chunks, tile_images, tile_rows, tile_columns, tiles_h, tiles_w,
                        first_h, last_h, first_w, last_w, capacity, sums_at, sources_at, targets_at,
                        x_channels_last, y_channels_last, relu};
    extern __shared__ __align__(128) unsigned char memory[];
    float* partial = reinterpret_cast<float*>(memory + g.sums_at);
    unsigned short* sources = reinterpret_cast<unsigned short*>(memory + g.sources_at);
    Target* targets = reinterpret_cast<Target*>(memory + g.targets_at);

    const Tables tables(tables_of_layer, g);
    const Tile tile(g, blockIdx.x / g.groups);
    const int* group = tables.groups + blockIdx.x % g.groups * (4 + g.phases);
    const int first_filter = group[0], end_filter = group[1], first_row = group[2];

    find_pixels(g, tables, tile, sources, targets);
    for (int phase = 0; phase < g.phases; ++phase) {
        const int start = group[3 + phase], count = group[4 + phase] - start;
        if (count)
            multiply_phase(g, tile, x, weights, tables.phases[2 * phase], tables.phases[2 * phase + 1], first_row + start,
                           count, memory, partial + start * PITCH);
    }
    for (int stripe = threadIdx.x; stripe < STRIPES; stripe += THREADS) partial[stripe * PITCH + PIXELS] = 0;
    __syncthreads();
    gather(g, tables, bias, first_filter, end_filter, tile.outputs(g), partial, sources, targets, y);
}
