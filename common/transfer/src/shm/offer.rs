//! The prefill node's end: who says the token gets the pool's file, for reading.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_kv::{Epoch, KvMemory, MemoryFile};
use baton_proto::node::v1 as pb;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::Directory;
use crate::{Capability, limits};

/// Why a pool is not offered. The node goes on without.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The pool does not lie in a file of memory.
    #[error("the KV pool does not lie in shared memory")]
    NotShared,
    /// The pool's file cannot be opened again, or the socket cannot be made.
    #[error("the KV pool cannot be offered: {0}")]
    System(#[from] io::Error),
}

/// A pool on offer, until its shutdown token is cancelled.
#[derive(Clone, Debug)]
pub struct Offer {
    message: pb::SharedPool,
}

impl Offer {
    /// Offers `memory`'s file at a socket in `directory` that is named after this process's `epoch`. Must be called on a runtime.
    pub fn open(
        directory: &Directory,
        epoch: Epoch,
        token: Capability,
        memory: &dyn KvMemory,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, OfferError> {
        let shared = memory.shared().ok_or(OfferError::NotShared)?;
        let file = MemoryFile::reader(shared.file)?;
        let (listener, path) = directory.listen(&format!("{epoch}.sock"))?;
        let socket = SocketFile(path);
        let message = pb::SharedPool {
            socket: path_text(&socket.0)?,
            token: token.as_bytes().to_vec(),
            blocks: shared.blocks as u32,
        };
        let server = Server {
            listener: UnixListener::from_std(listener)?,
            file: Arc::new(file),
            token,
            connections: Arc::new(Semaphore::new(limits::MAX_PEERS)),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = server.run() => {}
            }
            drop(socket);
        });
        Ok(Self { message })
    }

    /// For [`pb::PeerHello`].
    pub fn to_proto(&self) -> pb::SharedPool {
        self.message.clone()
    }
}

fn path_text(path: &Path) -> io::Result<String> {
    Ok(path.to_str().ok_or(io::ErrorKind::InvalidFilename)?.to_owned())
}

/// Removed on drop.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Server {
    listener: UnixListener,
    file: Arc<OwnedFd>,
    token: Capability,
    connections: Arc<Semaphore>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Server {
    async fn run(self) {
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a peer could not be given the KV pool's file");
                    sleep(Duration::from_millis(limits::SHM_ACCEPT_PAUSE_MS)).await;
                    continue;
                }
            };
            let Ok(permit) = self.connections.clone().try_acquire_owned() else {
                continue;
            };
            let (file, token, shutdown) = (self.file.clone(), self.token.clone(), self.shutdown.clone());
            self.tasks.spawn(async move {
                tokio::select! {
                    () = shutdown.cancelled() => {}
                    () = serve(stream, &file, &token) => {}
                }
                drop(permit);
            });
        }
    }
}

/// One peer: its token, the file, and then its end, which ends this one, too.
async fn serve(mut stream: UnixStream, file: &OwnedFd, token: &Capability) {
    let mut said = [0; 32];
    let by = Duration::from_millis(limits::SHM_FETCH_MS);
    match timeout(by, stream.read_exact(&mut said)).await {
        Ok(Ok(_)) if token.matches(&Capability::new(said)) => {}
        _ => return,
    }
    if let Ok(Ok(())) = timeout(by, send(&stream, std::slice::from_ref(file))).await {
        let _ = stream.read(&mut said).await;
    }
}

/// One byte, and the files (one, but for tests) with it.
pub(super) async fn send(stream: &UnixStream, files: &[OwnedFd]) -> io::Result<()> {
    stream
        .async_io(Interest::WRITABLE, || {
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(files.len()))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(
                control.push(SendAncillaryMessage::ScmRights(&files)),
                "the space is for them"
            );
            sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        })
        .await
}
