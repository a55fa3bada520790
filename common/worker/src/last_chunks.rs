//! Layers of prompts' last chunks, told while the step that computes them goes on.
//!
//! What a chunk leaves in the pool is pushed while the next is computed; only the last has no next. So its layers leave as they are computed, and what is left
//! to push when the step ends is what the last of them made.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_engine::LayerWatch;
use baton_kv::BlockId;
use tokio::sync::mpsc;

use crate::{HeldBlocks, Update};

/// A prompt that the running step ends.
pub(crate) struct LastChunk {
    /// Weak: when the sequence ends meanwhile, so does its stream.
    updates: mpsc::WeakSender<Update>,
    tokens: usize,
    /// Layers between two updates.
    every: usize,
    /// Of the model.
    layers: usize,
    table: Arc<[BlockId]>,
    /// Until the first update.
    hold: Option<HeldBlocks>,
}

impl LastChunk {
    /// A prompt of `tokens` tokens in the blocks of `table`, of which `hold` keeps those that the step completes; tells of every `every` layers, and of all.
    pub(crate) fn new(
        updates: mpsc::WeakSender<Update>,
        tokens: usize,
        every: usize,
        layers: usize,
        table: &[BlockId],
        hold: HeldBlocks,
    ) -> Self {
        Self {
            updates,
            tokens,
            every,
            layers,
            table: table.into(),
            hold: Some(hold),
        }
    }

    fn computed(&mut self, layers: usize) {
        if !layers.is_multiple_of(self.every) && layers != self.layers {
            return;
        }
        if let Some(updates) = self.updates.upgrade() {
            // There is room for each layer. A reader that is gone is found when the step ends.
            let _ = updates.try_send(Update::Layers {
                computed_tokens: self.tokens,
                layers,
                table: self.table.clone(),
                hold: self.hold.take(),
            });
        }
    }
}

/// Those of the running step. (The engine's thread alone uses it: it begins, is told of layers, and ends.)
pub(crate) struct LastChunks {
    /// See [`crate::WorkerConfig::layers_bytes`].
    pub(crate) bytes: usize,
    chunks: Arc<Mutex<Vec<LastChunk>>>,
}

impl LastChunks {
    /// Of no step.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            bytes,
            chunks: Arc::default(),
        }
    }

    /// A step begins.
    pub(crate) fn begin(&self, chunks: Vec<LastChunk>) {
        *lock(&self.chunks) = chunks;
    }

    /// It has ended: whatever holds are left are given up.
    pub(crate) fn end(&self) {
        lock(&self.chunks).clear();
    }

    /// What the engine tells of its layers.
    pub(crate) fn watch(&self) -> LayerWatch {
        let chunks = self.chunks.clone();
        Box::new(move |layers| lock(&chunks).iter_mut().for_each(|chunk| chunk.computed(layers)))
    }
}

fn lock(chunks: &Mutex<Vec<LastChunk>>) -> MutexGuard<'_, Vec<LastChunk>> {
    chunks.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
