//! The decoder, one piece of code over [`Ops`]. Llama, Mistral, Qwen2 and Qwen3 are switches of it.

use crate::ops::{Buffer, Ops, QkvPost, Vector, Weight};

/// A loaded decoder: handles into the backend that loaded it.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Token embeddings `[vocabulary, embedding]`.
    pub embedding: Weight,
    /// Layers, first to last.
    pub layers: Vec<Layer>,
    /// Norm before the output matrix.
    pub norm: Vector,
    /// Output matrix `[vocabulary, embedding]`; the embeddings themselves when tied.
    pub output: Weight,
    /// Added to the mean square in every norm.
    pub epsilon: f32,
    /// Where a step's values lie.
    pub arena: Arena,
}

/// One layer's weights.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Norm before attention.
    pub attention_norm: Vector,
    /// Queries, keys and values, stacked: `[(heads + 2·kv_heads)·head_dim, embedding]`.
    pub qkv: Weight,
    /// What happens to them next.
    pub qkv_post: QkvPost,
    /// Attention's output `[embedding, heads·head_dim]`.
    pub attention_output: Weight,
    /// Norm before the feed-forward block.
    pub feed_forward_norm: Vector,
    /// Gate and up, stacked: `[2·feed_forward, embedding]`.
    pub gate_up: Weight,
    /// Down `[embedding, feed_forward]`.
    pub down: Weight,
}

/// Every buffer of a step; nothing is allocated while one runs.
#[derive(Clone, Copy, Debug)]
pub struct Arena {
    /// The residual `[rows, embedding]`.
    pub residual: Buffer,
    /// The residual, normed `[rows, embedding]`.
    pub normed: Buffer,
    /// `[rows, (heads + 2·kv_heads)·head_dim]`.
    pub qkv: Buffer,
    /// `[rows, heads·head_dim]`.
    pub attended: Buffer,
    /// What a block adds to the residual `[rows, embedding]`.
    pub delta: Buffer,
    /// `[rows, feed_forward]`.
    pub activated: Buffer,
    /// The sampling rows, normed `[sequences, embedding]`.
    pub last: Buffer,
    /// `[sequences, vocabulary]`.
    pub logits: Buffer,
}

impl Decoder {
    /// One step: appends the KV of every row, and draws a token for each sampling span; the backend keeps what was drawn.
    pub fn run(&self, ops: &mut impl Ops) {
        self.run_telling(ops, |_| {});
    }

    /// The same; tells how many layers have the KV of every row in the pool, after each layer.
    pub fn run_telling(&self, ops: &mut impl Ops, told: impl Fn(usize)) {
        let arena = &self.arena;
        ops.embed(self.embedding, arena.residual);
        ops.rms_norm(
            arena.residual,
            self.layers[0].attention_norm,
            self.epsilon,
            arena.normed,
        );
        for (index, layer) in self.layers.iter().enumerate() {
            ops.linear(layer.qkv, arena.normed, arena.qkv);
            ops.qkv_post(index, &layer.qkv_post, arena.qkv);
            // It ends in a barrier: every thread has appended its rows.
            told(index + 1);
            ops.attention(index, arena.qkv, arena.attended);
            ops.linear(layer.attention_output, arena.attended, arena.delta);
            ops.add_rms_norm(
                arena.residual,
                arena.delta,
                layer.feed_forward_norm,
                self.epsilon,
                arena.normed,
            );
            ops.gated(layer.gate_up, arena.normed, arena.activated);
            ops.linear(layer.down, arena.activated, arena.delta);
            // The next layer's norm, or after the last layer the output's.
            let next = self.layers.get(index + 1).map_or(self.norm, |next| next.attention_norm);
            ops.add_rms_norm(arena.residual, arena.delta, next, self.epsilon, arena.normed);
        }
        ops.gather_rows(arena.normed, arena.last);
        ops.logits(self.output, arena.last, arena.logits);
        ops.sample(arena.logits);
    }
}
