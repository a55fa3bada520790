//! The engine of a model on the CPU: loads the decoder's weights, and runs it.

use std::sync::Arc;

use baton_gguf::Tensor;
use baton_kv::{KvDtype, KvIdentity, KvLayout, KvMemory};
use baton_scheduler::{StepOutput, StepPlan};

use crate::{
    Engine, LayerWatch, ModelConfig, ModelSpec, StepError,
    checkpoint::Checkpoint,
    cpu::{CpuBackend, CpuBackendBuilder, CpuConfig, CpuOps, Isa, LoadError, Loading, PARTIAL_BYTES},
    decoder::{Arena, Decoder, Layer},
    open::OpenError,
    ops::{QkNorms, QkvPost, Vector, Weight},
};

/// A loaded model with its pool and its threads.
pub struct LlamaEngine {
    backend: CpuBackend,
    decoder: Decoder,
    model: ModelSpec,
    identity: KvIdentity,
    watch: Option<LayerWatch>,
}

/// Bounds of the engine to be loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LlamaLimits {
    pub(crate) threads: usize,
    pub(crate) isa: Option<Isa>,
    pub(crate) layout: KvLayout,
    pub(crate) blocks: usize,
    pub(crate) shared_pool: bool,
    pub(crate) max_rows: usize,
    pub(crate) max_sequences: usize,
}

impl ModelConfig {
    /// The layout of its KV.
    pub fn layout(&self, block_tokens: usize) -> KvLayout {
        KvLayout {
            layers: self.layers,
            heads: self.attention.kv_heads,
            head_dim: self.attention.head_dim,
            block_tokens,
            dtype: KvDtype::Bf16,
        }
    }

    /// Bytes of a step's buffers, at most: values, packed activations in either form, shared partitions, and what sampling works in.
    pub(crate) fn arena_bytes(&self, max_rows: usize, max_sequences: usize, threads: usize) -> u64 {
        let row: usize = self.row_widths().iter().sum();
        let bytes = |rows: usize, width: usize| (rows as u64).saturating_mul(width as u64 * size_of::<f32>() as u64);
        let widest = self.row_widths().into_iter().max().unwrap_or(0);
        let activations = bytes(max_rows.max(max_sequences), 2 * widest);
        let sampling = (threads.min(max_sequences) as u64).saturating_mul(16 * self.vocabulary as u64);
        bytes(max_rows, row)
            .saturating_add(bytes(max_sequences, self.embedding + self.vocabulary))
            .saturating_add(activations)
            .saturating_add(PARTIAL_BYTES as u64)
            .saturating_add(sampling)
    }

    /// Widths of the buffers of `max_rows` rows, in [`Arena`]'s order.
    fn row_widths(&self) -> [usize; 6] {
        let shape = &self.attention;
        let qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let attended = shape.heads * shape.head_dim;
        [
            self.embedding,
            self.embedding,
            qkv,
            attended,
            self.embedding,
            self.feed_forward,
        ]
    }
}

impl LlamaEngine {
    /// Repacks the weights, or finds them in the cache, and starts the threads.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        limits: LlamaLimits,
        model: ModelSpec,
        identity: KvIdentity,
        loading: Loading<'_>,
    ) -> Result<Self, OpenError> {
        let builder = CpuBackendBuilder::new(CpuConfig {
            threads: limits.threads,
            isa: limits.isa,
            layout: limits.layout,
            blocks: limits.blocks,
            shared_pool: limits.shared_pool,
            shape: config.attention,
            max_rows: limits.max_rows,
            max_sampling_rows: limits.max_sequences,
            max_context: config.context_length,
        })?;
        let mut loader = Loader { checkpoint, builder };
        let decoder = loader.decoder(config, limits.max_rows, limits.max_sequences)?;
        let backend = loader.builder.build_from(loading)?;
        let model = ModelSpec {
            weight_bytes: backend.weight_bytes(),
            ..model
        };
        Ok(Self {
            backend,
            decoder,
            model,
            identity,
            watch: None,
        })
    }

    /// The logits of the last step's `index`-th sampling span, one per token of the vocabulary.
    pub fn logits(&self, index: usize) -> &[f32] {
        self.backend.row(self.decoder.arena.logits, index)
    }

    /// [`Engine::step`] with `program` in the place of [`Decoder::run`], for measuring: each thread calls it once with the decoder and with its own
    /// operations. All must call the same operations in the same order; the sampled tokens are those of the last [`Ops::sample`](crate::ops::Ops::sample).
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_with(
        &mut self,
        plan: &StepPlan,
        output: &mut StepOutput,
        program: &(dyn Fn(&Decoder, &mut CpuOps<'_>) + Sync),
    ) -> Result<(), StepError> {
        output.sampled.clear();
        let decoder = &self.decoder;
        self.backend.run(plan, &|ops| program(decoder, ops))?;
        output.sampled.extend_from_slice(self.backend.sampled());
        Ok(())
    }

    /// The instruction set that it computes with.
    pub fn isa(&self) -> Isa {
        self.backend.isa()
    }
}

impl Engine for LlamaEngine {
    fn model(&self) -> &ModelSpec {
        &self.model
    }

    fn identity(&self) -> KvIdentity {
        self.identity
    }

    fn memory(&self) -> Arc<dyn KvMemory> {
        self.backend.memory()
    }

    fn watch_layers(&mut self, watch: LayerWatch) {
        self.watch = Some(watch);
    }

    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError> {
        let Some(watch) = self.watch.take() else {
            return self.step_with(plan, output, &|decoder, ops| decoder.run(ops));
        };
        let result = self.step_with(plan, output, &|decoder, ops| {
            let caller = ops.thread() == 0;
            decoder.run_telling(ops, |layers| {
                if caller {
                    watch(layers);
                }
            });
        });
        self.watch = Some(watch);
        result
    }
}

/// Takes the decoder's weights out of the checkpoint, in the order in which a step reads them.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    builder: CpuBackendBuilder<'a>,
}

impl<'a> Loader<'a> {
    fn decoder(&mut self, config: &ModelConfig, max_rows: usize, max_sequences: usize) -> Result<Decoder, OpenError> {
        if !config.rope_factors.is_empty() {
            self.builder.rope_factors(&config.rope_factors)?;
        }
        let embedding = self.load(&["token_embd.weight"], |builder, parts| builder.embedding(parts[0]))?;
        let layers = (0..config.layers)
            .map(|layer| self.layer(config, layer))
            .collect::<Result<_, _>>()?;
        let norm = self.vector("output_norm.weight")?;
        let output = if config.tied_embedding {
            embedding
        } else {
            self.matrix(&["output.weight"])?
        };
        let widths = config.row_widths();
        let [residual, normed, qkv, attended, delta, activated] =
            widths.map(|width| self.builder.buffer(width, max_rows));
        let [last, logits] =
            [config.embedding, config.vocabulary].map(|width| self.builder.buffer(width, max_sequences));
        let arena = Arena {
            residual,
            normed,
            qkv,
            attended,
            delta,
            activated,
            last,
            logits,
        };
        Ok(Decoder {
            embedding,
            layers,
            norm,
            output,
            epsilon: config.epsilon,
            arena,
        })
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer, OpenError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let bias = |part: &str| format!("blk.{layer}.{part}.bias");
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm"))?,
            qkv: self.matrix(&[&name("attn_q"), &name("attn_k"), &name("attn_v")])?,
            qkv_post: QkvPost {
                bias: if config.qkv_bias {
                    let names = ["attn_q", "attn_k", "attn_v"].map(bias);
                    Some(self.load(&names.each_ref().map(String::as_str), |builder, parts| {
                        builder.stacked_vector(parts)
                    })?)
                } else {
                    None
                },
                norms: if config.qk_norm {
                    Some(QkNorms {
                        query: self.vector(&name("attn_q_norm"))?,
                        key: self.vector(&name("attn_k_norm"))?,
                        epsilon: config.epsilon,
                    })
                } else {
                    None
                },
            },
            attention_output: self.matrix(&[&name("attn_output")])?,
            feed_forward_norm: self.vector(&name("ffn_norm"))?,
            gate_up: self.matrix(&[&name("ffn_gate"), &name("ffn_up")])?,
            down: self.matrix(&[&name("ffn_down")])?,
        })
    }

    fn matrix(&mut self, names: &[&str]) -> Result<Weight, OpenError> {
        self.load(names, |builder, parts| builder.matrix(parts))
    }

    fn vector(&mut self, name: &str) -> Result<Vector, OpenError> {
        self.load(&[name], |builder, parts| builder.vector(parts[0]))
    }

    fn load<T>(
        &mut self,
        names: &[&str],
        add: impl FnOnce(&mut CpuBackendBuilder<'a>, &[Tensor<'a>]) -> Result<T, LoadError>,
    ) -> Result<T, OpenError> {
        let parts = names
            .iter()
            .map(|name| self.checkpoint.required(name))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(add(&mut self.builder, &parts)?)
    }
}
