// Attention of sequences that have one row in the step: out[row][head] = softmax(q . K^T) V over the row's pages of 32 tokens.
//
// The context is cut into splits of 256 tokens. A split is four warps' work: each takes every fourth page, whole, in registers, and the four are merged in
// order; splits are merged in order by the block that finishes a row's last one. So the order of additions depends on the position alone. The grid's
// x only says how many blocks share a row's splits.
//
// Queries that share a KV head are rows of the A operand (at most 8); keys and values are B, straight from global memory.

enum { PAGE = 32, SPLIT_PAGES = 8, DECODE_WARPS = 4, GROUP = 8 };

struct DecodeAttention {
    const bf16 *qkv;         // [rows, (heads + 2 kv_heads) * D]
    const bf16 *pool;        // the layer's: [block][k|v][kv head][32][D]
    const u32 *positions;    // [rows]
    const u32 *table_starts; // [rows]
    const u32 *tables;
    bf16 *out;               // [rows, heads * D]
    float *partials;         // [row][chunk of heads][split][GROUP][D], in units of exp2(score - max)
    float2 *spreads;         // [row][chunk of heads][split][GROUP]: max, sum
    u32 *finished;           // [row][chunk of heads]: splits that are done; 0 between launches
    float scale;             // log2(e) / sqrt(D)
    int heads, kv_heads, chunks, max_splits, window;
};

template <int D>
static __device__ __forceinline__ void decode_attention(const DecodeAttention &p) {
    enum { J = D / 32, F = D / 64 };
    __shared__ float outs[DECODE_WARPS][GROUP][D];
    __shared__ float maxima[DECODE_WARPS][GROUP], sums[DECODE_WARPS][GROUP];
    __shared__ u32 done;
    let_next_start();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int row = blockIdx.z, kv_head = blockIdx.y / p.chunks, chunk = blockIdx.y % p.chunks;
    const int queries = p.heads / p.kv_heads, first_query = chunk * GROUP, own = min(GROUP, queries - first_query);
    const int length = p.positions[row] + 1, pages = (length + PAGE - 1) / PAGE;
    const int seen = p.window > 0 && length > p.window ? length - p.window : 0;
    const int first_split = seen / (PAGE * SPLIT_PAGES), splits = (pages + SPLIT_PAGES - 1) / SPLIT_PAGES;
    const u32 *table = p.tables + p.table_starts[row];
    uint4 keys[4][J], values[2][F][4];
    auto fetch_keys = [&](u32 block) {
        const bf16 *k = p.pool + ((size_t)block * 2 * p.kv_heads + kv_head) * PAGE * D + group * D + quad * 8;
#pragma unroll
        for (int a = 0; a < 4; a++)
#pragma unroll
            for (int j = 0; j < J; j++) keys[a][j] = stream16(k + a * 8 * D + j * 32);
    };
    auto fetch_values = [&](u32 block) {
        const bf16 *v = p.pool + ((size_t)block * 2 * p.kv_heads + p.kv_heads + kv_head) * PAGE * D + quad * 2 * D + group * 8;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int f = 0; f < F; f++) {
                const bf16 *at = v + i * 16 * D + f * 64;
                values[i][f][0] = stream16(at);
                values[i][f][1] = stream16(at + D);
                values[i][f][2] = stream16(at + 8 * D);
                values[i][f][3] = stream16(at + 9 * D);
            }
    };
    // The page after `page` of this warp's; none: `pages` or more.
    auto next = [&](int page) {
        page += DECODE_WARPS;
        if (page % SPLIT_PAGES < DECODE_WARPS) page += ((int)gridDim.x - 1) * SPLIT_PAGES;
        return page;
    };
    int page = (first_split + blockIdx.x) * SPLIT_PAGES + warp;
    // Only the last page is written by this step.
    bool fetched = page < pages - 1;
    if (fetched) {
        const u32 block = table[page];
        fetch_keys(block);
        fetch_values(block);
    }
    wait_for_earlier();
    if (!fetched && page < pages) {
        const u32 block = table[page];
        fetch_keys(block);
        fetch_values(block);
    }
    uint4 q[J];
#pragma unroll
    for (int j = 0; j < J; j++) {
        q[j] = make_uint4(0, 0, 0, 0);
        if (group < own) {
            const size_t head = (size_t)row * (p.heads + 2 * p.kv_heads) + kv_head * queries + first_query + group;
            q[j] = load16(p.qkv + head * D + j * 32 + quad * 8);
        }
    }
    const size_t cell = (size_t)row * p.kv_heads * p.chunks + blockIdx.y;
    for (int split = first_split + blockIdx.x; split < splits; split += gridDim.x) {
        float o[F * 8][4], most = -infinity(), sum = 0.0f;
#pragma unroll
        for (int i = 0; i < F * 32; i++) o[i >> 2][i & 3] = 0.0f;
        const int end = min(pages, (split + 1) * SPLIT_PAGES);
        for (; page < end;) {
            const int after = next(page);
            const u32 block = after < pages ? table[after] : 0;
            float s[4][2], highest = -infinity();
#pragma unroll
            for (int a = 0; a < 4; a++) {
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int j = 0; j < J; j++) {
                    mma(c, q[j].x, 0, q[j].y, 0, keys[a][j].x, keys[a][j].y);
                    mma(c, q[j].z, 0, q[j].w, 0, keys[a][j].z, keys[a][j].w);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = page * PAGE + a * 8 + 2 * quad + i;
                    s[a][i] = token < length && token >= seen ? c[i] * p.scale : -infinity();
                    highest = fmaxf(highest, s[a][i]);
                }
            }
            if (after < pages) fetch_keys(block);
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float now = fmaxf(most, highest), base = now == -infinity() ? 0.0f : now, correction = exp2f(most - base);
            most = now;
            sum *= correction;
            u32 weights[4];
#pragma unroll
            for (int a = 0; a < 4; a++) {
                const float w0 = exp2f(s[a][0] - base), w1 = exp2f(s[a][1] - base);
                sum += w0 + w1;
                weights[a] = narrow2(w0, w1);
            }
#pragma unroll
            for (int i = 0; i < F * 8; i++) o[i][0] *= correction, o[i][1] *= correction;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int f = 0; f < F; f++) {
                    const u32 *v0 = (const u32 *)&values[i][f][0], *v1 = (const u32 *)&values[i][f][1];
                    const u32 *v2 = (const u32 *)&values[i][f][2], *v3 = (const u32 *)&values[i][f][3];
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        mma(o[f * 8 + 2 * w], weights[2 * i], 0, weights[2 * i + 1], 0, __byte_perm(v0[w], v1[w], 0x5410),
                            __byte_perm(v2[w], v3[w], 0x5410));
                        mma(o[f * 8 + 2 * w + 1], weights[2 * i], 0, weights[2 * i + 1], 0, __byte_perm(v0[w], v1[w], 0x7632),
                            __byte_perm(v2[w], v3[w], 0x7632));
                    }
                }
            if (after < pages) fetch_values(block);
            page = after;
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad == 0) maxima[warp][group] = most, sums[warp][group] = sum;
#pragma unroll
        for (int f = 0; f < F; f++)
#pragma unroll
            for (int d = 0; d < 8; d++) {
                outs[warp][group][f * 64 + 16 * quad + d] = o[f * 8 + d][0];
                outs[warp][group][f * 64 + 16 * quad + 8 + d] = o[f * 8 + d][1];
            }
        __syncthreads();
        for (int e = threadIdx.x; e < own * D; e += DECODE_WARPS * 32) {
            const int head = e / D, d = e % D;
            float top = -infinity(), all = 0.0f, out = 0.0f;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, maxima[w][head]);
            const float base = top == -infinity() ? 0.0f : top;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; w++) {
                const float factor = exp2f(maxima[w][head] - base);
                all += factor * sums[w][head];
                out += factor * outs[w][head][d];
            }
            if (splits - first_split == 1) {
                p.out[((size_t)row * p.heads + kv_head * queries + first_query + head) * D + d] = narrow(out / all);
            } else {
                const size_t at = (cell * p.max_splits + split) * GROUP + head;
                p.partials[at * D + d] = out;
                if (d == 0) p.spreads[at] = make_float2(top, all);
            }
        }
        __syncthreads();
    }
    if (splits - first_split <= 1) return;
    // Blocks that had no split count, too: the last one to come finds everything.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) done = atomicAdd(&p.finished[cell], 1);
    __syncthreads();
    if (done != gridDim.x - 1) return;
    __threadfence();
    if (threadIdx.x == 0) p.finished[cell] = 0;
    for (int e = threadIdx.x; e < own * D; e += DECODE_WARPS * 32) {
        const int head = e / D, d = e % D;
        float top = -infinity(), all = 0.0f, out = 0.0f;
        for (int split = first_split; split < splits; split++) {
            const size_t at = (cell * p.max_splits + split) * GROUP + head;
            const float2 spread = __ldcg(&p.spreads[at]);
            const float now = fmaxf(top, spread.x), base = now == -infinity() ? 0.0f : now;
            const float before = exp2f(top - base), factor = exp2f(spread.x - base);
            all = all * before + spread.y * factor;
            out = out * before + __ldcg(&p.partials[at * D + d]) * factor;
            top = now;
        }
        p.out[((size_t)row * p.heads + kv_head * queries + first_query + head) * D + d] = narrow(out / all);
    }
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32) decode_attention_64(const DecodeAttention p) { decode_attention<64>(p); }
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32) decode_attention_128(const DecodeAttention p) { decode_attention<128>(p); }
