// Runs CUDA kernels on the CPU: their own source, one block after the other, every thread a fiber.
//
// Fibers run in random order from barrier to barrier. Asynchronous copies are done when they are
// waited for, not before. Shared memory begins as NaN and ends in a canary. A block whose threads do
// not all reach a barrier aborts. Matrix instructions follow the fragment layouts of the PTX ISA
// (9.7.14.5), summed in float32.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)
#define __shared__ thread_local
using std::max;
using std::min;
typedef unsigned short half_bits;
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T> static T __ldg(const T* p) { return *p; }

struct Index { int x; };
static Index threadIdx, blockIdx;

struct Copy { void* to; const void* from; int bytes; bool there; };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    int thread = 0, waiting = 0;  // 0 runs, 1 for its warp, 2 for the block, 3 has ended
    int turn = 0;  // of the warp's exchange
    std::vector<Copy> fresh;
    std::deque<std::vector<Copy>> groups;
};

struct Exchange { const void* rows[32]; unsigned a[32][4], b[32][2]; };

static std::deque<Fiber> fibers;
static std::vector<Exchange> exchanges[2];
static ucontext_t scheduler;
static Fiber* running;
static std::function<void()> body;

static void stop(const char* what) {
    fprintf(stderr, "on_cpu: %s\n", what);
    abort();
}

static void wait(int whom) {
    running->waiting = whom;
    swapcontext(&running->context, &scheduler);
}

static void __syncthreads() { wait(2); }

static Exchange& exchange() { return exchanges[running->turn % 2][running->thread / 32]; }

static void exchanged() {
    wait(1);
    ++running->turn;
}

static void fiber_main() {
    body();
    wait(3);
}

static void run_block(int threads, unsigned seed) {
    std::mt19937 random(seed);
    fibers.resize(threads);
    for (auto& e : exchanges) e.resize(threads / 32);
    std::vector<int> order(threads);
    for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[t];
        f.thread = order[t] = t, f.waiting = f.turn = 0;
        f.fresh.clear(), f.groups.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        bool ran = false;
        for (int t : order)
            if (fibers[t].waiting == 0) {
                running = &fibers[t], threadIdx.x = t, ran = true;
                swapcontext(&scheduler, &fibers[t].context);
            }
        bool freed = false, all = true, ended = true;
        for (int warp = 0; warp < threads; warp += 32) {
            bool together = true;
            for (int t = warp; t < warp + 32; ++t) together &= fibers[t].waiting == 1;
            if (together) for (int t = warp; t < warp + 32; ++t) fibers[t].waiting = 0, freed = true;
        }
        for (Fiber& f : fibers) all &= f.waiting == 2, ended &= f.waiting == 3;
        if (ended) return;
        if (all) for (Fiber& f : fibers) f.waiting = 0, freed = true;
        if (!ran && !freed) stop("threads wait for others that never come");
    }
}

static void copy(void* to, const void* from, int bytes, bool there) { running->fresh.push_back({to, from, bytes, there}); }
static void copy16(void* to, const void* from, bool there) {
    if (((size_t)to | (size_t)from) % 16) stop("a copy of 16 bytes is not aligned");
    copy(to, from, 16, there);
}
static void copy4(void* to, const void* from, bool there) { copy(to, from, 4, there); }
static void copies_commit() {
    running->groups.push_back(std::move(running->fresh));
    running->fresh.clear();
}
template <int LEFT>
static void copies_wait() {
    while ((int)running->groups.size() > LEFT) {
        for (const Copy& c : running->groups.front()) {
            if (c.there) memcpy(c.to, c.from, c.bytes);
            else memset(c.to, 0, c.bytes);
        }
        running->groups.pop_front();
    }
}

static void load_matrices(unsigned (&to)[4], const void* row) {
    Exchange& e = exchange();
    const int lane = running->thread % 32;
    e.rows[lane] = row;
    exchanged();
    for (int k = 0; k < 4; ++k) memcpy(&to[k], (const char*)e.rows[8 * k + lane / 4] + lane % 4 * 4, 4);
}

// d (16 x 8) += a (16 x K) b (K x 8): PER numbers of a fragment's word, K = 8 * PER.
template <int PER, class Number>
static void multiply_fragments(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Number number) {
    Exchange& e = exchange();
    const int lane = running->thread % 32, step = 4 * PER;
    for (int k = 0; k < 4; ++k) e.a[lane][k] = a[k];
    e.b[lane][0] = b0, e.b[lane][1] = b1;
    exchanged();
    for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        for (int k = 0; k < 2 * step; ++k) {
            const unsigned x = e.a[row % 8 * 4 + k % step / PER][row / 8 + k / step * 2];
            const unsigned w = e.b[column * 4 + k % step / PER][k / step];
            d[r] += number(x, k % PER) * number(w, k % PER);
        }
    }
}

static float float_of(unsigned bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}
static unsigned bits_of(float number) {
    unsigned bits;
    memcpy(&bits, &number, 4);
    return bits;
}
static void multiply_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_fragments<1>(d, a, b0, b1, [](unsigned word, int) { return float_of(word & 0xffffe000); });
}
static void multiply_bfloat16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_fragments<2>(d, a, b0, b1, [](unsigned word, int k) { return float_of(word >> 16 * k << 16); });
}
static float float_of_half(half_bits h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
    return h & 0x8000 ? -size : size;
}
static void multiply_float16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_fragments<2>(d, a, b0, b1, [](unsigned word, int k) { return float_of_half(word >> 16 * k); });
}
static unsigned to_tf32(unsigned bits) { return (bits + 0x1000) & 0xffffe000; }
static half_bits to_bfloat16(float number) {
    if (number != number) return 0x7fff;
    const unsigned bits = bits_of(number);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static half_bits to_float16(float number) {  // nearest, ties to even: nearbyint rounds so
    if (number != number) return 0x7fff;
    const half_bits sign = std::signbit(number) ? 0x8000 : 0;
    const float size = std::fabs(number);
    if (size >= 65520) return sign | 0x7c00;
    const int exponent = std::max(size ? std::ilogb(size) : -24, -14);
    const int units = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // of the last place
    return sign + (units >= 1024 ? ((exponent + 14) << 10) + units : units);
}

const int MOST_SHARED = 227 << 10;

// All blocks of a kernel, which `call` calls with its arguments; `memory` holds MOST_SHARED + 64 bytes.
template <class Call>
static void launch(int blocks, int threads, unsigned char* memory, int shared_bytes, unsigned seed, Call call) {
    body = call;
    if (shared_bytes > MOST_SHARED) stop("too much shared memory");
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        memset(memory, 0xff, shared_bytes);
        memset(memory + shared_bytes, 0xa5, 64);
        run_block(threads, seed + blockIdx.x);
        for (int k = 0; k < 64; ++k)
            if (memory[shared_bytes + k] != 0xa5) stop("a write past the end of shared memory");
    }
}
