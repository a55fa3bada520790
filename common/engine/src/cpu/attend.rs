//! Attention over the pool, shared out among threads by (row tile, KV head, some of its query heads), and where these are few also by partition.
#![allow(unsafe_code)]

use super::{
    attention::{self, PARTITION, STEP_QUERIES, TILE, TileStep, bits_of},
    backend::Scratch,
    ops::CpuOps,
    plan::RowTile,
};
use crate::ops::Buffer;

/// Tiles ahead of the one in use that few queries, which wait for memory, ask for into the second-level cache.
const AHEAD: usize = 3;

/// Rows of one span, and some query heads of one KV head.
#[derive(Clone, Copy)]
struct Piece<'a> {
    layer: usize,
    tile: &'a RowTile,
    kv_head: usize,
    /// First query head.
    head: usize,
    /// Query heads: 1..=[`STEP_QUERIES`].
    heads: usize,
}

impl Piece<'_> {
    fn queries(&self) -> usize {
        self.tile.rows * self.heads
    }

    /// Rows of a step.
    fn step_rows(&self) -> usize {
        STEP_QUERIES / self.heads
    }
}

/// How attention of a step is cut into pieces.
struct Cut<'a> {
    layer: usize,
    tiles: &'a [RowTile],
    /// Query heads of a KV head.
    group: usize,
    /// Parts of a group, nearly equal.
    parts: usize,
    /// Pieces of a row tile.
    pairs: usize,
}

impl<'a> Cut<'a> {
    fn piece(&self, item: usize) -> Piece<'a> {
        let (kv_head, part) = (item % self.pairs / self.parts, item % self.parts);
        let heads = part * self.group / self.parts..(part + 1) * self.group / self.parts;
        Piece {
            layer: self.layer,
            tile: &self.tiles[item / self.pairs],
            kv_head,
            head: kv_head * self.group + heads.start,
            heads: heads.len(),
        }
    }

    fn items(&self) -> usize {
        self.tiles.len() * self.pairs
    }
}

impl CpuOps<'_> {
    /// [`Ops::attention`](crate::ops::Ops::attention) without its checks.
    pub(super) fn attend(&mut self, layer: usize, qkv: Buffer, out: Buffer) {
        let (core, places) = (self.core, self.places);
        let shape = &core.config.shape;
        let group = shape.heads / shape.kv_heads;
        let parts = group.div_ceil(STEP_QUERIES);
        let cut = Cut {
            layer,
            tiles: &places.tiles,
            group,
            parts,
            pairs: shape.kv_heads * parts,
        };
        let few = cut.items() < 2 * self.member.threads();
        if few && places.partitions > places.tiles.len() && core.partials.has(places.partitions * cut.pairs) {
            self.attend_by_partitions(&cut, qkv, out);
        } else {
            self.attend_by_pieces(&cut, qkv, out);
        }
    }

    /// A piece is one thread's.
    fn attend_by_pieces(&mut self, cut: &Cut<'_>, qkv: Buffer, out: Buffer) {
        loop {
            let item = self.member.next_item();
            if item >= cut.items() {
                break;
            }
            // A span's last rows see most tokens: longest work first.
            let piece = cut.piece(cut.items() - 1 - item);
            self.pack_queries(&piece, qkv);
            for (index, partition) in piece.tile.partitions.clone().enumerate() {
                self.partition(&piece, partition);
                let Scratch { part, total, .. } = &mut *self.scratch;
                if index == 0 {
                    std::mem::swap(part, total);
                } else {
                    total.merge(self.core.isa, part, piece.queries());
                }
            }
            self.finish(&piece, out);
        }
        self.member.barrier();
    }

    /// A piece's partitions are different threads', and merged, once all are there, by one.
    fn attend_by_partitions(&mut self, cut: &Cut<'_>, qkv: Buffer, out: Buffer) {
        let (core, places) = (self.core, self.places);
        let d = core.config.shape.head_dim;
        loop {
            let item = self.member.next_item();
            let Some((tile, partition)) = places.partition(item / cut.pairs) else {
                break;
            };
            let piece = cut.piece(tile * cut.pairs + item % cut.pairs);
            self.pack_queries(&piece, qkv);
            self.partition(&piece, partition);
            // SAFETY: this item's slot is this thread's.
            unsafe { core.partials.put(item, &self.scratch.part, piece.queries(), d) };
        }
        self.member.barrier();
        loop {
            let item = self.member.next_item();
            if item >= cut.items() {
                break;
            }
            let piece = cut.piece(item);
            let Scratch { part, total, .. } = &mut *self.scratch;
            for index in 0..piece.tile.partitions.len() {
                let slot = (piece.tile.first_partition + index) * cut.pairs + item % cut.pairs;
                let into = if index == 0 { &mut *total } else { &mut *part };
                // SAFETY: slots were written before the barrier, and nobody writes them in this phase.
                unsafe { core.partials.get(slot, into, piece.queries(), d) };
                if index > 0 {
                    total.merge(core.isa, part, piece.queries());
                }
            }
            self.finish(&piece, out);
        }
        self.member.barrier();
    }

    /// Scales a piece's queries and lays them out as steps take them: per step `[head_dim][rows · heads]`.
    fn pack_queries(&mut self, piece: &Piece<'_>, qkv: Buffer) {
        let d = self.core.config.shape.head_dim;
        let scale = 1.0 / (d as f32).sqrt();
        let queries = self.scratch.queries.as_mut_slice();
        for first in (0..piece.tile.rows).step_by(piece.step_rows()) {
            let rows = piece.step_rows().min(piece.tile.rows - first);
            let stride = rows * piece.heads;
            let packed = &mut queries[first * piece.heads * d..][..stride * d];
            for row in 0..rows {
                // SAFETY: nobody writes qkv in this phase.
                let x = unsafe { self.core.arena.row(qkv, piece.tile.row + first + row) };
                for (head, x) in x[piece.head * d..][..piece.heads * d].chunks_exact(d).enumerate() {
                    let column = packed[row * piece.heads + head..].iter_mut().step_by(stride);
                    column.zip(x).for_each(|(out, x)| *out = x * scale);
                }
            }
        }
    }

    /// A piece's queries against one partition, into the scratch's `part`.
    fn partition(&mut self, piece: &Piece<'_>, partition: usize) {
        let core = self.core;
        let (shape, layout) = (&core.config.shape, &core.config.layout);
        let (d, tile) = (shape.head_dim, piece.tile);
        let table = self.plan.table(&self.plan.spans[tile.span]);
        let step_fn = attention::step_fn(core.isa);
        let Scratch { queries, part, .. } = &mut *self.scratch;
        part.start(piece.queries(), d);

        let first_seen = shape.first_seen(tile.position);
        let end = (tile.position + tile.rows).min((partition + 1) * PARTITION);
        let begin = (partition * PARTITION).max(first_seen / TILE * TILE);
        // One step a tile, which takes no longer than reading it.
        let few = piece.queries() <= STEP_QUERIES;
        let last_tile = (tile.position + tile.rows - 1) / TILE * TILE;
        let place = |start: usize| {
            let block = core.memory.block(piece.layer, table[start / layout.block_tokens]);
            let offset = start % layout.block_tokens;
            // Keys and values of a head lie by token; keys within a tile by dimension.
            let at = |slot: usize| (slot * layout.block_tokens + offset) * d;
            // SAFETY: both heads' tiles lie within the block.
            unsafe { [piece.kv_head, shape.kv_heads + piece.kv_head].map(|slot| block.add(at(slot)).cast_const()) }
        };
        for start in (begin..end).step_by(TILE) {
            let [keys, values] = place(start);
            let ahead = if few {
                [1, AHEAD].map(|tiles| place((start + tiles * TILE).min(last_tile)))
            } else {
                [[std::ptr::null(); 2]; 2]
            };
            // Rows of which some token of the tile is seen: none before it, and none whose window has left it.
            let seen = |row: usize| {
                let position = tile.position + row;
                let from = shape.first_seen(position).saturating_sub(start).min(TILE);
                bits_of(from..(position + 1).saturating_sub(start).clamp(from, TILE))
            };
            let rows = 0..tile.rows;
            let first = rows.clone().find(|&row| seen(row) != 0).unwrap_or(tile.rows);
            let last = rows.rev().find(|&row| seen(row) != 0).map_or(first, |row| row + 1);
            let mut row = first;
            while row < last {
                let group = row / piece.step_rows() * piece.step_rows();
                let group_rows = piece.step_rows().min(tile.rows - group);
                let rows = (group + group_rows).min(last) - row;
                let (query, count) = (row * piece.heads, rows * piece.heads);
                let mut mask = [0; STEP_QUERIES];
                for (i, masks) in mask[..count].chunks_exact_mut(piece.heads).enumerate() {
                    masks.fill(seen(row + i));
                }
                let step = TileStep {
                    queries: queries.as_slice()[group * piece.heads * d + (row - group) * piece.heads..].as_ptr(),
                    stride: group_rows * piece.heads,
                    count,
                    head_dim: d,
                    keys,
                    values,
                    seen: mask,
                    ahead,
                    running: part.running[query..][..count].as_mut_ptr(),
                    acc: part.acc.as_mut_slice()[query * d..][..count * d].as_mut_ptr(),
                };
                // SAFETY: `isa` was checked against the CPU, and the slices above have the shapes that the step names. Keys and values were written before this
                // step or before the last barrier, and nobody writes the seen tokens' now.
                unsafe { step_fn(&step) };
                row += rows;
            }
        }
    }

    /// Writes what the scratch's `total` holds of a piece.
    fn finish(&mut self, piece: &Piece<'_>, out: Buffer) {
        let d = self.core.config.shape.head_dim;
        let total = &self.scratch.total;
        for row in 0..piece.tile.rows {
            // SAFETY: these heads of this row belong to this item; they lie within the row (its width was checked).
            let out = unsafe {
                let start = self.core.arena.row_ptr(out, piece.tile.row + row).add(piece.head * d);
                std::slice::from_raw_parts_mut(start, piece.heads * d)
            };
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                let query = row * piece.heads + head;
                attention::finish(&total.running[query], &total.acc.as_slice()[query * d..][..d], out);
            }
        }
    }
}
