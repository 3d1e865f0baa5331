// Fills memory with a pattern, and counts the words that differ from it: for tests, and for the memory check of `doctor`.
// Word i of the pattern is seed ^ (i * 0x9E3779B9), so that a word in the wrong place is seen.
//
// Launch of the first two: grid any, block any multiple of 32 up to 1024, no shared memory.
//   poison_fill(u32* words, u64 num_words, u32 seed)
//   poison_count(const u32* words, u64 num_words, u32 seed, u32* num_wrong)   num_wrong is added to

typedef unsigned int u32;
typedef unsigned long long u64;

static __device__ __forceinline__ u32 pattern(u64 index, u32 seed) {
    return seed ^ ((u32)index * 0x9E3779B9u);
}

static __device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void poison_fill(u32* words, u64 num_words, u32 seed) {
    wait_for_earlier_kernels();
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += step) words[i] = pattern(i, seed);
}

extern "C" __global__ void poison_count(const u32* words, u64 num_words, u32 seed, u32* num_wrong) {
    wait_for_earlier_kernels();
    const u64 step = (u64)gridDim.x * blockDim.x;
    u32 wrong = 0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += step) {
        wrong += words[i] != pattern(i, seed);
    }
    if (wrong != 0) atomicAdd(num_wrong, wrong);
}

// One thread that lasts `nanoseconds`, for what waits with a deadline: grid 1, block 32.
//   poison_delay(u64 nanoseconds)
extern "C" __global__ void poison_delay(u64 nanoseconds) {
    wait_for_earlier_kernels();
    u64 begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
