//! The threads that connections live on, each connection on one for its life.
//!
//! The first is the caller's own, which is the broker's: what passes between a
//! connection there and the broker wakes no other thread, and to wake one costs
//! more than a small request. So a new connection goes to the thread that has the
//! fewest, and to the first when in doubt.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Dropping it ends all threads but the caller's.
pub struct Threads {
    own: Arc<AtomicUsize>,
    others: Vec<Other>,
}

struct Other {
    n_connections: Arc<AtomicUsize>,
    handle: Handle,
    _running: oneshot::Sender<()>,
}

/// Counts a connection as long as it lives.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(n_connections: &Arc<AtomicUsize>) -> Self {
        n_connections.fetch_add(1, Ordering::Relaxed);
        Self(n_connections.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Threads {
    /// `n` threads, of which `n - 1` are new.
    pub fn start(n: usize) -> io::Result<Self> {
        let others = (1..n).map(Other::start).collect::<io::Result<_>>()?;
        let own = Arc::default();
        Ok(Self { own, others })
    }

    /// Lets `serve` run with `tcp` on the thread that has the fewest connections.
    pub fn spawn<F>(&self, tcp: TcpStream, serve: impl FnOnce(TcpStream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(other) = self.emptier() else {
            let seat = Seat::take(&self.own);
            tokio::spawn(async move {
                serve(tcp).await;
                drop(seat);
            });
            return;
        };
        let seat = Seat::take(&other.n_connections);
        // A stream belongs to the runtime in which it was made. If it cannot move, its
        // client sees it closed.
        let Ok(tcp) = tcp.into_std() else { return };
        other.handle.spawn(async move {
            if let Ok(tcp) = TcpStream::from_std(tcp) {
                serve(tcp).await;
            }
            drop(seat);
        });
    }

    /// Another thread, if it has fewer connections than our own.
    fn emptier(&self) -> Option<&Other> {
        let n = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let other = self.others.iter().min_by_key(|it| n(&it.n_connections))?;
        (n(&other.n_connections) < n(&self.own)).then_some(other)
    }
}

impl Other {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (running, ended) = oneshot::channel::<()>();
        thread::Builder::new()
            .name(format!("http-{number}"))
            .spawn(move || {
                let _ = runtime.block_on(ended);
            })?;
        Ok(Self {
            n_connections: Arc::default(),
            handle,
            _running: running,
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn connections_spread_over_the_threads_and_the_first_is_ours() {
        let threads = Threads::start(2).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, mut told) = mpsc::unbounded_channel();
        let ours = thread::current().id();
        let mut clients = Vec::new();
        for expected in [true, false, true, false] {
            clients.push(TcpStream::connect(address).await.unwrap());
            let (tcp, _) = listener.accept().await.unwrap();
            let tell = tell.clone();
            threads.spawn(tcp, move |mut tcp| async move {
                let _ = tell.send(thread::current().id());
                // Until the client hangs up.
                let _ = tcp.read_u8().await;
            });
            assert_eq!(told.recv().await == Some(ours), expected);
        }
        let other = &threads.others[0].n_connections;
        drop(clients);
        while other.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
    }
}
