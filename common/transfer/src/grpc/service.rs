//! The decode node's end of a push.

use std::sync::Arc;

use baton_kv::{KvMemory, Pool, Time};
use baton_proto::node::v1::{self as pb, handoff_server};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use crate::{Receiver, ReceiverAction, Reject, StreamId};

/// What the node lends to its handoff service: the lock that guards receiver and pool, and the pool's memory.
pub trait ReceiverPort: Send + Sync + 'static {
    /// The bytes of the pool's blocks.
    fn memory(&self) -> &Arc<dyn KvMemory>;

    /// Takes the lock, calls `f` once with the receiver, the pool, the time and an empty list, gives the lock back, and sees to it that the
    /// actions left in the list are carried out, in order. Short: `f` neither blocks nor copies blocks.
    fn locked(&self, f: &mut dyn FnMut(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>));
}

/// The open push streams, so that the node can close one ([`ReceiverAction::Fence`]). Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Fences {
    _private: (),
}

#[allow(unused_variables, clippy::todo)]
impl Fences {
    /// Closes the stream from this side and tells the peer why. A stream that is gone is ignored. May be called anywhere; never blocks.
    pub fn fence(&self, stream: StreamId, reject: Reject) {
        todo!()
    }
}

/// Serves `baton.node.v1.Handoff` over a node's [`ReceiverPort`].
pub struct HandoffService<P> {
    port: Arc<P>,
    fences: Fences,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

#[allow(unused_variables, clippy::todo)]
impl<P: ReceiverPort> HandoffService<P> {
    /// Streams run on `tasks` and are closed when `shutdown` is cancelled. `fences` are those that carry out the port's `Fence` actions.
    pub fn new(port: Arc<P>, fences: Fences, tasks: TaskTracker, shutdown: CancellationToken) -> Self {
        Self {
            port,
            fences,
            tasks,
            shutdown,
        }
    }

    /// The tonic service, with its message limits; serve it on a [`super::configure_server`] server.
    pub fn into_server(self) -> handoff_server::HandoffServer<Self> {
        handoff_server::HandoffServer::new(self).max_decoding_message_size(crate::limits::MESSAGE_BYTES)
    }
}

#[allow(unused_variables, clippy::todo)]
#[tonic::async_trait]
impl<P: ReceiverPort> handoff_server::Handoff for HandoffService<P> {
    type PushStream = tokio_stream::wrappers::ReceiverStream<Result<pb::PushReply, Status>>;

    async fn push(&self, request: Request<Streaming<pb::PushFrame>>) -> Result<Response<Self::PushStream>, Status> {
        todo!()
    }
}
