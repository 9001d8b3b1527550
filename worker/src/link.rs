//! The link between a worker and the server: a task that never waits for QGIS.
//!
//! It keeps beating while QGIS works, owns the deadline of the running request
//! and the credits of its stream, and ends the process when QGIS does not stop.
//!
//! | phase | meaning | left when |
//! |---|---|---|
//! | reserve | warm, not connected | the pool promotes the worker |
//! | seeking | no connection | connected: READY is said |
//! | connected | READY, REQUEST, … | the connection ends, or the worker leaves |
//!
//! A request whose server went away is cancelled, and the worker seeks again
//! only when QGIS is idle.

use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use qgisserver::protocol::{
    Because, Cancel, Disconnect, Edition, Final, Head, Message, Partial, Ready, Reason, Request,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::board::{Board, Farewell};
use crate::dealer::{Dealer, Event};
use crate::drive::Drive;

/// What the parent says through the control socket, one byte each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Connect, and tell the server why you have your place.
    Promoted(Because),
    /// Leave once your request is done.
    Dismissed,
}

const DISMISSED: u8 = b'D';

impl Order {
    pub fn byte(self) -> u8 {
        match self {
            // Its place among all; the parent and its workers are one program.
            Self::Promoted(because) => {
                let place = Because::ALL.iter().position(|it| *it == because);
                place.expect("all are there") as u8
            }
            Self::Dismissed => DISMISSED,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            DISMISSED => Some(Self::Dismissed),
            _ => {
                let because = Because::ALL.get(usize::from(byte)).copied();
                because.map(Self::Promoted)
            }
        }
    }
}

/// What the worker says back once the server knows it.
pub const JOINED: u8 = b'J';

/// Nobody waits for the answer any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unwanted;

/// One request for the main thread.
pub struct Job {
    pub request: Request,
    pub body: Bytes,
    pub outlet: Arc<Outlet>,
}

/// The end of its answer, ready to leave.
pub struct Last {
    pub outlet: Arc<Outlet>,
    pub report: Final,
    pub bytes: Bytes,
}

/// What the main thread gives back.
enum Out {
    Part(Partial, Bytes),
    End(Box<Final>, Bytes),
}

/// Where the answer to one request leaves. The main thread puts parts in and is
/// held up while the client takes none; the link grants credits and cancels.
pub struct Outlet {
    id: u64,
    flow: Mutex<Flow>,
    changed: Condvar,
    out: Option<(mpsc::UnboundedSender<Out>, Arc<Drive>)>,
    told: OnceLock<Told>,
}

/// What goes with the head of an answer.
pub struct Told {
    /// Of what it is made.
    pub edition: Option<Edition>,
    /// One more.
    pub header: Option<(String, String)>,
    /// How long it took to find the project.
    pub load_us: u64,
}

struct Flow {
    credits: u32,
    cancelled: bool,
    /// Asks QGIS to stop.
    stop: Option<Stop>,
}

/// How QGIS is asked to stop. It may wait for Python, so it gets a thread of its own.
pub type Stop = Box<dyn FnOnce() + Send>;

impl Outlet {
    fn new(id: u64, credits: u32, out: mpsc::UnboundedSender<Out>, drive: Arc<Drive>) -> Self {
        let flow = Mutex::new(Flow {
            credits,
            cancelled: false,
            stop: None,
        });
        Self {
            id,
            flow,
            changed: Condvar::new(),
            out: Some((out, drive)),
            told: OnceLock::new(),
        }
    }

    /// What is known of the answer before its first part.
    pub fn tell(&self, told: Told) {
        // A request has one project.
        let _ = self.told.set(told);
    }

    /// The head of the answer with all that belongs to it.
    pub fn dress(&self, mut head: Head) -> Head {
        let header = self.told.get().and_then(|told| told.header.clone());
        head.headers.extend(header);
        head
    }

    /// An outlet that leads nowhere, for the first map of a worker.
    pub fn nowhere() -> Self {
        let flow = Mutex::new(Flow {
            credits: u32::MAX,
            cancelled: false,
            stop: None,
        });
        Self {
            id: 0,
            flow,
            changed: Condvar::new(),
            out: None,
            told: OnceLock::new(),
        }
    }

    /// Sends a part; waits for a credit first. The channel behind is bounded by the credits.
    pub fn part(&self, head: Option<Head>, bytes: Bytes) -> Result<(), Unwanted> {
        let mut flow = self.flow.lock().expect("nobody panics while holding it");
        while flow.credits == 0 && !flow.cancelled {
            flow = self
                .changed
                .wait(flow)
                .expect("nobody panics while holding it");
        }
        if flow.cancelled {
            return Err(Unwanted);
        }
        flow.credits -= 1;
        drop(flow);
        let told = self.told.get().filter(|_| head.is_some());
        let partial = Partial {
            id: self.id,
            edition: told.and_then(|told| told.edition.clone()),
            load_us: told.map(|told| told.load_us),
            head: head.map(|head| self.dress(head)),
        };
        let sent = self.send(Out::Part(partial, bytes));
        if let Some((_, drive)) = &self.out {
            drive.step_in();
        }
        sent
    }

    /// Ends the answer.
    pub fn end(&self, r#final: Final, bytes: Bytes) {
        let r#final = Box::new(Final {
            id: self.id,
            ..r#final
        });
        // If the link is gone, so is the process in a moment.
        let _ = self.send(Out::End(r#final, bytes));
    }

    pub fn is_cancelled(&self) -> bool {
        self.flow
            .lock()
            .expect("nobody panics while holding it")
            .cancelled
    }

    fn send(&self, out: Out) -> Result<(), Unwanted> {
        match &self.out {
            Some((sender, _)) => sender.send(out).map_err(|_| Unwanted),
            None => Ok(()),
        }
    }

    fn is_blocked(&self) -> bool {
        let flow = self.flow.lock().expect("nobody panics while holding it");
        flow.credits == 0 && !flow.cancelled
    }

    fn grant(&self, n: u32) {
        let mut flow = self.flow.lock().expect("nobody panics while holding it");
        flow.credits = flow.credits.saturating_add(n);
        self.changed.notify_all();
    }

    fn cancel(&self) {
        let mut flow = self.flow.lock().expect("nobody panics while holding it");
        flow.cancelled = true;
        let stop = flow.stop.take();
        drop(flow);
        self.changed.notify_all();
        stop.into_iter().for_each(apart);
    }

    /// What to do when the request is cancelled; at once if it is already.
    pub fn on_cancel(&self, stop: Stop) {
        let mut flow = self.flow.lock().expect("nobody panics while holding it");
        match flow.cancelled {
            true => apart(stop),
            false => flow.stop = Some(stop),
        }
    }

    /// The request is done; there is nothing to stop any more.
    pub fn forget_stop(&self) {
        let stop = self
            .flow
            .lock()
            .expect("nobody panics while holding it")
            .stop
            .take();
        drop(stop);
    }
}

fn apart(stop: Stop) {
    let started = std::thread::Builder::new().name("stop".into()).spawn(stop);
    if let Err(error) = started {
        // The grace ends, and with it the process.
        tracing::warn!(%error, "QGIS could not be asked to stop");
    }
}

/// What a link needs to know.
pub struct Settings {
    pub server: String,
    pub heartbeat: Duration,
    pub heartbeat_misses: u32,
    /// For a request that is overdue or whose server went away.
    pub cancel_grace: Duration,
}

/// The link, to be run until the process ends. Gives `jobs` away; tells `drive`
/// when one begins and when its end is out.
pub async fn run(
    settings: Settings,
    ready: Ready,
    board: Arc<Board>,
    control: std::os::unix::net::UnixStream,
    jobs: mpsc::UnboundedSender<Job>,
    drive: Arc<Drive>,
) {
    control
        .set_nonblocking(true)
        .expect("a socket can be non-blocking");
    let control = tokio::net::UnixStream::from_std(control).expect("inside the runtime");
    Link::new(settings, ready, board, jobs, drive)
        .run(control)
        .await;
}

struct Link {
    settings: Settings,
    ready: Ready,
    board: Arc<Board>,
    jobs: mpsc::UnboundedSender<Job>,
    drive: Arc<Drive>,
    out: (mpsc::UnboundedSender<Out>, mpsc::UnboundedReceiver<Out>),
    promoted: bool,
    leaving: bool,
    dealer: Option<Dealer>,
    connecting: Option<Connecting>,
    heard_at: Instant,
    beat_at: Instant,
    seek_at: Instant,
    /// Before the next try; grows until a server is understood.
    pause: Duration,
    running: Option<Running>,
    /// It said goodbye; when it goes without an answer.
    gone_at: Option<Instant>,
}

type Connecting = Pin<Box<dyn Future<Output = Result<Dealer, String>> + Send>>;

struct Running {
    request_id: String,
    outlet: Arc<Outlet>,
    /// Between two parts.
    timeout: Duration,
    /// When a part has to be out; stands still while the client is the slow one.
    deadline: Instant,
    /// Cancelled: when the process ends if QGIS has not stopped.
    kill_at: Option<Instant>,
    /// The server that asked is still there.
    wanted: bool,
}

impl Link {
    fn new(
        settings: Settings,
        ready: Ready,
        board: Arc<Board>,
        jobs: mpsc::UnboundedSender<Job>,
        drive: Arc<Drive>,
    ) -> Self {
        let now = Instant::now();
        Self {
            settings,
            ready,
            board,
            jobs,
            drive,
            out: mpsc::unbounded_channel(),
            promoted: false,
            leaving: false,
            dealer: None,
            connecting: None,
            heard_at: now,
            beat_at: now,
            seek_at: now,
            pause: FIRST_PAUSE,
            running: None,
            gone_at: None,
        }
    }

    async fn run(mut self, mut control: tokio::net::UnixStream) -> ! {
        let mut beat = tokio::time::interval(self.settings.heartbeat);
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
                .expect("SIGTERM can be handled");
        loop {
            let alarm = self.alarm();
            // Dropping any of these futures loses nothing: reads of one byte, of
            // channels and of whole messages either happen or do not, and a
            // connection in the making is kept.
            tokio::select! {
                biased;
                out = self.out.1.recv() => self.pass_on(out.expect("we hold a sender")).await,
                event = next(&mut self.dealer) => self.hear(event).await,
                connected = made(&mut self.connecting) => {
                    if self.join(connected).await {
                        // If the parent is gone we are told below.
                        let _ = control.write_u8(JOINED).await;
                    }
                }
                byte = control.read_u8() => match byte.map(Order::from_byte) {
                    Ok(Some(Order::Promoted(because))) => {
                        self.ready.born.because = because;
                        self.promoted = true;
                    }
                    Ok(Some(Order::Dismissed)) => self.leave().await,
                    Ok(None) => tracing::warn!("the pool said something unknown"),
                    // The parent is gone: nobody would bury us.
                    Err(_) => exit(&self.board, Farewell::Told),
                },
                _ = terminate.recv() => self.leave().await,
                _ = beat.tick() => self.beat().await,
                () = until(alarm) => self.alarmed(),
            }
            self.seek();
        }
    }

    /// Begins to connect when that is what is missing.
    fn seek(&mut self) {
        if !self.lacks_connection() || Instant::now() < self.seek_at {
            return;
        }
        if self.leaving {
            exit(&self.board, Farewell::Told);
        }
        let (server, timeout) = (self.settings.server.clone(), self.settings.heartbeat);
        self.connecting = Some(Box::pin(
            async move { Dealer::connect(&server, timeout).await },
        ));
    }

    /// It should have a connection, and makes none yet.
    fn lacks_connection(&self) -> bool {
        let has_one = self.dealer.is_some() || self.connecting.is_some();
        self.promoted && self.running.is_none() && !has_one
    }

    /// The connection is made, or is not. True once READY is said.
    async fn join(&mut self, connected: Result<Dealer, String>) -> bool {
        let server = &self.settings.server;
        match connected {
            Ok(mut dealer) => {
                dealer.send(Message::Ready(self.ready.clone())).await;
                // Once more would be counted as one more.
                self.ready.born.because = Because::Reconnected;
                tracing::debug!(server, "connected");
                self.dealer = Some(dealer);
                self.heard_at = Instant::now();
                true
            }
            Err(why) => {
                tracing::debug!(server, why, "no server yet");
                self.retire();
                false
            }
        }
    }

    /// Waits before the next try, longer each time.
    fn retire(&mut self) {
        self.seek_at = Instant::now() + jittered(self.pause);
        self.pause = (self.pause * 2).min(LAST_PAUSE);
    }

    async fn hear(&mut self, event: Event) {
        self.heard_at = Instant::now();
        if let Event::Message(Message::Request(..) | Message::Heartbeat) = event {
            // This one understands us.
            self.pause = FIRST_PAUSE;
        }
        match event {
            Event::Message(Message::Request(request, body)) => self.begin(request, body),
            Event::Message(Message::Credit(credit)) => {
                if let Some(running) = self.running.as_mut().filter(|it| it.outlet.id == credit.id)
                {
                    running.outlet.grant(credit.n);
                    running.deadline = self.heard_at + running.timeout;
                }
            }
            Event::Message(Message::Cancel(cancel)) => self.cancel(cancel),
            Event::Message(Message::Heartbeat) => {}
            Event::Message(Message::Disconnect(Disconnect { reason })) => self.told(reason),
            Event::Message(other) => tracing::warn!(word = other.word(), "not for a worker"),
            Event::Malformed(error) => {
                tracing::error!(%error, "the server is not understood: leaving it");
                self.disconnected();
            }
            Event::Closed => self.disconnected(),
        }
    }

    fn begin(&mut self, request: Request, body: Bytes) {
        if self.running.is_some() {
            // Two at a time would mix their maps; the server sees the connection end.
            tracing::error!(
                request_id = request.request_id,
                "a second request while one is running"
            );
            return self.disconnected();
        }
        // It crossed our goodbye, which its end says again.
        self.gone_at = None;
        self.board.begin(&describe(&request));
        self.drive.running(true);
        let outlet = Arc::new(Outlet::new(
            request.id,
            request.window,
            self.out.0.clone(),
            self.drive.clone(),
        ));
        let first_byte = Duration::from_millis(request.first_byte_ms);
        self.running = Some(Running {
            request_id: request.request_id.clone(),
            outlet: outlet.clone(),
            timeout: Duration::from_millis(request.chunk_ms),
            deadline: Instant::now() + first_byte,
            kill_at: None,
            wanted: true,
        });
        self.jobs
            .send(Job {
                request,
                body,
                outlet,
            })
            .expect("the main thread outlives the link");
    }

    fn cancel(&mut self, cancel: Cancel) {
        if let Some(running) = self.running.as_mut().filter(|it| it.outlet.id == cancel.id) {
            running.stop(Duration::from_millis(cancel.grace_ms));
        }
    }

    /// Passes on what the main thread gave.
    async fn pass_on(&mut self, out: Out) {
        let wanted = self.running.as_ref().is_some_and(|running| running.wanted);
        match out {
            Out::Part(partial, bytes) => {
                if let Some(running) = &mut self.running {
                    running.deadline = Instant::now() + running.timeout;
                }
                self.send(wanted, Message::Partial(partial, bytes)).await;
            }
            Out::End(mut end, bytes) => {
                self.running = None;
                self.drive.running(false);
                self.board.end();
                if end.leaving {
                    self.board.say_farewell(Farewell::Doubt);
                    self.leaving = true;
                }
                end.leaving = self.leaving;
                self.send(wanted, Message::Final(*end, bytes)).await;
                if self.leaving {
                    self.leave().await;
                }
            }
        }
    }

    async fn send(&mut self, wanted: bool, message: Message) {
        if let Some(dealer) = self.dealer.as_mut().filter(|_| wanted) {
            dealer.send(message).await;
        }
    }

    /// Leaves now, or when the running request is done. The server's answer to
    /// DISCONNECT proves that it got everything before.
    async fn leave(&mut self) {
        self.leaving = true;
        self.gone_at = Some(Instant::now() + self.settings.heartbeat);
        if self.running.is_some() {
            return;
        }
        match &mut self.dealer {
            Some(dealer) => {
                dealer
                    .send(Message::Disconnect(Disconnect {
                        reason: Reason::Leaving,
                    }))
                    .await;
            }
            None => exit(&self.board, Farewell::Told),
        }
    }

    fn told(&mut self, reason: Reason) {
        match reason {
            // A request that crossed our word is served first; its end says it again.
            Reason::Leaving if self.leaving && self.running.is_none() => {
                exit(&self.board, Farewell::Told)
            }
            Reason::Leaving => {}
            Reason::Stopping | Reason::Unknown => self.disconnected(),
            Reason::Restart => {
                let parent = nix::unistd::getppid();
                if let Err(error) = nix::sys::signal::kill(parent, nix::sys::signal::SIGHUP) {
                    tracing::warn!(%error, "the pool could not be told to restart");
                }
            }
        }
    }

    fn disconnected(&mut self) {
        if self.dealer.take().is_some() {
            tracing::debug!(server = self.settings.server, "disconnected");
        }
        self.retire();
        if let Some(running) = &mut self.running {
            running.wanted = false;
            running.stop(self.settings.cancel_grace);
        }
    }

    async fn beat(&mut self) {
        self.board.beat();
        self.forgive_a_pause();
        // One more than the server waits for us: to leave costs the running request.
        let limit = self.settings.heartbeat * (self.settings.heartbeat_misses + 1);
        if self.dealer.is_some() && self.heard_at.elapsed() > limit {
            let request_id = self.running.as_ref().map(|it| it.request_id.as_str());
            tracing::warn!(
                request_id,
                server = self.settings.server,
                "silent for {limit:?}: leaving it"
            );
            self.disconnected();
        }
        self.send(true, Message::Heartbeat).await;
    }

    /// While this process itself stood still (SIGSTOP, a suspended machine) the
    /// server was not silent: what it said may wait in the socket.
    fn forgive_a_pause(&mut self) {
        let pause = std::mem::replace(&mut self.beat_at, Instant::now()).elapsed();
        if pause > self.settings.heartbeat * 2 {
            self.heard_at = Instant::now().min(self.heard_at + pause);
        }
    }

    /// When something has to happen if nothing else does.
    fn alarm(&self) -> Option<Instant> {
        let running = self.running.as_ref();
        let overdue = running.and_then(|running| match running.kill_at {
            Some(kill_at) => Some(kill_at),
            None => (!running.outlet.is_blocked()).then_some(running.deadline),
        });
        let seek = self.lacks_connection().then_some(self.seek_at);
        let gone = self.gone_at.filter(|_| running.is_none());
        overdue.into_iter().chain(seek).chain(gone).min()
    }

    fn alarmed(&mut self) {
        let now = Instant::now();
        let Some(running) = &mut self.running else {
            if self.gone_at.is_some_and(|at| at <= now) {
                exit(&self.board, Farewell::Told);
            }
            return;
        };
        match running.kill_at {
            Some(kill_at) if kill_at <= now => exit(&self.board, Farewell::Stuck),
            // The server has answered 504 by now; its CANCEL is on its way.
            None if running.deadline <= now => running.stop(self.settings.cancel_grace),
            _ => {}
        }
    }
}

impl Running {
    fn stop(&mut self, grace: Duration) {
        self.outlet.cancel();
        let kill_at = Instant::now() + grace;
        self.kill_at = Some(self.kill_at.map_or(kill_at, |at| at.min(kill_at)));
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// Between half and the whole of `pause`, so that a thousand workers do not come at once.
fn jittered(pause: Duration) -> Duration {
    let share = uuid::Uuid::new_v4().as_u128() as u32;
    pause / 2 + pause.mul_f64(f64::from(share) / f64::from(u32::MAX) / 2.0)
}

async fn next(dealer: &mut Option<Dealer>) -> Event {
    match dealer {
        Some(dealer) => dealer.next().await,
        None => pending().await,
    }
}

async fn made(connecting: &mut Option<Connecting>) -> Result<Dealer, String> {
    match connecting {
        Some(future) => {
            let connected = future.await;
            *connecting = None;
            connected
        }
        None => pending().await,
    }
}

async fn until(alarm: Option<Instant>) {
    match alarm {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

fn describe(request: &Request) -> String {
    match &request.project {
        Some(project) => format!(
            "{} of {project} ({})",
            request.operation, request.request_id
        ),
        None => format!("{} ({})", request.operation, request.request_id),
    }
}

/// Ends the process at once: QGIS's destructors could wait for what does not come.
fn exit(board: &Board, farewell: Farewell) -> ! {
    if board.farewell() == Farewell::None {
        board.say_farewell(farewell);
    }
    // SAFETY: ends the process without running anything.
    unsafe { libc::_exit(i32::from(farewell != Farewell::Told)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An alarm in the past would ring without end, and a core would burn.
    #[test]
    fn no_alarm_rings_while_a_connection_is_made() {
        let settings = Settings {
            server: "tcp://127.0.0.1:1".into(),
            heartbeat: Duration::from_secs(1),
            heartbeat_misses: 3,
            cancel_grace: Duration::from_secs(1),
        };
        let board = Arc::new(Board::new().unwrap());
        let (jobs, _received) = mpsc::unbounded_channel();
        let drive = Drive::new().unwrap();
        let mut link = Link::new(settings, Ready::default(), board, jobs, drive);
        assert_eq!(link.alarm(), None, "a reserve waits for its promotion");
        link.promoted = true;
        assert_eq!(link.alarm(), Some(link.seek_at));
        link.seek();
        assert!(link.connecting.is_some());
        assert_eq!(link.alarm(), None);
    }

    #[test]
    fn an_order_is_one_byte_and_means_one_thing() {
        let promoted = Because::ALL.iter().copied().map(Order::Promoted);
        for order in promoted.chain([Order::Dismissed]) {
            assert_eq!(Order::from_byte(order.byte()), Some(order));
        }
        assert_eq!(Order::from_byte(b'?'), None);
    }

    #[test]
    fn who_cancels_does_not_wait_for_the_one_that_is_asked_to_stop() {
        let (sender, _receiver) = mpsc::unbounded_channel();
        let outlet = Outlet::new(1, 0, sender, Drive::new().unwrap());
        let (asked, heard) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel();
        outlet.on_cancel(Box::new(move || {
            may_go_on.recv().unwrap();
            asked.send(()).unwrap();
        }));
        outlet.cancel();
        outlet.cancel();
        go_on.send(()).unwrap();
        heard.recv_timeout(Duration::from_secs(20)).unwrap();
        // Too late to be heard by the one before, but not at all is worse.
        let (asked, heard) = std::sync::mpsc::channel();
        outlet.on_cancel(Box::new(move || asked.send(()).unwrap()));
        heard.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn an_outlet_without_credits_holds_its_worker_until_the_client_takes_something() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let outlet = Arc::new(Outlet::new(1, 1, sender, Drive::new().unwrap()));
        outlet.part(None, Bytes::from_static(b"1")).unwrap();
        let writer = std::thread::spawn({
            let outlet = outlet.clone();
            move || outlet.part(None, Bytes::from_static(b"2"))
        });
        assert!(outlet.is_blocked());
        assert!(matches!(receiver.blocking_recv(), Some(Out::Part(..))));
        assert!(receiver.try_recv().is_err(), "no credit, no part");
        outlet.grant(1);
        assert_eq!(writer.join().unwrap(), Ok(()));
        assert!(matches!(receiver.blocking_recv(), Some(Out::Part(..))));
    }

    #[test]
    fn a_cancelled_outlet_lets_its_worker_go_at_once() {
        let (sender, _receiver) = mpsc::unbounded_channel();
        let outlet = Arc::new(Outlet::new(1, 0, sender, Drive::new().unwrap()));
        let writer = std::thread::spawn({
            let outlet = outlet.clone();
            move || outlet.part(None, Bytes::new())
        });
        outlet.cancel();
        assert_eq!(writer.join().unwrap(), Err(Unwanted));
        assert!(outlet.is_cancelled());
    }

    #[test]
    fn a_pause_is_spread_over_its_second_half() {
        let pause = Duration::from_secs(2);
        for _ in 0..100 {
            let jittered = jittered(pause);
            assert!(jittered >= pause / 2 && jittered <= pause, "{jittered:?}");
        }
    }
}
