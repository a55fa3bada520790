//! Which matrices there are going to be, and how they come into memory: read from the cache, or repacked, by all threads, into one allocation.
//!
//! One allocation, because a step reads all of it: huge pages spare it the TLB misses, and the cache holds it as it lies.

use std::sync::Arc;

use baton_gguf::Tensor;

use super::{Matrix, PanelKind, PanelShape, Segment, repack, shape_error};
use crate::{
    cpu::{
        alloc::{Aligned, OutOfMemory},
        builder::LoadError,
        math::LANES,
        rows::GROUP,
    },
    panel_cache::PanelCache,
    parallel,
    progress::{LoadStage, Report, StageProgress},
};

/// Version of the panels' bytes: another one whenever they change, or an older cache would be taken for them.
pub(super) const PANEL_FORMAT: &str = "panels 2";
/// About what a thread packs between two looks at the progress display.
const PIECE_BYTES: usize = 1 << 20;

/// Where panels may come from, and whom to tell.
#[derive(Clone, Copy)]
pub(crate) struct Loading<'a> {
    /// The cache, and the digest of the weights.
    pub(crate) cache: Option<(&'a PanelCache, blake3::Hash)>,
    pub(crate) threads: usize,
    pub(crate) report: Report<'a>,
}

/// Matrices whose panels do not exist yet.
#[derive(Default)]
pub(in crate::cpu) struct WeightPlan<'a> {
    matrices: Vec<Vec<Part<'a>>>,
}

/// A tensor that becomes consecutive panels.
struct Part<'a> {
    tensor: Tensor<'a>,
    row_bytes: usize,
    kind: PanelKind,
    shape: PanelShape,
    panels: usize,
}

impl<'a> WeightPlan<'a> {
    /// Adds a matrix of `parts`, stacked along n; returns its index.
    pub(in crate::cpu) fn add(&mut self, parts: &[Tensor<'a>]) -> Result<usize, LoadError> {
        let Some((last, before)) = parts.split_last() else {
            return Err(LoadError::Config("a matrix needs at least one tensor".into()));
        };
        let k = last.columns;
        for part in before {
            if part.columns != k {
                return Err(shape_error(
                    part,
                    format!("has {} columns where '{}' has {k}", part.columns, last.name),
                ));
            }
            if !part.rows.is_multiple_of(LANES) {
                return Err(shape_error(
                    part,
                    format!("{} rows are not a multiple of {LANES}", part.rows),
                ));
            }
        }
        let parts = parts.iter().map(|part| Part::new(*part)).collect::<Result<_, _>>()?;
        self.matrices.push(parts);
        Ok(self.matrices.len() - 1)
    }

    fn parts(&self) -> impl Iterator<Item = &Part<'a>> {
        self.matrices.iter().flatten()
    }

    /// Bytes of all panels.
    pub(in crate::cpu) fn bytes(&self) -> usize {
        self.parts().map(Part::bytes).fold(0, usize::saturating_add)
    }

    /// Brings all panels into memory.
    pub(in crate::cpu) fn load(&self, loading: Loading<'_>) -> Result<Vec<Matrix>, OutOfMemory> {
        let memory = match loading.cache {
            Some((cache, weights)) => {
                let key = self.key(&weights);
                let mut memory = Aligned::zeroed(self.bytes())?;
                if !cache.load(&key, memory.as_mut_slice(), loading.threads, loading.report) {
                    // Packing wants zeroes, and a cache that was damaged has left something.
                    drop(memory);
                    memory = self.pack(loading)?;
                    cache.store(&key, memory.as_slice(), loading.threads, loading.report);
                }
                memory
            }
            None => self.pack(loading)?,
        };
        Ok(self.matrices(memory))
    }

    /// Repacks everything.
    fn pack(&self, Loading { threads, report, .. }: Loading<'_>) -> Result<Aligned<u8>, OutOfMemory> {
        let mut memory = Aligned::zeroed(self.bytes())?;
        let mut rest = memory.as_mut_slice();
        let mut pieces = Vec::new();
        for part in self.parts() {
            let (own, after) = rest.split_at_mut(part.bytes());
            rest = after;
            let panels = (PIECE_BYTES / part.shape.bytes).max(1);
            let own = own.chunks_mut(panels * part.shape.bytes).enumerate();
            pieces.extend(own.map(|(piece, out)| (part, piece * panels, out)));
        }
        let total = self.parts().map(|part| part.tensor.bytes.len() as u64).sum();
        let progress = StageProgress::begin(LoadStage::Packing, total, report);
        parallel::for_each(pieces, threads, |(part, first, out)| {
            progress.add(part.pack(first, out));
        });
        Ok(memory)
    }

    /// The matrices of panels that lie in `memory`.
    fn matrices(&self, memory: Aligned<u8>) -> Vec<Matrix> {
        let memory = Arc::new(memory);
        let mut start = 0;
        let mut segment = |part: &Part<'_>| {
            let segment = Segment {
                kind: part.kind,
                shape: part.shape,
                panels: part.panels,
                memory: memory.clone(),
                start,
            };
            start += part.bytes();
            segment
        };
        let matrix = |parts: &Vec<Part<'_>>| Matrix {
            n: parts.iter().map(|part| part.tensor.rows).sum(),
            k: parts[0].tensor.columns,
            segments: parts.iter().map(&mut segment).collect(),
        };
        self.matrices.iter().map(matrix).collect()
    }

    /// The name of these panels: what they were made from, which of it, and how.
    pub(super) fn key(&self, weights: &blake3::Hash) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for text in [PANEL_FORMAT, crate::NUMERICS_CLASS] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(weights.as_bytes());
        for part in self.parts() {
            let tensor = &part.tensor;
            for number in [tensor.name.len(), tensor.rows, tensor.columns, part.bytes()] {
                hasher.update(&(number as u64).to_le_bytes());
            }
            hasher.update(tensor.name.as_bytes());
        }
        hasher.finalize()
    }
}

impl<'a> Part<'a> {
    fn new(tensor: Tensor<'a>) -> Result<Self, LoadError> {
        let kind = PanelKind::of(tensor.dtype).ok_or_else(|| LoadError::Type {
            name: tensor.name.into(),
            dtype: tensor.dtype,
        })?;
        let k = tensor.columns;
        if k == 0 || tensor.rows == 0 {
            return Err(shape_error(&tensor, "is empty"));
        }
        let row_bytes = tensor
            .dtype
            .row_bytes(k)
            .ok_or_else(|| shape_error(&tensor, format!("{k} columns are not whole groups of {GROUP}")))?;
        if row_bytes.checked_mul(tensor.rows) != Some(tensor.bytes.len()) {
            return Err(shape_error(
                &tensor,
                format!("holds {} bytes, not what its shape says", tensor.bytes.len()),
            ));
        }
        let shape = kind.shape(k);
        let panels = tensor.rows.div_ceil(LANES);
        panels
            .checked_mul(shape.bytes)
            .ok_or(OutOfMemory { bytes: usize::MAX })?;
        Ok(Self {
            tensor,
            row_bytes,
            kind,
            shape,
            panels,
        })
    }

    fn bytes(&self) -> usize {
        self.panels * self.shape.bytes
    }

    /// Packs the panels from `first` on that `out`, which is zero, has room for; missing rows of the last stay zero. Returns the tensor's bytes that are in them.
    fn pack(&self, first: usize, out: &mut [u8]) -> usize {
        let row = first * LANES;
        let rows = (out.len() / self.shape.bytes * LANES).min(self.tensor.rows - row);
        let bytes = &self.tensor.bytes[row * self.row_bytes..][..rows * self.row_bytes];
        let panels = out.chunks_exact_mut(self.shape.bytes);
        for (panel, rows) in panels.zip(bytes.chunks(LANES * self.row_bytes)) {
            for (lane, row) in rows.chunks_exact(self.row_bytes).enumerate() {
                repack::row(self.tensor.dtype, self.kind, self.shape, row, lane, panel);
            }
        }
        bytes.len()
    }
}
