//! What the node lends to its handoff service.

use std::sync::Arc;

use baton_kv::{Checksum, KvMemory, Pool, Time};

use crate::{PieceHeader, Receiver, ReceiverAction, Reject, StreamId, Verdict, Verify, WritePermit};

/// The lock that guards receiver and pool, and the pool's memory.
pub trait ReceiverPort: Send + Sync + 'static {
    /// The bytes of the pool's blocks.
    fn memory(&self) -> &Arc<dyn KvMemory>;

    /// Takes the lock, calls `step` with the receiver, the pool, the time and an empty list, gives the lock back, and sees to it that the
    /// actions left in the list are carried out, in order. Short: `step` neither blocks nor copies blocks.
    fn locked<R>(&self, step: impl FnOnce(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>) -> R) -> R;
}

/// Copies one piece to its place, if it is invited and not here yet. Returns the sums to take if it was the last.
pub(super) fn write_piece<P: ReceiverPort>(
    port: &Arc<P>,
    stream: StreamId,
    piece: &PieceHeader,
    data: &[u8],
) -> Result<Option<PendingVerify<P>>, Reject> {
    let Some(permit) = port.locked(|receiver, _, now, _| receiver.begin_write(stream, piece, now))? else {
        return Ok(None);
    };
    let mut landing = Landing {
        port,
        permit: Some(permit),
    };
    let written = landing.copy(data);
    Ok(landing
        .end(written)
        .map(|verify| PendingVerify::new(port.clone(), verify)))
}

/// Gives its permit back even when the copy panics.
struct Landing<'a, P: ReceiverPort> {
    port: &'a Arc<P>,
    permit: Option<WritePermit>,
}

impl<P: ReceiverPort> Landing<'_, P> {
    fn copy(&self, data: &[u8]) -> bool {
        let permit = self.permit.as_ref().expect("given back only at the end");
        let layer_bytes = data.len() / permit.layers().len();
        permit
            .layers()
            .zip(data.chunks_exact(layer_bytes))
            .all(|(layer, piece)| {
                self.port
                    .memory()
                    .write(layer, permit.block(), permit.valid_tokens(), piece)
                    .is_ok()
            })
    }

    fn end(&mut self, written: bool) -> Option<Verify> {
        let permit = self.permit.take()?;
        self.port
            .locked(|receiver, pool, now, actions| receiver.landed(permit, written, now, pool, actions))
    }
}

impl<P: ReceiverPort> Drop for Landing<'_, P> {
    fn drop(&mut self) {
        self.end(false);
    }
}

/// Sums to take; given back even when it is dropped without having been run.
pub(super) struct PendingVerify<P: ReceiverPort> {
    port: Arc<P>,
    verify: Option<Verify>,
}

impl<P: ReceiverPort> PendingVerify<P> {
    pub(super) fn new(port: Arc<P>, verify: Verify) -> Self {
        Self {
            port,
            verify: Some(verify),
        }
    }

    /// Sums every block where it lies now. For a thread that may block.
    pub(super) fn run(mut self) -> Result<Verdict, Reject> {
        let mut scratch = Vec::new();
        let slots = self.verify.as_ref().expect("given back only at the end").slots();
        let sums: Result<Vec<Checksum>, _> = slots
            .iter()
            .map(|slot| Checksum::of_block(&**self.port.memory(), slot.block, slot.valid_tokens, &mut scratch))
            .collect();
        self.end(sums.ok().as_deref()).unwrap_or(Err(Reject::Aborted))
    }

    fn end(&mut self, sums: Option<&[Checksum]>) -> Option<Result<Verdict, Reject>> {
        let verify = self.verify.take()?;
        Some(
            self.port
                .locked(|receiver, pool, now, actions| receiver.sums(verify, sums, now, pool, actions)),
        )
    }
}

impl<P: ReceiverPort> Drop for PendingVerify<P> {
    fn drop(&mut self) {
        self.end(None);
    }
}
