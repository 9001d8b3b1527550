//! A worker and a server that says what no server of ours would: the worker's half of the wire.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use common::{Pool, SOON, World, path_of};
use qgisserver::protocol::{
    Cancel, Credit, Disconnect, Final, Message, ProjectRef, Ready, Reason, Request,
};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use zeromq::{RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// A ROUTER in the hands of the test.
struct FakeServer {
    runtime: Runtime,
    socket: RouterSocket,
    address: SocketAddr,
}

/// A worker as the ROUTER names it.
type Peer = Bytes;

impl FakeServer {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut socket = RouterSocket::new();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        runtime.block_on(socket.bind_listener(listener)).unwrap();
        Self {
            runtime,
            socket,
            address,
        }
    }

    fn send_frames(&mut self, peer: &Peer, frames: Vec<Bytes>) {
        let mut message = ZmqMessage::try_from(frames).unwrap();
        message.push_front(peer.clone());
        self.runtime.block_on(self.socket.send(message)).unwrap();
    }

    fn send(&mut self, peer: &Peer, message: Message) {
        self.send_frames(peer, message.encode());
    }

    /// The next message that is no heartbeat, if one comes within `bound`.
    fn hear_within(&mut self, bound: Duration) -> Option<(Peer, Message)> {
        let next = async {
            loop {
                let mut frames = self.socket.recv().await.unwrap().into_vec();
                let peer = frames.remove(0);
                match Message::decode(&frames).unwrap() {
                    Message::Heartbeat => {}
                    message => return (peer, message),
                }
            }
        };
        let heard = async { timeout(bound, next).await.ok() };
        self.runtime.block_on(heard)
    }

    fn hear(&mut self) -> (Peer, Message) {
        self.hear_within(SOON).expect("a worker says something")
    }

    fn welcome(&mut self) -> (Peer, Ready) {
        match self.hear() {
            (peer, Message::Ready(ready)) => (peer, ready),
            (_, other) => panic!("{other:?} instead of READY"),
        }
    }

    fn ask(&mut self, peer: &Peer, request: Request) {
        self.send(peer, Message::Request(request, Bytes::new()));
    }

    fn end(&mut self) -> (Final, Bytes) {
        match self.hear() {
            (_, Message::Final(end, bytes)) => (end, bytes),
            (_, other) => panic!("{other:?} instead of FINAL"),
        }
    }
}

/// A request that makes the stub do `what`.
fn request(id: u64, what: &str) -> Request {
    Request {
        id,
        request_id: format!("test-{id}"),
        first_byte_ms: 60_000,
        chunk_ms: 60_000,
        window: 2,
        method: "GET".into(),
        url: format!("http://localhost{}", path_of(what)),
        headers: Vec::new(),
        project: Some(ProjectRef {
            alias: "file".into(),
            path: "city".into(),
        }),
        operation: "GetMap".into(),
        trace: None,
        ..Request::default()
    }
}

/// One worker, no spare, and the server it thinks it has.
fn one_worker(settings: &str) -> (World, FakeServer, Pool) {
    let (world, server) = (World::stub(), FakeServer::new());
    let own = "server.workers = 1\nworker.spares = 0\nzmq.heartbeat = 5";
    let pool = Pool::start(&world, server.address, &format!("{own}\n{settings}"));
    (world, server, pool)
}

#[test]
fn a_worker_says_who_it_is_and_answers_with_the_request_s_id() {
    let (_world, mut server, pool) = one_worker("worker.identity = here");
    let (peer, ready) = server.welcome();
    assert_eq!((ready.pool.as_str(), ready.number), ("here", 1));
    assert!(!ready.instance.is_empty() && !ready.versions.qgis.is_empty());
    server.ask(&peer, request(7, "DO=echo"));
    let (end, _) = server.end();
    assert_eq!((end.id, end.failure), (7, None));
    assert_eq!(end.head.unwrap().status, 200);
    drop(pool);
}

#[test]
fn a_worker_sends_no_more_than_its_window_until_it_gets_credit() {
    let (_world, mut server, _pool) = one_worker("worker.chunk_bytes = 1024");
    let (peer, _) = server.welcome();
    server.ask(&peer, request(1, "DO=stream&N=6&SIZE=1024"));
    let n_parts = 2;
    for _ in 0..n_parts {
        let (_, message) = server.hear();
        assert!(matches!(message, Message::Partial(..)), "{message:?}");
    }
    let more = server.hear_within(Duration::from_millis(500));
    assert!(more.is_none(), "more than the window: {more:?}");
    server.send(&peer, Message::Credit(Credit { id: 99, n: 9 }));
    assert!(
        server.hear_within(Duration::from_millis(300)).is_none(),
        "a credit for another request"
    );
    server.send(&peer, Message::Credit(Credit { id: 1, n: 9 }));
    let mut bytes = n_parts * 1024;
    loop {
        match server.hear().1 {
            Message::Partial(_, part) => bytes += part.len(),
            Message::Final(end, rest) => {
                assert_eq!((end.failure, bytes + rest.len()), (None, 6144));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_worker_that_is_overdue_leaves_without_being_told() {
    let (_world, mut server, _pool) = one_worker("zmq.cancel_grace = 0.2");
    let (peer, first) = server.welcome();
    let overdue = Request {
        first_byte_ms: 300,
        ..request(1, "DO=hang")
    };
    server.ask(&peer, overdue);
    let (_, second) = server.welcome();
    assert_ne!(first.instance, second.instance);
}

#[test]
fn a_cancelled_worker_that_does_not_stop_leaves_after_the_grace() {
    let (_world, mut server, _pool) = one_worker("");
    let (peer, first) = server.welcome();
    server.ask(&peer, request(1, "DO=hang"));
    server.send(
        &peer,
        Message::Cancel(Cancel {
            id: 1,
            grace_ms: 50,
        }),
    );
    let (_, second) = server.welcome();
    assert_ne!(first.pid, second.pid);
}

#[test]
fn a_worker_that_is_unknown_says_ready_again_and_is_the_same() {
    let (_world, mut server, _pool) = one_worker("");
    let (peer, first) = server.welcome();
    let reason = Reason::Unknown;
    server.send(&peer, Message::Disconnect(Disconnect { reason }));
    let (other, second) = server.welcome();
    assert_eq!(first.instance, second.instance);
    assert_ne!(peer, other, "a new connection");
}

#[test]
fn a_server_of_another_version_is_left_and_looked_for_again() {
    let (_world, mut server, pool) = one_worker("");
    let (peer, first) = server.welcome();
    let frames = ["qgisserver/9", "HEARTBEAT"].map(|text| Bytes::from_static(text.as_bytes()));
    server.send_frames(&peer, frames.to_vec());
    let (_, second) = server.welcome();
    pool.process.log.wait_line("qgisserver/9");
    assert_eq!(first.instance, second.instance);
}

#[test]
fn a_silent_server_is_left_and_looked_for_again() {
    let (_world, mut server, pool) = one_worker("zmq.heartbeat = 0.2");
    let (_, first) = server.welcome();
    // This server never says HEARTBEAT.
    let (_, second) = server.welcome();
    pool.process.log.wait_line("silent for");
    assert_eq!(first.instance, second.instance);
}

#[test]
fn told_to_restart_a_pool_replaces_its_worker_which_says_goodbye() {
    let (_world, mut server, pool) = one_worker("");
    let (peer, first) = server.welcome();
    let reason = Reason::Restart;
    server.send(&peer, Message::Disconnect(Disconnect { reason }));
    // The new one speaks first, but two connections may overtake each other.
    let mut heard = [server.hear(), server.hear()];
    heard.sort_by_key(|(_, message)| message.word() == "READY");
    let [(leaver, goodbye), (_, welcome)] = heard;
    let Message::Ready(second) = welcome else {
        panic!("{welcome:?} instead of READY");
    };
    assert_ne!(first.instance, second.instance);
    let reason = Reason::Leaving;
    assert_eq!(goodbye, Message::Disconnect(Disconnect { reason }));
    assert_eq!(leaver, peer);
    // A request that crossed the goodbye is served all the same.
    server.ask(&peer, request(5, "DO=echo"));
    let (end, _) = server.end();
    assert_eq!((end.id, end.failure, end.leaving), (5, None, true));
    // It says goodbye again, and then it does not wait for ever.
    let (leaver, goodbye) = server.hear();
    assert_eq!((leaver, goodbye.word()), (peer, "DISCONNECT"));
    pool.process.log.wait_line("the pool was told to restart");
}
