//! Which request goes to which worker, and who has waited too long.
//!
//! Decisions only: events and `now` come in, [`Effect`]s go out; no clock and
//! no socket. A request is in one list, `waiting` or `assigned`. A worker is
//! in one state:
//!
//! | state | event | becomes |
//! |---|---|---|
//! | | READY | `Idle` |
//! | `Idle` | a request is assigned | `Busy` |
//! | `Busy` | its FINAL | `Idle`, or `Leaving` if it says so |
//! | `Busy` | deadline, or its client left | `Cancelled` |
//! | `Cancelled` | its FINAL, which is dropped | `Idle`, or `Leaving` |
//! | `Cancelled` | no FINAL within grace and silence limit | expelled |
//! | any | DISCONNECT | `Leaving`, as soon as its request ended |
//! | any | disconnected, silent, against the protocol | gone |
//!
//! Dispatch is in order of arrival, to the worker that has been idle longest.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Error;

/// The routing key of a connection.
pub type Peer = Bytes;

/// The number of a request, as on the wire.
pub type Id = u64;

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub queue_max: usize,
    pub queue_timeout: Duration,
    pub heartbeat: Duration,
    /// Without a sign of life for so long, a worker is dead.
    pub silence: Duration,
    pub window: u32,
    pub cancel_grace: Duration,
}

/// What decisions need to know of a request.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    pub retry: bool,
    pub cancel: bool,
    pub timeout: Duration,
}

/// What is to be done now, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send the request; its first byte is due within `left`.
    Assign {
        id: Id,
        peer: Peer,
        left: Duration,
    },
    /// Its worker died; it waits again, first in line.
    Requeued {
        id: Id,
    },
    /// The request ended without FINAL.
    Answer {
        id: Id,
        error: Error,
    },
    /// The request ended, and nobody waits for an answer.
    Forget {
        id: Id,
    },
    Credit {
        peer: Peer,
        id: Id,
        n: u32,
    },
    Cancel {
        peer: Peer,
        id: Id,
    },
    /// Acknowledge that the worker leaves.
    Farewell {
        peer: Peer,
    },
    /// The worker is in no list any more; end its connection.
    Expel {
        peer: Peer,
        why: Why,
    },
}

/// Why a worker was expelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Silent {
        after: Duration,
    },
    /// Cancelled, and neither ended its request nor exited.
    Stuck,
    /// It left, and its connection lingered.
    Left,
    NotHeld,
    Headless,
    Overrun {
        window: u32,
    },
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent { after } => write!(f, "no sign of life for {:.1} s", after.as_secs_f64()),
            Self::Stuck => write!(f, "it did not end a cancelled request"),
            Self::Left => write!(f, "it said that it leaves"),
            Self::NotHeld => write!(f, "it replied to a request that it does not hold"),
            Self::Headless => write!(f, "its reply began without a head"),
            Self::Overrun { window } => {
                write!(f, "it sent more than {window} chunks without a credit")
            }
        }
    }
}

/// What becomes of a part of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Deliver,
    /// Nobody waits for it.
    Drop,
    /// From a peer that never said READY, or was expelled.
    Stranger,
}

/// All requests and all workers.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    waiting: VecDeque<Request>,
    assigned: HashMap<Id, Request>,
    workers: HashMap<Peer, Worker>,
    /// Longest idle first.
    idle: VecDeque<Peer>,
    effects: Vec<Effect>,
    stopping: bool,
    /// No deadline is earlier; moved forward by `tick` only.
    wake: Option<Instant>,
    ticked: Instant,
}

#[derive(Debug)]
struct Request {
    id: Id,
    ticket: Ticket,
    /// First byte, then next chunk.
    until: Instant,
    queued_until: Instant,
    /// Of the worker that has it; meaningless while waiting.
    peer: Peer,
    /// Chunks that the client has not taken.
    unacked: u32,
    streaming: bool,
    retried: bool,
    /// Somebody waits for the answer.
    watched: bool,
}

#[derive(Debug)]
struct Worker {
    state: State,
    heard: Instant,
    /// Never to be assigned again.
    leaving: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Busy(Id),
    Cancelled { id: Id, until: Instant },
    Leaving,
}

impl Queue {
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            assigned: HashMap::new(),
            workers: HashMap::new(),
            idle: VecDeque::new(),
            effects: Vec::new(),
            stopping: false,
            wake: None,
            ticked: now,
        }
    }

    /// What is to be done since the last call.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// When to call `tick` at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.wake
    }

    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn n_running(&self) -> usize {
        self.assigned.len()
    }

    // Requests.

    /// A request arrived.
    pub fn submit(&mut self, id: Id, ticket: Ticket, now: Instant) {
        if self.stopping {
            return self.answer(id, Error::Stopping);
        }
        let limit = self.limits.queue_max;
        if self.idle.is_empty() && self.waiting.len() >= limit {
            return self.answer(id, Error::QueueFull { limit });
        }
        let request = Request::new(id, ticket, now, self.limits.queue_timeout);
        self.alarm(request.until.min(request.queued_until));
        self.waiting.push_back(request);
        self.dispatch(now);
    }

    /// Its client is gone.
    pub fn withdraw(&mut self, id: Id, now: Instant) {
        if let Some(at) = self.waiting.iter().position(|r| r.id == id) {
            self.waiting.remove(at);
            return self.effects.push(Effect::Forget { id });
        }
        let Some(request) = self.assigned.get_mut(&id) else {
            return;
        };
        if request.ticket.cancel {
            let request = self.assigned.remove(&id).expect("it was found above");
            self.cancel(&request, now);
            return self.effects.push(Effect::Forget { id });
        }
        // It runs to its end, and its chunks are dropped as they come.
        request.watched = false;
        let unacked = request.unacked;
        self.took(id, unacked, now);
    }

    /// The client took `n` chunks.
    pub fn took(&mut self, id: Id, n: u32, now: Instant) {
        let Some(request) = self.assigned.get_mut(&id) else {
            return;
        };
        let n = n.min(request.unacked);
        if n == 0 {
            return;
        }
        if request.unacked == self.limits.window {
            request.until = now + request.ticket.timeout;
        }
        request.unacked -= n;
        let (until, peer) = (request.until, request.peer.clone());
        self.alarm(until);
        self.effects.push(Effect::Credit { peer, id, n });
    }

    // Workers.

    /// A worker introduced itself. False if it is in no state to do so, and nothing changed.
    pub fn ready(&mut self, peer: &Peer, now: Instant) -> bool {
        self.alarm(now + self.limits.silence);
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.heard = now;
            return worker.state == State::Idle;
        }
        let worker = Worker {
            state: State::Idle,
            heard: now,
            leaving: false,
        };
        self.workers.insert(peer.clone(), worker);
        self.idle.push_back(peer.clone());
        self.dispatch(now);
        true
    }

    /// A sign of life. False from a stranger.
    pub fn heard(&mut self, peer: &Peer, now: Instant) -> bool {
        let worker = self.workers.get_mut(peer);
        worker.map(|worker| worker.heard = now).is_some()
    }

    /// Part of a reply; the first has a head.
    pub fn partial(&mut self, peer: &Peer, id: Id, has_head: bool, now: Instant) -> Fate {
        match self.holds(peer, id, now) {
            Held::Live { streaming } if !streaming && !has_head => {
                self.expel(peer, Why::Headless, now)
            }
            Held::Live { .. } => self.streamed(peer, id, now),
            Held::Cancelled => Fate::Drop,
            Held::Nothing => self.expel(peer, Why::NotHeld, now),
            Held::Stranger => Fate::Stranger,
        }
    }

    fn streamed(&mut self, peer: &Peer, id: Id, now: Instant) -> Fate {
        let window = self.limits.window;
        let request = self.assigned.get_mut(&id).expect("the busy hold one");
        if request.unacked >= window {
            return self.expel(peer, Why::Overrun { window }, now);
        }
        request.streaming = true;
        request.unacked += 1;
        request.until = now + request.ticket.timeout;
        let (until, watched) = (request.until, request.watched);
        self.alarm(until);
        if watched {
            return Fate::Deliver;
        }
        self.took(id, 1, now);
        Fate::Drop
    }

    /// The end of a reply. `has_head`: with a head, or with the reason why there is none.
    pub fn finished(
        &mut self,
        peer: &Peer,
        id: Id,
        has_head: bool,
        leaving: bool,
        now: Instant,
    ) -> Fate {
        let fate = match self.holds(peer, id, now) {
            Held::Live { streaming } if !streaming && !has_head => {
                return self.expel(peer, Why::Headless, now);
            }
            Held::Live { .. } => self.ended(id),
            Held::Cancelled => Fate::Drop,
            Held::Nothing => return self.expel(peer, Why::NotHeld, now),
            Held::Stranger => return Fate::Stranger,
        };
        self.release(peer, leaving, now);
        fate
    }

    fn ended(&mut self, id: Id) -> Fate {
        let request = self.assigned.remove(&id).expect("the busy hold one");
        if request.watched {
            return Fate::Deliver;
        }
        self.effects.push(Effect::Forget { id });
        Fate::Drop
    }

    /// A worker says that it leaves; it may still end its request. Strangers are acknowledged, too.
    pub fn leaving(&mut self, peer: &Peer, now: Instant) {
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.heard = now;
            worker.leaving = true;
            if worker.state == State::Idle {
                worker.state = State::Leaving;
                self.idle.retain(|idle| idle != peer);
            }
        }
        self.effects.push(Effect::Farewell { peer: peer.clone() });
    }

    /// Its connection is gone.
    pub fn gone(&mut self, peer: &Peer, now: Instant) {
        let Some(worker) = self.workers.remove(peer) else {
            return;
        };
        match worker.state {
            State::Idle => self.idle.retain(|idle| idle != peer),
            State::Busy(id) => self.orphaned(id, now),
            State::Cancelled { .. } | State::Leaving => {}
        }
    }

    // The whole.

    /// From now on new requests are refused; those that are here go on.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Those that are here end, too.
    pub fn abort(&mut self) {
        let waiting = self.waiting.drain(..).map(|request| request.id);
        let assigned = self.assigned.drain().map(|(id, _)| id);
        let ids: Vec<Id> = waiting.chain(assigned).collect();
        self.workers.clear();
        self.idle.clear();
        for id in ids {
            self.answer(id, Error::Stopping);
        }
    }

    /// Whatever is due is done. Called at `next_deadline`, and once per heartbeat at least.
    pub fn tick(&mut self, now: Instant) {
        self.forgive_a_pause(now);
        self.wake = None;
        self.expire_waiting(now);
        self.expire_assigned(now);
        self.expire_workers(now);
    }

    /// After the process itself stood still, the workers' heartbeats are still
    /// in the sockets: the time it slept does not count as their silence.
    fn forgive_a_pause(&mut self, now: Instant) {
        let pause = now.duration_since(self.ticked);
        self.ticked = now;
        if pause <= self.limits.heartbeat * 2 {
            return;
        }
        for worker in self.workers.values_mut() {
            worker.heard = (worker.heard + pause).min(now);
        }
    }

    fn expire_waiting(&mut self, now: Instant) {
        let after = self.limits.queue_timeout;
        for request in std::mem::take(&mut self.waiting) {
            let due = request.until.min(request.queued_until);
            if due > now {
                self.alarm(due);
                self.waiting.push_back(request);
            } else if request.queued_until < request.until {
                self.answer(request.id, Error::QueueTimedOut { after });
            } else {
                self.answer(request.id, request.timed_out());
            }
        }
    }

    fn expire_assigned(&mut self, now: Instant) {
        let window = self.limits.window;
        let mut overdue = Vec::new();
        let mut alarm = None;
        // Without a credit the worker cannot send: the client is slow, not the worker.
        for request in self.assigned.values().filter(|r| r.unacked < window) {
            match request.until <= now {
                true => overdue.push(request.id),
                false => alarm = earlier(alarm, request.until),
            }
        }
        self.wake = earlier_of(self.wake, alarm);
        for id in overdue {
            let request = self.assigned.remove(&id).expect("it was found above");
            self.cancel(&request, now);
            self.answer(id, request.timed_out());
        }
    }

    fn expire_workers(&mut self, now: Instant) {
        let silence = self.limits.silence;
        let mut expelled = Vec::new();
        let mut alarm = None;
        for (peer, worker) in &self.workers {
            let why = match worker.state {
                State::Leaving => Why::Left,
                State::Cancelled { until, .. } if until <= now => Why::Stuck,
                _ => Why::Silent { after: silence },
            };
            let due = match worker.state {
                State::Cancelled { until, .. } => until.min(worker.heard + silence),
                _ => worker.heard + silence,
            };
            match due <= now {
                true => expelled.push((peer.clone(), why)),
                false => alarm = earlier(alarm, due),
            }
        }
        self.wake = earlier_of(self.wake, alarm);
        for (peer, why) in expelled {
            self.expel(&peer, why, now);
        }
    }

    // Moves between lists.

    fn dispatch(&mut self, now: Instant) {
        while !self.waiting.is_empty() && !self.idle.is_empty() {
            let request = self.waiting.pop_front().expect("it is not empty");
            let peer = self.idle.pop_front().expect("it is not empty");
            self.assign(request, peer, now);
        }
    }

    fn assign(&mut self, mut request: Request, peer: Peer, now: Instant) {
        let worker = self.workers.get_mut(&peer).expect("the idle are known");
        worker.state = State::Busy(request.id);
        request.peer = peer.clone();
        let (id, left) = (request.id, request.until.saturating_duration_since(now));
        self.effects.push(Effect::Assign { id, peer, left });
        self.assigned.insert(id, request);
    }

    /// What `peer` has to do with request `id`.
    fn holds(&mut self, peer: &Peer, id: Id, now: Instant) -> Held {
        let Some(worker) = self.workers.get_mut(peer) else {
            return Held::Stranger;
        };
        worker.heard = now;
        match worker.state {
            State::Busy(held) if held == id => Held::Live {
                streaming: self.assigned[&id].streaming,
            },
            State::Cancelled { id: held, .. } if held == id => Held::Cancelled,
            _ => Held::Nothing,
        }
    }

    /// The worker's request ended.
    fn release(&mut self, peer: &Peer, leaving: bool, now: Instant) {
        let worker = self.workers.get_mut(peer).expect("it was heard just now");
        worker.leaving |= leaving;
        if leaving {
            self.effects.push(Effect::Farewell { peer: peer.clone() });
        }
        if worker.leaving {
            worker.state = State::Leaving;
            return;
        }
        worker.state = State::Idle;
        self.idle.push_back(peer.clone());
        self.dispatch(now);
    }

    fn cancel(&mut self, request: &Request, now: Instant) {
        let until = now + self.limits.cancel_grace + self.limits.silence;
        let (id, peer) = (request.id, request.peer.clone());
        let worker = self
            .workers
            .get_mut(&peer)
            .expect("assigned to a known one");
        worker.state = State::Cancelled { id, until };
        self.alarm(until);
        self.effects.push(Effect::Cancel { peer, id });
    }

    fn expel(&mut self, peer: &Peer, why: Why, now: Instant) -> Fate {
        let peer = peer.clone();
        self.effects.push(Effect::Expel {
            peer: peer.clone(),
            why,
        });
        self.gone(&peer, now);
        Fate::Drop
    }

    /// The worker that had it is gone.
    fn orphaned(&mut self, id: Id, now: Instant) {
        let mut request = self.assigned.remove(&id).expect("the busy hold one");
        if !request.may_be_sent_again() {
            return self.answer(id, Error::WorkerDied);
        }
        request.retried = true;
        request.queued_until = now + self.limits.queue_timeout;
        self.alarm(request.until.min(request.queued_until));
        self.waiting.push_front(request);
        self.effects.push(Effect::Requeued { id });
        self.dispatch(now);
    }

    fn answer(&mut self, id: Id, error: Error) {
        self.effects.push(Effect::Answer { id, error });
    }

    fn alarm(&mut self, at: Instant) {
        self.wake = earlier(self.wake, at);
    }
}

/// What a peer has to do with a request it replies to.
enum Held {
    Live { streaming: bool },
    Cancelled,
    Nothing,
    Stranger,
}

impl Request {
    fn new(id: Id, ticket: Ticket, now: Instant, queue_timeout: Duration) -> Self {
        Self {
            id,
            ticket,
            until: now + ticket.timeout,
            queued_until: now + queue_timeout,
            peer: Peer::new(),
            unacked: 0,
            streaming: false,
            retried: false,
            watched: true,
        }
    }

    fn may_be_sent_again(&self) -> bool {
        self.ticket.retry && self.watched && !self.streaming && !self.retried
    }

    fn timed_out(&self) -> Error {
        Error::TimedOut {
            after: self.ticket.timeout,
        }
    }
}

fn earlier(one: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(one.map_or(other, |one| one.min(other)))
}

fn earlier_of(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    other.map_or(one, |other| earlier(one, other))
}
