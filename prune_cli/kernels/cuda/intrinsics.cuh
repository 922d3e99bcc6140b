// The instructions of the tensor cores and of the asynchronous copies, as functions. Nothing else here
// or in stripe_conv.cu is PTX: with other bodies for these functions the kernel runs on a CPU.
// PTX ISA 8.8, sections 9.7.9 (cp.async), 9.7.14 (ldmatrix, mma); all of it exists since sm_80.
typedef unsigned short half_bits;  // a float16 or bfloat16: no header is needed to compile this

// 16 bytes from global to shared memory, or 16 zero bytes where `there` is false.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool there) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy4(void* shared, const void* global, bool there) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most LEFT of this thread's groups are under way.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers (8 x 4 of 32-bit ones): lane k names row k % 8 of matrix k / 8 and
// receives, of each matrix, 4 bytes: number lane % 4 of row lane / 4.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

#define MULTIPLY(NAME, SHAPE_AND_TYPES)                                                                        \
    __device__ __forceinline__ void NAME(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {    \
        asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                                       \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                          \
    }
MULTIPLY(multiply_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
MULTIPLY(multiply_float16, "m16n8k16.row.col.f32.f16.f16.f32")
MULTIPLY(multiply_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")

__device__ __forceinline__ unsigned to_tf32(unsigned number) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(number));
    return rounded;
}

__device__ __forceinline__ half_bits to_float16(float number) {
    half_bits rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(number));
    return rounded;
}

__device__ __forceinline__ half_bits to_bfloat16(float number) {
    unsigned rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(0.0f), "f"(number));
    return static_cast<half_bits>(rounded);
}
