//! Which layers of which slots have landed.

use std::ops::Range;

/// One layer of one slot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    Missing,
    /// A permit for it is out.
    Writing,
    Landed,
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

/// `[slot][layer]`.
pub(super) struct Fill {
    layers: usize,
    cells: Vec<Layer>,
    /// Cells that have not landed.
    missing: usize,
}

impl Fill {
    pub(super) fn new(slots: usize, layers: usize) -> Self {
        Self {
            layers,
            cells: vec![Layer::Missing; slots * layers],
            missing: slots * layers,
        }
    }

    fn row(&mut self, slot: usize, layers: &Range<usize>) -> &mut [Layer] {
        let start = slot * self.layers;
        &mut self.cells[start + layers.start..start + layers.end]
    }

    pub(super) fn begin(&mut self, slot: usize, layers: &Range<usize>) -> Begin {
        let row = self.row(slot, layers);
        let missing = row.iter().filter(|layer| **layer == Layer::Missing).count();
        if missing == 0 {
            return Begin::Duplicate;
        }
        if missing < row.len() {
            return Begin::Overlap;
        }
        row.fill(Layer::Writing);
        Begin::Write
    }

    pub(super) fn landed(&mut self, slot: usize, layers: &Range<usize>) {
        let row = self.row(slot, layers);
        assert!(
            row.iter().all(|layer| *layer == Layer::Writing),
            "a permit covers layers that are being written"
        );
        row.fill(Layer::Landed);
        self.missing -= layers.len();
    }

    /// The whole slot is wanted again. Nothing of it may be being written.
    pub(super) fn reset(&mut self, slot: usize) {
        let layers = 0..self.layers;
        let row = self.row(slot, &layers);
        assert!(
            row.iter().all(|layer| *layer == Layer::Landed),
            "only a complete slot is asked for again"
        );
        row.fill(Layer::Missing);
        self.missing += layers.len();
    }

    pub(super) fn complete(&self) -> bool {
        self.missing == 0
    }
}
