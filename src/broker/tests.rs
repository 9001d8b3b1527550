//! The broker over its real socket, with workers that only pretend.

use std::future::poll_fn;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::*;
use crate::protocol::{Cancel, Credit, Disconnect, Final, Message, Partial, Request};

/// Longer than anything here takes; a test that needs it has failed.
const LONG: Duration = Duration::from_secs(10);

/// A broker in a directory of its own.
struct Server {
    handle: Handle,
    broker: Broker,
    directory: tempfile::TempDir,
}

impl Server {
    fn start(adapt: impl FnOnce(&mut config::Broker)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config::Config::default().broker;
        config.runtime_dir = directory.path().to_owned();
        // Fakes do not beat unless the test is about it.
        config.heartbeat = LONG;
        adapt(&mut config);
        let (handle, broker) = start(&config).unwrap();
        Self {
            handle,
            broker,
            directory,
        }
    }

    async fn worker(&self, number: u32) -> Fake {
        let mut fake = Fake::connect(&self.broker.endpoint).await;
        fake.ready(number).await;
        fake
    }

    /// A call in flight; dropping the task does not withdraw it, aborting does.
    fn call(&self, call: Call) -> tokio::task::JoinHandle<Result<Reply, Error>> {
        let handle = self.handle.clone();
        tokio::spawn(async move { handle.call(call).await })
    }

    /// When the status says so.
    async fn until(&self, what: impl Fn(&Status) -> bool) {
        let settled = async {
            while !what(&self.handle.status().await) {
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, settled)
            .await
            .expect("the status never came about");
    }
}

/// A worker as far as the wire goes.
struct Fake {
    socket: DealerSocket,
}

impl Fake {
    async fn connect(endpoint: &str) -> Self {
        let mut socket = DealerSocket::new();
        socket.connect(endpoint).await.unwrap();
        Self { socket }
    }

    async fn ready(&mut self, number: u32) {
        let instance = format!("instance-{number}");
        let ready = Ready {
            pool: "test".into(),
            instance,
            number,
            ..Ready::default()
        };
        self.say(Message::Ready(ready)).await;
    }

    async fn say(&mut self, message: Message) {
        self.raw(message.encode()).await;
    }

    async fn raw(&mut self, frames: Vec<Bytes>) {
        self.socket
            .send(ZmqMessage::try_from(frames).unwrap())
            .await
            .unwrap();
    }

    /// The next message but heartbeats; `None` when the broker hung up.
    async fn hear(&mut self) -> Option<Message> {
        loop {
            let message = timeout(LONG, self.socket.recv()).await.ok()?.ok()?;
            match Message::decode(&message.into_vec()).unwrap() {
                Message::Heartbeat => {}
                message => return Some(message),
            }
        }
    }

    async fn request(&mut self) -> (Request, Bytes) {
        match self.hear().await {
            Some(Message::Request(request, body)) => (request, body),
            other => panic!("expected a REQUEST, heard {other:?}"),
        }
    }

    async fn chunk(&mut self, id: u64, head: Option<Head>, bytes: Bytes) {
        self.say(Message::Partial(Partial { id, head }, bytes))
            .await;
    }

    async fn finish(&mut self, id: u64, head: Option<Head>, bytes: &'static str) {
        let last = Final {
            id,
            head,
            memory_kb: 7,
            ..Final::default()
        };
        self.say(Message::Final(last, Bytes::from_static(bytes.as_bytes())))
            .await;
    }

    /// Serves one request with its own operation as the body.
    async fn serve(&mut self) -> Request {
        let (request, _) = self.request().await;
        self.finish(request.id, ok(), "served").await;
        request
    }
}

fn ok() -> Option<Head> {
    Some(Head {
        status: 200,
        headers: Vec::new(),
    })
}

fn get(operation: &str) -> Call {
    Call {
        request_id: "r-1".into(),
        method: "GET".into(),
        url: "http://localhost/ows/?".into(),
        headers: Vec::new(),
        body: Bytes::new(),
        project: None,
        operation: operation.into(),
        retry: false,
        cancel: true,
        timeout: LONG,
    }
}

async fn next(body: &mut Body) -> Option<Result<Bytes, Error>> {
    timeout(LONG, poll_fn(|cx| body.poll_next(cx)))
        .await
        .expect("no chunk came")
}

/// All chunks as one.
async fn read(body: &mut Body) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    while let Some(chunk) = next(body).await {
        all.extend_from_slice(&chunk?);
    }
    Ok(all)
}

#[tokio::test]
async fn a_small_reply_comes_whole() {
    let server = Server::start(|_| {});
    let mut worker = server.worker(1).await;
    let call = server.call(Call {
        body: "<x/>".into(),
        ..get("GetMap")
    });
    let (request, body) = worker.request().await;
    assert_eq!((&*request.operation, &*body), ("GetMap", &b"<x/>"[..]));
    worker.finish(request.id, ok(), "picture").await;
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(reply.head.status, 200);
    assert!(reply.body.is_complete() && reply.body.outcome().is_some());
    assert_eq!(reply.body.n_left(), Some(7));
    assert_eq!(read(&mut reply.body).await.unwrap(), b"picture");
    let status = server.handle.status().await;
    assert_eq!(
        (status.workers[0].n_served, status.workers[0].memory_kb),
        (1, 7)
    );
    assert_eq!(status.workers[0].serving, None);
    assert!(server.handle.is_ready());
}

#[tokio::test]
async fn a_stream_starts_before_it_ends() {
    let server = Server::start(|_| {});
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    worker.chunk(request.id, ok(), "one ".into()).await;
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(next(&mut reply.body).await.unwrap().unwrap(), "one ");
    assert!(!reply.body.is_complete() && reply.body.outcome().is_none());
    worker.chunk(request.id, None, "two ".into()).await;
    worker.finish(request.id, None, "three").await;
    assert_eq!(read(&mut reply.body).await.unwrap(), b"two three");
    assert!(reply.body.outcome().is_some());
}

#[tokio::test]
async fn a_failure_has_no_reply() {
    let server = Server::start(|_| {});
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetMap"));
    let (request, _) = worker.request().await;
    let failure = Some(Failure::BadLayers);
    let last = Final {
        id: request.id,
        failure,
        ..Final::default()
    };
    worker.say(Message::Final(last, Bytes::new())).await;
    assert_eq!(
        call.await.unwrap().unwrap_err(),
        Error::Failed(Failure::BadLayers)
    );
}

#[tokio::test]
async fn a_dead_worker_is_known_within_milliseconds() {
    let server = Server::start(|_| {});
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetMap"));
    worker.request().await;
    drop(worker);
    let died = Instant::now();
    assert_eq!(call.await.unwrap().unwrap_err(), Error::WorkerDied);
    assert!(
        died.elapsed() < Duration::from_millis(100),
        "{:?}",
        died.elapsed()
    );
    server.until(|status| status.workers.is_empty()).await;
    assert!(!server.handle.is_ready());
}
