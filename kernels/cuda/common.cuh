// What all device code shares: short integer names, conversions, 16-byte vectors, sums over warps and blocks, and the two
// halves of programmatic dependent launch. Compiles under nvcc, NVRTC and hipcc; needs no host header.
//
// Invariant: sums are formed in an order that depends on the block size only, never on timing.
#pragma once

#if defined(__HIPCC__) || defined(__HIP_PLATFORM_AMD__) || defined(__HIPCC_RTC__)
#define PHALANX_HIP 1
#if !defined(__HIPCC_RTC__)
#include <hip/hip_runtime.h>
#include <hip/hip_fp16.h>
#endif
#else
#define PHALANX_HIP 0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// "No slot", "no token": the mark of padding in the step's inputs.
constexpr u32 kNone = 0xFFFFFFFFu;

// Lanes that run in step.
#if PHALANX_HIP
#if defined(__AMDGCN_WAVEFRONT_SIZE)
constexpr int kWarp = __AMDGCN_WAVEFRONT_SIZE;
#elif defined(__GFX10__) || defined(__GFX11__) || defined(__GFX12__)
constexpr int kWarp = 32;
#else
constexpr int kWarp = 64;
#endif
#else
constexpr int kWarp = 32;
#endif

// INFINITY, which NVRTC lacks.
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

// ---- types ----

typedef __half f16;
#if PHALANX_HIP
// The upper half of an f32.
struct bf16 {
    u16 bits;
};
#else
typedef __nv_bfloat16 bf16;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
#if PHALANX_HIP
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
#else
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
#endif

// `from_float<T>(x)`: rounds to nearest, ties to even.
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
#if PHALANX_HIP
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    u32 bits = __float_as_uint(x);
    // A NaN stays one: rounding could carry its payload away.
    bf16 out = {u16((x != x) ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
    return out;
}
#else
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
#endif

// ---- 16-byte vectors ----

// Sixteen bytes of T, aligned.
template <typename T> struct alignas(16) Vec {
    static constexpr int kLen = 16 / int(sizeof(T));
    T at[kLen];
};

// `from` is 16-byte aligned.
template <typename T> __device__ __forceinline__ Vec<T> load_vec(const T* from) {
    Vec<T> out;
    *reinterpret_cast<uint4*>(&out) = *reinterpret_cast<const uint4*>(from);
    return out;
}

// The same through the read-only path: only for what no kernel writes (weights, tables).
template <typename T> __device__ __forceinline__ Vec<T> load_vec_const(const T* from) {
    Vec<T> out;
#if PHALANX_HIP
    *reinterpret_cast<uint4*>(&out) = *reinterpret_cast<const uint4*>(from);
#else
    *reinterpret_cast<uint4*>(&out) = __ldg(reinterpret_cast<const uint4*>(from));
#endif
    return out;
}

template <typename T> __device__ __forceinline__ void store_vec(T* to, const Vec<T>& from) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&from);
}

// A vector's values in f32, and back.
template <typename T> __device__ __forceinline__ void unpack(const Vec<T>& from, float (&to)[Vec<T>::kLen]) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kLen; i++) to[i] = to_float(from.at[i]);
}

template <typename T> __device__ __forceinline__ Vec<T> pack(const float (&from)[Vec<T>::kLen]) {
    Vec<T> out;
#pragma unroll
    for (int i = 0; i < Vec<T>::kLen; i++) out.at[i] = from_float<T>(from[i]);
    return out;
}

// ---- warps ----

// The value of the lane whose index differs by `mask`. All lanes of the warp call it.
template <typename V> __device__ __forceinline__ V shuffle_xor(V value, int mask) {
#if PHALANX_HIP
    return __shfl_xor(value, mask);
#else
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#endif
}

// The value of lane `lane`.
template <typename V> __device__ __forceinline__ V shuffle(V value, int lane) {
#if PHALANX_HIP
    return __shfl(value, lane);
#else
    return __shfl_sync(0xFFFFFFFFu, value, lane);
#endif
}

// The value of the lane `delta` below; the own one where there is none.
template <typename V> __device__ __forceinline__ V shuffle_up(V value, int delta) {
#if PHALANX_HIP
    return __shfl_up(value, delta);
#else
    return __shfl_up_sync(0xFFFFFFFFu, value, delta);
#endif
}

// All lanes get the result; the order is that of a butterfly.
template <typename V> __device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// ---- blocks ----

// Most warps of a block, and so the length of the scratch that sums over a block need.
constexpr int kWarpsMax = 1024 / 32;

// The sum over the block, in warp order, for all threads. `scratch`: `kWarpsMax` values in shared memory, not in use by an
// earlier call that a thread may still read (a __syncthreads() between two calls on the same scratch). blockDim.x is a
// multiple of kWarp; y and z are 1.
template <typename V> __device__ __forceinline__ V block_sum(V value, V* scratch) {
    value = warp_sum(value);
    const int num_warps = int(blockDim.x) / kWarp;
    if (num_warps == 1) return value;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    const int lane = int(threadIdx.x) % kWarp;
    return warp_sum(lane < num_warps ? scratch[lane] : V(0));
}

// The largest over the block, for all threads; as `block_sum`.
__device__ __forceinline__ float block_max(float value, float* scratch) {
    value = warp_max(value);
    const int num_warps = int(blockDim.x) / kWarp;
    if (num_warps == 1) return value;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    const int lane = int(threadIdx.x) % kWarp;
    return warp_max(lane < num_warps ? scratch[lane] : -infinity());
}

// ---- programmatic dependent launch ----

// Waits until the kernels before this one in the stream are done and their writes are seen. Every block calls it before it
// touches anything that they read or wrote. Without programmatic launch it costs nothing.
__device__ __forceinline__ void pdl_wait() {
#if !PHALANX_HIP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin up to its own `pdl_wait`.
__device__ __forceinline__ void pdl_launch() {
#if !PHALANX_HIP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
