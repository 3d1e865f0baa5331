// Products of whole warpgroups, and the barriers in shared memory that go with them: the PTX of capability 9.0 in words.
//
// A tile in shared memory is 128 rows in halves of 64 columns of two bytes: rows of 128 bytes, 16-byte pieces permuted by their
// row, each half `kHalfBytes` long and at a multiple of 1024. Only what is compiled for sm_90a may include this.
#pragma once

#include "attention_tensor.cuh"

constexpr int kHalfBytes = 128 * 128;

// Byte of 16-byte piece `piece` of row `row` of a tile.
__device__ __forceinline__ u32 piece_at(u32 row, u32 piece) {
    return piece / 8 * kHalfBytes + row * 128 + ((piece ^ row) % 8) * 16;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- barriers ----

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Arrives once all copies that this thread has started are done.
__device__ __forceinline__ void barrier_arrive_copied(u32 at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n"
                 "}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

// ---- products ----

// What threads have written to shared memory, and these have seen, is seen by their products from here on.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers that were written are seen by the products behind it.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// Nothing that uses these registers moves across.
template <int N> __device__ __forceinline__ void pin(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}

// Descriptor of a tile in shared memory: groups of 8 rows are 1024 bytes apart, halves of 64 columns `kHalfBytes`.
__device__ __forceinline__ u64 describe(u32 address) {
    constexpr u64 kSwizzle128 = u64(1) << 62, kGroups = u64(1024 >> 4) << 32, kHalves = u64(kHalfBytes >> 4) << 16;
    return kSwizzle128 | kGroups | kHalves | u64((address & 0x3FFFF) >> 4);
}

#define FOUR(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define EIGHT_FOURS(x, i)                                                                                                    \
    FOUR(x, i), FOUR(x, i + 1), FOUR(x, i + 2), FOUR(x, i + 3), FOUR(x, i + 4), FOUR(x, i + 5), FOUR(x, i + 6), FOUR(x, i + 7)
#define FIRST_32                                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                 \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIRST_64                                                                                                             \
    FIRST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// s (64 x 128) = q (64 x 16) k^T, or += it: both as descriptors, rows of 64 columns.
// o (64 x 128, or 64 x 64) = p (64 x 16) v, or += it: p in registers, v by a descriptor, its rows are keys.
template <typename T> struct Products;
#define PRODUCTS(T, NAME)                                                                                                    \
    template <> struct Products<T> {                                                                                         \
        static __device__ __forceinline__ void scores(float (&s)[16][4], u64 q, u64 k, u32 add) {                            \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                    \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" FIRST_64                          \
                         "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                                  \
                         : EIGHT_FOURS(s, 0), EIGHT_FOURS(s, 8)                                                              \
                         : "l"(q), "l"(k), "r"(add));                                                                        \
        }                                                                                                                    \
        static __device__ __forceinline__ void values(float (&o)[16][4], const u32 (&p)[4], u64 v, u32 add) {                \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                                    \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" FIRST_64                          \
                         "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                                                    \
                         : EIGHT_FOURS(o, 0), EIGHT_FOURS(o, 8)                                                              \
                         : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(add));                                    \
        }                                                                                                                    \
        static __device__ __forceinline__ void values(float (&o)[8][4], const u32 (&p)[4], u64 v, u32 add) {                 \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                    \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" FIRST_32                           \
                         "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"                                                    \
                         : EIGHT_FOURS(o, 0)                                                                                 \
                         : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(add));                                    \
        }                                                                                                                    \
    };
PRODUCTS(f16, "f16")
PRODUCTS(bf16, "bf16")

#endif
