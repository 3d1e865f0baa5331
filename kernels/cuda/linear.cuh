// What the two linear kernels share: the ways a sum becomes an output, asynchronous copies, tensor-core products, and
// barriers over a cluster of blocks.
//
// Invariant: all sums are f32 and in an order that only the launch parameters decide.
#pragma once

#include "common.cuh"

// What becomes of the sums Y[m][n]. A bias, where given, is added first.
enum Epilogue : u32 {
    kPlain = 0,    // out[m][n] in T
    kFloat = 1,    // out[m][n] in f32: logits
    kSilu = 2,     // rows of W interleaved by 16 (gate, up): out[m][n / 2] = silu(gate) * up, in T
    kGeluTanh = 3, // the same with the tanh form of GELU
};

__device__ __forceinline__ bool is_gated(u32 epilogue) { return epilogue >= kSilu; }

__device__ __forceinline__ float gated(u32 epilogue, float gate, float up) {
    if (epilogue == kSilu) return gate / (1.0f + expf(-gate)) * up;
    const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(inner)) * up;
}

template <typename T> __device__ __forceinline__ void put(void* out, u64 at, u32 epilogue, float value) {
    if (epilogue == kFloat) {
        static_cast<float*>(out)[at] = value;
    } else {
        static_cast<T*>(out)[at] = from_float<T>(value);
    }
}

// Four neighbours in a row, of which the first `count` exist.
template <typename T> struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <typename T>
__device__ __forceinline__ void put_four(void* out, u64 at, u32 epilogue, const float (&values)[4], u32 count) {
    if (count < 4 || at % 4 != 0) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (i < count) put<T>(out, at + i, epilogue, values[i]);
        }
    } else if (epilogue == kFloat) {
        const Four<float> all = {values[0], values[1], values[2], values[3]};
        *reinterpret_cast<Four<float>*>(static_cast<float*>(out) + at) = all;
    } else {
        Four<T> all;
#pragma unroll
        for (u32 i = 0; i < 4; i++) all.at[i] = from_float<T>(values[i]);
        *reinterpret_cast<Four<T>*>(static_cast<T*>(out) + at) = all;
    }
}

#if !PHALANX_HIP

__device__ __forceinline__ u32 shared_address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

// Copies 16 bytes past the L1 cache, or writes 16 zero bytes where `take` is false (`from` is then not read).
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool take) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const u32 bytes = take ? 16u : 0u;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kLeft> __device__ __forceinline__ void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Waits for all groups of this thread but the youngest `left`.
__device__ __forceinline__ void wait_copies(u32 left) {
    switch (left) {
    case 0: wait_copies<0>(); break;
    case 1: wait_copies<1>(); break;
    case 2: wait_copies<2>(); break;
    case 3: wait_copies<3>(); break;
    case 4: wait_copies<4>(); break;
    case 5: wait_copies<5>(); break;
    case 6: wait_copies<6>(); break;
    case 7: wait_copies<7>(); break;
    case 8: wait_copies<8>(); break;
    case 9: wait_copies<9>(); break;
    default: wait_copies<10>(); break;
    }
}

__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// sum[16 x 8] += a[16 x 16] b[16 x 8], by one warp.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define PHALANX_MMA(TYPE)                                                                                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
                 "{%0,%1,%2,%3};"                                                                                              \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                      \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#else
#define PHALANX_MMA(TYPE)
#endif

template <>
__device__ __forceinline__ void multiply_add<f16>(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    PHALANX_MMA("f16");
}

template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    PHALANX_MMA("bf16");
}

#undef PHALANX_MMA

// All threads of all blocks of the cluster meet; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same, without a word on writes: those before have used up what they read from the others.
__device__ __forceinline__ void cluster_meet() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Four f32 at the place `address` (of this block's shared memory) in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ float4 load_from_block(u32 address, u32 rank) {
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(there)
                 : "memory");
#endif
    return value;
}

#endif
