//! The only seam to the ZeroMQ crate: one ROUTER, messages in and out, who is gone.
//!
//! `zeromq` is pinned. What we rely on, and what would break with another version:
//!
//! - Its peers' lengths are not bounded, so the socket must be where only our
//!   own workers and the gate can reach it.
//! - Its maps can deadlock on a multi-thread runtime, so the ROUTER and all its
//!   tasks live on one current_thread runtime.
//! - `send` queues up to 100,000 messages per peer and then waits; here it is
//!   polled once, and a peer with a full queue is an error.
//! - A connection has no public way to be closed but `peer_disconnected` of the
//!   socket's back end, which is what the crate itself does at EOF: queued
//!   messages are still written.

use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::sync::mpsc;
use zeromq::util::PeerIdentity;
use zeromq::{
    MultiPeerBackend, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketEvent,
    SocketRecv, SocketSend, ZmqError, ZmqMessage,
};

use super::queue::Peer;

/// What the transport has to tell.
#[derive(Debug)]
pub enum Event {
    Message(Peer, Vec<Bytes>),
    Gone(Peer),
}

/// A peer is not there, or takes nothing.
#[derive(Debug)]
pub struct Undeliverable {
    pub why: String,
    /// The message is the last in its queue.
    pub may_arrive: bool,
}

/// What the broker needs of a ZMTP implementation.
pub trait Transport {
    /// The next event. Dropping the future loses nothing.
    fn next(&mut self) -> impl Future<Output = Event>;

    /// Queues a message; never waits.
    fn send(&mut self, peer: &Peer, frames: Vec<Bytes>) -> Result<(), Undeliverable>;

    /// Ends a connection; what was sent before is still written.
    fn close(&mut self, peer: &Peer);
}

/// The ROUTER of the `zeromq` crate.
pub struct Router {
    receiver: RouterRecvHalf,
    sender: RouterSendHalf,
    gone: mpsc::UnboundedReceiver<Peer>,
    backend: Arc<dyn MultiPeerBackend>,
}

impl Router {
    /// Must run on the runtime that will drive the socket.
    pub async fn bind(listener: UnixListener) -> Result<Self, ZmqError> {
        let mut socket = RouterSocket::new();
        // `split` would lose the monitor; the back end is shared with the halves.
        let mut monitor = socket.monitor();
        let backend = socket.backend();
        socket.bind_listener(listener).await?;
        let (sender, receiver) = socket.split();
        let (tell, gone) = mpsc::unbounded_channel();
        // The monitor drops what does not fit, so it is emptied at once.
        tokio::spawn(async move {
            while let Ok(event) = monitor.recv().await {
                if let SocketEvent::Disconnected(peer) = event {
                    let _ = tell.send(peer.into());
                }
            }
        });
        Ok(Self {
            receiver,
            sender,
            gone,
            backend,
        })
    }
}

impl Transport for Router {
    async fn next(&mut self) -> Event {
        loop {
            // Both branches are cancel-safe: the other's message stays queued.
            tokio::select! {
                Some(peer) = self.gone.recv() => return Event::Gone(peer),
                message = self.receiver.recv() => {
                    let Ok(message) = message else { continue };
                    let mut frames = message.into_vecdeque();
                    let peer = frames.pop_front().expect("ROUTER puts the peer in front");
                    return Event::Message(peer, frames.into());
                }
            }
        }
    }

    fn send(&mut self, peer: &Peer, frames: Vec<Bytes>) -> Result<(), Undeliverable> {
        let mut message = ZmqMessage::try_from(frames).expect("a message has frames");
        message.push_front(peer.clone());
        let sending = pin!(self.sender.send(message));
        match sending.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Ok(()),
            Poll::Ready(Err(error)) => Err(Undeliverable {
                why: error.to_string(),
                may_arrive: false,
            }),
            Poll::Pending => Err(Undeliverable {
                why: "its send queue is full".into(),
                may_arrive: true,
            }),
        }
    }

    fn close(&mut self, peer: &Peer) {
        if let Ok(peer) = PeerIdentity::try_from(peer.clone()) {
            self.backend.peer_disconnected(&peer);
        }
    }
}
