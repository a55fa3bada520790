//! Which runs of layers of which slots have landed, and the checksums of what lies there.

use std::ops::Range;

use baton_kv::Checksum;

/// Layers of one slot.
struct Part {
    layers: Range<usize>,
    /// Of the bytes where they lie; none while a permit is out.
    sum: Option<Checksum>,
}

/// What [`Fill::begin`] found.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Begin {
    /// Nobody writes there; marked as being written.
    Write,
    /// All of it has landed or is being written.
    Duplicate,
    /// Some of it, and not the rest.
    Overlap,
}

/// Per slot its parts in layer order, which do not overlap; neighbours that have landed are one part.
pub(super) struct Fill {
    layers: usize,
    slots: Vec<Vec<Part>>,
    /// Slots of which every layer has landed.
    complete: usize,
}

impl Fill {
    pub(super) fn new(slots: usize, layers: usize) -> Self {
        Self {
            layers,
            slots: (0..slots).map(|_| Vec::new()).collect(),
            complete: 0,
        }
    }

    pub(super) fn begin(&mut self, slot: usize, layers: &Range<usize>) -> Begin {
        let parts = &mut self.slots[slot];
        let shared = |part: &Part| {
            let end = part.layers.end.min(layers.end);
            end.saturating_sub(part.layers.start.max(layers.start))
        };
        let known: usize = parts.iter().map(shared).sum();
        if known == layers.len() {
            return Begin::Duplicate;
        }
        if known > 0 {
            return Begin::Overlap;
        }
        let at = parts.partition_point(|part| part.layers.start < layers.start);
        let (layers, sum) = (layers.clone(), None);
        parts.insert(at, Part { layers, sum });
        Begin::Write
    }

    /// Takes a [`Begin::Write`] back: nothing was written.
    pub(super) fn undo(&mut self, slot: usize, layers: &Range<usize>) {
        let at = self.writing(slot, layers);
        self.slots[slot].remove(at);
    }

    /// The layers, of `layer_bytes` each, are written, and `sum` is what lies there now.
    pub(super) fn landed(&mut self, slot: usize, layers: &Range<usize>, layer_bytes: usize, sum: Checksum) {
        let at = self.writing(slot, layers);
        let parts = &mut self.slots[slot];
        parts[at].sum = Some(sum);
        for first in [at, at.wrapping_sub(1)] {
            if let Some([low, high]) = parts.get(first..first.saturating_add(2))
                && low.layers.end == high.layers.start
                && let (Some(below), Some(above)) = (low.sum, high.sum)
            {
                let sum = Some(below.then(above, high.layers.len() * layer_bytes));
                let layers = low.layers.start..high.layers.end;
                parts.splice(first..first + 2, [Part { layers, sum }]);
            }
        }
        self.complete += usize::from(self.sum(slot).is_some());
    }

    /// The whole slot is wanted again. Nothing of it may be being written.
    pub(super) fn reset(&mut self, slot: usize) {
        assert!(self.sum(slot).is_some(), "only a complete slot is asked for again");
        self.slots[slot].clear();
        self.complete -= 1;
    }

    /// Of all the layers of a slot, once they have landed.
    pub(super) fn sum(&self, slot: usize) -> Option<Checksum> {
        match self.slots[slot].as_slice() {
            [part] if part.layers == (0..self.layers) => part.sum,
            _ => None,
        }
    }

    pub(super) fn complete(&self) -> bool {
        self.complete == self.slots.len()
    }

    /// The part that a permit is out for.
    fn writing(&self, slot: usize, layers: &Range<usize>) -> usize {
        let parts = self.slots[slot].iter();
        let at = parts
            .enumerate()
            .find(|(_, part)| part.layers == *layers && part.sum.is_none());
        at.expect("a permit covers layers that are being written").0
    }
}
