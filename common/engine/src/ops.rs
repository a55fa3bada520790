//! The operations of which a decoder is made, and the arena that they work on.
//!
//! A backend that uses several threads runs the decoder on each of them (SPMD): every thread calls the same operations in the same
//! order, does its share, and each operation ends in a barrier where the next one needs it. So there is one fork per step.
//!
//! All arena buffers hold `f32`, row-major `[rows, width]`, rows = rows of the running step (or sampling rows, for the last buffers).

/// An arena buffer `[max_rows, width]` of f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer(pub usize);

/// A loaded matrix `[n, k]`, repacked by the backend; or several stacked along n.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Weight(pub usize);

/// A loaded vector of f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vector(pub usize);

/// Shapes that the attention operations need.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// KV heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Leading elements of a head that are rotated.
    pub rope_dim: usize,
    /// RoPE base frequency.
    pub rope_base: f64,
    /// Pairs `(i, i + rope_dim/2)` (NeoX) or `(2i, 2i + 1)` (the GGUF `llama` order).
    pub rope_interleaved: bool,
    /// Positions that a row sees, its own included; `None`: all before it.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The first position that the row at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// What is done to a row's queries, keys and values before queries and keys are rotated.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct QkvPost {
    /// Added `[heads + 2·kv_heads, head_dim]` (Qwen2).
    pub bias: Option<Vector>,
    /// Then each head of queries and keys is normed (Qwen3).
    pub norms: Option<QkNorms>,
}

/// Norms of single heads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QkNorms {
    /// Of queries `[head_dim]`.
    pub query: Vector,
    /// Of keys `[head_dim]`.
    pub key: Vector,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// About a dozen fused operations. Rows, positions, tables and sampling come from the running step's plan.
pub trait Ops {
    /// `out[r] = table[token of row r]`, dequantised.
    fn embed(&mut self, table: Weight, out: Buffer);

    /// `out[r] = x[r] / rms(x[r]) * weight`.
    fn rms_norm(&mut self, x: Buffer, weight: Vector, epsilon: f32, out: Buffer);

    /// `x[r] += delta[r]`, then `out[r] = x[r] / rms(x[r]) * weight`.
    fn add_rms_norm(&mut self, x: Buffer, delta: Buffer, weight: Vector, epsilon: f32, out: Buffer);

    /// `out[r] = weight · x[r]`.
    fn linear(&mut self, weight: Weight, x: Buffer, out: Buffer);

    /// `qkv[r]` is `[heads + 2·kv_heads, head_dim]`: does what `post` says, rotates queries and keys by the row's position (in place), and appends keys and
    /// values, rounded to the pool's dtype, to the pool.
    fn qkv_post(&mut self, layer: usize, post: &QkvPost, qkv: Buffer);

    /// `out[r] [heads, head_dim]`: attention of row r's queries over positions `first_seen(position(r))..=position(r)` in the pool, in KV tiles of 32 in block
    /// order.
    fn attention(&mut self, layer: usize, qkv: Buffer, out: Buffer);

    /// `gate_up` is gate and up, stacked: `out[r] = silu(gate · x[r]) * (up · x[r])`.
    fn gated(&mut self, gate_up: Weight, x: Buffer, out: Buffer);

    /// `out[s] = x[last row of the s-th sampling span]`.
    fn gather_rows(&mut self, x: Buffer, out: Buffer);

    /// `out[s] = weight · x[s]` over the sampling rows.
    fn logits(&mut self, weight: Weight, x: Buffer, out: Buffer);

    /// Draws one token per sampling span from its logits.
    fn sample(&mut self, logits: Buffer);
}
