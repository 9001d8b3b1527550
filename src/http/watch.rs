//! When a connection has been still for too long: one watch per connection, fed
//! by its socket and its replies, asked now and then for a verdict.
//!
//! | stillness | bound | then |
//! |---|---|---|
//! | connected, no request yet, or a request head that does not end | `header_timeout` | cut |
//! | nothing to do after a reply | `idle_timeout` | closed |
//! | nothing to do while the server drains (HTTP/1) | `drain_idle` | closed |
//! | the socket takes fewer of our bytes than `write_rate_min` says | `write_timeout` | cut |
//! | a reply's next chunk is not fetched (HTTP/2 flow control) | `write_timeout` | cut |
//! | our last word is said, the client still sends | `linger_timeout`, `body_max` | closed |

use std::collections::HashMap;
use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// Bytes that are thrown away at once.
const DISCARD: usize = 16 << 10;

/// How long each stillness may last.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub header: Duration,
    pub idle: Duration,
    pub write: Duration,
    /// What a client that is behind has to take within `write`.
    pub write_bytes: usize,
    /// A socket that is closed while bytes of a request wait in it is reset, and
    /// with it the answer is lost. So they are read for so long, and no more of
    /// them than this.
    pub linger: Duration,
    pub linger_bytes: usize,
}

/// What should happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ask again then, at the latest.
    Wait(Instant),
    /// It may end as its protocol ends connections.
    Close,
    /// It must end now.
    Cut(&'static str),
}

/// The state behind a [`Watch`]; pure.
#[derive(Debug)]
struct State {
    /// Requests whose replies are not over.
    n_running: usize,
    n_begun: u64,
    /// When the last reply ended, or the connection began.
    quiet_since: Instant,
    /// First byte that came since then.
    head_since: Option<Instant>,
    taking: Taking,
    /// Replies whose last chunk was handed over and which were not asked for the next.
    untaken: HashMap<u64, Instant>,
    /// HTTP/2 sends frames that are no requests, so bytes say nothing about heads.
    multiplexed: bool,
    /// The server drains, and since when; idle connections are kept for so long.
    draining: Option<(Instant, Duration)>,
    /// The client may still send what nobody will read.
    unread: bool,
    /// The connection must not look as if it had ended properly.
    broken: bool,
}

/// How a client takes its reply. The time between two chunks is not its own: what
/// counts is how long the socket was waited for.
#[derive(Debug, Clone, Copy, Default)]
struct Taking {
    /// The socket would not take all since then.
    blocked_since: Option<Instant>,
    /// How long that was the case before, since `n_taken` began.
    blocked_before: Duration,
    n_taken: usize,
}

impl Taking {
    /// The socket took so much, or has to be waited for.
    fn written(&mut self, limits: &Limits, now: Instant, taken: Option<usize>) {
        let Some(taken) = taken else {
            self.blocked_since.get_or_insert(now);
            return;
        };
        if let Some(since) = self.blocked_since.take() {
            self.blocked_before += now.saturating_duration_since(since);
        }
        self.n_taken += taken;
        if self.n_taken >= limits.write_bytes {
            *self = Self::default();
        }
    }

    /// When the client will have had its time.
    fn deadline(&self, limits: &Limits) -> Option<Instant> {
        Some(self.blocked_since? + limits.write.saturating_sub(self.blocked_before))
    }
}

impl State {
    fn written(&mut self, limits: &Limits, now: Instant, taken: Option<usize>) {
        self.taking.written(limits, now, taken);
        if taken.is_some() && self.n_running == 0 {
            // Idle is who has the end of the reply.
            self.quiet_since = now;
        }
    }

    fn verdict(&self, limits: &Limits, now: Instant) -> Verdict {
        let untaken = self.untaken.values().map(|since| *since + limits.write);
        let stuck = untaken.chain(self.taking.deadline(limits)).min();
        let mut next = now + limits.header.min(limits.idle).min(limits.write) / 4;
        if let Some(deadline) = stuck {
            if now >= deadline {
                return Verdict::Cut("the client takes too little");
            }
            next = next.min(deadline);
        }
        if self.n_running > 0 || self.taking.blocked_since.is_some() {
            return Verdict::Wait(next);
        }
        let (deadline, verdict) = match self.head_since {
            Some(since) if !self.multiplexed => (
                since + limits.header,
                Verdict::Cut("a request head did not end"),
            ),
            _ if self.draining.is_some() => {
                let (since, idle) = self.draining.expect("it was just seen");
                (self.quiet_since.max(since) + idle, Verdict::Close)
            }
            _ if self.n_begun == 0 => (
                self.quiet_since + limits.header,
                Verdict::Cut("no request came"),
            ),
            _ => (self.quiet_since + limits.idle, Verdict::Close),
        };
        if now >= deadline {
            verdict
        } else {
            Verdict::Wait(next.min(deadline))
        }
    }
}

/// Shared by the socket, the replies and the task of one connection.
#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    state: Mutex<State>,
}

impl Watch {
    pub fn new(limits: Limits) -> Arc<Self> {
        let state = State {
            n_running: 0,
            n_begun: 0,
            quiet_since: Instant::now(),
            head_since: None,
            taking: Taking::default(),
            untaken: HashMap::new(),
            multiplexed: false,
            draining: None,
            unread: false,
            broken: false,
        };
        Arc::new(Self {
            limits,
            state: Mutex::new(state),
        })
    }

    pub fn verdict(&self) -> Verdict {
        self.state().verdict(&self.limits, Instant::now())
    }

    /// The TLS handshake is over.
    pub fn established(&self, multiplexed: bool) {
        let mut state = self.state();
        state.multiplexed = multiplexed;
        state.head_since = None;
        state.quiet_since = Instant::now();
    }

    /// A request has arrived; its reply is over when the [`Running`] is dropped.
    pub fn begin(self: &Arc<Self>) -> Running {
        let mut state = self.state();
        if state.n_running == 0 {
            state.taking = Taking::default();
        }
        state.n_running += 1;
        state.n_begun += 1;
        state.head_since = None;
        Running {
            watch: self.clone(),
            number: state.n_begun,
        }
    }

    /// The connection ends now; a client that waits for the rest of a reply sees a reset.
    pub fn break_off(&self) {
        let mut state = self.state();
        state.broken |= state.n_running > 0 || state.taking.blocked_since.is_some();
    }

    /// The server takes no new connections, and wants to be rid of this one.
    pub fn drain(&self, idle: Duration) {
        self.state().draining = Some((Instant::now(), idle));
    }

    /// We close a connection that is idle as far as we know. A request that crosses our
    /// word on its way must not make the kernel reset the connection.
    pub fn farewell(&self) {
        self.state().unread = true;
    }

    pub fn had_request(&self) -> bool {
        self.state().n_begun > 0
    }

    fn has_read(&self) {
        let mut state = self.state();
        if state.n_running == 0 {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Whether more may come after our last byte: the rest of a body, or of a head
    /// that was refused.
    fn expects_more(&self) -> bool {
        let state = self.state();
        !state.multiplexed && (state.unread || state.n_running == 0 && state.head_since.is_some())
    }

    fn has_written(&self, taken: Option<usize>) {
        self.state().written(&self.limits, Instant::now(), taken);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code that holds this lock can panic")
    }
}

/// A request that is being served.
#[derive(Debug)]
pub struct Running {
    watch: Arc<Watch>,
    number: u64,
}

impl Running {
    /// A chunk of the reply was handed over.
    pub fn handed_over(&self) {
        self.watch
            .state()
            .untaken
            .insert(self.number, Instant::now());
    }

    /// Not all of the request will be read.
    pub fn leaves_unread(&self) {
        self.watch.state().unread = true;
    }

    /// There is no rest of the reply. HTTP/1.0 would take a closed connection for its end.
    pub fn cut_off(&self) {
        let mut state = self.watch.state();
        state.broken |= !state.multiplexed;
    }

    /// The next chunk was asked for, so the last one is on its way.
    pub fn asked(&self) {
        self.watch.state().untaken.remove(&self.number);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.watch.state();
        state.untaken.remove(&self.number);
        state.n_running -= 1;
        state.quiet_since = Instant::now();
        state.head_since = None;
    }
}

/// A socket that tells its watch what moves.
#[derive(Debug)]
pub struct Watched {
    io: TcpStream,
    watch: Arc<Watch>,
    lingering: Option<Lingering>,
}

/// The time after our last byte.
#[derive(Debug)]
struct Lingering {
    over: Pin<Box<Sleep>>,
    n_discarded: usize,
}

impl Watched {
    pub fn new(io: TcpStream, watch: Arc<Watch>) -> Self {
        Self {
            io,
            watch,
            lingering: None,
        }
    }

    /// Reads and forgets until the client has nothing more to say, or has had its time.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limits = self.watch.limits;
        let lingering = self.lingering.get_or_insert_with(|| Lingering {
            over: Box::pin(sleep(limits.linger)),
            n_discarded: 0,
        });
        while lingering.n_discarded < limits.linger_bytes {
            let mut buffer = [MaybeUninit::uninit(); DISCARD];
            let mut buffer = ReadBuf::uninit(&mut buffer);
            match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    lingering.n_discarded += buffer.filled().len();
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending if lingering.n_discarded > 0 || self.watch.expects_more() => {
                    return lingering.over.as_mut().poll(cx);
                }
                Poll::Pending => return Poll::Ready(()),
            }
            if lingering.over.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
        }
        Poll::Ready(())
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.watch.has_written(match &written {
            Poll::Pending => None,
            Poll::Ready(taken) => Some(*taken.as_ref().unwrap_or(&0)),
        });
        written
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.watch.state().broken {
            _ = self.io.set_zero_linger();
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.watch.has_read();
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        }
        self.poll_linger(cx).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LIMITS: Limits = Limits {
        header: SECOND,
        idle: Duration::from_secs(8),
        write: Duration::from_secs(4),
        write_bytes: 100,
        linger: SECOND,
        linger_bytes: 1,
    };

    fn state(now: Instant) -> State {
        State {
            n_running: 0,
            n_begun: 0,
            quiet_since: now,
            head_since: None,
            taking: Taking::default(),
            untaken: HashMap::new(),
            multiplexed: false,
            draining: None,
            unread: false,
            broken: false,
        }
    }

    #[test]
    fn a_new_connection_may_be_silent_as_long_as_a_head_may_take() {
        let now = Instant::now();
        let state = state(now);
        assert!(matches!(state.verdict(&LIMITS, now), Verdict::Wait(at) if at <= now + SECOND));
        assert!(matches!(
            state.verdict(&LIMITS, now + SECOND),
            Verdict::Cut(_)
        ));
    }

    #[test]
    fn a_served_connection_may_idle_longer_but_its_next_head_may_not_dawdle() {
        let now = Instant::now();
        let mut state = State {
            n_begun: 1,
            ..state(now)
        };
        assert!(matches!(
            state.verdict(&LIMITS, now + 7 * SECOND),
            Verdict::Wait(_)
        ));
        assert_eq!(state.verdict(&LIMITS, now + 8 * SECOND), Verdict::Close);
        state.head_since = Some(now + 2 * SECOND);
        assert!(matches!(
            state.verdict(&LIMITS, now + 3 * SECOND),
            Verdict::Cut(_)
        ));
        state.multiplexed = true;
        assert!(matches!(
            state.verdict(&LIMITS, now + 3 * SECOND),
            Verdict::Wait(_)
        ));
    }

    #[test]
    fn a_running_request_is_not_idle_however_long_it_takes() {
        let now = Instant::now();
        let state = State {
            n_begun: 1,
            n_running: 1,
            ..state(now)
        };
        assert!(matches!(
            state.verdict(&LIMITS, now + 1000 * SECOND),
            Verdict::Wait(_)
        ));
    }

    #[test]
    fn a_client_that_takes_nothing_is_cut_off() {
        let now = Instant::now();
        let mut state = State {
            n_begun: 2,
            n_running: 1,
            taking: Taking {
                blocked_since: Some(now),
                ..Taking::default()
            },
            ..state(now)
        };
        assert!(
            matches!(state.verdict(&LIMITS, now + 3 * SECOND), Verdict::Wait(at) if at <= now + 4 * SECOND)
        );
        assert!(matches!(
            state.verdict(&LIMITS, now + 4 * SECOND),
            Verdict::Cut(_)
        ));
        state.taking = Taking::default();
        state.untaken = HashMap::from([(1, now), (2, now + SECOND)]);
        assert!(matches!(
            state.verdict(&LIMITS, now + 4 * SECOND),
            Verdict::Cut(_)
        ));
    }

    #[test]
    fn a_few_bytes_now_and_then_are_not_enough_and_an_honest_rate_is() {
        let now = Instant::now();
        let after = |taken: usize| {
            let mut state = State {
                n_begun: 1,
                n_running: 1,
                ..state(now)
            };
            state.written(&LIMITS, now, None);
            for second in 1..=8 {
                let now = now + second * SECOND;
                if let Verdict::Cut(_) = state.verdict(&LIMITS, now) {
                    return Some(second);
                }
                state.written(&LIMITS, now, Some(taken));
                state.written(&LIMITS, now, None);
            }
            None
        };
        assert_eq!(after(1), Some(4));
        assert_eq!(after(40), None);
    }

    #[test]
    fn the_unsent_end_of_a_reply_is_no_idleness() {
        let now = Instant::now();
        let mut state = State {
            n_begun: 1,
            ..state(now)
        };
        state.written(&LIMITS, now, None);
        let at = |state: &State, seconds: u32| state.verdict(&LIMITS, now + seconds * SECOND);
        for second in 1..12 {
            assert!(matches!(at(&state, second), Verdict::Wait(_)), "{second}");
            state.written(&LIMITS, now + second * SECOND, Some(100));
            state.written(&LIMITS, now + second * SECOND, None);
        }
        state.written(&LIMITS, now + 12 * SECOND, Some(1000));
        assert!(matches!(at(&state, 19), Verdict::Wait(_)));
        assert_eq!(at(&state, 20), Verdict::Close);
    }

    #[test]
    fn while_the_server_drains_an_idle_connection_is_soon_closed_but_no_request_is_lost() {
        let now = Instant::now();
        for n_begun in [0, 1] {
            let mut state = State {
                n_begun,
                draining: Some((now, SECOND / 2)),
                ..state(now)
            };
            assert!(
                matches!(state.verdict(&LIMITS, now), Verdict::Wait(at) if at <= now + SECOND / 2)
            );
            assert_eq!(state.verdict(&LIMITS, now + SECOND / 2), Verdict::Close);
            // A head that has begun may end, and its request may run.
            state.head_since = Some(now);
            assert!(matches!(
                state.verdict(&LIMITS, now + SECOND / 2),
                Verdict::Wait(_)
            ));
            state.n_running = 1;
            assert!(matches!(
                state.verdict(&LIMITS, now + 9 * SECOND),
                Verdict::Wait(_)
            ));
        }
    }
}
