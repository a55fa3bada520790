//! What of each slot has been computed and sent, and what the next frame holds.

use std::ops::Range;

use baton_kv::{BlockId, Checksum, Generation, KvLayout};

use crate::{Ticket, limits};

/// Layers of one block to read and send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunToSend {
    /// Index into the ticket's slots.
    pub slot: usize,
    /// The slot's generation.
    pub generation: Generation,
    /// Where it lies on this node.
    pub block: BlockId,
    /// Which layers.
    pub layers: Range<usize>,
    /// Tokens to send.
    pub valid_tokens: usize,
}

/// What one frame may hold.
struct Bounds {
    bytes: usize,
    /// More than `bytes`, where that leaves nothing for another frame.
    slack: usize,
    runs: usize,
}

/// One slot of the ticket.
struct Slot {
    generation: Generation,
    valid_tokens: usize,
    /// Layers that were given out.
    planned: usize,
    /// Layers that were read, and their checksum.
    read: usize,
    sum: Checksum,
}

pub(super) struct Slots {
    layout: KvLayout,
    held_blocks: usize,
    bounds: Bounds,
    slots: Vec<Slot>,
    /// Slots before it were given out whole.
    first: usize,
    /// Prompt positions of which every layer is in the pool.
    computed: usize,
    /// Further positions, and how many layers of them are.
    ahead: (usize, usize),
    table: Vec<BlockId>,
    /// Bytes given out of blocks of which not every layer was computed.
    early_bytes: u64,
}

impl Slots {
    pub(super) fn new(ticket: &Ticket, prompt_tokens: usize, protocol: u32) -> Self {
        let slot = |(index, slot): (usize, &baton_kv::GrantedSlot)| Slot {
            generation: slot.generation,
            valid_tokens: ticket.valid_tokens(index, prompt_tokens),
            planned: 0,
            read: 0,
            sum: Checksum(0),
        };
        Self {
            layout: ticket.layout,
            held_blocks: ticket.held_blocks,
            bounds: match protocol {
                1 => Bounds {
                    bytes: limits::PIECE_BYTES,
                    slack: 0,
                    runs: 1,
                },
                _ => Bounds {
                    bytes: limits::FRAME_BYTES,
                    slack: limits::FRAME_SLACK_BYTES,
                    runs: limits::FRAME_RUNS,
                },
            },
            slots: ticket.slots.iter().enumerate().map(slot).collect(),
            first: 0,
            computed: 0,
            ahead: (0, 0),
            table: Vec::new(),
            early_bytes: 0,
        }
    }

    /// All layers of positions `0..tokens` are in the blocks of `table`.
    pub(super) fn computed(&mut self, tokens: usize, table: &[BlockId]) {
        if tokens > self.computed {
            self.computed = tokens;
            self.set_table(table);
        }
    }

    /// The first `layers` layers of positions `0..tokens` are.
    pub(super) fn computed_layers(&mut self, tokens: usize, layers: usize, table: &[BlockId]) {
        if tokens > self.computed && (tokens, layers) > self.ahead {
            self.ahead = (tokens, layers);
            self.set_table(table);
        }
    }

    fn set_table(&mut self, table: &[BlockId]) {
        if table.len() >= self.table.len() {
            self.table.clear();
            self.table.extend_from_slice(table);
        }
    }

    /// Layers that can be sent and were not given out yet.
    fn ready(&self, slot: usize) -> Range<usize> {
        let planned = self.slots[slot].planned;
        let (index, end) = (self.held_blocks + slot, self.end(slot));
        let computed = match self.ahead {
            _ if self.table.len() <= index => 0,
            _ if end <= self.computed => self.layout.layers,
            (tokens, layers) if end <= tokens => layers,
            _ => 0,
        };
        planned..computed.max(planned)
    }

    /// Prompt positions before the slot's end.
    fn end(&self, slot: usize) -> usize {
        (self.held_blocks + slot) * self.layout.block_tokens + self.slots[slot].valid_tokens
    }

    fn layer_bytes(&self, slot: usize) -> usize {
        self.layout.valid_bytes(self.slots[slot].valid_tokens) / self.layout.layers
    }

    /// The next frame: what is ready now, in order; empty when nothing is.
    pub(super) fn plan(&mut self) -> Vec<RunToSend> {
        let most = self.bounds.bytes + self.bounds.slack;
        let mut left = 0;
        for slot in self.first..self.slots.len() {
            left += self.ready(slot).len() * self.layer_bytes(slot);
            if left > most {
                left = self.bounds.bytes;
                break;
            }
        }
        let mut runs = Vec::new();
        for slot in self.first..self.slots.len() {
            let mut layers = self.ready(slot);
            if layers.is_empty() {
                continue;
            }
            // One layer travels whatever its size.
            let fit = (left / self.layer_bytes(slot)).max(usize::from(runs.is_empty()));
            layers.end = layers.end.min(layers.start + fit);
            if layers.is_empty() || runs.len() == self.bounds.runs {
                break;
            }
            left = left.saturating_sub(layers.len() * self.layer_bytes(slot));
            if self.end(slot) > self.computed {
                self.early_bytes += (layers.len() * self.layer_bytes(slot)) as u64;
            }
            self.slots[slot].planned = layers.end;
            runs.push(RunToSend {
                slot,
                generation: self.slots[slot].generation,
                block: self.table[self.held_blocks + slot],
                layers,
                valid_tokens: self.slots[slot].valid_tokens,
            });
        }
        while self
            .slots
            .get(self.first)
            .is_some_and(|slot| slot.planned == self.layout.layers)
        {
            self.first += 1;
        }
        runs
    }

    /// `run`, which was given out, is on its way; `sum` is of the bytes that were read. Runs of one slot come in their order.
    pub(super) fn sent(&mut self, run: &RunToSend, sum: Checksum) {
        let bytes = run.layers.len() * self.layer_bytes(run.slot);
        let slot = &mut self.slots[run.slot];
        assert!(
            run.layers.start == slot.read && run.layers.end <= slot.planned,
            "a run is sent once, and after those below it"
        );
        slot.sum = if slot.read == 0 { sum } else { slot.sum.then(sum, bytes) };
        slot.read = run.layers.end;
    }

    /// Everything was given out.
    pub(super) fn planned(&self) -> bool {
        self.first == self.slots.len()
    }

    /// Valid tokens and checksum of each slot, once everything is on its way.
    pub(super) fn sums(&self) -> Option<Vec<(usize, Checksum)>> {
        let all = self.slots.iter();
        all.map(|slot| (slot.read == self.layout.layers).then_some((slot.valid_tokens, slot.sum)))
            .collect()
    }

    /// The whole slot is to be sent again. Everything was sent before.
    pub(super) fn again(&mut self, slot: usize) {
        (self.slots[slot].planned, self.slots[slot].read) = (0, 0);
        self.first = self.first.min(slot);
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn early_bytes(&self) -> u64 {
        self.early_bytes
    }

    /// Payload of all slots.
    pub(super) fn bytes(&self) -> u64 {
        let bytes = |slot: &Slot| self.layout.valid_bytes(slot.valid_tokens) as u64;
        self.slots.iter().map(bytes).sum()
    }
}
