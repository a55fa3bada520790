//! Who may come in, who waits, and who goes where: the router's queue over its members' credits.
//!
//! ```text
//! submit ──▶ waiting (FIFO) ──credit──▶ dispatched ──done──▶ forgotten
//!    │          │  ▲                        │
//!    └─ refused    └──── requeue, in front ─┘   (a node had no room after all)
//! ```
//!
//! A request may have several choices, each a unit of its own: the first goes through all of this, and the others are held until it has its first token. Then they
//! wait in front of all, since they came before them, and go best beside it.
//!
//! A request is refused at its submission or never, and granted at most once per wait; nodes that go may come back, so that a request which waits does so until
//! its deadline, which is its submitter's to keep. Its credits end with it: whoever submits it posts [`Event::Done`] at its end, always.

use std::collections::{BTreeMap, HashMap};

use baton_kv::{RequestId, Time};

use super::{
    member::{Credit, Hello, Load, MemberId, Role},
    members::{Expected, JoinError, Joined, Members, Shape},
    pairs::Travelled,
    placement::{self, Candidate, Needs, Path, PlacementConfig, Possible},
    prefix_index::{KvReport, PrefixIndex},
};

/// Weight of a new sample in the moving average of the time per place in the queue.
const WAIT_WEIGHT: f64 = 0.2;

/// Requests that are looked at when there is no room for the first: as many as keep nodes busy beside a large one that waits for much to be free.
const LOOKS: usize = 8;

/// Later requests that may pass one that waits: then what becomes free is kept for it.
const PASSES: u32 = 64;

/// Bounds of the queue, and how requests are placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdmissionConfig {
    /// Requests that may wait, each choice counted; one more is refused at once.
    pub max_queue: usize,
    /// Bytes of the prefix index.
    pub prefix_index_bytes: usize,
    /// Which requests a decode node runs itself.
    pub placement: PlacementConfig,
}

/// One leg of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Leg {
    /// On a prefill node.
    Prefill,
    /// On a decode node.
    Decode,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// A request wants in.
    Submit {
        /// Its id, unused so far; that of its first choice, if there are more.
        request: RequestId,
        /// Its further choices, each under an id of its own.
        others: Vec<RequestId>,
        /// What each needs.
        needs: Needs,
        /// Until when it will wait.
        deadline: Time,
    },
    /// The first choice has a token: where it decodes, its prompt's KV lies, and the others may follow.
    Begun {
        /// The first choice.
        request: RequestId,
    },
    /// `by` had no room after all: the request gives its credits back and waits again, in front.
    Requeue {
        /// Whose.
        request: RequestId,
        /// Which node.
        by: MemberId,
    },
    /// The leg's node has the dispatch: its next report shows it.
    Acknowledged {
        /// Whose.
        request: RequestId,
        /// Which.
        leg: Leg,
    },
    /// A request's KV has travelled.
    Travelled {
        /// From there.
        prefill: MemberId,
        /// To there.
        decode: MemberId,
        /// How.
        travelled: Travelled,
    },
    /// The leg is over: its credit comes back.
    Settled {
        /// Whose.
        request: RequestId,
        /// Which.
        leg: Leg,
    },
    /// The request has ended, wherever it was. Unknown ids are ignored.
    Done {
        /// Whose.
        request: RequestId,
    },
    /// A member's report.
    Load {
        /// Whose.
        member: MemberId,
        /// The report.
        load: Load,
    },
    /// A member's blocks.
    Kv {
        /// Whose.
        member: MemberId,
        /// The report.
        report: KvReport,
    },
    /// A member's stream ended.
    Leave {
        /// Whose.
        member: MemberId,
    },
}

/// What the driver must do.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// The request goes here; its credits are taken.
    Granted {
        /// Whose.
        request: RequestId,
        /// Where, and why.
        candidate: Candidate,
    },
    /// The request that was just submitted cannot come in, and is forgotten.
    Refused {
        /// Whose.
        request: RequestId,
        /// Why.
        refusal: Refusal,
    },
    /// The member's blocks are no longer known: ask for a snapshot.
    SnapshotWanted {
        /// Whose.
        member: MemberId,
    },
}

/// Why a request was not admitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// `max_queue` wait already.
    QueueFull {
        /// `max_queue`.
        limit: usize,
        /// When there should be room.
        retry_ms: u64,
    },
    /// By the present pace its turn would come too late.
    WouldWaitTooLong {
        /// When the queue should be shorter.
        retry_ms: u64,
    },
    /// No decode node is ready.
    NoNodes,
    /// Larger than every decode node.
    TooLarge {
        /// Blocks it needs.
        needed: u64,
        /// Blocks of the largest node.
        largest: u64,
    },
}

#[derive(Debug)]
struct Request {
    needs: Needs,
    state: State,
    /// Further choices that are held for this one.
    others: Vec<RequestId>,
}

#[derive(Debug)]
enum State {
    /// Until the first choice has begun.
    Held,
    Waiting {
        place: i64,
        since: Time,
        before: usize,
        /// By how many later ones.
        passed: u32,
    },
    Dispatched {
        prefill: Option<Credit>,
        decode: Option<Credit>,
    },
}

impl State {
    fn waiting(place: i64, since: Time, before: usize) -> Self {
        Self::Waiting {
            place,
            since,
            before,
            passed: 0,
        }
    }
}

/// Queue, members and prefix index.
#[derive(Debug)]
pub struct Admission {
    config: AdmissionConfig,
    members: Members,
    index: PrefixIndex,
    requests: HashMap<RequestId, Request>,
    /// By place; a requeued request, or one that was held, takes one before the first.
    queue: BTreeMap<i64, RequestId>,
    next_place: i64,
    /// Requests that are [`State::Held`].
    held: usize,
    /// Moving average: milliseconds waited per request in front.
    place_ms: Option<f64>,
}

impl Admission {
    /// Nobody waits, no members.
    pub fn new(config: AdmissionConfig, expected: Expected) -> Self {
        Self {
            config,
            members: Members::new(expected),
            index: PrefixIndex::new(config.prefix_index_bytes),
            requests: HashMap::new(),
            queue: BTreeMap::new(),
            next_place: 0,
            held: 0,
            place_ms: None,
        }
    }

    /// Takes a node in. It gets requests after its first load report.
    pub fn join(&mut self, hello: Hello) -> Result<Joined, JoinError> {
        let epoch = hello.epoch;
        let joined = self.members.join(hello)?;
        self.index.join(joined.member, epoch);
        if let Some(replaced) = joined.replaced {
            self.index.leave(replaced);
        }
        Ok(joined)
    }

    /// Takes in one event.
    pub fn step(&mut self, event: Event, now: Time, actions: &mut Vec<Action>) {
        match event {
            Event::Submit {
                request,
                others,
                needs,
                deadline,
            } => self.submit(request, others, needs, deadline, now, actions),
            Event::Begun { request } => self.begun(request, now),
            Event::Requeue { request, by } => self.requeue(request, by, now),
            Event::Acknowledged { request, leg } => return self.acknowledged(request, leg),
            Event::Travelled {
                prefill,
                decode,
                travelled,
            } => return self.members.travelled(prefill, decode, travelled),
            Event::Settled { request, leg } => self.settled(request, leg),
            Event::Done { request } => self.done(request),
            Event::Load { member, load } => {
                let Some(member) = self.members.get_mut(member) else {
                    return;
                };
                member.report(load);
            }
            Event::Kv { member, report } => {
                if self.index.report(member, report) {
                    actions.push(Action::SnapshotWanted { member });
                }
                return;
            }
            Event::Leave { member } => {
                self.members.leave(member);
                self.index.leave(member);
            }
        }
        self.dispatch(now, actions);
    }

    fn submit(
        &mut self,
        request: RequestId,
        others: Vec<RequestId>,
        needs: Needs,
        deadline: Time,
        now: Time,
        actions: &mut Vec<Action>,
    ) {
        if let Err(refusal) = self.admissible(&needs, 1 + others.len(), deadline, now) {
            return actions.push(Action::Refused { request, refusal });
        }
        let place = self.next_place;
        self.next_place += 1;
        for &other in &others {
            self.insert(other, needs.clone(), State::Held, Vec::new());
        }
        self.held += others.len();
        let state = State::waiting(place, now, self.queue.len());
        self.insert(request, needs, state, others);
        self.queue.insert(place, request);
    }

    fn insert(&mut self, id: RequestId, needs: Needs, state: State, others: Vec<RequestId>) {
        let request = Request { needs, state, others };
        let old = self.requests.insert(id, request);
        debug_assert!(old.is_none(), "request ids are drawn at random, once each");
    }

    fn begun(&mut self, request: RequestId, now: Time) {
        let Some(first) = self.requests.get_mut(&request) else {
            return;
        };
        let beside = match first.state {
            State::Dispatched { decode, .. } => decode.map(|credit| credit.member),
            State::Held | State::Waiting { .. } => None,
        };
        // From the last on, so that they stand in their order.
        for id in std::mem::take(&mut first.others).into_iter().rev() {
            let place = self.front();
            let Some(other) = self.requests.get_mut(&id) else {
                continue;
            };
            if matches!(other.state, State::Held) {
                other.needs.beside = beside;
                other.state = State::waiting(place, now, 0);
                self.queue.insert(place, id);
                self.held -= 1;
            }
        }
    }

    fn admissible(&self, needs: &Needs, choices: usize, deadline: Time, now: Time) -> Result<(), Refusal> {
        self.placeable(needs)?;
        let retry_ms = self.expected_wait_ms();
        if self.queue.len() + self.held + choices > self.config.max_queue {
            let limit = self.config.max_queue;
            return Err(Refusal::QueueFull { limit, retry_ms });
        }
        if now.after_ms(retry_ms) > deadline {
            return Err(Refusal::WouldWaitTooLong { retry_ms });
        }
        Ok(())
    }

    fn placeable(&self, needs: &Needs) -> Result<(), Refusal> {
        match placement::possible(needs, &self.members) {
            Possible::Yes => Ok(()),
            Possible::NoNodes => Err(Refusal::NoNodes),
            Possible::TooLarge { needed, largest } => Err(Refusal::TooLarge { needed, largest }),
        }
    }

    /// How long a new request would wait, by the pace of those before it.
    pub fn expected_wait_ms(&self) -> u64 {
        (self.place_ms.unwrap_or(0.0) * self.queue.len() as f64) as u64
    }

    fn requeue(&mut self, id: RequestId, by: MemberId, now: Time) {
        if let Some(member) = self.members.get_mut(by) {
            member.refused();
        }
        let place = self.front();
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        if let State::Dispatched { prefill, decode } = request.state {
            request.state = State::waiting(place, now, 0);
            self.queue.insert(place, id);
            for credit in [prefill, decode].into_iter().flatten() {
                self.members.give_back(credit);
            }
        }
    }

    /// A place before all that wait.
    fn front(&mut self) -> i64 {
        let first = self.queue.first_key_value();
        let place = first.map_or(self.next_place, |(first, _)| first - 1);
        self.next_place = self.next_place.max(place + 1);
        place
    }

    fn credit(&mut self, request: RequestId, leg: Leg) -> Option<&mut Option<Credit>> {
        match (&mut self.requests.get_mut(&request)?.state, leg) {
            (State::Dispatched { prefill, .. }, Leg::Prefill) => Some(prefill),
            (State::Dispatched { decode, .. }, Leg::Decode) => Some(decode),
            (State::Held | State::Waiting { .. }, _) => None,
        }
    }

    fn acknowledged(&mut self, request: RequestId, leg: Leg) {
        let Some(Some(mut credit)) = self.credit(request, leg).copied() else {
            return;
        };
        self.members.acknowledge(&mut credit);
        if let Some(slot) = self.credit(request, leg) {
            *slot = Some(credit);
        }
    }

    fn settled(&mut self, request: RequestId, leg: Leg) {
        if let Some(credit) = self.credit(request, leg).and_then(Option::take) {
            self.members.give_back(credit);
        }
    }

    fn done(&mut self, request: RequestId) {
        match self.requests.remove(&request).map(|request| request.state) {
            Some(State::Held) => self.held -= 1,
            Some(State::Waiting { place, .. }) => {
                self.queue.remove(&place);
            }
            Some(State::Dispatched { prefill, decode }) => {
                for credit in [prefill, decode].into_iter().flatten() {
                    self.members.give_back(credit);
                }
            }
            None => {}
        }
    }

    /// First come, first served, but while there is no room for a large one, smaller ones pass: a few at a time, and so many in all.
    fn dispatch(&mut self, now: Time, actions: &mut Vec<Action>) {
        let mut blocked: Vec<RequestId> = Vec::new();
        let mut after = i64::MIN;
        while let Some((&place, &id)) = self.queue.range(after..).next() {
            after = place + 1;
            let needs = &self.requests[&id].needs;
            let found = placement::candidates(needs, &self.members, &self.index, &self.config.placement);
            let Some(candidate) = found.into_iter().next() else {
                blocked.push(id);
                if blocked.len() == LOOKS || self.passed(id).is_none_or(|passed| *passed >= PASSES) {
                    return;
                }
                continue;
            };
            self.queue.remove(&place);
            self.grant(id, candidate, now);
            actions.push(Action::Granted { request: id, candidate });
            let mut spent = false;
            for id in &blocked {
                if let Some(passed) = self.passed(*id) {
                    *passed += 1;
                    spent |= *passed >= PASSES;
                }
            }
            if spent {
                return;
            }
        }
    }

    fn passed(&mut self, request: RequestId) -> Option<&mut u32> {
        match &mut self.requests.get_mut(&request)?.state {
            State::Waiting { passed, .. } => Some(passed),
            State::Held | State::Dispatched { .. } => None,
        }
    }

    fn grant(&mut self, id: RequestId, candidate: Candidate, now: Time) {
        if let Some(request) = self.requests.get(&id) {
            let (Path::Local { decode: first } | Path::Handoff { prefill: first, .. }) = candidate.path;
            self.index.used(first, &request.needs.names);
            if let Path::Handoff { decode, .. } = candidate.path {
                self.index.used(decode, &request.needs.names);
            }
        }
        let tokens = candidate.uncached_tokens as u64;
        let (prefill, decode) = match candidate.path {
            Path::Local { decode } => (None, self.members.take(decode, candidate.decode_blocks, tokens)),
            Path::Handoff { prefill, decode } => (
                self.members.take(prefill, 0, tokens),
                self.members.take(decode, candidate.decode_blocks, 0),
            ),
        };
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let dispatched = State::Dispatched { prefill, decode };
        if let State::Waiting { since, before, .. } = std::mem::replace(&mut request.state, dispatched) {
            let sample = (now.0 - since.0.min(now.0)) as f64 / 1_000.0 / (before + 1) as f64;
            let old = self.place_ms.unwrap_or(sample);
            self.place_ms = Some(old + WAIT_WEIGHT * (sample - old));
        }
    }

    /// Requests that wait for a node; choices that are held for their first do not.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Requests that are held, wait or run, each choice counted.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// The members.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Who holds what.
    pub fn index(&self) -> &PrefixIndex {
        &self.index
    }

    /// What the members share.
    pub fn shape(&self) -> Option<Shape> {
        self.members.shape()
    }

    /// Whether a request could be served: some node can decode.
    pub fn ready(&self) -> bool {
        self.members.ready(Role::Decode).next().is_some()
    }
}

#[cfg(test)]
mod tests;
