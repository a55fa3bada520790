//! The operations, as one thread of the team runs them: it does its share, then meets the others at a barrier.
//!
//! Every unsafe row access below rests on the same rule: within a phase (between two barriers) each item (row, or part of a row, or panel)
//! is written by the one thread that owns it, and nobody reads what the phase writes. Shares do not overlap, and [`Member::next_item`]
//! gives each item out once.
//!
//! With few rows (a decoding step of one sequence or two) operations on whole rows do not divide them: each thread does all of them, into rows of its own
//! that nobody else touches, and goes on without waiting. What such an operation reads of shared rows is not written again before all have met.
#![allow(unsafe_code)]

use std::ops::Range;

use baton_scheduler::StepPlan;

use super::{
    activations::{Activations, Form, PACK_COLUMNS, PackScratch, TILE_ROWS, tile_of, tile_start, tiles},
    arena::Buffers,
    attention::TILE,
    backend::{Core, OWN_ROWS, Scratch},
    isa::Isa,
    linear::{Tile, tile_fn},
    math::LANES,
    plan::Places,
    rows,
    team::Member,
    weight::Matrix,
};
use crate::ops::{Buffer, Ops, QkvPost, Vector, Weight};

/// Rows that meet a group of panels before the next group does: their activations stay in the second-level cache.
const ROW_BLOCK: usize = 8 * TILE_ROWS;
/// Bytes of panels that meet a block of rows: they stay in the first-level cache.
const PANEL_BYTES: usize = 24 << 10;
/// Bytes of the next matrix that each thread asks for.
const NEXT_BYTES: usize = 8 << 10;
/// Items per thread when there are few rows: evens out threads that lose their core for a while.
const ITEMS_PER_THREAD: usize = 4;

/// One thread's view of the running step.
pub struct CpuOps<'a> {
    pub(super) core: &'a Core,
    pub(super) plan: &'a StepPlan,
    pub(super) places: &'a Places,
    pub(super) member: &'a Member<'a>,
    pub(super) scratch: &'a mut Scratch,
    /// Buffers whose rows each thread has for itself.
    pub(super) own: Buffers,
    /// Shared buffers that some thread may still be reading: nobody has waited since.
    pub(super) read: Buffers,
}

impl CpuOps<'_> {
    /// Which thread this is, from 0; thread 0 is the caller of [`CpuBackend::run`](super::CpuBackend::run).
    pub fn thread(&self) -> usize {
        self.member.index()
    }

    fn rows(&self) -> usize {
        self.places.rows.len()
    }

    fn check_width(&self, buffer: Buffer, width: usize) {
        assert_eq!(self.core.arena.width(buffer), width, "buffer of another width");
    }

    /// Threads that run the step.
    pub fn threads(&self) -> usize {
        self.member.threads()
    }

    /// How often this thread has met the others in this step.
    pub fn met(&self) -> usize {
        self.member.met()
    }

    /// Waits for all.
    pub fn meet(&mut self) {
        self.member.barrier();
        self.read = Buffers::default();
    }

    /// Whether each thread does all rows for itself.
    fn few(&self) -> bool {
        self.rows() <= OWN_ROWS
    }

    /// The rows, of `total`, that an operation on whole rows does on this thread.
    fn whole_rows(&self, total: usize) -> Range<usize> {
        if self.few() { 0..total } else { self.member.share(total) }
    }

    /// Before an operation on whole rows writes `out`; afterwards [`Self::row_of`] says where. `read`: shared rows that it may read.
    fn begin_rows(&mut self, out: Buffer, read: &[Buffer]) {
        if self.few() {
            read.iter()
                .filter(|&&buffer| !self.own.contains(buffer))
                .for_each(|&buffer| self.read.insert(buffer));
            self.own.insert(out);
        } else {
            self.begin_shared(out);
        }
    }

    /// Before threads write their shares of `out`.
    fn begin_shared(&mut self, out: Buffer) {
        if self.read.contains(out) {
            self.meet();
        }
        self.own.remove(out);
    }

    /// After an operation on whole rows.
    fn end_rows(&mut self) {
        if !self.few() {
            self.meet();
        }
    }

    /// Where this thread finds a row of a buffer.
    fn row_of(&self, buffer: Buffer, row: usize) -> usize {
        if self.own.contains(buffer) {
            self.core.arena.own_row(buffer, self.member.index(), OWN_ROWS, row)
        } else {
            row
        }
    }

    /// `out[r] = weight · x[r]` for `rows` rows.
    fn multiply(&mut self, weight: Weight, x: Buffer, out: Buffer, rows: usize) {
        let core = self.core;
        let matrix = &core.matrices[weight.0];
        self.check_width(x, matrix.k);
        self.check_width(out, matrix.n);
        assert_ne!(x, out, "a linear map cannot work in place");
        self.begin_shared(out);
        let first = self.row_of(x, 0);
        let Scratch { activations, pack, .. } = &mut *self.scratch;
        let product = Product::new(core, self.member, matrix, (x, first), rows, activations, pack);
        product.share_tiles(self.member, matrix.panels(), |panel, row, tile_rows| {
            // SAFETY: these 16 outputs of these rows belong to this item.
            unsafe { product.tile(panel, row, tile_rows, core.panel_out(out, row, tile_rows, panel)) };
        });
        self.ask_for_next(weight, rows);
        self.meet();
    }
}

impl CpuOps<'_> {
    /// Asks for the first panels of the matrix that comes next, as matrices are loaded in the order of their use: few rows would wait for them.
    fn ask_for_next(&self, weight: Weight, rows: usize) {
        let matrices = &self.core.matrices;
        // After the output matrix comes the first layer's: of the embeddings, which are loaded first, a step reads single rows.
        let next = matrices.get(weight.0 + 1).or_else(|| matrices.get(1));
        if let (Some(next), true) = (next, rows <= TILE_ROWS) {
            // What each thread will most likely take first.
            let blocks = (self.member.threads() * ITEMS_PER_THREAD).min(next.panels());
            let block = self.thread().min(blocks - 1);
            let (segment, panel) = next.panel(block * next.panels() / blocks);
            prefetch(segment.panel(panel), NEXT_BYTES);
        }
    }
}

/// Asks for memory that will be wanted soon, into the second-level cache.
fn prefetch(start: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, bytes);
}

/// A matrix and the rows that it is multiplied with.
struct Product<'a> {
    isa: Isa,
    matrix: &'a Matrix,
    activations: &'a Activations,
    rows: usize,
}

impl<'a> Product<'a> {
    /// Packs `rows` rows of a buffer from a first one on: few of them each thread for itself, into `own`; more all threads together.
    fn new(
        core: &'a Core,
        member: &Member<'_>,
        matrix: &'a Matrix,
        (x, x_row): (Buffer, usize),
        rows: usize,
        own: &'a Activations,
        scratch: &mut PackScratch,
    ) -> Self {
        let k = matrix.k;
        let forms = Form::ALL.into_iter().filter(|&form| matrix.takes(form));
        let parts = k.div_ceil(PACK_COLUMNS);
        let mut pack_tile = |activations: &Activations, form, first: usize, part: usize| {
            let columns = part * PACK_COLUMNS..k.min((part + 1) * PACK_COLUMNS);
            let (_, tile_rows) = tile_of(first, rows);
            let mut tile = [&[][..]; TILE_ROWS];
            for (row, slot) in (first..first + tile_rows).zip(&mut tile) {
                // SAFETY: nobody writes x in this phase.
                *slot = unsafe { core.arena.row(x, x_row + row) };
            }
            // SAFETY: this part of the tile is this thread's own, or in its share.
            unsafe { activations.pack(core.isa, form, first, k, &tile[..tile_rows], columns, scratch) };
        };
        let mut activations = own;
        if rows > OWN_ROWS {
            activations = &core.activations;
            for form in forms {
                for item in member.share(tiles(rows) * parts) {
                    let (tile, part) = (item / parts, item % parts);
                    pack_tile(activations, form, tile_start(tile, rows), part);
                }
            }
            member.barrier();
        } else if rows > 0 {
            for (form, part) in forms.flat_map(|form| (0..parts).map(move |part| (form, part))) {
                pack_tile(own, form, 0, part);
            }
        }
        Self {
            isa: core.isa,
            matrix,
            activations,
            rows,
        }
    }

    /// Calls `compute(panel, first row, rows)` for this thread's share of the tiles of panels `0..panels`.
    fn share_tiles(&self, member: &Member<'_>, panels: usize, mut compute: impl FnMut(usize, usize, usize)) {
        let rows = self.rows;
        let (panel_blocks, row_block) = if rows <= TILE_ROWS {
            ((member.threads() * ITEMS_PER_THREAD).min(panels), rows)
        } else {
            (
                panels.div_ceil((PANEL_BYTES / self.matrix.widest_panel()).max(1)),
                ROW_BLOCK,
            )
        };
        let row_blocks = rows.div_ceil(row_block.max(1));
        loop {
            let item = member.next_item();
            if item >= panel_blocks * row_blocks {
                return;
            }
            let (block, first_row) = (item / row_blocks, item % row_blocks * row_block);
            // Nearly equal blocks.
            let block_panels = block * panels / panel_blocks..(block + 1) * panels / panel_blocks;
            let end_row = (first_row + row_block).min(rows);
            let mut row = first_row;
            while row < end_row {
                let (_, tile_rows) = tile_of(row, rows);
                block_panels.clone().for_each(|panel| compute(panel, row, tile_rows));
                row += tile_rows;
            }
        }
    }

    /// One panel times the tile of rows that begins at `row`.
    ///
    /// # Safety
    /// `out` points to 16 numbers per row, as far apart as it says, which nobody else touches meanwhile.
    #[inline(always)]
    unsafe fn tile(&self, panel: usize, row: usize, tile_rows: usize, (out, out_stride): (*mut f32, usize)) {
        let k = self.matrix.k;
        let (segment, panel) = self.matrix.panel(panel);
        let tile = Tile {
            panel: segment.panel(panel),
            shape: segment.shape,
            k,
            rows: tile_rows,
            packed: self.activations.tile(segment.kind.form(), row, tile_rows, k),
            out,
            out_stride,
        };
        // SAFETY: `isa` was checked against the CPU; panel and rows lie within their memory; the caller answers for the outputs.
        unsafe { tile_fn(self.isa, segment.kind, tile_rows)(&tile) };
    }
}

impl Ops for CpuOps<'_> {
    fn embed(&mut self, table: Weight, out: Buffer) {
        let table = &self.core.matrices[table.0];
        self.begin_rows(out, &[]);
        for row in self.whole_rows(self.rows()) {
            let token = self.plan.tokens[row] as usize;
            // SAFETY: the row is in this thread's share, or its own.
            table.row(token, unsafe { self.core.arena.row_mut(out, self.row_of(out, row)) });
        }
        self.end_rows();
    }

    fn rms_norm(&mut self, x: Buffer, weight: Vector, epsilon: f32, out: Buffer) {
        let core = self.core;
        assert_ne!(x, out, "the norm cannot work in place");
        let weight = &core.vectors[weight.0];
        self.check_width(x, weight.len());
        self.check_width(out, weight.len());
        self.begin_rows(out, &[x]);
        for row in self.whole_rows(self.rows()) {
            // SAFETY: nobody else writes x in this phase; the output row is in this thread's share, or its own.
            let (x, out) = unsafe {
                (
                    core.arena.row(x, self.row_of(x, row)),
                    core.arena.row_mut(out, self.row_of(out, row)),
                )
            };
            rows::rms_norm(core.isa, x, weight, epsilon, out);
        }
        self.end_rows();
    }

    fn add_rms_norm(&mut self, x: Buffer, delta: Buffer, weight: Vector, epsilon: f32, out: Buffer) {
        let core = self.core;
        assert!(x != out && x != delta && delta != out, "the norm cannot work in place");
        let weight = &core.vectors[weight.0];
        for buffer in [x, delta, out] {
            self.check_width(buffer, weight.len());
        }
        // What is added to must be each thread's own already, where the rows are.
        assert!(
            !self.few() || self.own.contains(x),
            "few rows of a sum begin with an operation on whole rows"
        );
        self.begin_rows(x, &[]);
        self.begin_rows(out, &[delta]);
        for row in self.whole_rows(self.rows()) {
            // SAFETY: nobody else writes delta in this phase; the other rows are in this thread's share, or its own.
            let (x, delta, out) = unsafe {
                (
                    core.arena.row_mut(x, self.row_of(x, row)),
                    core.arena.row(delta, self.row_of(delta, row)),
                    core.arena.row_mut(out, self.row_of(out, row)),
                )
            };
            rows::add(core.isa, x, delta);
            rows::rms_norm(core.isa, x, weight, epsilon, out);
        }
        self.end_rows();
    }

    fn linear(&mut self, weight: Weight, x: Buffer, out: Buffer) {
        self.multiply(weight, x, out, self.rows());
    }

    fn qkv_post(&mut self, layer: usize, post: &QkvPost, qkv: Buffer) {
        let core = self.core;
        let (shape, layout) = (&core.config.shape, &core.config.layout);
        let (d, bt) = (shape.head_dim, layout.block_tokens);
        let heads = shape.heads + 2 * shape.kv_heads;
        self.check_width(qkv, heads * d);
        assert!(!self.own.contains(qkv), "heads of a shared buffer are turned");
        self.begin_shared(qkv);
        for item in self.member.share(self.rows() * heads) {
            let (row, head) = (item / heads, item % heads);
            // SAFETY: this head of this row is in this thread's share, and lies within the row.
            let x = unsafe { std::slice::from_raw_parts_mut(core.arena.row_ptr(qkv, row).add(head * d), d) };
            if let Some(bias) = post.bias {
                rows::add(core.isa, x, &core.vectors[bias.0][head * d..][..d]);
            }
            if head < shape.heads + shape.kv_heads {
                if let Some(norms) = &post.norms {
                    let weight = if head < shape.heads { norms.query } else { norms.key };
                    // The queries' room is not in use in this phase.
                    let before = &mut self.scratch.queries.as_mut_slice()[..d];
                    before.copy_from_slice(x);
                    rows::rms_norm(core.isa, before, &core.vectors[weight.0][..d], norms.epsilon, x);
                }
                let (cosines, sines) = core.angles(row);
                rows::rotate(core.isa, x, cosines, sines, shape.rope_interleaved);
            }
            if let Some(slot) = head.checked_sub(shape.heads) {
                let place = self.places.rows[row];
                let block = self.plan.table(&self.plan.spans[place.span])[place.position / bt];
                let (token, start) = (place.position % bt, slot * bt * d);
                // SAFETY: slots are keys' heads, then values' heads: within the block. The scheduler gives every position of a step its own
                // place (a sequence writes only to blocks that it alone holds), and this item its one thread.
                unsafe {
                    let head = core.memory.block(layer, block).add(start);
                    if slot < shape.kv_heads {
                        rows::narrow_apart(core.isa, x, head.add(token / TILE * TILE * d + token % TILE), TILE);
                    } else {
                        rows::narrow(core.isa, x, std::slice::from_raw_parts_mut(head.add(token * d), d));
                    }
                }
            }
        }
        self.meet();
    }

    fn attention(&mut self, layer: usize, qkv: Buffer, out: Buffer) {
        let shape = self.core.config.shape;
        self.check_width(qkv, (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
        self.check_width(out, shape.heads * shape.head_dim);
        assert_ne!(qkv, out, "attention cannot work in place");
        assert!(!self.own.contains(qkv), "a shared buffer is attended");
        self.begin_shared(out);
        self.attend(layer, qkv, out);
    }

    fn gated(&mut self, gate_up: Weight, x: Buffer, out: Buffer) {
        let (core, rows) = (self.core, self.rows());
        let matrix = &core.matrices[gate_up.0];
        self.check_width(x, matrix.k);
        self.check_width(out, matrix.n / 2);
        assert!(matrix.n.is_multiple_of(2 * LANES), "gate and up are not whole panels");
        assert_ne!(x, out, "a linear map cannot work in place");
        self.begin_shared(out);
        let first = self.row_of(x, 0);
        let Scratch { activations, pack, .. } = &mut *self.scratch;
        let product = Product::new(core, self.member, matrix, (x, first), rows, activations, pack);
        let panels = matrix.panels() / 2;
        let [mut gate, mut up, mut both] = [[0.0; TILE_ROWS * LANES]; 3];
        product.share_tiles(self.member, panels, |panel, row, tile_rows| {
            let len = tile_rows * LANES;
            // SAFETY: a tile has at most TILE_ROWS rows.
            unsafe {
                product.tile(panel, row, tile_rows, (gate.as_mut_ptr(), LANES));
                product.tile(panels + panel, row, tile_rows, (up.as_mut_ptr(), LANES));
            }
            rows::silu_mul(core.isa, &gate[..len], &up[..len], &mut both[..len]);
            let (out, stride) = core.panel_out(out, row, tile_rows, panel);
            for (row, both) in both[..len].chunks_exact(LANES).enumerate() {
                // SAFETY: these 16 outputs of these rows belong to this item.
                unsafe { both.as_ptr().copy_to_nonoverlapping(out.add(row * stride), LANES) };
            }
        });
        self.ask_for_next(gate_up, rows);
        self.meet();
    }

    fn gather_rows(&mut self, x: Buffer, out: Buffer) {
        let core = self.core;
        assert_ne!(x, out, "rows cannot be gathered in place");
        self.check_width(out, core.arena.width(x));
        self.begin_rows(out, &[x]);
        for row in self.whole_rows(self.places.sampling.len()) {
            // SAFETY: nobody else writes x in this phase; the output row is in this thread's share, or its own.
            let (x, out) = unsafe {
                (
                    core.arena.row(x, self.row_of(x, self.places.sampling[row].0)),
                    core.arena.row_mut(out, self.row_of(out, row)),
                )
            };
            out.copy_from_slice(x);
        }
        self.end_rows();
    }

    fn logits(&mut self, weight: Weight, x: Buffer, out: Buffer) {
        self.multiply(weight, x, out, self.places.sampling.len());
    }

    /// The tokens are in [`CpuBackend::sampled`](super::CpuBackend::sampled).
    fn sample(&mut self, logits: Buffer) {
        assert!(!self.own.contains(logits), "shared logits are drawn from");
        self.draw(logits);
    }
}
