// What all kernels share. Self-contained: no header of CUDA's is needed, so that a host with a driver and NVRTC alone can compile it.
//
// Fragments of mma.m16n8k16 (PTX ISA): lane = 4 * group + quad. A holds rows group and group + 8, B holds column group, C holds columns 2 * quad and
// 2 * quad + 1; of 16 k a lane has 2 * quad, 2 * quad + 1 and those + 8. A product does not depend on which k stands where, as long as A and B agree:
// a lane loads 8 consecutive k (16 bytes) of either, and feeds two products with them.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x << 16); }
static __device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
static __device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Two numbers as bf16, to nearest even; the first in the low half.
static __device__ __forceinline__ u32 narrow2(float first, float second) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
}
static __device__ __forceinline__ bf16 narrow(float x) { return (bf16)(narrow2(x, 0.0f) & 0xffffu); }

// 16 bytes that this kernel reads once and nobody writes meanwhile: weights, and old keys and values.
static __device__ __forceinline__ uint4 stream16(const void *from) {
    uint4 out;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "l"(from));
    return out;
}
// 16 bytes that an earlier kernel has written.
static __device__ __forceinline__ uint4 load16(const void *from) {
    uint4 out;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "l"(from) : "memory");
    return out;
}

static __device__ __forceinline__ void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Programmatic dependent launch: the next kernel may start now; and this one waits here until all before it have ended. Every kernel calls both, and writes
// only after `wait_for_earlier`, so that waiting for the kernel before is waiting for all.
static __device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Sum over a block of at most 1024 threads, whole warps; every thread gets it. `shared` holds 32 floats.
static __device__ __forceinline__ float block_sum(float x, float *shared) {
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.0f;
    for (u32 warp = 0; warp < blockDim.x >> 5; warp++) total += shared[warp];
    return total;
}

static __device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }
