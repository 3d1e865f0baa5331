// Tensor-core pieces of attention: asynchronous copies, fragments, products. NVIDIA, sm_80 and newer.
//
// A tile is rows of D elements of two bytes in shared memory, 16-byte pieces permuted within their row so that the eight
// rows of a matrix fragment lie in different banks.
#pragma once

#include "attention.cuh"

extern __shared__ __align__(1024) unsigned char shared_bytes[];

__device__ __forceinline__ u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// threadIdx.x, read anew: what is derived from it is computed again in every turn of a loop instead of living in registers.
__device__ __forceinline__ u32 thread_again() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Element index of 16-byte piece `piece` of row `row`.
template <int D> __device__ __forceinline__ u32 swizzled(u32 row, u32 piece) {
    // Rows of a multiple of 128 bytes start in the same bank; rows of 192 bytes alternate between two halves of the banks.
    const u32 mask = D % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return row * D + (piece ^ mask) * 8;
}

// The shared address of piece `p + 2 * k`, from the one of piece `p` < 2 of the same row; the tile is 128-byte aligned. Few
// distinct values: the rest becomes immediate offsets.
template <int D> __device__ __forceinline__ u32 stepped(u32 address, int k) {
    return D % 64 == 0 ? (address ^ u32(k % 4 * 32)) + u32(k / 4 * 128) : (address ^ u32(k % 2 * 32)) + u32(k / 2 * 64);
}

// Copies 16 bytes, or writes zeros.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
    const u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of the thread's groups are under way.
template <int Pending> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Copies a tile of 16 contiguous rows by `Threads` threads; rows from `valid` on become zeros: 0 * NaN would be NaN.
template <typename T, int D, int Threads>
__device__ __forceinline__ void copy_tile(u32 to, const T* from, u32 valid, u32 thread) {
    constexpr u32 kPieces = D / 8;
#pragma unroll
    for (u32 i = 0; i < (16 * kPieces + Threads - 1) / Threads; i++) {
        const u32 at = thread + i * Threads;
        if ((16 * kPieces) % Threads == 0 || at < 16 * kPieces) {
            const u32 row = at / kPieces, piece = at % kPieces;
            copy_async(to + 2 * swizzled<D>(row, piece), from + at * 8, row < valid);
        }
    }
}

__device__ __forceinline__ void load_fragments(u32 (&to)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void load_fragments_transposed(u32 (&to)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// c += a b: 16 x 8 += 16 x 16 * 16 x 8.
template <typename T> __device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void multiply_add<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values side by side, `low` first.
template <typename T> __device__ __forceinline__ u32 pair(float low, float high);
template <> __device__ __forceinline__ u32 pair<f16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const u32*>(&both);
}
template <> __device__ __forceinline__ u32 pair<bf16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const u32*>(&both);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cap * tanh(score * scale / cap), by tanh x = 1 - 2 / (1 + e^2x): its limits are right, its error about 1e-6 of the cap.
__device__ __forceinline__ float capped(float score, float scale, float cap) {
    return cap - __fdividef(2.0f * cap, 1.0f + exp2_fast(score * __fdividef(2.0f * kLog2e * scale, cap)));
}

// Over the four lanes that hold a row of a fragment.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// A row's maximum as the zero of exponents: a row that has seen nothing yet must not make NaN of -inf - -inf.
__device__ __forceinline__ float finite_max(float m) { return m == -infinity() ? 0.0f : m; }
