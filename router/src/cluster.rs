//! The members and the queue, shared by the edges: drives [`crate::core::admission`].
//!
//! One lock, never held across an await; each event is a few table look-ups under it. What a request holds is given back by the drop of its [`Admitted`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use baton_kv::{Epoch, NodeId, RequestId, Time};
use baton_node::clock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, ClientTlsConfig};

use crate::{
    core::{
        admission::{Action, Admission, AdmissionConfig, Event, Refusal},
        member::{Hello, MemberId},
        members::{Expected, JoinError, Shape},
        placement::{Needs, Path},
        request::{Place, Placement},
    },
    error::GenerateError,
    limits, nodes,
};

/// Handle; clones are the same cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    ready: watch::Sender<bool>,
    /// What this router shows to nodes, and whom it believes; `None`: no TLS.
    tls: Option<ClientTlsConfig>,
}

struct State {
    admission: Admission,
    edges: HashMap<MemberId, Edge>,
    /// Where the answers of those go who wait or run.
    answers: HashMap<RequestId, mpsc::Sender<Answer>>,
    actions: Vec<Action>,
}

/// A member's connection, and its stream.
struct Edge {
    channel: Channel,
    epoch: Epoch,
    node: NodeId,
    /// A snapshot is wanted; one word suffices however often it is.
    snapshots: mpsc::Sender<()>,
    /// Cancelled when a newer announcement of the same node has replaced it.
    replaced: CancellationToken,
}

/// What becomes of a request that waits.
pub(crate) type Answer = Result<Placement, GenerateError>;

/// A request that waits or runs. Its drop gives back its place and its credits, wherever it is.
pub(crate) struct Admitted {
    cluster: Cluster,
    request: RequestId,
    /// One answer per wait.
    pub(crate) answers: mpsc::Receiver<Answer>,
}

/// A node that has joined. Its drop makes it leave.
pub(crate) struct Membership {
    cluster: Cluster,
    pub(crate) member: MemberId,
    /// Says that a snapshot is wanted.
    pub(crate) snapshots: mpsc::Receiver<()>,
    /// Cancelled when a newer announcement has taken its place.
    pub(crate) replaced: CancellationToken,
}

/// How to reach a member.
pub(crate) struct Reach {
    pub(crate) channel: Channel,
    pub(crate) epoch: Epoch,
}

impl Cluster {
    /// No members.
    pub(crate) fn new(config: AdmissionConfig, expected: Expected, tls: Option<ClientTlsConfig>) -> Self {
        let state = State {
            admission: Admission::new(config, expected),
            edges: HashMap::new(),
            answers: HashMap::new(),
            actions: Vec::new(),
        };
        let inner = Inner {
            state: Mutex::new(state),
            ready: watch::Sender::new(false),
            tls,
        };
        Self { inner: Arc::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at queue, members and index, e.g. for metrics.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Admission) -> T) -> T {
        look(&self.lock().admission)
    }

    /// What the members share.
    pub(crate) fn shape(&self) -> Option<Shape> {
        self.look(Admission::shape)
    }

    /// Whether a node can decode.
    pub(crate) fn ready(&self) -> bool {
        *self.inner.ready.borrow()
    }

    /// Sees every change of [`Cluster::ready`].
    pub(crate) fn watch_ready(&self) -> watch::Receiver<bool> {
        self.inner.ready.subscribe()
    }

    /// Takes in one event.
    pub(crate) fn step(&self, event: Event) {
        let mut state = self.lock();
        state.step(event, clock::now());
        self.tell_ready(&state);
    }

    fn tell_ready(&self, state: &State) {
        let ready = state.admission.ready();
        self.inner
            .ready
            .send_if_modified(|old| std::mem::replace(old, ready) != ready);
    }

    /// Takes a node in.
    pub(crate) fn join(&self, hello: Hello) -> Result<Membership, JoinError> {
        let channel = nodes::connect(&hello.address, self.inner.tls.as_ref())
            .map_err(|_| JoinError::Malformed("address must be host:port"))?;
        let (epoch, node) = (hello.epoch, hello.node.clone());
        let mut guard = self.lock();
        let state = &mut *guard;
        let joined = state.admission.join(hello)?;
        let (snapshots, wanted) = mpsc::channel(1);
        let replaced = CancellationToken::new();
        let edge = Edge {
            channel,
            epoch,
            node,
            snapshots,
            replaced: replaced.clone(),
        };
        state.edges.insert(joined.member, edge);
        if let Some(old) = joined.replaced.and_then(|old| state.edges.remove(&old)) {
            old.replaced.cancel();
        }
        self.tell_ready(state);
        Ok(Membership {
            cluster: self.clone(),
            member: joined.member,
            snapshots: wanted,
            replaced,
        })
    }

    /// How to reach a member; `None` when it has left.
    pub(crate) fn reach(&self, member: MemberId) -> Option<Reach> {
        let state = self.lock();
        let edge = state.edges.get(&member)?;
        Some(Reach {
            channel: edge.channel.clone(),
            epoch: edge.epoch,
        })
    }

    /// Lets a request's choices wait, the first until `deadline`, or refuses them at once. The first may have been granted already when this returns; the others
    /// are held until [`Event::Begun`].
    pub(crate) fn submit(
        &self,
        first: RequestId,
        others: Vec<RequestId>,
        needs: Needs,
        deadline: Time,
    ) -> Result<Vec<Admitted>, GenerateError> {
        let mut admitted: Vec<Admitted> = Vec::with_capacity(1 + others.len());
        let mut state = self.lock();
        for request in std::iter::once(first).chain(others.iter().copied()) {
            let (sender, answers) = mpsc::channel(1);
            state.answers.insert(request, sender);
            admitted.push(Admitted {
                cluster: self.clone(),
                request,
                answers,
            });
        }
        let submit = Event::Submit {
            request: first,
            others,
            needs,
            deadline,
        };
        state.step(submit, clock::now());
        let refused = !state.answers.contains_key(&first);
        // Those that are dropped lock it, too.
        drop(state);
        if !refused {
            return Ok(admitted);
        }
        match admitted[0].answers.try_recv() {
            Ok(Err(error)) => Err(error),
            _ => Err(GenerateError::Internal(
                "a request was dropped at its admission".to_owned(),
            )),
        }
    }
}

impl Admitted {
    /// Whose.
    pub(crate) fn request(&self) -> RequestId {
        self.request
    }
}

impl State {
    fn step(&mut self, event: Event, now: Time) {
        self.admission.step(event, now, &mut self.actions);
        self.act();
    }

    fn act(&mut self) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Granted { request, candidate } => {
                    if let (Some(placement), Some(answer)) =
                        (self.placement(candidate.path), self.answers.get(&request))
                    {
                        // Full or closed: its reader is about to post that it is done.
                        let _ = answer.try_send(Ok(placement));
                    }
                }
                Action::Refused { request, refusal } => {
                    if let Some(answer) = self.answers.remove(&request) {
                        let _ = answer.try_send(Err(refusal.into()));
                    }
                }
                Action::SnapshotWanted { member } => {
                    if let Some(edge) = self.edges.get(&member) {
                        // Full: it is being asked already.
                        let _ = edge.snapshots.try_send(());
                    }
                }
            }
        }
    }

    fn placement(&self, path: Path) -> Option<Placement> {
        let place = |member: MemberId| {
            let node = self.edges.get(&member)?.node.clone();
            Some(Place { member, node })
        };
        Some(match path {
            Path::Local { decode } => Placement {
                prefill: None,
                decode: place(decode)?,
            },
            Path::Handoff { prefill, decode } => Placement {
                prefill: Some(place(prefill)?),
                decode: place(decode)?,
            },
        })
    }
}

impl From<Refusal> for GenerateError {
    fn from(refusal: Refusal) -> Self {
        let bounded = |ms| Duration::from_millis(ms).clamp(limits::SHED_RETRY, limits::SHED_RETRY_MAX);
        match refusal {
            Refusal::QueueFull { limit, retry_ms } => Self::QueueFull {
                limit,
                retry_after: bounded(retry_ms),
            },
            Refusal::WouldWaitTooLong { retry_ms } => Self::QueueTimeout {
                retry_after: bounded(retry_ms),
            },
            Refusal::NoNodes => Self::NoNodes,
            Refusal::TooLarge { needed, largest } => Self::TooLargeForNodes { needed, largest },
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut state = self.cluster.lock();
        state.answers.remove(&self.request);
        let done = Event::Done { request: self.request };
        state.step(done, clock::now());
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.cluster.lock();
        state.edges.remove(&self.member);
        state.step(Event::Leave { member: self.member }, clock::now());
        self.cluster.tell_ready(&state);
    }
}
