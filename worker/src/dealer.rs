//! The ZeroMQ socket of a worker: the only file here that knows the crate.
//!
//! One [`Dealer`] is one connection. `zeromq` never reconnects a DEALER, and its
//! `recv` waits for ever when the peer is gone, so the monitor's word ends a
//! connection and a new one takes a new socket. No identity is set: the ROUTER
//! makes one that nobody can guess.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::Stream;
use qgisserver::protocol::{self, Message};
use zeromq::{DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend};

/// What a connection brings.
// One event exists at a time; a box would be an allocation per message.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Event {
    Message(Message),
    Malformed(protocol::Error),
    Closed,
}

/// One connection to the server.
pub struct Dealer {
    socket: DealerSocket,
    monitor: Box<dyn Stream<Item = SocketEvent> + Send + Unpin>,
}

impl Dealer {
    /// Connects within `timeout`, handshake included.
    pub async fn connect(endpoint: &str, timeout: Duration) -> Result<Self, String> {
        let mut options = SocketOptions::default();
        options.connect_timeout(timeout);
        let mut socket = DealerSocket::with_options(options);
        let monitor = Box::new(socket.monitor());
        socket
            .connect(endpoint)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Self { socket, monitor })
    }

    /// Queues a message; it may still be lost with the connection.
    pub async fn send(&mut self, message: Message) {
        let frames = message.encode().try_into().expect("a message has frames");
        if let Err(error) = self.socket.send(frames).await {
            // The monitor tells the same story, and there it is acted upon.
            tracing::debug!(%error, "not sent");
        }
    }

    /// The next event. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                message = self.socket.recv() => return match message {
                    Ok(message) => decode(&message.into_vec()),
                    Err(_) => Event::Closed,
                },
                event = self.monitor.next() => match event {
                    Some(SocketEvent::Disconnected(_) | SocketEvent::Closed) | None => return Event::Closed,
                    Some(_) => {}
                },
            }
        }
    }
}

fn decode(frames: &[Bytes]) -> Event {
    match Message::decode(frames) {
        Ok(message) => Event::Message(message),
        Err(error) => Event::Malformed(error),
    }
}
