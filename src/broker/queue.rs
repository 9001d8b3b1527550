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
//! | `Busy` | deadline, or its client left and it may not run on | `Cancelled` |
//! | `Cancelled` | its FINAL, which is dropped | `Idle`, or `Leaving` |
//! | `Cancelled` | others have to wait | `Cancelled`, with a short grace |
//! | `Cancelled` | no FINAL within its grace and the silence limit | expelled |
//! | any | DISCONNECT | `Leaving`, as soon as its request ended |
//! | any | disconnected, silent, against the protocol | gone |
//!
//! Who is next is decided in [`super::waiting`] by client, project, lane and
//! estimated cost. Of the idle workers it goes to one that has its project open, or
//! else to the one that has been idle longest; one that missed a heartbeat gets a
//! request only if all the idle did.
//!
//! A project that may be waiting for a source that does not answer ([`super::standings`])
//! has no more workers than long requests may have. If it is noticed too late, its youngest
//! request that may be sent again gives its worker back as soon as another project's could
//! have it, and waits once more.
//!
//! An errand is a request of our own for a certain worker: it is assigned to it as soon
//! as it is idle, and until then is in neither list.
//!
//! A project may have layers that this same server serves. Then its worker waits
//! for a request that waits for a worker, and with enough of these all do. So:
//!
//! 1. A request of a worker that serves one names it (`Ticket::cause`). It goes
//!    first, and no limit or lane holds it up.
//! 2. Its cause's project is remembered as one that asks us. Requests to such
//!    projects go in the long lane, which never has the last of several workers.
//! 3. If it happened already, because nobody knew, the youngest of them that may
//!    be sent again steps back: its worker is freed and it waits once more. If
//!    none may, our own requests are refused at once, and their causes go on.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;

use super::Error;
use super::cost::{Costs, Kind};
use super::crowd::Crowd;
use super::lanes::{Line, Rules, Sort};
use super::pace::Pace;
use super::rate::Rates;
use super::standings::{Standing, Standings};
use super::waiting::{Name, Waiting, Wish};

/// Projects that asked us are forgotten so long after they last did, or when
/// there are too many.
const ASKS_US_FOR: Duration = Duration::from_secs(600);
const ASKS_US_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not zero");

/// The routing key of a connection.
pub type Peer = Bytes;

/// The number of a request, as on the wire.
pub type Id = u64;

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub queue_max: usize,
    /// Waiting and running, of one client and of one project; 0: any number.
    pub client_max: usize,
    pub project_max: usize,
    /// Of one client in a second; 0: any number.
    pub client_rate: usize,
    pub lanes: Rules,
    /// After so long a request that was not expected to be long is; None: never.
    pub stalled: Option<Duration>,
    pub queue_timeout: Duration,
    pub heartbeat: Duration,
    /// Without a sign of life for so long, a worker is dead.
    pub silence: Duration,
    pub window: u32,
    pub cancel_grace: Duration,
    /// What is not cancelled when its client leaves may run for so long.
    pub run_on: Duration,
}

/// What decisions need to know of a request.
#[derive(Debug, Clone)]
pub struct Ticket {
    pub retry: bool,
    pub cancel: bool,
    pub timeout: Duration,
    pub client: Name,
    pub project: Name,
    pub sort: Sort,
    pub kind: Kind,
    /// The worker that asks, if one of ours does.
    pub cause: Option<Peer>,
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
    /// Its worker, which waited for others of our own, is wanted for them; it waits again.
    SteppedBack {
        id: Id,
    },
    /// Its worker is wanted for projects that answer; it waits again.
    GaveWay {
        id: Id,
    },
    /// Its project has answered nothing since it began, and that is long ago.
    Stalled {
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
    /// Ask for its end; it must have come within `grace`.
    Cancel {
        peer: Peer,
        id: Id,
        grace: Duration,
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
    /// It was the peer's last.
    Expelled,
    /// From a peer that never said READY, or was expelled before.
    Stranger,
}

/// All requests and all workers.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    waiting: Waiting<Request>,
    assigned: HashMap<Id, Request>,
    workers: HashMap<Peer, Worker>,
    /// Longest idle first.
    idle: VecDeque<Peer>,
    /// Cancelled, with more than a short grace as long as nobody waits.
    spared: Vec<Peer>,
    /// One per worker at most.
    errands: HashMap<Peer, (Id, Ticket)>,
    crowd: Crowd,
    rates: Rates,
    costs: Costs,
    pace: Pace,
    standings: Standings,
    /// Projects whose requests made their workers ask us, and when they last did.
    ask_us: LruCache<Name, Instant>,
    /// When a request came that is not long.
    last_small: Option<Instant>,
    /// When the number of workers changed: in a moment it may again.
    changed: Instant,
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
    line: Line,
    /// The request that waits for this one.
    cause: Option<Id>,
    /// First byte, then next chunk.
    until: Instant,
    queued_until: Instant,
    /// Of the worker that has it, and since when; meaningless while waiting.
    peer: Peer,
    began: Instant,
    /// Chunks that the client has not taken.
    unacked: u32,
    streaming: bool,
    /// Its worker may have got it.
    sent: bool,
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
    /// What it is busy with, or was until it was cancelled, is in the long lane or has
    /// run for as long as if it were.
    is_long: bool,
    /// Of that request.
    project: Name,
    /// Projects that it has open, as far as is known; the last used first.
    open: LruCache<Name, ()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Busy(Id),
    Cancelled { id: Id, until: Instant },
    Leaving,
}

impl Queue {
    /// Goes by `limits` from now on; what waits already keeps its time.
    pub fn configure(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            waiting: Waiting::default(),
            assigned: HashMap::new(),
            workers: HashMap::new(),
            idle: VecDeque::new(),
            spared: Vec::new(),
            errands: HashMap::new(),
            crowd: Crowd::default(),
            rates: Rates::default(),
            costs: Costs::default(),
            pace: Pace::default(),
            standings: Standings::default(),
            ask_us: LruCache::new(ASKS_US_MAX),
            last_small: None,
            changed: now,
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
        earlier_of(self.wake, self.waiting.next_due())
    }

    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn n_running(&self) -> usize {
        self.assigned.len()
    }

    /// Each line with how many wait there and how many of it run.
    pub fn lines(&self) -> [(Line, usize, usize); Line::ALL.len()] {
        let n_running = |line| self.assigned.values().filter(|it| it.line == line).count();
        Line::ALL.map(|line| (line, self.waiting.n_in(line), n_running(line)))
    }

    /// Where a request that runs stood in line.
    pub fn line_of(&self, id: Id) -> Option<Line> {
        self.assigned.get(&id).map(|request| request.line)
    }

    /// Workers with long requests, and how many there may be.
    pub fn long(&self) -> (usize, usize) {
        let (n, n_long) = self.n_of_lanes();
        (n_long, self.limits.lanes.long_max(n))
    }

    /// Who has how many requests here.
    pub fn crowd(&self) -> &Crowd {
        &self.crowd
    }

    /// Projects that have not answered for a while, the last noticed first.
    pub fn stalled(&self) -> Vec<Name> {
        self.standings.stalled()
    }

    /// Workers that serve, now or after what they are busy with.
    pub fn n_serving(&self) -> usize {
        let serves = |worker: &&Worker| match worker.state {
            State::Idle | State::Busy(_) => !worker.leaving,
            State::Cancelled { .. } | State::Leaving => false,
        };
        self.workers.values().filter(serves).count()
    }

    // Requests.

    /// A request arrived.
    pub fn submit(&mut self, id: Id, ticket: Ticket, now: Instant) {
        let cause = self.cause_of(&ticket);
        if let Err(error) = self.admit(&ticket, cause.is_some(), now) {
            return self.effects.push(Effect::Answer { id, error });
        }
        if let Some(cause) = cause {
            self.note_cause(cause, now);
        }
        let cost = self.costs.estimate(&ticket.kind);
        let line = match cause {
            Some(_) => Line::Own,
            None => self.line(&ticket, cost, now),
        };
        if matches!(line, Line::Maps | Line::Papers) {
            self.last_small = Some(now);
        }
        self.crowd.enter(&ticket.client, &ticket.project);
        let request = Request {
            line,
            cause,
            ..Request::new(id, ticket, now, self.limits.queue_timeout)
        };
        if self.may_start(&request, now) {
            return self.give(request, now);
        }
        self.waiting.push(id, request.wish(cost), request);
        self.dispatch(now);
        if line != Line::Own {
            self.refuse_overflow(id);
        }
    }

    /// With nobody in front of it and a worker for it: then there is no need to wait
    /// for a turn.
    fn may_start(&self, request: &Request, now: Instant) -> bool {
        let (line, project) = (request.line, &request.ticket.project);
        let is_free = self.waiting.is_empty() && !self.idle.is_empty();
        if line == Line::Own || !is_free {
            return is_free;
        }
        let doors = self.doors(now);
        doors.is_open(line) && doors.has_room(project, &self.holders())
    }

    /// A client's rate counts what nothing else keeps out.
    fn admit(&mut self, ticket: &Ticket, is_own: bool, now: Instant) -> Result<(), Error> {
        let Limits {
            queue_max,
            client_max,
            project_max,
            client_rate,
            ..
        } = self.limits;
        if self.stopping {
            return Err(Error::Stopping);
        }
        if is_own {
            return match self.waiting.n_in(Line::Own) < queue_max {
                true => Ok(()),
                false => Err(self.queue_full()),
            };
        }
        if client_max > 0 && self.crowd.of_client(&ticket.client) >= client_max {
            return Err(Error::ClientBusy {
                limit: client_max,
                retry_after: self.retry_after(),
            });
        }
        if project_max > 0 && self.crowd.of_project(&ticket.project) >= project_max {
            return Err(Error::ProjectBusy {
                limit: project_max,
                retry_after: self.retry_after(),
            });
        }
        match self.rates.ask(&ticket.client, client_rate, now) {
            None => Ok(()),
            Some(retry_after) => Err(Error::ClientTooFast {
                limit: client_rate,
                retry_after,
            }),
        }
    }

    /// Only those that would have to wait count: it came last, so it goes first.
    fn refuse_overflow(&mut self, id: Id) {
        let limit = self.limits.queue_max;
        if self.waiting.len() - self.waiting.n_in(Line::Own) <= limit {
            return;
        }
        if let Some(request) = self.waiting.remove(id) {
            self.answer(&request, self.queue_full());
        }
    }

    fn queue_full(&self) -> Error {
        Error::QueueFull {
            limit: self.limits.queue_max,
            retry_after: self.retry_after(),
        }
    }

    /// When those that wait now are likely to be served.
    fn retry_after(&self) -> Duration {
        self.pace.retry_after(self.waiting.len(), self.n_serving())
    }

    fn line(&mut self, ticket: &Ticket, cost: u32, now: Instant) -> Line {
        let asked = self.ask_us.get(&ticket.project);
        let asks_us = asked.is_some_and(|at| now.duration_since(*at) < ASKS_US_FOR);
        self.limits.lanes.line(ticket.sort, asks_us, cost)
    }

    /// What its worker is busy with, if it comes from one.
    fn cause_of(&self, ticket: &Ticket) -> Option<Id> {
        match self.workers.get(ticket.cause.as_ref()?)?.state {
            State::Busy(id) => Some(id),
            State::Idle | State::Cancelled { .. } | State::Leaving => None,
        }
    }

    /// From now on its project's requests leave a worker for what they cause.
    fn note_cause(&mut self, cause: Id, now: Instant) {
        let Some(project) = self
            .assigned
            .get(&cause)
            .map(|it| it.ticket.project.clone())
        else {
            return;
        };
        let known = self.ask_us.put(project.clone(), now);
        if known.is_some_and(|at| now.duration_since(at) < ASKS_US_FOR) {
            return;
        }
        for request in self.assigned.values_mut() {
            if request.ticket.project == project && request.line != Line::Own {
                request.line = Line::Held;
                let worker = self.workers.get_mut(&request.peer);
                worker.expect("assigned to a known one").is_long = true;
            }
        }
        let tell = |request: &mut Request| request.line = Line::Held;
        self.waiting.move_project(&project, Line::Held, tell);
    }

    /// What QGIS took for a request that succeeds in a moment.
    pub fn took_time(&mut self, id: Id, taken: Duration) {
        if let Some(request) = self.assigned.get(&id) {
            self.costs.learn(&request.ticket.kind, taken);
        }
    }

    /// A worker found no such project.
    pub fn found_none(&mut self, project: &Name) {
        self.standings.is_none(project);
    }

    /// A worker has the project open, and `n_open` in all.
    pub fn opened(&mut self, peer: &Peer, project: &Name, n_open: u32) {
        let Some(worker) = self.workers.get_mut(peer) else {
            return;
        };
        worker.open.put(project.clone(), ());
        let heard = worker.heard;
        // It closes what was not used for longest.
        while worker.open.len() > n_open.max(1) as usize {
            worker.open.pop_lru();
        }
        if self.standings.opened(project, heard) {
            self.dispatch(heard);
        }
    }

    /// What a worker has open, as far as is known; the last used first.
    pub fn open(&self, peer: &Peer) -> Vec<Name> {
        let worker = self.workers.get(peer).into_iter();
        let open = worker.flat_map(|worker| worker.open.iter());
        open.map(|(project, ())| project.clone()).collect()
    }

    /// A request of our own for this worker, as soon as it is idle.
    pub fn errand(&mut self, peer: &Peer, id: Id, ticket: Ticket, now: Instant) {
        let worker = self.workers.get(peer).filter(|worker| !worker.leaving);
        let Some(worker) = worker.filter(|_| !self.stopping) else {
            return self.effects.push(Effect::Forget { id });
        };
        if worker.state == State::Idle {
            self.idle.retain(|idle| idle != peer);
            return self.begin_errand(peer, id, ticket, now);
        }
        if let Some((id, _)) = self.errands.insert(peer.clone(), (id, ticket)) {
            self.effects.push(Effect::Forget { id });
        }
    }

    fn begin_errand(&mut self, peer: &Peer, id: Id, ticket: Ticket, now: Instant) {
        self.crowd.enter(&ticket.client, &ticket.project);
        let request = Request {
            // So that others know that there is one worker less for a while.
            line: Line::Held,
            ..Request::new(id, ticket, now, self.limits.queue_timeout)
        };
        self.assign(request, peer.clone(), now);
    }

    fn forget_errand(&mut self, peer: &Peer) {
        if let Some((id, _)) = self.errands.remove(peer) {
            self.effects.push(Effect::Forget { id });
        }
    }

    /// Its worker may have it from now on. True if it may still go to another.
    pub fn sent(&mut self, id: Id) -> bool {
        let Some(request) = self.assigned.get_mut(&id) else {
            return false;
        };
        request.sent = true;
        request.may_be_sent_again()
    }

    /// No worker would take it; the one that should have is free again.
    pub fn refused(&mut self, id: Id, error: Error, now: Instant) {
        let Some(request) = self.assigned.remove(&id) else {
            return;
        };
        self.answer(&request, error);
        self.release(&request.peer, false, now);
    }

    /// Its client is gone.
    pub fn withdraw(&mut self, id: Id, now: Instant) {
        if let Some(request) = self.waiting.remove(id) {
            return self.forget(&request);
        }
        let Some(request) = self.assigned.get_mut(&id) else {
            return;
        };
        if request.ticket.cancel {
            let request = self.assigned.remove(&id).expect("it was found above");
            self.cancel(&request, self.time_left(&request, now), now);
            self.forget(&request);
            return self.make_way(now);
        }
        // It runs to its end, and its chunks are dropped as they come. Nobody waits for
        // them, so that there is one bound for all it does.
        request.watched = false;
        request.until = request.until.max(request.began + self.limits.run_on);
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
        if request.unacked == self.limits.window && request.watched {
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
            is_long: false,
            project: Name::default(),
            open: LruCache::unbounded(),
        };
        self.workers.insert(peer.clone(), worker);
        self.changed = now;
        self.idle.push_back(peer.clone());
        self.dispatch(now);
        true
    }

    /// A sign of life. False from a stranger.
    pub fn heard(&mut self, peer: &Peer, now: Instant) -> bool {
        let worker = self.workers.get_mut(peer);
        worker.map(|worker| worker.heard = now).is_some()
    }

    /// It missed a heartbeat.
    pub fn is_late(&self, peer: &Peer, now: Instant) -> bool {
        let patience = self.limits.heartbeat * 3 / 2;
        let worker = self.workers.get(peer);
        worker.is_some_and(|it| now.saturating_duration_since(it.heard) >= patience)
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
        let project = (!request.streaming).then(|| request.ticket.project.clone());
        request.streaming = true;
        request.unacked += 1;
        if request.watched {
            request.until = now + request.ticket.timeout;
        }
        let (until, watched) = (request.until, request.watched);
        self.alarm(until);
        if let Some(project) = project {
            self.standings.answered(&project, now);
            self.dispatch(now);
        }
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
            Held::Live { .. } => self.ended(id, now),
            Held::Cancelled => Fate::Drop,
            Held::Nothing => return self.expel(peer, Why::NotHeld, now),
            Held::Stranger => return Fate::Stranger,
        };
        self.release(peer, leaving, now);
        fate
    }

    fn ended(&mut self, id: Id, now: Instant) -> Fate {
        let request = self.assigned.remove(&id).expect("the busy hold one");
        self.pace.took(now.duration_since(request.began));
        self.standings.answered(&request.ticket.project, now);
        if request.watched {
            self.crowd
                .leave(&request.ticket.client, &request.ticket.project);
            return Fate::Deliver;
        }
        self.forget(&request);
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
            self.forget_errand(peer);
            self.dispatch(now);
        }
        self.effects.push(Effect::Farewell { peer: peer.clone() });
    }

    /// Its connection is gone.
    pub fn gone(&mut self, peer: &Peer, now: Instant) {
        let Some(worker) = self.workers.remove(peer) else {
            return;
        };
        self.changed = now;
        self.forget_errand(peer);
        match worker.state {
            State::Idle => self.idle.retain(|idle| idle != peer),
            State::Busy(id) => self.orphaned(id, now),
            State::Cancelled { .. } => self.spared.retain(|spared| spared != peer),
            State::Leaving => {}
        }
        // Its lane may have room now.
        self.dispatch(now);
    }

    // The whole.

    /// From now on new requests are refused; those that are here go on.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Those that are here end, too.
    pub fn abort(&mut self) {
        let waiting = self.waiting.drain().map(|(_, request)| request);
        let assigned = self.assigned.drain().map(|(_, request)| request);
        let requests: Vec<Request> = waiting.chain(assigned).collect();
        self.workers.clear();
        self.idle.clear();
        self.spared.clear();
        let errands = self
            .errands
            .drain()
            .map(|(_, (id, _))| Effect::Forget { id });
        self.effects.extend(errands);
        for request in requests {
            self.answer(&request, Error::Stopping);
        }
    }

    /// Whatever is due is done. Called at `next_deadline`, and once per heartbeat at least.
    pub fn tick(&mut self, now: Instant) {
        self.forgive_a_pause(now);
        self.wake = None;
        self.expire_waiting(now);
        self.expire_assigned(now);
        self.note_overruns(now);
        self.standings.tick(now);
        self.expire_workers(now);
        // The reserve of small requests may have lapsed.
        self.dispatch(now);
    }

    /// After the process itself stood still, the workers' heartbeats are still
    /// in the sockets: the time it slept does not count as their silence.
    fn forgive_a_pause(&mut self, now: Instant) {
        let pause = now.duration_since(self.ticked);
        self.ticked = now;
        if pause <= self.limits.heartbeat * 5 / 4 {
            return;
        }
        for worker in self.workers.values_mut() {
            worker.heard = (worker.heard + pause).min(now);
        }
    }

    fn expire_waiting(&mut self, now: Instant) {
        let after = self.limits.queue_timeout;
        while let Some((_, request)) = self.waiting.pop_due(now) {
            let error = match request.queued_until < request.until {
                true => Error::QueueTimedOut { after },
                false => request.timed_out(),
            };
            self.answer(&request, error);
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
            // What it waited before is not its own fault, nor is a client that reads slowly.
            let ran = now.duration_since(request.began);
            let ran = ran.min(request.ticket.timeout);
            self.pace.took(ran);
            self.costs.learn_at_least(&request.ticket.kind, ran);
            self.cancel(&request, self.limits.cancel_grace, now);
            self.answer(&request, request.timed_out());
        }
    }

    /// Whatever runs for so long is long, though nobody expected it to be.
    fn note_overruns(&mut self, now: Instant) {
        let Some(patience) = self.limits.stalled else {
            return;
        };
        let mut overran = Vec::new();
        let mut alarm = None;
        for request in self.assigned.values() {
            let is_noted = self.workers[&request.peer].is_long;
            match request.began + patience {
                _ if is_noted || request.streaming => {}
                due if due <= now => overran.push(request.id),
                due => alarm = earlier(alarm, due),
            }
        }
        self.wake = earlier_of(self.wake, alarm);
        overran.sort_unstable();
        for id in overran {
            let request = &self.assigned[&id];
            let worker = self.workers.get_mut(&request.peer);
            worker.expect("assigned to a known one").is_long = true;
            let project = &request.ticket.project;
            if self.standings.overran(project, request.began, now) {
                self.effects.push(Effect::Stalled { id });
            }
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
        // What one of them had must not go to the next of them.
        self.idle
            .retain(|idle| expelled.iter().all(|(peer, _)| peer != idle));
        for (peer, why) in expelled {
            self.expel(&peer, why, now);
        }
    }

    // Moves between lists.

    fn dispatch(&mut self, now: Instant) {
        while !self.waiting.is_empty() && !self.idle.is_empty() {
            let (doors, holders) = (
                self.doors(now),
                Holders::new(&self.workers, &self.standings),
            );
            let has_room = |project: &Name| doors.has_room(project, &holders);
            let next = self.waiting.pop(|line| doors.is_open(line), has_room);
            let Some((_, request)) = next else {
                self.alarm_when_reserve_lapses(now);
                break;
            };
            self.give(request, now);
        }
        self.make_way(now);
    }

    /// To one of the idle, of whom there is at least one.
    fn give(&mut self, request: Request, now: Instant) {
        let at = self.best_idle(&request.ticket.project, now);
        let peer = self.idle.remove(at).expect("it is not empty");
        self.assign(request, peer, now);
    }

    /// Who may have an idle worker.
    fn doors(&self, now: Instant) -> Doors {
        let (n, n_long) = self.n_of_lanes();
        let long_max = self.limits.lanes.long_max(n);
        let held = n_long < long_max;
        let lapse = self.reserved_until();
        Doors {
            held,
            slow: held || lapse.is_none_or(|lapse| lapse <= now),
            share: self.limits.stalled.map_or(usize::MAX, |_| long_max),
        }
    }

    fn holders(&self) -> Holders<'_> {
        Holders::new(&self.workers, &self.standings)
    }

    /// Workers that serve, or soon will again, and those of them with long requests.
    fn n_of_lanes(&self) -> (usize, usize) {
        let serving = self.workers.values().filter(|it| !it.leaving);
        serving.fold((0, 0), |(n, n_long), worker| match worker.state {
            State::Leaving => (n, n_long),
            State::Idle => (n + 1, n_long),
            State::Busy(_) | State::Cancelled { .. } => {
                (n + 1, n_long + usize::from(worker.is_long))
            }
        })
    }

    fn reserved_until(&self) -> Option<Instant> {
        self.last_small.map(|at| at + self.limits.lanes.reserve)
    }

    fn alarm_when_reserve_lapses(&mut self, now: Instant) {
        if let Some(lapse) = self.reserved_until().filter(|lapse| *lapse > now)
            && self.waiting.n_in(Line::Slow) > 0
        {
            self.alarm(lapse);
        }
    }

    /// Some have to wait: what is cancelled gets no more time than it needs to
    /// stop, and workers that wait for each other do not.
    fn make_way(&mut self, now: Instant) {
        if self.waiting.is_empty() {
            return;
        }
        self.hurry(now);
        self.part_those_who_wait_for_each_other(now);
        self.take_back_from_stalled(now);
    }

    /// As many as there are that wait and could have their workers.
    fn hurry(&mut self, now: Instant) {
        if self.spared.is_empty() {
            return;
        }
        let is_cancelled = |it: &&Worker| matches!(it.state, State::Cancelled { .. });
        let n_cancelled = self.workers.values().filter(is_cancelled).count();
        let n_hurried = n_cancelled.saturating_sub(self.spared.len());
        let n = self.waiting.len().saturating_sub(n_hurried);
        let none_is_idle = self.idle.is_empty();
        let is_missed = |peer: &&Peer| none_is_idle || self.workers[*peer].is_long;
        let missed: Vec<Peer> = self
            .spared
            .iter()
            .filter(is_missed)
            .take(n)
            .cloned()
            .collect();
        self.spared.retain(|peer| !missed.contains(peer));
        for peer in missed {
            self.hurry_one(peer, now);
        }
    }

    fn hurry_one(&mut self, peer: Peer, now: Instant) {
        let grace = self.limits.cancel_grace;
        let soon = now + grace + self.limits.silence;
        let worker = self.workers.get_mut(&peer).expect("the spared are known");
        let State::Cancelled { id, until } = &mut worker.state else {
            unreachable!("the spared are cancelled");
        };
        *until = soon.min(*until);
        let id = *id;
        self.alarm(soon);
        self.effects.push(Effect::Cancel { peer, id, grace });
    }

    /// See the third rule at the top.
    fn part_those_who_wait_for_each_other(&mut self, now: Instant) {
        if self.waiting.n_in(Line::Own) == 0 || !self.all_wait_for_us() {
            return;
        }
        let settled = self.changed + self.limits.silence;
        if settled > now {
            return self.alarm(settled);
        }
        let Some(id) = self.who_steps_back() else {
            let own: Vec<Id> = self.waiting.of(Line::Own).map(|it| it.id).collect();
            for id in own {
                let request = self.waiting.remove(id).expect("it was found above");
                self.answer(&request, Error::WaitsForItself);
            }
            return;
        };
        self.step_back(id, Line::Held, now);
        self.effects.push(Effect::SteppedBack { id });
    }

    /// It frees its worker, and waits once more.
    fn step_back(&mut self, id: Id, line: Line, now: Instant) {
        let mut request = self.assigned.remove(&id).expect("the busy hold one");
        self.cancel(&request, self.limits.cancel_grace, now);
        request.begin_again(now + self.limits.queue_timeout);
        request.line = line;
        self.waiting.push_again(id, request.wish(0), request);
    }

    /// One at a time, if another project's request could have its worker and none is
    /// about to be free.
    fn take_back_from_stalled(&mut self, now: Instant) {
        let is_cancelled = |it: &Worker| matches!(it.state, State::Cancelled { .. });
        if !self.standings.any_is_stalled()
            || !self.idle.is_empty()
            || self.workers.values().any(is_cancelled)
        {
            return;
        }
        let (doors, holders) = (self.doors(now), self.holders());
        if holders.n_stalled() <= doors.share {
            return;
        }
        let is_open = |line| doors.is_open(line);
        let has_room = |project: &Name| doors.has_room(project, &holders);
        if self.waiting.next(&is_open, &has_room).is_none() {
            return;
        }
        if let Some((id, line)) = self.who_gives_way() {
            self.step_back(id, line, now);
            self.effects.push(Effect::GaveWay { id });
        }
    }

    /// The youngest of the stalled projects that may.
    fn who_gives_way(&self) -> Option<(Id, Line)> {
        let may = |it: &&Request| {
            let is_small = matches!(it.line, Line::Maps | Line::Papers);
            is_small && it.may_be_sent_again() && self.standings.is_stalled(&it.ticket.project)
        };
        let youngest = self.assigned.values().filter(may).max_by_key(|it| it.id);
        youngest.map(|it| (it.id, it.line))
    }

    /// No worker will be free before one of our own requests was served.
    fn all_wait_for_us(&self) -> bool {
        let waiting = self.waiting.of(Line::Own).filter_map(|it| it.cause);
        let running = self.assigned.values().filter_map(|it| it.cause);
        let causes: HashSet<Id> = waiting.chain(running).collect();
        let waits = |worker: &Worker| match worker.state {
            State::Busy(id) => causes.contains(&id),
            State::Leaving => true,
            State::Idle | State::Cancelled { .. } => false,
        };
        !self.assigned.is_empty() && self.workers.values().all(waits)
    }

    /// The youngest that may, if that helps another.
    fn who_steps_back(&self) -> Option<Id> {
        let helps = |id: Id| {
            let mut causes = self.waiting.of(Line::Own).filter_map(|it| it.cause);
            causes.any(|cause| cause != id && self.assigned.contains_key(&cause))
        };
        let may = |it: &&Request| it.line != Line::Own && it.may_be_sent_again() && helps(it.id);
        self.assigned.values().filter(may).map(|it| it.id).max()
    }

    /// Of those that missed no heartbeat, if there is one, the longest idle that has the
    /// project open, or the longest idle.
    fn best_idle(&self, project: &Name, now: Instant) -> usize {
        let is_fresh = |peer: &Peer| !self.is_late(peer, now);
        let has_it = |peer: &Peer| self.workers[peer].open.contains(project) && is_fresh(peer);
        let at = self.idle.iter().position(has_it);
        at.or_else(|| self.idle.iter().position(is_fresh))
            .unwrap_or(0)
    }

    fn assign(&mut self, mut request: Request, peer: Peer, now: Instant) {
        let worker = self.workers.get_mut(&peer).expect("the idle are known");
        worker.state = State::Busy(request.id);
        worker.is_long = request.line.is_long();
        worker.project = request.ticket.project.clone();
        request.peer = peer.clone();
        request.began = now;
        let (id, left) = (request.id, request.until.saturating_duration_since(now));
        self.alarm(request.until);
        if let Some(patience) = self.limits.stalled {
            self.alarm(now + patience);
        }
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
        self.spared.retain(|spared| spared != peer);
        let worker = self.workers.get_mut(peer).expect("it was heard just now");
        worker.leaving |= leaving;
        if leaving {
            self.effects.push(Effect::Farewell { peer: peer.clone() });
        }
        if worker.leaving {
            worker.state = State::Leaving;
            self.forget_errand(peer);
        } else if let Some((id, ticket)) = self.errands.remove(peer) {
            self.begin_errand(peer, id, ticket, now);
        } else {
            worker.state = State::Idle;
            self.idle.push_back(peer.clone());
        }
        self.dispatch(now);
    }

    /// For a request that nobody waits for: a worker with open projects is
    /// worth more than the time until the deadline.
    fn time_left(&self, request: &Request, now: Instant) -> Duration {
        let left = match request.unacked < self.limits.window {
            true => request.until.saturating_duration_since(now),
            // Its clock stood still while the client took nothing.
            false => request.ticket.timeout,
        };
        left.max(self.limits.cancel_grace)
    }

    fn cancel(&mut self, request: &Request, grace: Duration, now: Instant) {
        let until = now + grace + self.limits.silence;
        let (id, peer) = (request.id, request.peer.clone());
        let worker = self
            .workers
            .get_mut(&peer)
            .expect("assigned to a known one");
        worker.state = State::Cancelled { id, until };
        if grace > self.limits.cancel_grace {
            self.spared.push(peer.clone());
        }
        self.alarm(until);
        self.effects.push(Effect::Cancel { peer, id, grace });
    }

    fn expel(&mut self, peer: &Peer, why: Why, now: Instant) -> Fate {
        let peer = peer.clone();
        self.effects.push(Effect::Expel {
            peer: peer.clone(),
            why,
        });
        self.gone(&peer, now);
        Fate::Expelled
    }

    /// The worker that had it is gone.
    fn orphaned(&mut self, id: Id, now: Instant) {
        let mut request = self.assigned.remove(&id).expect("the busy hold one");
        if !request.sent {
            return self.put_back(request, now);
        }
        if !request.may_be_sent_again() {
            return self.answer(&request, Error::WorkerDied);
        }
        request.begin_again(now + self.limits.queue_timeout);
        self.effects.push(Effect::Requeued { id });
        self.put_back(request, now);
    }

    /// Ahead of those that had no turn yet.
    fn put_back(&mut self, request: Request, now: Instant) {
        self.waiting
            .push_again(request.id, request.wish(0), request);
        self.dispatch(now);
    }

    fn answer(&mut self, request: &Request, error: Error) {
        self.crowd
            .leave(&request.ticket.client, &request.ticket.project);
        let id = request.id;
        self.effects.push(Effect::Answer { id, error });
    }

    fn forget(&mut self, request: &Request) {
        self.crowd
            .leave(&request.ticket.client, &request.ticket.project);
        self.effects.push(Effect::Forget { id: request.id });
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

/// See [`super::lanes`] and [`super::standings`].
struct Doors {
    slow: bool,
    held: bool,
    /// Workers that one new project may have, and all stalled ones together.
    share: usize,
}

/// Who has which worker at one moment, about which many that wait ask.
struct Holders<'a> {
    workers: &'a HashMap<Peer, Worker>,
    standings: &'a Standings,
    n_stalled: OnceCell<usize>,
}

impl<'a> Holders<'a> {
    fn new(workers: &'a HashMap<Peer, Worker>, standings: &'a Standings) -> Self {
        Self {
            workers,
            standings,
            n_stalled: OnceCell::new(),
        }
    }

    fn n_of(&self, project: &Name) -> usize {
        self.n(|it| it == project)
    }

    fn n_stalled(&self) -> usize {
        let count = || self.n(|it| self.standings.is_stalled(it));
        *self.n_stalled.get_or_init(count)
    }

    fn n(&self, is_it: impl Fn(&Name) -> bool) -> usize {
        let holds = |it: &&Worker| match it.state {
            State::Busy(_) | State::Cancelled { .. } => !it.leaving && is_it(&it.project),
            State::Idle | State::Leaving => false,
        };
        self.workers.values().filter(holds).count()
    }
}

impl Doors {
    fn has_room(&self, project: &Name, holders: &Holders<'_>) -> bool {
        match holders.standings.of(project) {
            Standing::Sound => true,
            Standing::New => holders.n_of(project) < self.share,
            Standing::Stalled => holders.n_stalled() < self.share,
        }
    }

    fn is_open(&self, line: Line) -> bool {
        match line {
            Line::Own | Line::Maps | Line::Papers => true,
            Line::Slow => self.slow,
            Line::Held => self.held,
        }
    }
}

impl Request {
    fn new(id: Id, ticket: Ticket, now: Instant, queue_timeout: Duration) -> Self {
        Self {
            id,
            until: now + ticket.timeout,
            ticket,
            line: Line::Maps,
            cause: None,
            queued_until: now + queue_timeout,
            peer: Peer::new(),
            began: now,
            unacked: 0,
            streaming: false,
            sent: false,
            retried: false,
            watched: true,
        }
    }

    fn wish(&self, cost: u32) -> Wish {
        Wish {
            line: self.line,
            client: self.ticket.client.clone(),
            project: self.ticket.project.clone(),
            cost,
            due: self.until.min(self.queued_until),
        }
    }

    /// Its only second try.
    fn begin_again(&mut self, queued_until: Instant) {
        self.retried = true;
        self.sent = false;
        self.queued_until = queued_until;
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

#[cfg(test)]
mod tests {
    use super::super::cost::Work;
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn limits() -> Limits {
        Limits {
            queue_max: 2,
            client_max: 0,
            project_max: 0,
            client_rate: 0,
            lanes: Rules {
                reserved: None,
                slow: S,
                reserve: 2 * S,
            },
            stalled: None,
            queue_timeout: 10 * S,
            heartbeat: S,
            silence: 3 * S,
            window: 2,
            cancel_grace: S,
            run_on: 20 * S,
        }
    }

    /// A queue and its clock.
    struct Bench {
        queue: Queue,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                queue: Queue::new(limits(), now),
                now,
            }
        }

        fn with_workers(names: &[&'static str]) -> Self {
            let mut bench = Self::new();
            names.iter().for_each(|name| bench.ready(name));
            bench
        }

        fn ready(&mut self, peer: &'static str) {
            self.queue.ready(&peer.into(), self.now);
        }

        fn submit(&mut self, id: Id) -> Vec<Effect> {
            self.submit_as(id, ticket())
        }

        fn submit_as(&mut self, id: Id, ticket: Ticket) -> Vec<Effect> {
            self.queue.submit(id, ticket, self.now);
            self.effects()
        }

        fn partial(&mut self, peer: &'static str, id: Id) -> Fate {
            self.queue.partial(&peer.into(), id, true, self.now)
        }

        fn finished(&mut self, peer: &'static str, id: Id) -> Fate {
            self.queue.finished(&peer.into(), id, true, false, self.now)
        }

        fn gone(&mut self, peer: &'static str) -> Vec<Effect> {
            self.queue.gone(&peer.into(), self.now);
            self.effects()
        }

        fn took(&mut self, id: Id, n: u32) -> Vec<Effect> {
            self.queue.took(id, n, self.now);
            self.effects()
        }

        fn withdraw(&mut self, id: Id) -> Vec<Effect> {
            self.queue.withdraw(id, self.now);
            self.effects()
        }

        fn effects(&mut self) -> Vec<Effect> {
            let effects = self.unsent();
            for effect in &effects {
                if let Effect::Assign { id, .. } = effect {
                    self.queue.sent(*id);
                }
            }
            effects
        }

        /// Effects whose requests have not reached their workers.
        fn unsent(&mut self) -> Vec<Effect> {
            self.queue.check(self.now);
            self.queue.effects()
        }

        /// Time passes, with a heartbeat of each of `living` per second.
        fn pass(&mut self, time: Duration, living: &[&'static str]) -> Vec<Effect> {
            let end = self.now + time;
            while self.now < end {
                self.now = (self.now + S).min(end);
                for peer in living {
                    self.queue.heard(&(*peer).into(), self.now);
                }
                self.queue.tick(self.now);
            }
            self.effects()
        }
    }

    impl Queue {
        /// What must hold between any two events.
        fn check(&self, now: Instant) {
            for (id, request) in &self.assigned {
                assert_eq!(self.workers[&request.peer].state, State::Busy(*id));
                assert!(request.unacked <= self.limits.window);
                assert_eq!(self.waiting.line_of(*id), None);
                let is_long = self.workers[&request.peer].is_long;
                assert!(is_long || !request.line.is_long());
            }
            let busy = |w: &&Worker| matches!(w.state, State::Busy(_));
            assert_eq!(
                self.workers.values().filter(busy).count(),
                self.assigned.len()
            );
            let idle = |w: &&Worker| w.state == State::Idle;
            assert_eq!(self.workers.values().filter(idle).count(), self.idle.len());
            for peer in &self.idle {
                assert_eq!(self.workers[peer].state, State::Idle);
                assert!(!self.workers[peer].leaving);
            }
            // No worker is idle while a request that may have it waits.
            let doors = self.doors(now);
            let holders = self.holders();
            let has_room = |project: &Name| doors.has_room(project, &holders);
            let next = self.waiting.next(&|line| doors.is_open(line), &has_room);
            let is_tick_due = self.next_deadline().is_some_and(|due| due <= now);
            assert!(next.is_none() || self.idle.is_empty() || is_tick_due);
            for (id, request) in self.waiting.iter() {
                assert_eq!(self.waiting.line_of(id), Some(request.line));
            }
            for peer in &self.spared {
                assert!(matches!(self.workers[peer].state, State::Cancelled { .. }));
            }
            // Whoever waits while none is idle has nobody spared for it.
            let n_spared = self.spared.len();
            assert!(
                n_spared == 0
                    || self.waiting.is_empty()
                    || !self.idle.is_empty()
                    || n_spared < self.workers.len()
            );
            let everybody = self.waiting.len() + self.assigned.len();
            let n: usize = self
                .crowd
                .top_clients(usize::MAX)
                .iter()
                .map(|(_, n)| n)
                .sum();
            assert_eq!(n, everybody);
            let waiting = self.waiting.iter();
            let dues = waiting.map(|(_, r)| r.until.min(r.queued_until));
            let running = self
                .assigned
                .values()
                .filter(|r| r.unacked < self.limits.window);
            let silences = self.workers.values().map(|w| w.heard + self.limits.silence);
            let due = dues.chain(running.map(|r| r.until)).chain(silences).min();
            assert!(due.is_none_or(|due| self.next_deadline().is_some_and(|wake| wake <= due)));
        }
    }

    fn ticket() -> Ticket {
        Ticket {
            retry: true,
            cancel: true,
            timeout: 5 * S,
            client: "a client".into(),
            project: "city".into(),
            sort: Sort::Map,
            kind: Kind::default(),
            cause: None,
        }
    }

    fn assigned(id: Id, peer: &'static str) -> Effect {
        assigned_for(id, peer, 5 * S)
    }

    fn assigned_for(id: Id, peer: &'static str, left: Duration) -> Effect {
        Effect::Assign {
            id,
            peer: peer.into(),
            left,
        }
    }

    fn cancelled(id: Id, peer: &'static str) -> Effect {
        cancelled_within(id, peer, S)
    }

    fn cancelled_within(id: Id, peer: &'static str, grace: Duration) -> Effect {
        Effect::Cancel {
            peer: peer.into(),
            id,
            grace,
        }
    }

    fn answered(id: Id, error: Error) -> Effect {
        Effect::Answer { id, error }
    }

    fn expelled(peer: &'static str, why: Why) -> Effect {
        Effect::Expel {
            peer: peer.into(),
            why,
        }
    }

    fn timed_out(id: Id) -> Effect {
        answered(id, Error::TimedOut { after: 5 * S })
    }

    #[test]
    fn requests_are_served_in_order_of_arrival_by_the_longest_idle() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        assert_eq!(bench.submit(1), [assigned(1, "a")]);
        assert_eq!(bench.submit(2), [assigned(2, "b")]);
        assert_eq!(bench.submit(3), []);
        assert_eq!(bench.submit(4), []);
        assert_eq!(bench.finished("b", 2), Fate::Deliver);
        assert_eq!(bench.effects(), [assigned(3, "b")]);
        bench.finished("a", 1);
        assert_eq!(bench.effects(), [assigned(4, "a")]);
        bench.finished("a", 4);
        bench.finished("b", 3);
        assert_eq!(bench.effects(), []);
        assert_eq!(bench.submit(5), [assigned(5, "a")]);
    }

    #[test]
    fn a_request_goes_to_a_worker_that_has_its_project_open() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let city = || in_project("city");
        bench.queue.opened(&"b".into(), &city().project, 2);
        assert_eq!(bench.submit_as(1, city()), [assigned(1, "b")]);
        // Rather any worker than to wait for that one.
        assert_eq!(bench.submit_as(2, city()), [assigned(2, "a")]);
        bench.finished("b", 1);
        bench.finished("a", 2);
        bench.queue.opened(&"b".into(), &"town".into(), 2);
        bench.queue.opened(&"b".into(), &"river".into(), 2);
        bench.effects();
        // It had to close the city for that.
        assert_eq!(
            bench.submit_as(3, city()),
            [assigned(3, "b")],
            "the longest idle"
        );
        assert_eq!(bench.submit_as(4, in_project("town")), [assigned(4, "a")]);
    }

    /// Two workers, and projects that answered.
    fn bench_that_knows(projects: &[&str]) -> Bench {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let stalled = Some(3 * S);
        bench.queue.configure(Limits {
            stalled,
            ..limits()
        });
        for (project, id) in projects.iter().zip(100..) {
            let sent = bench.submit_as(id, in_project(project));
            let peer = if sent == [assigned(id, "a")] {
                "a"
            } else {
                "b"
            };
            bench.finished(peer, id);
        }
        bench.effects();
        bench
    }

    #[test]
    fn a_project_that_never_answered_leaves_workers_to_others_until_it_does() {
        for is_stream in [false, true] {
            let mut bench = bench_that_knows(&["lake"]);
            assert_eq!(bench.submit_as(1, in_project("city")), [assigned(1, "b")]);
            assert_eq!(bench.submit_as(2, in_project("city")), []);
            assert_eq!(bench.submit_as(3, in_project("lake")), [assigned(3, "a")]);
            bench.finished("a", 3);
            assert_eq!(bench.effects(), []);
            match is_stream {
                true => bench.partial("b", 1),
                false => bench.finished("b", 1),
            };
            assert_eq!(bench.effects(), [assigned(2, "a")]);
        }
    }

    #[test]
    fn the_only_project_has_all_workers_from_the_start() {
        let mut bench = bench_that_knows(&[]);
        assert_eq!(bench.submit(1), [assigned(1, "a")]);
        assert_eq!(bench.submit(2), [assigned(2, "b")]);
        bench.pass(2 * S, &["a", "b"]);
    }

    #[test]
    fn a_project_that_stalls_gives_back_what_it_has_too_much_and_gets_it_when_it_answers() {
        let mut bench = bench_that_knows(&["lake", "city"]);
        assert_eq!(bench.submit_as(1, in_project("city")), [assigned(1, "a")]);
        assert_eq!(bench.submit_as(2, in_project("city")), [assigned(2, "b")]);
        assert_eq!(bench.submit_as(3, in_project("lake")), []);
        assert_eq!(bench.pass(2 * S, &["a", "b"]), []);
        assert_eq!(
            bench.pass(S, &["a", "b"]),
            [
                Effect::Stalled { id: 1 },
                cancelled(2, "b"),
                Effect::GaveWay { id: 2 }
            ]
        );
        assert_eq!(bench.gone("b"), []);
        bench.ready("c");
        assert_eq!(bench.effects(), [assigned_for(3, "c", 2 * S)]);
        bench.finished("c", 3);
        assert_eq!(
            bench.effects(),
            [],
            "the other one waits, though it is first"
        );
        bench.finished("a", 1);
        assert_eq!(bench.effects(), [assigned_for(2, "c", 2 * S)]);
        bench.submit_as(4, in_project("city"));
        assert_eq!(bench.queue.n_waiting(), 0, "it has both again");
    }

    #[test]
    fn stalled_projects_hold_no_more_together_than_one_alone() {
        let mut bench = bench_that_knows(&["lake", "city", "town"]);
        for (id, project) in [(1, "city"), (2, "town"), (3, "lake")] {
            bench.submit_as(id, in_project(project));
        }
        let effects = bench.pass(3 * S, &["a", "b"]);
        let (stalled, others) = effects.split_at(2);
        assert_eq!(stalled, [1, 2].map(|id| Effect::Stalled { id }));
        assert_eq!(others[1..], [Effect::GaveWay { id: 2 }]);
    }

    #[test]
    fn nothing_is_taken_from_a_stalled_project_while_nobody_else_waits() {
        let mut bench = bench_that_knows(&["lake", "city"]);
        (1..=3).for_each(|id| drop(bench.submit_as(id, in_project("city"))));
        assert_eq!(bench.pass(4 * S, &["a", "b"]), [Effect::Stalled { id: 1 }]);
    }

    #[test]
    fn a_project_that_answers_others_meanwhile_is_not_stalled() {
        let mut bench = bench_that_knows(&["lake", "city"]);
        bench.submit_as(1, in_project("city"));
        bench.pass(S, &["a", "b"]);
        bench.submit_as(2, in_project("city"));
        bench.finished("b", 2);
        assert_eq!(bench.pass(3 * S, &["a", "b"]), []);
        assert_eq!(bench.submit_as(3, in_project("city")), [assigned(3, "b")]);
    }

    /// Otherwise a print would have the worker that is left.
    #[test]
    fn what_has_run_for_long_counts_as_long() {
        let mut bench = bench_that_knows(&["lake", "city"]);
        bench.submit_as(1, in_project("city"));
        bench.pass(3 * S, &["a", "b"]);
        let print = Ticket {
            sort: Sort::Print,
            ..in_project("lake")
        };
        assert_eq!(bench.submit_as(2, print), []);
        assert_eq!(bench.submit_as(3, in_project("lake")), [assigned(3, "b")]);
    }

    #[test]
    fn a_print_that_takes_its_time_stalls_no_project() {
        let mut bench = bench_that_knows(&["lake", "city"]);
        let print = Ticket {
            sort: Sort::Print,
            ..in_project("city")
        };
        bench.submit_as(1, print);
        assert_eq!(bench.pass(4 * S, &["a", "b"]), []);
        assert_eq!(bench.submit_as(2, in_project("city")), [assigned(2, "b")]);
    }

    #[test]
    fn without_the_setting_no_project_stalls_and_new_ones_have_all_workers() {
        let mut bench = bench_that_knows(&["lake"]);
        bench.queue.configure(limits());
        bench.submit_as(1, in_project("city"));
        assert_eq!(bench.submit_as(2, in_project("city")), [assigned(2, "a")]);
        assert_eq!(bench.submit_as(3, in_project("lake")), []);
        assert_eq!(bench.pass(4 * S, &["a", "b"]), []);
    }

    #[test]
    fn an_errand_is_for_one_worker_as_soon_as_it_is_idle() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let send = |bench: &mut Bench, peer: &'static str, id| {
            let ticket = Ticket {
                retry: false,
                ..ticket()
            };
            bench.queue.errand(&peer.into(), id, ticket, bench.now);
            bench.effects()
        };
        assert_eq!(send(&mut bench, "b", 1), [assigned(1, "b")]);
        assert_eq!(bench.submit(2), [assigned(2, "a")]);
        assert_eq!(bench.submit(3), []);
        assert_eq!(send(&mut bench, "a", 4), []);
        bench.finished("a", 2);
        assert_eq!(bench.effects(), [assigned(4, "a")], "before what waits");
        bench.finished("b", 1);
        assert_eq!(bench.effects(), [assigned(3, "b")]);
        // It dies with its worker, waiting or not.
        assert_eq!(send(&mut bench, "b", 5), []);
        let effects = bench.gone("b");
        assert!(effects.contains(&Effect::Forget { id: 5 }), "{effects:?}");
        assert_eq!(send(&mut bench, "b", 6), [Effect::Forget { id: 6 }]);
        let effects = bench.gone("a");
        assert!(
            effects.contains(&answered(4, Error::WorkerDied)),
            "{effects:?}"
        );
    }

    #[test]
    fn a_full_queue_refuses_at_once() {
        let mut bench = Bench::new();
        assert_eq!([bench.submit(1), bench.submit(2)].concat(), []);
        assert_eq!(bench.submit(3), [answered(3, queue_full(S))]);
        bench.ready("a");
        assert_eq!(bench.effects(), [assigned(1, "a")]);
        assert_eq!(bench.submit(4), []);
    }

    #[test]
    fn a_request_without_a_worker_waits_queue_timeout_and_no_longer() {
        let mut bench = Bench::new();
        bench.submit_as(
            1,
            Ticket {
                timeout: 60 * S,
                ..ticket()
            },
        );
        assert_eq!(bench.queue.next_deadline(), Some(bench.now + 10 * S));
        assert_eq!(bench.pass(10 * S - Duration::from_millis(1), &[]), []);
        let error = Error::QueueTimedOut { after: 10 * S };
        assert_eq!(
            bench.pass(Duration::from_millis(1), &[]),
            [answered(1, error)]
        );
        assert_eq!(bench.queue.next_deadline(), None);
    }

    #[test]
    fn waiting_counts_towards_the_deadline() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(
            1,
            Ticket {
                timeout: 60 * S,
                ..ticket()
            },
        );
        bench.submit(2);
        bench.pass(2 * S, &["a"]);
        bench.finished("a", 1);
        assert_eq!(bench.effects(), [assigned_for(2, "a", 3 * S)]);
        assert_eq!(bench.pass(3 * S, &["a"]), [cancelled(2, "a"), timed_out(2)]);
    }

    #[test]
    fn a_timed_out_worker_is_idle_again_after_its_late_final() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        assert_eq!(bench.pass(5 * S, &["a"]), [cancelled(1, "a"), timed_out(1)]);
        assert_eq!(bench.submit(2), []);
        assert_eq!(bench.partial("a", 1), Fate::Drop);
        assert_eq!(bench.finished("a", 1), Fate::Drop);
        assert_eq!(bench.effects(), [assigned(2, "a")]);
    }

    #[test]
    fn a_cancelled_worker_that_never_ends_is_expelled() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.pass(5 * S, &["a"]);
        assert_eq!(bench.pass(3 * S, &["a"]), []);
        assert_eq!(bench.pass(S, &["a"]), [expelled("a", Why::Stuck)]);
    }

    #[test]
    fn a_stream_has_the_timeout_between_chunks_while_the_client_takes_them() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.pass(4 * S, &["a"]);
        assert_eq!(bench.partial("a", 1), Fate::Deliver);
        assert_eq!(bench.pass(4 * S, &["a"]), []);
        assert_eq!(bench.partial("a", 1), Fate::Deliver);
        // The window is full: the client is slow, and the worker may wait for it.
        assert_eq!(bench.pass(60 * S, &["a"]), []);
        let credit = Effect::Credit {
            peer: "a".into(),
            id: 1,
            n: 2,
        };
        assert_eq!(bench.took(1, 2), [credit]);
        assert_eq!(bench.pass(4 * S, &["a"]), []);
        assert_eq!(bench.pass(S, &["a"]), [cancelled(1, "a"), timed_out(1)]);
    }

    #[test]
    fn a_worker_that_overruns_its_window_is_expelled() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.partial("a", 1);
        bench.partial("a", 1);
        assert_eq!(bench.partial("a", 1), Fate::Expelled);
        let died = answered(1, Error::WorkerDied);
        assert_eq!(
            bench.effects(),
            [expelled("a", Why::Overrun { window: 2 }), died]
        );
    }

    #[test]
    fn a_worker_that_replies_to_what_it_does_not_hold_is_expelled() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit(1);
        assert_eq!(bench.finished("b", 1), Fate::Expelled);
        assert_eq!(bench.effects(), [expelled("b", Why::NotHeld)]);
        assert_eq!(bench.finished("b", 1), Fate::Stranger);
        assert_eq!(bench.partial("a", 7), Fate::Expelled);
        let again = Effect::Requeued { id: 1 };
        assert_eq!(bench.effects(), [expelled("a", Why::NotHeld), again]);
    }

    #[test]
    fn a_reply_that_begins_without_a_head_expels_its_worker() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(
            1,
            Ticket {
                retry: false,
                ..ticket()
            },
        );
        bench
            .queue
            .finished(&"a".into(), 1, false, false, bench.now);
        let died = answered(1, Error::WorkerDied);
        assert_eq!(bench.effects(), [expelled("a", Why::Headless), died]);
    }

    #[test]
    fn a_death_before_the_first_byte_is_retried_once_ahead_of_the_others() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.submit(2);
        bench.pass(S, &["a"]);
        assert_eq!(bench.gone("a"), [Effect::Requeued { id: 1 }]);
        bench.ready("b");
        assert_eq!(bench.effects(), [assigned_for(1, "b", 4 * S)]);
        assert_eq!(bench.gone("b"), [answered(1, Error::WorkerDied)]);
        bench.ready("c");
        assert_eq!(bench.effects(), [assigned_for(2, "c", 4 * S)]);
    }

    #[test]
    fn what_was_not_sent_is_first_in_line_again_and_has_its_retry_left() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let post = Ticket {
            retry: false,
            ..ticket()
        };
        bench.queue.submit(1, post, bench.now);
        assert_eq!(bench.unsent(), [assigned(1, "a")]);
        bench.queue.gone(&"a".into(), bench.now);
        assert_eq!(bench.unsent(), [assigned(1, "b")]);
        bench.queue.gone(&"b".into(), bench.now);
        assert_eq!(bench.unsent(), []);
        assert_eq!(bench.submit(2), []);
        bench.ready("c");
        assert_eq!(bench.effects(), [assigned(1, "c")]);
        assert_eq!(bench.gone("c"), [answered(1, Error::WorkerDied)]);
    }

    #[test]
    fn what_no_worker_would_take_is_answered_and_its_worker_is_free() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.queue.submit(1, ticket(), bench.now);
        assert_eq!(bench.submit(2), [assigned(1, "a")]);
        let error = Error::RequestTooLarge { limit: 1 };
        bench.queue.refused(1, error.clone(), bench.now);
        assert_eq!(bench.effects(), [answered(1, error), assigned(2, "a")]);
    }

    #[test]
    fn what_must_not_be_sent_twice_is_answered_at_once() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit_as(
            1,
            Ticket {
                retry: false,
                ..ticket()
            },
        );
        assert_eq!(bench.gone("a"), [answered(1, Error::WorkerDied)]);
        bench.submit(2);
        bench.partial("b", 2);
        assert_eq!(bench.gone("b"), [answered(2, Error::WorkerDied)]);
    }

    #[test]
    fn a_silent_worker_is_dead() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit(1);
        let silent = expelled("a", Why::Silent { after: 3 * S });
        assert_eq!(bench.pass(2 * S, &["b"]), []);
        let effects = bench.pass(S, &["b"]);
        assert_eq!(
            effects,
            [
                silent,
                Effect::Requeued { id: 1 },
                assigned_for(1, "b", 2 * S)
            ]
        );
        assert!(!bench.queue.heard(&"a".into(), bench.now));
    }

    #[test]
    fn the_retry_does_not_go_to_a_worker_that_is_as_dead() {
        let mut bench = Bench::with_workers(&["a", "b", "c", "d", "e", "f"]);
        bench.submit(1);
        let effects = bench.pass(3 * S, &["f"]);
        assert!(
            effects.contains(&assigned_for(1, "f", 2 * S)),
            "{effects:?}"
        );
        assert!(!effects.contains(&answered(1, Error::WorkerDied)));
        assert_eq!(bench.finished("f", 1), Fate::Deliver);
    }

    #[test]
    fn a_worker_that_missed_a_heartbeat_is_the_last_choice() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.pass(2 * S, &["b"]);
        assert_eq!(bench.submit(1), [assigned(1, "b")]);
        assert_eq!(bench.submit(2), [assigned(2, "a")]);
    }

    #[test]
    fn a_pause_of_the_server_is_not_the_workers_silence() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.pass(S, &["a"]);
        bench.now += 60 * S;
        bench.queue.tick(bench.now);
        assert_eq!(bench.effects(), []);
        let silent = expelled("a", Why::Silent { after: 3 * S });
        assert_eq!(bench.pass(3 * S, &[]), [silent]);
    }

    #[test]
    fn a_withdrawn_request_leaves_the_queue_or_is_cancelled() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.submit(2);
        assert_eq!(bench.withdraw(2), [Effect::Forget { id: 2 }]);
        assert_eq!(
            bench.withdraw(1),
            [cancelled_within(1, "a", 5 * S), Effect::Forget { id: 1 }]
        );
        assert_eq!(bench.withdraw(1), []);
        assert_eq!(bench.finished("a", 1), Fate::Drop);
        assert_eq!(bench.submit(3), [assigned(3, "a")]);
    }

    #[test]
    fn a_client_that_leaves_does_not_cost_a_worker_before_the_deadline() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.pass(2 * S, &["a"]);
        let cancel = cancelled_within(1, "a", 3 * S);
        assert_eq!(bench.withdraw(1), [cancel, Effect::Forget { id: 1 }]);
        assert_eq!(bench.pass(5 * S, &["a"]), []);
        assert_eq!(bench.pass(S, &["a"]), [expelled("a", Why::Stuck)]);
    }

    #[test]
    fn a_client_that_leaves_late_leaves_its_worker_time_to_stop() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit(1);
        bench.submit(2);
        bench.partial("b", 2);
        bench.partial("b", 2);
        bench.pass(5 * S - Duration::from_millis(1), &["a", "b"]);
        let forget = |id| Effect::Forget { id };
        assert_eq!(bench.withdraw(1), [cancelled(1, "a"), forget(1)]);
        // With a full window it was the client who did nothing.
        let cancel = cancelled_within(2, "b", 5 * S);
        assert_eq!(bench.withdraw(2), [cancel, forget(2)]);
    }

    #[test]
    fn what_must_not_be_cancelled_runs_to_its_end_unheard() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(
            1,
            Ticket {
                cancel: false,
                ..ticket()
            },
        );
        bench.partial("a", 1);
        let credit = Effect::Credit {
            peer: "a".into(),
            id: 1,
            n: 1,
        };
        assert_eq!(bench.withdraw(1), std::slice::from_ref(&credit));
        for _ in 0..5 {
            assert_eq!(bench.partial("a", 1), Fate::Drop);
            assert_eq!(bench.effects(), std::slice::from_ref(&credit));
        }
        assert_eq!(bench.finished("a", 1), Fate::Drop);
        assert_eq!(bench.effects(), [Effect::Forget { id: 1 }]);
        assert_eq!(bench.submit(2), [assigned(2, "a")]);
    }

    fn run_on() -> Ticket {
        Ticket {
            cancel: false,
            ..ticket()
        }
    }

    #[test]
    fn what_runs_on_without_its_client_has_a_later_deadline_and_one_in_all() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(1, run_on());
        bench.pass(4 * S, &["a"]);
        bench.withdraw(1);
        assert_eq!(bench.pass(13 * S, &["a"]), []);
        assert_eq!(bench.partial("a", 1), Fate::Drop);
        bench.effects();
        assert_eq!(bench.pass(2 * S, &["a"]), []);
        let effects = bench.pass(S, &["a"]);
        assert!(effects.contains(&cancelled(1, "a")), "{effects:?}");
    }

    #[test]
    fn what_could_run_on_ends_at_its_deadline_while_its_client_waits() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(1, run_on());
        let effects = bench.pass(5 * S, &["a"]);
        assert!(effects.contains(&cancelled(1, "a")), "{effects:?}");
    }

    #[test]
    fn a_leaving_worker_gets_nothing_more() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let farewell = |peer: &'static str| Effect::Farewell { peer: peer.into() };
        bench.submit(1);
        bench.queue.finished(&"a".into(), 1, true, true, bench.now);
        bench.queue.leaving(&"b".into(), bench.now);
        bench.queue.leaving(&"stranger".into(), bench.now);
        assert_eq!(
            bench.effects(),
            [farewell("a"), farewell("b"), farewell("stranger")]
        );
        assert_eq!(bench.submit(2), []);
        assert_eq!(bench.gone("a"), []);
        assert_eq!(bench.pass(3 * S, &[]), [expelled("b", Why::Left)]);
    }

    #[test]
    fn a_worker_may_leave_while_busy_and_end_its_request() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.queue.leaving(&"a".into(), bench.now);
        assert_eq!(bench.effects(), [Effect::Farewell { peer: "a".into() }]);
        assert_eq!(bench.finished("a", 1), Fate::Deliver);
        assert_eq!(bench.submit(2), []);
    }

    #[test]
    fn who_leaves_or_was_cancelled_does_not_count_as_serving() {
        let mut bench = Bench::with_workers(&["idle", "busy", "cancelled", "left", "leaving"]);
        bench.queue.leaving(&"left".into(), bench.now);
        bench.queue.leaving(&"idle".into(), bench.now);
        bench.ready("anew");
        for id in 1..=3 {
            bench.submit(id);
        }
        assert_eq!(bench.queue.n_serving(), 4);
        bench.withdraw(2);
        bench.queue.leaving(&"leaving".into(), bench.now);
        assert_eq!(bench.queue.n_serving(), 2);
    }

    #[test]
    fn ready_again_changes_nothing_for_the_busy() {
        let mut bench = Bench::with_workers(&["a"]);
        assert!(bench.queue.ready(&"a".into(), bench.now));
        bench.submit(1);
        assert!(!bench.queue.ready(&"a".into(), bench.now));
        assert_eq!(bench.submit(2), []);
    }

    #[test]
    fn a_stopping_queue_ends_what_it_has_and_takes_nothing_new() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.submit(2);
        bench.queue.stop();
        assert_eq!(bench.submit(3), [answered(3, Error::Stopping)]);
        bench.finished("a", 1);
        assert_eq!(bench.effects(), [assigned(2, "a")]);
        bench.queue.abort();
        assert_eq!(bench.effects(), [answered(2, Error::Stopping)]);
    }

    fn of(client: &str) -> Ticket {
        Ticket {
            client: client.into(),
            ..ticket()
        }
    }

    fn print() -> Ticket {
        Ticket {
            sort: Sort::Print,
            ..ticket()
        }
    }

    /// To a project that is slow by experience.
    fn slow() -> Ticket {
        Ticket {
            project: "slow".into(),
            kind: Kind::of("slow", "GetMap", &Work::default()),
            ..ticket()
        }
    }

    /// By the worker `peer`.
    fn asked_by(peer: &'static str) -> Ticket {
        Ticket {
            client: "self".into(),
            project: "base".into(),
            cause: Some(peer.into()),
            ..ticket()
        }
    }

    fn in_project(project: &str) -> Ticket {
        Ticket {
            project: project.into(),
            ..ticket()
        }
    }

    impl Bench {
        /// Room for any number, as fairness matters where many wait.
        fn roomy(names: &[&'static str]) -> Self {
            let mut bench = Self::new();
            bench.queue.limits.queue_max = 1000;
            names.iter().for_each(|name| bench.ready(name));
            bench.pass(3 * S, names);
            bench
        }

        /// The worker ends what it has; what it and others get then.
        fn ends(&mut self, peer: &'static str) -> Vec<Id> {
            let State::Busy(id) = self.queue.workers[peer.as_bytes()].state else {
                panic!("{peer} has nothing to end");
            };
            self.finished(peer, id);
            ids(&self.effects())
        }

        /// That the long requests of `slow` are known to be.
        fn learn_what_is_slow(&mut self) {
            self.queue.costs.learn(&slow().kind, 2 * S);
        }
    }

    /// What was assigned.
    fn ids(effects: &[Effect]) -> Vec<Id> {
        let id = |effect: &Effect| match effect {
            Effect::Assign { id, .. } => Some(*id),
            _ => None,
        };
        effects.iter().filter_map(id).collect()
    }

    fn queue_full(retry_after: Duration) -> Error {
        Error::QueueFull {
            limit: 2,
            retry_after,
        }
    }

    #[test]
    fn who_is_refused_is_told_when_those_before_will_have_been_served() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.pass(4 * S, &["a"]);
        bench.finished("a", 1);
        (2..5).for_each(|id| drop(bench.submit(id)));
        // Two wait, and one took four seconds.
        assert_eq!(bench.submit(5), [answered(5, queue_full(8 * S))]);
        bench.ready("b");
        bench.submit(6);
        assert_eq!(bench.submit(7), [answered(7, queue_full(4 * S))]);
    }

    #[test]
    fn two_hundred_requests_of_one_client_delay_another_by_one() {
        let mut bench = Bench::roomy(&["a"]);
        (0..200).for_each(|id| drop(bench.submit_as(id, of("greedy"))));
        bench.submit_as(1000, of("modest"));
        bench.submit_as(1001, of("modest"));
        let next: Vec<Id> = (0..4).flat_map(|_| bench.ends("a")).collect();
        assert_eq!(next.iter().filter(|id| **id >= 1000).count(), 2, "{next:?}");
    }

    #[test]
    fn a_client_and_a_project_have_their_limits() {
        let mut bench = Bench::roomy(&["a"]);
        (
            bench.queue.limits.client_max,
            bench.queue.limits.project_max,
        ) = (2, 3);
        assert_eq!(bench.submit_as(1, of("x")), [assigned(1, "a")]);
        assert_eq!(bench.submit_as(2, of("x")), []);
        let retry_after = S;
        let error = Error::ClientBusy {
            limit: 2,
            retry_after,
        };
        let busy = answered(3, error);
        assert_eq!(bench.submit_as(3, of("x")), [busy]);
        assert_eq!(bench.submit_as(4, of("y")), []);
        let error = Error::ProjectBusy {
            limit: 3,
            retry_after,
        };
        let busy = answered(5, error);
        assert_eq!(bench.submit_as(5, of("y")), [busy]);
        bench.ends("a");
        assert_eq!(bench.submit_as(6, of("x")), []);
        bench.withdraw(6);
        assert_eq!(bench.submit_as(7, of("x")), []);
    }

    #[test]
    fn prints_leave_a_worker_to_small_maps() {
        let mut bench = Bench::roomy(&["a", "b"]);
        (1..=8).for_each(|id| drop(bench.submit_as(id, print())));
        assert_eq!((bench.queue.n_running(), bench.queue.n_waiting()), (1, 7));
        for id in 11..=15 {
            assert_eq!(ids(&bench.submit(id)), [id]);
            assert_eq!(bench.ends("b"), [] as [Id; 0]);
        }
        // However long nobody wants a small one.
        bench.pass(4 * S, &["a", "b"]);
        assert_eq!((bench.queue.n_running(), bench.queue.n_waiting()), (1, 7));
        assert_eq!(bench.ends("a"), [2]);
    }

    #[test]
    fn the_only_worker_prints_too() {
        let mut bench = Bench::with_workers(&["a"]);
        assert_eq!(ids(&bench.submit_as(1, print())), [1]);
    }

    #[test]
    fn what_is_slow_by_experience_leaves_a_worker_while_small_maps_come() {
        let mut bench = Bench::roomy(&["a", "b"]);
        bench.learn_what_is_slow();
        bench.submit(1);
        bench.ends("a");
        (11..=18).for_each(|id| drop(bench.submit_as(id, slow())));
        assert_eq!((bench.queue.n_running(), bench.queue.n_waiting()), (1, 7));
        assert_eq!(bench.queue.next_deadline(), Some(bench.now + 2 * S));
        assert_eq!(bench.pass(S, &["a", "b"]), []);
        assert_eq!(ids(&bench.submit(2)), [2]);
        assert_eq!(bench.ends("a"), [] as [Id; 0]);
        // Nobody asks for a small one any more.
        assert_eq!(ids(&bench.pass(2 * S, &["a", "b"])), [12]);
    }

    #[test]
    fn where_all_is_slow_no_worker_is_kept_from_it() {
        let mut bench = Bench::roomy(&["a", "b"]);
        bench.learn_what_is_slow();
        assert_eq!(ids(&bench.submit_as(1, slow())), [1]);
        assert_eq!(ids(&bench.submit_as(2, slow())), [2]);
    }

    #[test]
    fn what_took_too_long_is_known_to_be_long() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        let ticket = Ticket {
            kind: Kind::of("city", "GetMap", &Work::default()),
            ..ticket()
        };
        bench.submit_as(1, ticket.clone());
        bench.pass(5 * S, &["a", "b"]);
        assert_eq!(bench.queue.costs.estimate(&ticket.kind), 5000);
    }

    #[test]
    fn what_runs_out_of_time_is_thought_to_take_what_it_ran_and_not_what_it_waited_before() {
        let mut bench = Bench::with_workers(&["a"]);
        let ticket = |project| Ticket {
            kind: Kind::of(project, "GetMap", &Work::default()),
            ..ticket()
        };
        bench.submit_as(1, ticket("city"));
        bench.pass(S, &["a"]);
        bench.submit_as(2, ticket("village"));
        bench.pass(3 * S, &["a"]);
        bench.finished("a", 1);
        assert_eq!(bench.effects(), [assigned_for(2, "a", 2 * S)]);
        bench.pass(2 * S, &["a"]);
        let estimate = bench.queue.costs.estimate(&ticket("village").kind);
        assert_eq!(estimate, 2000, "of five seconds it waited three");
    }

    #[test]
    fn what_a_client_took_to_read_is_not_thought_to_be_work() {
        let mut bench = Bench::with_workers(&["a"]);
        let kind = Kind::of("city", "GetFeature", &Work::default());
        let ticket = Ticket { kind, ..ticket() };
        bench.submit_as(1, ticket);
        bench.partial("a", 1);
        bench.partial("a", 1);
        assert_eq!(bench.pass(60 * S, &["a"]), []);
        bench.took(1, 2);
        assert_eq!(bench.pass(5 * S, &["a"]), [cancelled(1, "a"), timed_out(1)]);
        let estimate = bench.queue.costs.estimate(&kind);
        assert_eq!(estimate, 5000, "its timeout, and not the minute before");
    }

    #[test]
    fn cancelled_work_has_no_more_time_than_it_needs_once_others_wait() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit(1);
        bench.submit(2);
        let forget = |id| Effect::Forget { id };
        let spared = |id, peer| cancelled_within(id, peer, 5 * S);
        assert_eq!(bench.withdraw(1), [spared(1, "a"), forget(1)]);
        assert_eq!(bench.withdraw(2), [spared(2, "b"), forget(2)]);
        // One waits, so one of them has to make way.
        assert_eq!(bench.submit(3), [cancelled(1, "a")]);
        assert_eq!(bench.pass(3 * S, &["a", "b"]), []);
        assert_eq!(bench.submit(4), [cancelled(2, "b")]);
        assert_eq!(bench.pass(S, &["a", "b"]), [expelled("a", Why::Stuck)]);
        assert_eq!(bench.finished("b", 2), Fate::Drop);
        assert_eq!(ids(&bench.effects()), [3]);
    }

    #[test]
    fn who_leaves_while_others_wait_makes_way_at_once() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit(1);
        bench.submit(2);
        let effects = bench.withdraw(1);
        assert_eq!(effects.last(), Some(&cancelled(1, "a")), "{effects:?}");
    }

    #[test]
    fn a_cancelled_print_makes_way_for_the_next_although_others_are_idle() {
        let mut bench = Bench::with_workers(&["a", "b"]);
        bench.submit_as(1, print());
        bench.withdraw(1);
        assert_eq!(bench.submit_as(2, print()), [cancelled(1, "a")]);
    }

    #[test]
    fn a_request_of_our_own_worker_goes_first() {
        let mut bench = Bench::roomy(&["a", "b"]);
        bench.submit_as(1, in_project("cascade"));
        bench.submit(2);
        (3..=9).for_each(|id| drop(bench.submit(id)));
        bench.submit_as(10, asked_by("a"));
        assert_eq!(bench.ends("b"), [10]);
    }

    #[test]
    fn a_request_in_the_name_of_a_worker_that_has_none_is_like_any_other() {
        let mut bench = Bench::roomy(&["a"]);
        bench.submit(1);
        bench.submit(2);
        bench.submit_as(3, asked_by("nobody"));
        assert_eq!(bench.ends("a"), [2]);
    }

    #[test]
    fn a_project_that_asks_us_never_has_the_last_worker_again() {
        let mut bench = Bench::roomy(&["a", "b"]);
        bench.submit_as(1, in_project("cascade"));
        assert_eq!(ids(&bench.submit_as(2, asked_by("a"))), [2]);
        assert_eq!(bench.submit_as(3, in_project("cascade")), []);
        assert_eq!(bench.ends("b"), [] as [Id; 0]);
        assert_eq!(ids(&bench.submit_as(4, asked_by("a"))), [4]);
        bench.ends("b");
        assert_eq!(bench.ends("a"), [3]);
        assert_eq!(ids(&bench.submit_as(5, asked_by("a"))), [5]);
    }

    /// Nobody could know that the project asks us, and it has both workers.
    #[test]
    fn a_pool_that_waits_for_itself_does_not_wait_long() {
        let mut bench = Bench::roomy(&["a", "b"]);
        bench.submit_as(1, in_project("cascade"));
        bench.submit_as(2, in_project("cascade"));
        bench.submit_as(6, in_project("cascade"));
        assert_eq!(bench.submit_as(3, asked_by("a")), []);
        let steps_back = [cancelled(2, "b"), Effect::SteppedBack { id: 2 }];
        assert_eq!(bench.submit_as(4, asked_by("b")), steps_back);
        // Its worker could not stop, so it left, and with it what it asked for.
        assert_eq!(bench.gone("b"), []);
        assert_eq!(bench.withdraw(4), [Effect::Forget { id: 4 }]);
        bench.ready("c");
        assert_eq!(bench.effects(), [assigned(3, "c")]);
        assert_eq!(bench.ends("c"), [] as [Id; 0]);
        assert_eq!(bench.ends("a"), [2]);
        // It has the long lane now, and the other worker what it asks for.
        let asker = bench.queue.assigned[&2].peer.clone();
        let ticket = Ticket {
            cause: Some(asker),
            ..asked_by("a")
        };
        assert_eq!(ids(&bench.submit_as(5, ticket)), [5]);
    }

    #[test]
    fn the_only_worker_is_not_kept_waiting_for_itself() {
        let mut bench = Bench::roomy(&["a"]);
        bench.submit_as(1, in_project("cascade"));
        let refused = answered(2, Error::WaitsForItself);
        assert_eq!(bench.submit_as(2, asked_by("a")), [refused]);
        assert_eq!(bench.finished("a", 1), Fate::Deliver);
    }

    #[test]
    fn a_pool_that_has_just_begun_may_grow_before_it_gives_up() {
        let mut bench = Bench::with_workers(&["a"]);
        bench.submit_as(1, in_project("cascade"));
        assert_eq!(bench.submit_as(2, asked_by("a")), []);
        assert_eq!(bench.pass(2 * S, &["a"]), []);
        bench.ready("b");
        assert_eq!(ids(&bench.effects()), [2]);
    }

    #[test]
    fn what_must_not_be_sent_twice_does_not_step_back() {
        let mut bench = Bench::roomy(&["a", "b"]);
        let write = Ticket {
            retry: false,
            ..in_project("cascade")
        };
        bench.submit_as(1, write.clone());
        bench.submit_as(2, write);
        bench.submit_as(3, asked_by("a"));
        let refused = |id| answered(id, Error::WaitsForItself);
        let mut effects = bench.submit_as(4, asked_by("b"));
        effects.sort_by_key(|effect| format!("{effect:?}"));
        assert_eq!(effects, [refused(3), refused(4)]);
    }

    #[test]
    fn a_pool_that_shrinks_to_those_who_wait_for_it_does_not_wedge() {
        let mut bench = Bench::roomy(&["a", "b", "c"]);
        bench.submit_as(1, in_project("one"));
        bench.submit_as(2, in_project("two"));
        bench.submit(3);
        bench.submit_as(4, asked_by("a"));
        assert_eq!(bench.submit_as(5, asked_by("b")), []);
        // A worker that is gone may be replaced in a moment.
        assert_eq!(bench.gone("c"), [Effect::Requeued { id: 3 }]);
        let effects = bench.pass(3 * S, &["a", "b"]);
        assert!(effects.contains(&cancelled(2, "b")), "{effects:?}");
    }

    mod whatever_happens {
        use proptest::prelude::*;

        use super::*;

        const PEERS: [&str; 4] = ["a", "b", "c", "d"];
        const CLIENTS: [&str; 3] = ["x", "y", "z"];
        const ERRAND: &str = "errand";
        /// The first of them is slow by experience.
        const PROJECTS: [&str; 4] = ["slow", "city", "village", "cascade"];

        #[derive(Debug, Clone)]
        enum Event {
            Submit {
                retry: bool,
                cancel: bool,
                /// Of three clients, four projects, three sorts.
                who: (usize, usize, usize),
                /// A worker asks, if there is one that serves a request.
                cause: Option<usize>,
            },
            /// For one of the workers.
            Errand(usize),
            /// A worker has a project open.
            Opened(usize, usize),
            Withdraw(usize),
            Took(usize, u32),
            Ready(usize),
            Heard(usize),
            Leaving(usize),
            Gone(usize),
            /// Of what the worker holds, or of something else.
            Partial(usize, bool),
            Final(usize, bool, bool),
            Pass(u32),
            Stop,
        }

        fn event() -> impl Strategy<Value = Event> {
            let peer = 0..PEERS.len();
            prop_oneof![
                4 => (any::<bool>(), any::<bool>(), (0usize..3, 0usize..4, 0usize..3), prop::option::weighted(0.3, peer.clone()))
                    .prop_map(|(retry, cancel, who, cause)| Event::Submit { retry, cancel, who, cause }),
                1 => peer.clone().prop_map(Event::Errand),
                1 => (peer.clone(), 0usize..4).prop_map(|(at, project)| Event::Opened(at, project)),
                1 => (0usize..64).prop_map(Event::Withdraw),
                3 => (0usize..64, 0u32..4).prop_map(|(at, n)| Event::Took(at, n)),
                4 => peer.clone().prop_map(Event::Ready),
                3 => peer.clone().prop_map(Event::Heard),
                1 => peer.clone().prop_map(Event::Leaving),
                1 => peer.clone().prop_map(Event::Gone),
                5 => (peer.clone(), prop::bool::weighted(0.95))
                    .prop_map(|(at, held)| Event::Partial(at, held)),
                5 => (peer, prop::bool::weighted(0.95), prop::bool::weighted(0.1))
                    .prop_map(|(at, held, leaving)| Event::Final(at, held, leaving)),
                2 => (1u32..4000).prop_map(Event::Pass),
                1 => prop::bool::weighted(0.05)
                    .prop_map(|stop| if stop { Event::Stop } else { Event::Pass(1) }),
            ]
        }

        /// What a front and some workers would have seen.
        #[derive(Default)]
        struct World {
            submitted: Vec<Id>,
            /// How each request ended.
            ends: HashMap<Id, &'static str>,
            n_assigned: HashMap<Id, u32>,
            holds: HashMap<Peer, Id>,
        }

        impl World {
            fn end(&mut self, id: Id, how: &'static str) {
                let before = self.ends.insert(id, how);
                assert_eq!(before, None, "request {id} ended twice, now as {how}");
            }

            fn see(&mut self, effects: Vec<Effect>) {
                for effect in effects {
                    match effect {
                        Effect::Assign { id, peer, .. } => {
                            assert!(
                                !self.ends.contains_key(&id),
                                "{id} was assigned after its end"
                            );
                            assert_eq!(self.holds.insert(peer, id), None, "a busy worker got {id}");
                            let n = self.n_assigned.entry(id).or_default();
                            *n += 1;
                            assert!(*n <= 2, "{id} was sent three times");
                        }
                        Effect::Answer { id, .. } => self.end(id, "answer"),
                        Effect::Forget { id } => self.end(id, "forgotten"),
                        Effect::Expel { peer, .. } => drop(self.holds.remove(&peer)),
                        Effect::Credit { n, .. } => assert!((1..=2).contains(&n)),
                        Effect::Cancel { peer, id, .. } => {
                            assert_eq!(self.holds.get(&peer), Some(&id))
                        }
                        Effect::Requeued { .. }
                        | Effect::SteppedBack { .. }
                        | Effect::GaveWay { .. }
                        | Effect::Stalled { .. }
                        | Effect::Farewell { .. } => {}
                    }
                }
            }
        }

        fn play(bench: &mut Bench, world: &mut World, event: Event) {
            let (queue, now) = (&mut bench.queue, bench.now);
            let pick = |at: usize| {
                world
                    .submitted
                    .get(at % world.submitted.len().max(1))
                    .copied()
            };
            match event {
                Event::Submit {
                    retry,
                    cancel,
                    who: (client, project, sort),
                    cause,
                } => {
                    let project = PROJECTS[project];
                    let id = world.submitted.len() as Id;
                    world.submitted.push(id);
                    queue.submit(
                        id,
                        Ticket {
                            retry,
                            cancel,
                            client: CLIENTS[client].into(),
                            project: project.into(),
                            sort: [Sort::Map, Sort::Paper, Sort::Print][sort],
                            kind: Kind::of(project, "GetMap", &Work::default()),
                            cause: cause.map(|at| PEERS[at].into()),
                            ..ticket()
                        },
                        now,
                    );
                }
                Event::Errand(at) => {
                    let id = world.submitted.len() as Id;
                    world.submitted.push(id);
                    let ticket = Ticket {
                        retry: false,
                        client: ERRAND.into(),
                        ..ticket()
                    };
                    queue.errand(&PEERS[at].into(), id, ticket, now);
                }
                Event::Opened(at, project) => {
                    queue.opened(&PEERS[at].into(), &PROJECTS[project].into(), 2);
                }
                Event::Withdraw(at) => {
                    if let Some(id) = pick(at) {
                        queue.withdraw(id, now);
                    }
                }
                Event::Took(at, n) => {
                    if let Some(id) = pick(at) {
                        queue.took(id, n, now);
                    }
                }
                Event::Ready(at) => drop(queue.ready(&PEERS[at].into(), now)),
                Event::Heard(at) => drop(queue.heard(&PEERS[at].into(), now)),
                Event::Leaving(at) => queue.leaving(&PEERS[at].into(), now),
                Event::Gone(at) => {
                    world.holds.remove(PEERS[at].as_bytes());
                    queue.gone(&PEERS[at].into(), now);
                }
                Event::Partial(at, held) => {
                    let held = world.holds.get(PEERS[at].as_bytes()).filter(|_| held);
                    let fate =
                        queue.partial(&PEERS[at].into(), held.copied().unwrap_or(99), true, now);
                    let ended = held.is_some_and(|id| world.ends.contains_key(id));
                    assert!(!(ended && fate == Fate::Deliver), "a part after the end");
                }
                Event::Final(at, held, leaving) => {
                    let peer = PEERS[at].into();
                    let id = world.holds.get(&peer).filter(|_| held).copied();
                    let fate = queue.finished(&peer, id.unwrap_or(99), true, leaving, now);
                    if let Some(id) = id {
                        world.holds.remove(&peer);
                        if fate == Fate::Deliver {
                            world.end(id, "reply");
                        }
                    }
                }
                Event::Pass(ms) => {
                    bench.now += Duration::from_millis(ms.into());
                    queue.tick(bench.now);
                }
                Event::Stop => queue.stop(),
            }
        }

        /// A long request gets a worker within the bound of its lane; a slow one beyond
        /// it only while nobody asks for small ones.
        fn check_lanes(bench: &Bench, (n_before, _): (usize, usize), effects: &[Effect]) {
            let (n_long, long_max) = bench.queue.long();
            let line = |id: &Id| bench.queue.assigned.get(id).map(|it| it.line);
            let assigned = ids(effects);
            let is_errand = |id: &Id| {
                let request = bench.queue.assigned.get(id);
                request.is_some_and(|it| &*it.ticket.client == ERRAND)
            };
            // It has its worker whatever the others do.
            if assigned.iter().any(is_errand) {
                return;
            }
            let is_held = assigned.iter().any(|id| line(id) == Some(Line::Held));
            let is_slow = assigned.iter().any(|id| line(id) == Some(Line::Slow));
            let is_quiet = bench
                .queue
                .reserved_until()
                .is_none_or(|at| at <= bench.now);
            let grew = n_long > n_before;
            assert!(!grew || !is_held || n_long <= long_max || is_quiet && is_slow);
            assert!(!grew || !is_slow || n_long <= long_max || is_quiet);
        }

        proptest! {
            #![proptest_config(ProptestConfig::with_cases(256))]

            /// In one list each, never with two workers, and exactly one end.
            #[test]
            fn every_request_ends_exactly_once(
                events in prop::collection::vec(event(), 1..200),
                stalled in prop::option::of(Just(S)),
            ) {
                let mut bench = Bench::new();
                bench.queue.limits.stalled = stalled;
                bench.queue.limits.queue_max = 20;
                bench.queue.limits.client_max = 15;
                bench.queue.limits.project_max = 15;
                let slow = Kind::of("slow", "GetMap", &Work::default());
                bench.queue.costs.learn(&slow, 2 * S);
                let mut world = World::default();
                for event in events {
                    let before = bench.queue.long();
                    play(&mut bench, &mut world, event);
                    let effects = bench.unsent();
                    check_lanes(&bench, before, &effects);
                    for id in ids(&effects) {
                        bench.queue.sent(id);
                    }
                    world.see(effects);
                }
                // With a client that takes everything, all ends by itself.
                for _ in 0..60 {
                    bench.now += S;
                    for id in world.submitted.clone() {
                        bench.queue.took(id, 2, bench.now);
                    }
                    bench.queue.tick(bench.now);
                    let effects = bench.effects();
                    world.see(effects);
                }
                prop_assert_eq!(bench.queue.n_waiting() + bench.queue.n_running(), 0);
                prop_assert_eq!(world.ends.len(), world.submitted.len());
            }
        }
    }
}
