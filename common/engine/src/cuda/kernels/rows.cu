// What is done to single rows between the linear layers.

// residual[row] = table[token of row]
extern "C" __global__ void embed(const bf16 *table, const u32 *tokens, float *residual, int width) {
    let_next_start();
    wait_for_earlier();
    const bf16 *from = table + (size_t)tokens[blockIdx.x] * width;
    float *to = residual + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        const uint4 x = load16(from + i);
        *(float4 *)(to + i) = make_float4(low(x.x), high(x.x), low(x.y), high(x.y));
        *(float4 *)(to + i + 4) = make_float4(low(x.z), high(x.z), low(x.w), high(x.w));
    }
}

// residual[row] += delta[row], where there is one; normed[row] = residual[row] / rms * norm. A block a row; width a multiple of 4.
extern "C" __global__ void rms_norm(float *residual, const bf16 *delta, const float *norm, bf16 *normed, int width, float epsilon) {
    __shared__ float shared[32];
    let_next_start();
    wait_for_earlier();
    float *h = residual + (size_t)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x * 4; i < width; i += blockDim.x * 4) {
        float4 x = *(float4 *)(h + i);
        if (delta) {
            const uint2 d = *(const uint2 *)(delta + (size_t)blockIdx.x * width + i);
            x.x += low(d.x), x.y += high(d.x), x.z += low(d.y), x.w += high(d.y);
            *(float4 *)(h + i) = x;
        }
        squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    const float scale = rsqrtf(block_sum(squares, shared) / (float)width + epsilon);
    for (int i = threadIdx.x * 4; i < width; i += blockDim.x * 4) {
        const float4 x = *(float4 *)(h + i), w = *(const float4 *)(norm + i);
        uint2 out;
        out.x = narrow2(x.x * scale * w.x, x.y * scale * w.y);
        out.y = narrow2(x.z * scale * w.z, x.w * scale * w.w);
        *(uint2 *)(normed + (size_t)blockIdx.x * width + i) = out;
    }
}

// out[s] = x[rows[s]], divided by its root mean square where that is still to be done (`squares` [row, width / 16]).
extern "C" __global__ void gather(const bf16 *x, const u32 *rows, const float *squares, bf16 *out, int width, float epsilon) {
    __shared__ float shared[32];
    let_next_start();
    wait_for_earlier();
    const size_t row = rows[blockIdx.x];
    float scale = 1.0f;
    if (squares) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width / 16; i += blockDim.x) sum += squares[row * (width / 16) + i];
        scale = rsqrtf(block_sum(sum, shared) / (float)width + epsilon);
    }
    for (int i = threadIdx.x * 2; i < width; i += blockDim.x * 2) {
        const u32 pair = *(const u32 *)(x + row * width + i);
        *(u32 *)(out + (size_t)blockIdx.x * width + i) = squares ? narrow2(low(pair) * scale, high(pair) * scale) : pair;
    }
}

// out[row][i] = silu(gate_up[row][i]) * gate_up[row][width + i]. Width a multiple of 8; grid (over width, rows).
extern "C" __global__ void silu_mul(const bf16 *gate_up, bf16 *out, int width) {
    let_next_start();
    wait_for_earlier();
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= width) return;
    const bf16 *gate = gate_up + (size_t)blockIdx.y * 2 * width + i;
    uint4 g = load16(gate), u = load16(gate + width);
    u32 *a = (u32 *)&g, *b = (u32 *)&u;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) a[pair] = narrow2(silu(low(a[pair])) * low(b[pair]), silu(high(a[pair])) * high(b[pair]));
    *(uint4 *)(out + (size_t)blockIdx.y * width + i) = g;
}

struct QkvPost {
    bf16 *qkv;               // [rows, (heads + 2 kv_heads) * head_dim]; queries are rotated in place
    bf16 *pool;              // the layer's: [block][k|v][kv head][32 tokens][head_dim]
    const u32 *positions;    // [rows]
    const u32 *table_starts; // [rows]: where the row's block table begins in `tables`
    const u32 *tables;
    const float2 *angles;    // [position][rope_dim / 2]: cosine, sine
    const float *bias;       // [(heads + 2 kv_heads) * head_dim], or null
    const float *query_norm; // [head_dim], or null
    const float *key_norm;
    float epsilon;
    int rows, heads, kv_heads, head_dim, rope_dim, interleaved;
};

// Bias, norms of heads and RoPE; keys and values go to the pool. A warp a head; grid (rows, heads / 8).
extern "C" __global__ void __launch_bounds__(256) qkv_post(const QkvPost p) {
    __shared__ float values[8][256];
    let_next_start();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x, head = blockIdx.y * 8 + warp;
    const int heads = p.heads + 2 * p.kv_heads, d = p.head_dim;
    wait_for_earlier();
    if (head >= heads) return;
    const bool value = head >= p.heads + p.kv_heads, query = head < p.heads;
    bf16 *from = p.qkv + ((size_t)row * heads + head) * d;
    float *x = values[warp];
    float squares = 0.0f;
    for (int i = lane; i < d; i += 32) {
        float y = widen(from[i]);
        if (p.bias) y += p.bias[head * d + i];
        x[i] = y;
        squares += y * y;
    }
    const u32 position = p.positions[row];
    __syncwarp();
    if (!value) {
        if (p.query_norm) {
            const float scale = rsqrtf(warp_sum(squares) / (float)d + p.epsilon);
            const float *norm = query ? p.query_norm : p.key_norm;
            for (int i = lane; i < d; i += 32) x[i] *= scale * norm[i];
            __syncwarp();
        }
        const int pairs = p.rope_dim / 2;
        for (int pair = lane; pair < pairs; pair += 32) {
            const float2 angle = p.angles[(size_t)position * pairs + pair];
            const int i = p.interleaved ? 2 * pair : pair, j = p.interleaved ? i + 1 : pair + pairs;
            const float a = x[i], b = x[j];
            x[i] = a * angle.x - b * angle.y;
            x[j] = a * angle.y + b * angle.x;
        }
        __syncwarp();
    }
    bf16 *to = from;
    if (!query) {
        const u32 block = p.tables[p.table_starts[row] + position / 32];
        const int slot = value ? p.kv_heads + (head - p.heads - p.kv_heads) : head - p.heads;
        to = p.pool + (((size_t)block * 2 * p.kv_heads + slot) * 32 + position % 32) * d;
    }
    for (int i = lane * 2; i < d; i += 64) *(u32 *)(to + i) = narrow2(x[i], x[i + 1]);
}

// angles[position][pair] of all positions; frequencies in radians per position.
extern "C" __global__ void rope_angles(float2 *angles, const double *frequencies, int pairs, int positions) {
    let_next_start();
    wait_for_earlier();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)pairs * positions) return;
    double sine, cosine;
    sincos((double)(at / pairs) * frequencies[at % pairs], &sine, &cosine);
    angles[at] = make_float2((float)cosine, (float)sine);
}

// Random numbers of mean 0, about normal (the sum of four uniform ones), in [-2 sqrt(3) deviation, 2 sqrt(3) deviation].
extern "C" __global__ void random_bf16(bf16 *out, u64 count, u32 seed, float deviation) {
    let_next_start();
    wait_for_earlier();
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        u64 z = i + ((u64)seed << 40) + 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        const int sum = (int)(z & 0xffff) + (int)(z >> 16 & 0xffff) + (int)(z >> 32 & 0xffff) + (int)(z >> 48) - 2 * 65535;
        // Each part has the variance 65536^2 / 12.
        out[i] = narrow((float)sum * (deviation * 1.7320508f / 65536.0f));
    }
}
