// One configuration of the kernel, as the function NAME; included once for each, in a namespace of its own.
alignas(128) static thread_local unsigned char memory[MOST_SHARED + 64];

#include KERNEL

template <size_t... K>
static void call(void** p, const int* g, std::index_sequence<K...>) {
    stripe_conv((const Element*)p[0], (Element*)p[1], (const Element*)p[2], (const float*)p[3], (const int*)p[4], g[K]...);
}

extern "C" void NAME(int blocks, int threads, int shared_bytes, void** pointers, const int* geometry, unsigned seed) {
    if (threads != THREADS) stop("the kernel was compiled for another number of threads");
    launch(blocks, threads, memory, shared_bytes, seed,
           [=] { call(pointers, geometry, std::make_index_sequence<sizeof(Geometry) / sizeof(int)>()); });
}
