//! What the node lends to its handoff service.

use std::sync::Arc;

use baton_kv::{Checksum, ChecksumState, KvMemory, KvMemoryError, Pool, Time};

use crate::{PieceSource, PieceWrite, PiecesHeader, Receiver, ReceiverAction, Reject, StreamId, Verdict, WritePermit};

/// The lock that guards receiver and pool, and the pool's memory.
pub trait ReceiverPort: Send + Sync + 'static {
    /// The bytes of the pool's blocks.
    fn memory(&self) -> &Arc<dyn KvMemory>;

    /// Takes the lock, calls `step` with the receiver, the pool, the time and an empty list, gives the lock back, and sees to it that the
    /// actions left in the list are carried out, in order. Short: `step` neither blocks nor copies blocks.
    fn locked<R>(&self, step: impl FnOnce(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>) -> R) -> R;
}

/// Copies what a frame brought to its place, as far as it is invited and not here yet, and sums it where it lies. Returns the verdict if it was the last.
pub(super) fn write_pieces<P: ReceiverPort>(
    port: &Arc<P>,
    stream: StreamId,
    frame: &PiecesHeader,
    source: &mut dyn PieceSource,
) -> Result<Option<Verdict>, Reject> {
    let Some(permit) = port.locked(|receiver, _, now, _| receiver.begin_write(stream, frame, now))? else {
        return Ok(None);
    };
    let mut landing = Landing {
        port,
        permit: Some(permit),
    };
    let sums = landing.copy(source);
    landing.end(sums.ok().as_deref()).transpose()
}

/// Gives its permit back even when the copy panics.
struct Landing<'a, P: ReceiverPort> {
    port: &'a Arc<P>,
    permit: Option<WritePermit>,
}

impl<P: ReceiverPort> Landing<'_, P> {
    /// The checksums of what lies there afterwards.
    fn copy(&self, source: &mut dyn PieceSource) -> Result<Vec<Checksum>, KvMemoryError> {
        let permit = self.permit.as_ref().expect("given back only at the end");
        let memory = &**self.port.memory();
        let mut scratch = Vec::new();
        let mut copy = |write: &PieceWrite| {
            let mut sum = ChecksumState::default();
            for layer in write.layers() {
                source.copy(write, layer, memory)?;
                // While it is in the processor's caches.
                sum.add_piece(memory, layer, write.block(), write.valid_tokens(), &mut scratch)?;
            }
            Ok(sum.finish())
        };
        permit.writes().iter().map(&mut copy).collect()
    }

    fn end(&mut self, sums: Option<&[Checksum]>) -> Option<Result<Verdict, Reject>> {
        let permit = self.permit.take()?;
        self.port
            .locked(|receiver, pool, now, actions| receiver.landed(permit, sums, now, pool, actions))
    }
}

impl<P: ReceiverPort> Drop for Landing<'_, P> {
    fn drop(&mut self) {
        self.end(None);
    }
}
