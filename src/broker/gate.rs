//! Who may reach the ROUTER from elsewhere: a TCP listener that relays what `zmtp.rs` allows.
//!
//! The ZeroMQ crate believes every length a peer announces, so nothing a
//! stranger sent gets to it unchecked. There is no authentication yet, so the
//! gate listens on loopback only. It has a thread of its own: what it relays
//! costs the broker nothing.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::throttle::Throttle;
use super::zmtp::{Guard, Refusal};
use crate::thread::Thread;

const READ: usize = 64 << 10;

/// The bounds of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For greeting and handshake together.
    pub handshake: Duration,
    /// Without a byte from the peer, or without one that could be passed on.
    pub idle: Duration,
    pub peers_max: usize,
}

/// An open gate; dropping it closes it.
#[derive(Debug)]
pub struct Gate {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    accepting: Option<oneshot::Sender<()>>,
    thread: Thread,
}

impl Gate {
    /// Relays from `listener` to the ipc socket at `socket`.
    pub fn open(listener: TcpListener, socket: PathBuf, limits: Limits) -> io::Result<Self> {
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() {
            return Err(io::Error::other(
                "without authentication only loopback is possible",
            ));
        }
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel();
        let (accepting, shut) = oneshot::channel();
        let main = move || serve(listener, socket, limits, shut, stopped);
        Ok(Self {
            address,
            stop: Some(stop),
            accepting: Some(accepting),
            thread: Thread::start("gate", main)?,
        })
    }

    /// Dropping it lets no more in.
    pub fn accepting(&mut self) -> Option<oneshot::Sender<()>> {
        self.accepting.take()
    }

    /// Lets no more in; those inside have `handshake` to see that the ROUTER is gone.
    pub async fn close(&mut self) {
        self.stop = None;
        self.thread.ended().await;
    }
}

async fn serve(
    listener: TcpListener,
    socket: PathBuf,
    limits: Limits,
    mut shut: oneshot::Receiver<()>,
    mut stopped: oneshot::Receiver<()>,
) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the gate cannot listen"),
    };
    let mut listener = Some(listener);
    let log = Log::default();
    let socket: Arc<Path> = socket.into();
    let mut peers = JoinSet::new();
    loop {
        // Accepting is cancel-safe; a reaped relay has already logged its end.
        tokio::select! {
            _ = &mut stopped => break,
            _ = &mut shut, if listener.is_some() => listener = None,
            Some(_) = peers.join_next() => {}
            accepted = accept(&listener) => match accepted {
                Ok((_, from)) if peers.len() >= limits.peers_max => {
                    log.refused(from, &format!("{} peers are here already", limits.peers_max));
                }
                Ok((stream, from)) => {
                    peers.spawn(attend(stream, from, socket.clone(), limits, log.clone()));
                }
                Err(error) => {
                    log.not_accepted(&error);
                    // Out of descriptors, most likely: the same error would come at once.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    let _ = timeout(limits.handshake, async {
        while peers.join_next().await.is_some() {}
    })
    .await;
}

async fn accept(listener: &Option<tokio::net::TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

async fn attend(stream: TcpStream, from: SocketAddr, socket: Arc<Path>, limits: Limits, log: Log) {
    match relay(stream, &socket, limits).await {
        Ok(()) | Err(End::Closed) => tracing::debug!(%from, "left the gate"),
        Err(End::Lost(error)) => tracing::debug!(%from, %error, "left the gate"),
        Err(End::Silent { after }) => {
            log.refused(from, &format!("silent for {:.1} s", after.as_secs_f64()));
        }
        Err(End::Deaf { after }) => {
            log.refused(
                from,
                &format!("took nothing for {:.1} s", after.as_secs_f64()),
            );
        }
        Err(End::Slow { after }) => {
            log.refused(
                from,
                &format!("no handshake within {:.1} s", after.as_secs_f64()),
            );
        }
        Err(End::Refused(refusal)) => log.refused(from, &refusal.to_string()),
    }
}

/// How a connection ended, if the peer did not just hang up.
enum End {
    /// By the ROUTER.
    Closed,
    Lost(io::Error),
    Silent {
        after: Duration,
    },
    Deaf {
        after: Duration,
    },
    Slow {
        after: Duration,
    },
    Refused(Refusal),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

async fn relay(mut peer: TcpStream, socket: &Path, limits: Limits) -> Result<(), End> {
    peer.set_nodelay(true)?;
    let mut router = UnixStream::connect(socket).await?;
    let (mut from_peer, mut to_peer) = peer.split();
    let (mut from_router, mut to_router) = router.split();
    {
        let mut answers = pin!(answers(&mut from_router, &mut to_peer, limits.idle));
        // If the peer ends, all that it said has been passed on. If the ROUTER
        // does, in whatever way we notice, its last words are still under way.
        tokio::select! {
            end = guarded(&mut from_peer, &mut to_router, limits) => match end {
                Err(End::Closed) => drop(timeout(limits.handshake, answers).await),
                end => return end,
            },
            end = answers.as_mut() => end?,
        }
    }
    to_peer.shutdown().await?;
    // Closing with unread bytes would make the kernel throw away what we said.
    let _ = timeout(limits.handshake, drain(&mut from_peer)).await;
    Ok(())
}

/// Passes on what the guard has seen and allowed.
async fn guarded(
    peer: &mut tcp::ReadHalf<'_>,
    router: &mut unix::WriteHalf<'_>,
    limits: Limits,
) -> Result<(), End> {
    let mut guard = Guard::new();
    let mut buffer = vec![0; READ];
    let handshake_until = Instant::now() + limits.handshake;
    loop {
        let patience = match guard.is_open() {
            true => limits.idle,
            false => handshake_until.saturating_duration_since(Instant::now()),
        };
        let n = match timeout(patience, peer.read(&mut buffer)).await {
            Ok(read) => read?,
            Err(_) if guard.is_open() => return Err(End::Silent { after: limits.idle }),
            Err(_) => {
                return Err(End::Slow {
                    after: limits.handshake,
                });
            }
        };
        if n == 0 {
            return Ok(());
        }
        guard.check(&buffer[..n]).map_err(End::Refused)?;
        match write(router, &buffer[..n], limits.idle).await {
            Err(error) if error.kind() != io::ErrorKind::TimedOut => return Err(End::Closed),
            written => written?,
        }
    }
}

/// Passes on what the ROUTER says, as long as the peer takes it.
async fn answers(
    router: &mut unix::ReadHalf<'_>,
    peer: &mut tcp::WriteHalf<'_>,
    idle: Duration,
) -> Result<(), End> {
    let mut buffer = vec![0; READ];
    // An error ends what it has to say just as well.
    while let Ok(n @ 1..) = router.read(&mut buffer).await {
        match write(peer, &buffer[..n], idle).await {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(End::Deaf { after: idle });
            }
            written => written?,
        }
    }
    Ok(())
}

/// All of it, however slowly, but not without a byte for `idle`.
async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    idle: Duration,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = timeout(idle, to.write(bytes)).await??;
        bytes = &bytes[n..];
    }
    Ok(())
}

async fn drain(peer: &mut tcp::ReadHalf<'_>) {
    let mut buffer = [0; 4096];
    while peer.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
}

/// Log lines that anybody who connects can cause.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Throttle>>);

impl Log {
    fn refused(&self, from: SocketAddr, why: &str) {
        if let Some(suppressed) = self.allow() {
            tracing::warn!(%from, why, suppressed, "refused at the gate");
        }
    }

    fn not_accepted(&self, error: &io::Error) {
        if let Some(suppressed) = self.allow() {
            tracing::error!(%error, suppressed, "the gate cannot accept");
        }
    }

    fn allow(&self) -> Option<u32> {
        self.0
            .lock()
            .expect("nothing panics with it")
            .allow(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::super::zmtp::tests::{greeting, opening};
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// A gate before a socket that only counts.
    struct Bench {
        gate: Gate,
        router: UnixListener,
        _directory: tempfile::TempDir,
    }

    impl Bench {
        fn new(adapt: impl FnOnce(&mut Limits)) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let router = UnixListener::bind(&path).unwrap();
            let mut limits = Limits {
                handshake: LONG,
                idle: LONG,
                peers_max: 8,
            };
            adapt(&mut limits);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let gate = Gate::open(listener, path, limits).unwrap();
            Self {
                gate,
                router,
                _directory: directory,
            }
        }

        async fn peer(&self, bytes: &[u8]) -> TcpStream {
            let mut peer = TcpStream::connect(self.gate.address).await.unwrap();
            // A gate that hangs up in the middle is what the tests are about.
            let _ = peer.write_all(bytes).await;
            peer
        }

        /// All that came through of one connection.
        async fn router_sees(&self) -> Vec<u8> {
            let (mut stream, _) = timeout(LONG, self.router.accept()).await.unwrap().unwrap();
            let mut bytes = Vec::new();
            timeout(LONG, stream.read_to_end(&mut bytes))
                .await
                .unwrap()
                .unwrap();
            bytes
        }
    }

    #[tokio::test]
    async fn what_is_allowed_passes_both_ways() {
        let bench = Bench::new(|_| {});
        let mut peer = bench.peer(&opening()).await;
        let (mut router, _) = bench.router.accept().await.unwrap();
        router.write_all(b"last words").await.unwrap();
        let mut bytes = vec![0; opening().len()];
        timeout(LONG, router.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(bytes, opening());
        // Not even what the router never read makes its last words disappear.
        peer.write_all(&[0, 1, b'x']).await.unwrap();
        drop(router);
        let mut said = Vec::new();
        timeout(LONG, peer.read_to_end(&mut said))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(said, b"last words");
    }

    #[tokio::test]
    async fn nothing_of_a_refused_read_passes() {
        let bench = Bench::new(|_| {});
        let length = [&[6], &(1u64 << 62).to_be_bytes()[..]].concat();
        let attack = [greeting(b"NULL"), length].concat();
        assert_eq!(attack.len(), 73);
        let _peer = bench.peer(&attack).await;
        let seen = bench.router_sees().await;
        assert!(
            greeting(b"NULL").starts_with(&seen),
            "at most what was read before"
        );
    }

    #[tokio::test]
    async fn a_silent_peer_is_closed_before_and_after_the_handshake() {
        let short = Duration::from_millis(500);
        for bytes in [Vec::new(), greeting(b"NULL"), opening()] {
            let bench = Bench::new(|limits| (limits.handshake, limits.idle) = (short, short));
            let mut peer = bench.peer(&bytes).await;
            assert_eq!(bench.router_sees().await, bytes);
            let mut nothing = Vec::new();
            timeout(LONG, peer.read_to_end(&mut nothing))
                .await
                .unwrap()
                .unwrap();
        }
    }

    /// Two descriptors and what was to be sent, for ever.
    #[tokio::test]
    async fn a_peer_that_talks_and_never_listens_is_closed() {
        let bench = Bench::new(|limits| limits.idle = Duration::from_millis(200));
        let mut peer = bench.peer(&opening()).await;
        let (router, _) = bench.router.accept().await.unwrap();
        let (mut from_peer, mut to_peer) = router.into_split();
        let talking = tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(20));
            while peer.write_all(&[0, 1, b'x']).await.is_ok() {
                beat.tick().await;
            }
        });
        let listening = tokio::spawn(async move {
            let mut buffer = [0; 64];
            while from_peer.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        let much = vec![7; READ];
        let closed = async { while to_peer.write_all(&much).await.is_ok() {} };
        timeout(LONG, closed).await.expect("it is still connected");
        for task in [talking, listening] {
            timeout(LONG, task).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_peer_that_the_router_does_not_hear_is_closed() {
        let bench = Bench::new(|limits| limits.idle = Duration::from_millis(200));
        let mut peer = bench.peer(&opening()).await;
        let (_deaf, _) = bench.router.accept().await.unwrap();
        let frame = [&[0, 255][..], &[7; 255]].concat().repeat(1000);
        let closed = async { while peer.write_all(&frame).await.is_ok() {} };
        timeout(LONG, closed).await.expect("it is still connected");
    }

    #[tokio::test]
    async fn more_peers_than_allowed_are_refused() {
        let bench = Bench::new(|limits| limits.peers_max = 1);
        let _first = bench.peer(&opening()).await;
        let _inside = bench.router.accept().await.unwrap();
        let mut second = bench.peer(b"").await;
        assert_eq!(
            timeout(LONG, second.read(&mut [0])).await.unwrap().unwrap(),
            0
        );
    }

    #[tokio::test]
    async fn only_loopback_is_possible() {
        let limits = Limits {
            handshake: LONG,
            idle: LONG,
            peers_max: 1,
        };
        let opened = Gate::open(
            TcpListener::bind("0.0.0.0:0").unwrap(),
            PathBuf::new(),
            limits,
        );
        assert!(opened.is_err());
    }

    #[tokio::test]
    async fn a_closed_gate_lets_nobody_in() {
        let mut bench = Bench::new(|_| {});
        timeout(LONG, bench.gate.close()).await.unwrap();
        assert!(TcpStream::connect(bench.gate.address).await.is_err());
    }
}
