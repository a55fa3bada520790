//! The decode node's end: another process's pool, mapped for reading.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_kv::{BlockId, ChecksumState, ForeignMemory, ForeignMemoryError, KvLayout};
use baton_proto::node::v1 as pb;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
    time::timeout,
};

use super::Directory;
use crate::limits;

/// What a probe copies before it sums it, as pieces are.
const PART_BYTES: usize = 64 << 10;

/// Why an offered pool cannot be used. Nothing was changed; the pair can go on over gRPC.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    /// The token is not 32 bytes.
    #[error("the offer is malformed")]
    Offer,
    /// The socket does not lie in this node's own directory (`--shm-dir`): another user's, another host's, or another directory was given.
    #[error("the peer's socket is not in this node's directory: another user, another host, or another --shm-dir")]
    Elsewhere,
    /// So many blocks that their bytes cannot be counted, or none.
    #[error("the offered pool has an impossible size")]
    Blocks,
    /// Nobody listens there: another host, or a container with a directory of its own, most likely.
    #[error("the peer's socket cannot be reached, as if it were on another host: {0}")]
    Unreachable(io::Error),
    /// The peer did not answer in time, or this node could not probe what it gave.
    #[error("the peer's pool was not mapped and probed in time")]
    Timeout,
    /// The peer closed the connection, broke it, or sent something else than one file.
    #[error("the peer did not hand over its pool")]
    Refused,
    /// The file cannot be trusted, or mapped.
    #[error("the peer's pool cannot be mapped: {0}")]
    Memory(#[from] ForeignMemoryError),
}

impl ShmError {
    /// The stable code, for [`pb::PeerWelcome::shared_refused`].
    pub fn code(&self) -> &'static str {
        match self {
            Self::Offer => "SHM_OFFER",
            Self::Elsewhere => "SHM_ELSEWHERE",
            Self::Blocks => "SHM_BLOCKS",
            Self::Unreachable(_) => "SHM_UNREACHABLE",
            Self::Timeout => "SHM_TIMEOUT",
            Self::Refused => "SHM_REFUSED",
            Self::Memory(ForeignMemoryError::NotMemory) => "SHM_NOT_MEMORY",
            Self::Memory(ForeignMemoryError::NotSealed) => "SHM_NOT_SEALED",
            Self::Memory(ForeignMemoryError::Size { .. }) => "SHM_SIZE",
            Self::Memory(ForeignMemoryError::System(_)) => "SHM_SYSTEM",
        }
    }
}

/// A peer's pool. Stays readable after the peer has died.
pub struct Mapping {
    memory: ForeignMemory,
    layout: KvLayout,
    blocks: usize,
    /// Closed by the peer when it goes.
    pub(super) peer: Arc<UnixStream>,
}

impl Mapping {
    /// Asks at the offer's socket, which must lie in `directory`, and maps what it gives; `layout` is the peer's, and this node's. Must be called on a
    /// runtime. Cancel-safe: nothing stays.
    pub async fn fetch(directory: &Directory, offer: &pb::SharedPool, layout: &KvLayout) -> Result<Self, ShmError> {
        let path = directory.admits(&offer.socket).ok_or(ShmError::Elsewhere)?;
        if offer.token.len() != 32 {
            return Err(ShmError::Offer);
        }
        let blocks = offer.blocks as usize;
        let bytes = layout.block_bytes().checked_mul(blocks).ok_or(ShmError::Blocks)?;
        if bytes == 0 {
            return Err(ShmError::Blocks);
        }
        let asked = ask(&path, &offer.token);
        let (peer, file) = timeout(Duration::from_millis(limits::SHM_FETCH_MS), asked)
            .await
            .map_err(|_| ShmError::Timeout)??;
        Ok(Self {
            memory: ForeignMemory::open(file, bytes)?,
            layout: *layout,
            blocks,
            peer: Arc::new(peer),
        })
    }

    /// Whether `block` is one of the pool's.
    pub(crate) fn holds(&self, block: BlockId) -> bool {
        (block.0 as usize) < self.blocks
    }

    /// A whole block's piece; `None` outside of the pool.
    ///
    /// # Safety
    /// The peer may write it at any time: it may only be copied, and whatever depends on it is decided by the copy.
    pub(super) unsafe fn piece(&self, layer: usize, block: BlockId) -> Option<&[u8]> {
        if layer >= self.layout.layers || !self.holds(block) {
            return None;
        }
        let len = self.layout.layer_block_bytes();
        // SAFETY: the caller only copies.
        unsafe { self.memory.bytes((layer * self.blocks + block.0 as usize) * len, len) }
    }

    /// Bytes per second at which a thread copies from it into memory of its own and sums the copy, measured now: the best of some passes, of which
    /// others may have disturbed one. For a thread that may block: takes some 10 ms, and pages of the peer's pool.
    pub fn copy_rate(&self) -> f64 {
        let bytes = self.memory.len().min(limits::SHM_PROBE_BYTES);
        let mut copied = vec![0; bytes];
        let mut pass = || {
            // SAFETY: copied.
            let from = unsafe { self.memory.bytes(0, bytes) }.expect("within the file");
            let started = Instant::now();
            let mut sum = ChecksumState::default();
            for (from, to) in from.chunks(PART_BYTES).zip(copied.chunks_mut(PART_BYTES)) {
                to.copy_from_slice(from);
                sum.update(to);
            }
            std::hint::black_box(sum.finish());
            started.elapsed().as_secs_f64()
        };
        // The first pass takes the pages.
        pass();
        let seconds = (0..limits::SHM_PROBE_PASSES)
            .map(|_| pass())
            .fold(f64::INFINITY, f64::min);
        bytes as f64 / seconds.max(f64::EPSILON)
    }
}

/// Says the token; returns what came back.
async fn ask(path: &Path, token: &[u8]) -> Result<(UnixStream, OwnedFd), ShmError> {
    let mut peer = UnixStream::connect(path).await.map_err(ShmError::Unreachable)?;
    peer.write_all(token).await.map_err(|_| ShmError::Refused)?;
    let file = peer
        .async_io(Interest::READABLE, || receive(&peer))
        .await
        .map_err(|_| ShmError::Refused)?;
    Ok((peer, file.ok_or(ShmError::Refused)?))
}

/// One byte and exactly one file.
fn receive(peer: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    // Room for a second one, so that it is seen (and closed).
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        peer,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut files: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    let one = received.bytes == 1 && files.len() == 1;
    Ok(if one { files.pop() } else { None })
}
