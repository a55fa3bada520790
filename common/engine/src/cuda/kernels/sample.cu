// The greedy token of each row of logits, and its log-probability: the highest logit, the lowest id among equals. A block of 1024 threads a row.

struct Drawn { u32 token; float logprob; u32 sound; u32 pad; };

extern "C" __global__ void __launch_bounds__(1024) greedy(const float *logits, Drawn *drawn, int vocabulary) {
    __shared__ float maxima[32], sums[32];
    __shared__ u32 tokens[32], flaws[32];
    let_next_start();
    wait_for_earlier();
    const float *row = logits + (size_t)blockIdx.x * vocabulary;
    float most = -infinity(), sum = 0.0f;
    u32 token = 0xffffffffu, flaw = 0;
    for (int i = threadIdx.x * 4; i < vocabulary; i += blockDim.x * 4) {
        const float4 x = *(const float4 *)(row + i);
        const float four[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            // Not a number, or infinite.
            flaw |= !(four[j] < infinity());
            if (four[j] > most) {
                sum *= __expf(most - four[j]);
                most = four[j];
                token = i + j;
            }
        }
        const float base = most == -infinity() ? 0.0f : most;
#pragma unroll
        for (int j = 0; j < 4; j++) sum += __expf(four[j] - base);
    }
    auto take = [&](float other, float other_sum, u32 other_token, u32 other_flaw) {
        const float now = fmaxf(most, other), base = now == -infinity() ? 0.0f : now;
        sum = sum * __expf(most - base) + other_sum * __expf(other - base);
        if (other > most || (other == most && other_token < token)) token = other_token;
        most = now;
        flaw |= other_flaw;
    };
#pragma unroll
    for (int step = 16; step; step >>= 1)
        take(__shfl_xor_sync(~0u, most, step), __shfl_xor_sync(~0u, sum, step), __shfl_xor_sync(~0u, token, step), __shfl_xor_sync(~0u, flaw, step));
    if ((threadIdx.x & 31) == 0) {
        const int warp = threadIdx.x >> 5;
        maxima[warp] = most, sums[warp] = sum, tokens[warp] = token, flaws[warp] = flaw;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < 32; warp++) take(maxima[warp], sums[warp], tokens[warp], flaws[warp]);
    Drawn out = {token, -logf(sum), !flaw && most > -infinity(), 0};
    drawn[blockIdx.x] = out;
}
