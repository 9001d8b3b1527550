//! The broker over its real socket, with workers that only pretend.

use std::future::poll_fn;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;
use zeromq::{DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, ZmqMessage};

use super::*;
use crate::protocol::{
    BODY_MAX, Because, Born, Cancel, Credit, Disconnect, Final, Message, Partial, Request,
};

/// Longer than anything here takes; a test that needs it has failed.
const LONG: Duration = Duration::from_secs(10);

/// A broker in a directory of its own.
struct Server {
    handle: Handle,
    broker: Broker,
    directory: tempfile::TempDir,
}

impl Server {
    async fn start(adapt: impl FnOnce(&mut config::Broker)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config::Config::default().broker;
        config.runtime_dir = directory.path().to_owned();
        // Fakes do not beat unless the test is about it.
        config.heartbeat = LONG;
        adapt(&mut config);
        let (handle, broker) = start(&config, None).await.unwrap();
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
        tokio::spawn(async move { handle.call(call).await.map_err(|lost| lost.error) })
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
    /// The crate's `recv` waits for ever when the broker is gone.
    hung_up: oneshot::Receiver<()>,
}

impl Fake {
    async fn connect(endpoint: &str) -> Self {
        let mut socket = DealerSocket::new();
        let mut monitor = socket.monitor();
        socket.connect(endpoint).await.unwrap();
        let (tell, hung_up) = oneshot::channel();
        tokio::spawn(async move {
            while !matches!(
                monitor.recv().await,
                Ok(SocketEvent::Disconnected(_)) | Err(_)
            ) {}
            let _ = tell.send(());
        });
        Self { socket, hung_up }
    }

    async fn ready(&mut self, number: u32) {
        self.ready_because(number, Because::Start).await;
    }

    async fn ready_because(&mut self, number: u32, because: Because) {
        let instance = format!("instance-{number}");
        let ready = Ready {
            pool: "test".into(),
            instance,
            number,
            born: Born { because },
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
            let message = tokio::select! {
                biased;
                message = timeout(LONG, self.socket.recv()) => message.expect("it is silent"),
                _ = &mut self.hung_up => return None,
            };
            match Message::decode(&message.ok()?.into_vec()).unwrap() {
                Message::Heartbeat => {}
                message => return Some(message),
            }
        }
    }

    /// The next request; credits of the one before may still be under way.
    async fn request(&mut self) -> (Request, Bytes) {
        loop {
            match self.hear().await {
                Some(Message::Request(request, body)) => return (request, body),
                Some(Message::Credit(_)) => {}
                other => panic!("expected a REQUEST, heard {other:?}"),
            }
        }
    }

    async fn chunk(&mut self, id: u64, head: Option<Head>, bytes: Bytes) {
        self.say(Message::Partial(
            Partial {
                id,
                head,
                ..Partial::default()
            },
            bytes,
        ))
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

pub fn ok() -> Option<Head> {
    Some(Head {
        status: 200,
        ..Head::default()
    })
}

pub fn get(operation: &str) -> Call {
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
        trace: None,
        document: None,
        client: "192.0.2.1".into(),
        work: Work::default(),
        cause: None,
        visitor: None,
        wait: Wait::since(Instant::now()),
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
    let server = Server::start(|_| {}).await;
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
    assert_eq!(read(&mut reply.body).await.unwrap(), b"picture");
    let status = server.handle.status().await;
    assert_eq!(
        (status.workers[0].n_served, status.workers[0].memory_kb),
        (1, 7)
    );
    assert!(status.workers[0].request.is_none());
    assert!(server.handle.is_ready());
}

#[tokio::test]
async fn a_stream_starts_before_it_ends() {
    let server = Server::start(|_| {}).await;
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
    let server = Server::start(|_| {}).await;
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
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetMap"));
    worker.request().await;
    drop(worker);
    let died = Instant::now();
    assert_eq!(call.await.unwrap().unwrap_err(), Error::WorkerDied);
    // The alternative would be a heartbeat.
    assert!(died.elapsed() < LONG / 4, "{:?}", died.elapsed());
    server.until(|status| status.workers.is_empty()).await;
    assert!(!server.handle.is_ready());
}

// Streaming.

/// The worker may have `window` chunks under way, however slow the reader is.
#[tokio::test]
async fn a_slow_reader_stops_the_worker_at_the_window() {
    let server = Server::start(|config| config.window = 4).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    assert_eq!(request.window, 4);
    worker.chunk(request.id, ok(), "0".into()).await;
    for chunk in ["1", "2", "3"] {
        worker.chunk(request.id, None, chunk.into()).await;
    }
    let mut reply = call.await.unwrap().unwrap();
    for chunk in ["0", "1", "2"] {
        assert_eq!(next(&mut reply.body).await.unwrap().unwrap(), chunk);
    }
    let mut credits = 0;
    while credits < 3 {
        match worker.hear().await {
            Some(Message::Credit(Credit { id, n })) if id == request.id => credits += n,
            other => panic!("expected CREDIT, heard {other:?}"),
        }
    }
    assert_eq!(credits, 3);
}

#[tokio::test]
async fn a_worker_that_ignores_the_window_is_expelled() {
    let server = Server::start(|config| config.window = 2).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    for head in [ok(), None, None] {
        worker.chunk(request.id, head, "x".into()).await;
    }
    let unknown = Message::Disconnect(Disconnect {
        reason: Reason::Unknown,
    });
    assert_eq!(worker.hear().await, Some(unknown));
    assert_eq!(worker.hear().await, None, "the broker hangs up");
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(read(&mut reply.body).await, Err(Error::WorkerDied));
}

/// 64 MB through a window of 16 chunks: nobody ever holds more than the window.
#[tokio::test]
async fn a_long_stream_arrives_whole_and_in_order() {
    const N: u32 = 1024;
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    let writer = tokio::spawn(async move {
        let (id, mut credits) = (request.id, request.window);
        for n in 0..N {
            while credits == 0 {
                match worker.hear().await {
                    Some(Message::Credit(credit)) => credits += credit.n,
                    other => panic!("expected CREDIT, heard {other:?}"),
                }
                assert!(credits <= request.window);
            }
            let mut bytes = vec![0; 64 << 10];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            worker
                .chunk(id, ok().filter(|_| n == 0), bytes.into())
                .await;
            credits -= 1;
        }
        worker.finish(id, None, "").await;
        // The crate has no linger: what is queued needs its socket.
        while worker.hear().await.is_some() {}
    });
    let mut reply = call.await.unwrap().unwrap();
    for n in 0..N {
        let chunk = next(&mut reply.body).await.unwrap().unwrap();
        assert_eq!(chunk[..4], n.to_be_bytes());
    }
    assert_eq!(next(&mut reply.body).await, None);
    assert!(reply.body.outcome().is_some());
    writer.abort();
}

#[tokio::test]
async fn a_stream_that_fails_half_way_is_not_ended_normally() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let call = server.call(Call {
        retry: true,
        ..get("GetFeature")
    });
    let (request, _) = worker.request().await;
    worker.chunk(request.id, ok(), "half".into()).await;
    let mut reply = call.await.unwrap().unwrap();
    drop(worker);
    assert_eq!(next(&mut reply.body).await, Some(Ok("half".into())));
    assert_eq!(next(&mut reply.body).await, Some(Err(Error::WorkerDied)));
}

#[tokio::test]
async fn a_failure_half_way_breaks_the_stream() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    worker.chunk(request.id, ok(), "half".into()).await;
    let failure = Some(Failure::PluginRaised);
    let last = Final {
        id: request.id,
        failure,
        ..Final::default()
    };
    worker.say(Message::Final(last, Bytes::new())).await;
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(
        read(&mut reply.body).await,
        Err(Error::Failed(Failure::PluginRaised))
    );
    assert!(reply.body.outcome().is_none());
}

// Deaths and deadlines.

#[tokio::test]
async fn a_request_whose_worker_died_goes_to_another() {
    let server = Server::start(|_| {}).await;
    let mut first = server.worker(1).await;
    let call = server.call(Call {
        retry: true,
        ..get("GetMap")
    });
    let (one, _) = first.request().await;
    let mut second = server.worker(2).await;
    drop(first);
    let two = second.serve().await;
    assert_eq!((one.id, one.url), (two.id, two.url));
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_silent_worker_is_found_out() {
    let server = Server::start(|config| {
        config.heartbeat = Duration::from_millis(300);
        config.heartbeat_misses = 5;
    })
    .await;
    let mut silent = server.worker(1).await;
    let call = server.call(get("GetMap"));
    silent.request().await;
    assert_eq!(call.await.unwrap().unwrap_err(), Error::WorkerDied);
    let unknown = Message::Disconnect(Disconnect {
        reason: Reason::Unknown,
    });
    assert_eq!(silent.hear().await, Some(unknown));
}

#[tokio::test]
async fn heartbeats_go_both_ways_and_keep_a_worker() {
    let server = Server::start(|config| {
        config.heartbeat = Duration::from_millis(100);
        config.heartbeat_misses = 20;
    })
    .await;
    let mut worker = server.worker(1).await;
    // For longer than it could be silent.
    for _ in 0..30 {
        let message = timeout(LONG, worker.socket.recv()).await.unwrap().unwrap();
        assert_eq!(Message::decode(&message.into_vec()), Ok(Message::Heartbeat));
        worker.say(Message::Heartbeat).await;
    }
    assert_eq!(server.handle.status().await.workers.len(), 1);
}

#[tokio::test]
async fn an_overdue_request_is_a_timeout_and_its_worker_is_cancelled() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let after = Duration::from_secs(1);
    let started = Instant::now();
    let call = server.call(Call {
        timeout: after,
        ..get("GetMap")
    });
    let (request, _) = worker.request().await;
    // What is left of it.
    let left = Duration::from_millis(request.first_byte_ms);
    let gone = started.elapsed() + Duration::from_millis(1);
    assert!(left <= after && left + gone >= after, "{left:?} {gone:?}");
    assert_eq!(call.await.unwrap().unwrap_err(), Error::TimedOut { after });
    let late = started.elapsed() - after;
    assert!(late < LONG / 4, "late by {late:?}");
    let cancel = Cancel {
        id: request.id,
        grace_ms: 1000,
    };
    assert_eq!(worker.hear().await, Some(Message::Cancel(cancel)));
    // Unassignable until its late FINAL, which nobody sees.
    let call = server.call(get("GetMap"));
    server.until(|status| status.n_waiting == 1).await;
    worker.finish(request.id, ok(), "late").await;
    worker.serve().await;
    assert_eq!(
        read(&mut call.await.unwrap().unwrap().body).await.unwrap(),
        b"served"
    );
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let running = server.call(get("GetMap"));
    let (request, _) = worker.request().await;
    let waiting = server.call(get("GetMap"));
    server.until(|status| status.n_waiting == 1).await;
    waiting.abort();
    running.abort();
    // Until its own deadline.
    match worker.hear().await {
        Some(Message::Cancel(Cancel { id, grace_ms })) => {
            assert_eq!(id, request.id);
            assert!((5_000..=10_000).contains(&grace_ms), "{grace_ms}");
        }
        other => panic!("expected CANCEL, heard {other:?}"),
    }
    server
        .until(|status| status.n_waiting + status.n_running == 0)
        .await;
}

#[tokio::test]
async fn a_body_that_is_dropped_cancels_its_request() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    worker.chunk(request.id, ok(), "half".into()).await;
    drop(call.await.unwrap().unwrap());
    loop {
        match worker.hear().await {
            Some(Message::Cancel(cancel)) => break assert_eq!(cancel.id, request.id),
            Some(Message::Credit(_)) => {}
            other => panic!("expected CANCEL, heard {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_transaction_whose_client_left_runs_to_its_end() {
    let server = Server::start(|config| config.window = 1).await;
    let mut worker = server.worker(1).await;
    let call = server.call(Call {
        cancel: false,
        ..get("Transaction")
    });
    let (request, _) = worker.request().await;
    call.abort();
    for head in [ok(), None, None] {
        worker.chunk(request.id, head, "x".into()).await;
        let credit = Credit {
            id: request.id,
            n: 1,
        };
        assert_eq!(worker.hear().await, Some(Message::Credit(credit)));
    }
    worker.finish(request.id, None, "").await;
    let call = server.call(get("GetMap"));
    worker.serve().await;
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn waiting_has_two_bounds() {
    let server = Server::start(|config| {
        config.queue_max = 1;
        config.queue_timeout = Duration::from_secs(1);
    })
    .await;
    let waiting = server.call(get("GetMap"));
    server.until(|status| status.n_waiting == 1).await;
    let refused = server.handle.call(get("GetMap")).await.unwrap_err().error;
    let retry_after = Duration::from_secs(1);
    let full = Error::QueueFull {
        limit: 1,
        retry_after,
    };
    assert_eq!(refused, full);
    let after = Duration::from_secs(1);
    assert_eq!(
        waiting.await.unwrap().unwrap_err(),
        Error::QueueTimedOut { after }
    );
}

// Coming and going.

#[tokio::test]
async fn a_leaving_worker_is_acknowledged_and_not_assigned_again() {
    let server = Server::start(|_| {}).await;
    let mut leaver = server.worker(1).await;
    let leaving = Message::Disconnect(Disconnect {
        reason: Reason::Leaving,
    });
    leaver.say(leaving.clone()).await;
    assert_eq!(leaver.hear().await, Some(leaving));
    server.until(|_| !server.handle.is_ready()).await;
    let call = server.call(get("GetMap"));
    server.until(|status| status.n_waiting == 1).await;
    let mut other = server.worker(2).await;
    other.serve().await;
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_worker_that_connects_anew_replaces_its_old_self() {
    let server = Server::start(|_| {}).await;
    let mut old = server.worker(1).await;
    let call = server.call(Call {
        retry: true,
        ..get("GetMap")
    });
    old.request().await;
    let mut anew = server.worker(1).await;
    anew.serve().await;
    assert!(call.await.unwrap().is_ok());
    assert_eq!(server.handle.status().await.workers.len(), 1);
}

/// A broker that says goodbye for no longer than `heartbeat`, and misses none of its fakes.
async fn patient(heartbeat: Duration) -> Server {
    let adapt = |config: &mut config::Broker| {
        (config.heartbeat, config.heartbeat_misses) = (heartbeat, 100);
    };
    Server::start(adapt).await
}

#[tokio::test]
async fn one_worker_of_each_pool_is_told_to_restart() {
    let server = patient(Duration::from_millis(300)).await;
    let mut workers = [server.worker(1).await, server.worker(2).await];
    server.until(|status| status.workers.len() == 2).await;
    server.handle.tell_pools(Reason::Restart);
    server.broker.stop(Duration::ZERO).await;
    let mut n_told = 0;
    for worker in &mut workers {
        while let Some(Message::Disconnect(Disconnect { reason })) = worker.hear().await {
            n_told += u32::from(reason == Reason::Restart);
        }
    }
    assert_eq!(n_told, 1);
}

#[tokio::test]
async fn a_stopping_broker_ends_what_it_has_and_leaves_nothing_behind() {
    let server = patient(Duration::from_secs(1)).await;
    let mut worker = server.worker(1).await;
    let call = server.call(get("GetMap"));
    let (request, _) = worker.request().await;
    let Server {
        handle,
        broker,
        directory,
    } = server;
    let stopped = tokio::spawn(broker.stop(LONG));
    let stopping = async {
        while handle.is_ready() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, stopping).await.unwrap();
    assert_eq!(
        handle.call(get("GetMap")).await.unwrap_err().error,
        Error::Stopping
    );
    worker.finish(request.id, ok(), "last").await;
    assert_eq!(
        read(&mut call.await.unwrap().unwrap().body).await.unwrap(),
        b"last"
    );
    let stopping = Message::Disconnect(Disconnect {
        reason: Reason::Stopping,
    });
    assert_eq!(worker.hear().await, Some(stopping));
    drop(worker);
    timeout(LONG, stopped).await.unwrap().unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(
        handle.call(get("GetMap")).await.unwrap_err().error,
        Error::Stopping
    );
    assert_eq!(handle.status().await.workers.len(), 0);
}

#[tokio::test]
async fn a_drain_has_an_end() {
    let server = patient(Duration::from_millis(500)).await;
    let mut worker = server.worker(1).await;
    let running = server.call(get("GetMap"));
    let waiting = server.call(get("GetMap"));
    worker.request().await;
    server.until(|status| status.n_waiting == 1).await;
    timeout(LONG, server.broker.stop(Duration::from_millis(50)))
        .await
        .unwrap();
    for call in [running, waiting] {
        assert_eq!(call.await.unwrap().unwrap_err(), Error::Stopping);
    }
}

// What is not of this protocol.

#[tokio::test]
async fn what_cannot_be_understood_is_refused_and_the_rest_goes_on() {
    let server = Server::start(|_| {}).await;
    let mut worker = server.worker(1).await;
    let messages: [&[&'static str]; 6] = [
        &["qgisserver/2", "HEARTBEAT"],
        &["qgisserver/1", "HEARTBEAT"],
        &["qgisserver/1", "HELLO"],
        &["qgisserver/1", "READY", "{"],
        &["qgisserver/1", "CREDIT", r#"{"id":0,"n":1}"#],
        &[""],
    ];
    for frames in messages {
        let mut stranger = Fake::connect(&server.broker.endpoint).await;
        let frames = frames
            .iter()
            .map(|frame| Bytes::from_static(frame.as_bytes()));
        stranger.raw(frames.collect()).await;
        let unknown = Message::Disconnect(Disconnect {
            reason: Reason::Unknown,
        });
        assert_eq!(stranger.hear().await, Some(unknown));
        assert_eq!(stranger.hear().await, None, "the broker hangs up");
    }
    let call = server.call(get("GetMap"));
    worker.serve().await;
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_worker_that_speaks_nonsense_loses_its_request_to_another() {
    let server = Server::start(|_| {}).await;
    let mut first = server.worker(1).await;
    let call = server.call(Call {
        retry: true,
        ..get("GetMap")
    });
    first.request().await;
    let mut second = server.worker(2).await;
    first.raw(vec!["qgisserver/9".into(), "FINAL".into()]).await;
    second.serve().await;
    assert!(call.await.unwrap().is_ok());
    assert_eq!(server.handle.status().await.workers.len(), 1);
}

// The gate.

async fn gated() -> Server {
    Server::start(|config| config.gate = Some("127.0.0.1:0".parse().unwrap())).await
}

impl Server {
    fn gate(&self) -> std::net::SocketAddr {
        self.broker.gate.expect("it was configured")
    }
}

#[tokio::test]
async fn a_worker_behind_the_gate_is_a_worker() {
    let server = gated().await;
    let mut worker = Fake::connect(&format!("tcp://{}", server.gate())).await;
    worker.ready(1).await;
    let call = server.call(get("GetFeature"));
    let (request, _) = worker.request().await;
    worker
        .chunk(request.id, ok(), vec![7; 1 << 20].into())
        .await;
    worker.finish(request.id, None, "end").await;
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(read(&mut reply.body).await.unwrap().len(), (1 << 20) + 3);
    // Its death is known as fast as that of a local one.
    let call = server.call(get("GetMap"));
    worker.request().await;
    drop(worker);
    let died = Instant::now();
    assert_eq!(call.await.unwrap().unwrap_err(), Error::WorkerDied);
    // The alternative would be a heartbeat.
    assert!(died.elapsed() < LONG / 4, "{:?}", died.elapsed());
}

/// Chunks of the largest size that can be set, and a request that is larger than any chunk.
#[tokio::test]
async fn what_may_be_large_passes_the_gate() {
    let server = gated().await;
    let mut worker = Fake::connect(&format!("tcp://{}", server.gate())).await;
    worker.ready(1).await;
    let body: Bytes = vec![7; 3 * BODY_MAX].into();
    let call = server.call(Call {
        body: body.clone(),
        ..get("Transaction")
    });
    let (request, received) = worker.request().await;
    assert!(received == body, "{} bytes", received.len());
    for head in [ok(), None] {
        worker
            .chunk(request.id, head, vec![7; BODY_MAX].into())
            .await;
    }
    worker.finish(request.id, None, "").await;
    let mut reply = call.await.unwrap().unwrap();
    assert_eq!(read(&mut reply.body).await.unwrap().len(), 2 * BODY_MAX);
}

#[tokio::test]
async fn a_worker_behind_the_gate_hears_that_the_server_stops() {
    let server = gated().await;
    let mut worker = Fake::connect(&format!("tcp://{}", server.gate())).await;
    worker.ready(1).await;
    server.until(|status| status.workers.len() == 1).await;
    let stopped = tokio::spawn(server.broker.stop(LONG));
    let stopping = Message::Disconnect(Disconnect {
        reason: Reason::Stopping,
    });
    assert_eq!(worker.hear().await, Some(stopping));
    drop(worker);
    timeout(LONG, stopped).await.unwrap().unwrap();
}

/// What would kill the ZeroMQ crate, or tie it down, and what is no ZMTP at all.
#[tokio::test]
async fn whatever_comes_to_the_gate_real_workers_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::zmtp::tests::{greeting, opening};

    let server = gated().await;
    let mut worker = Fake::connect(&format!("tcp://{}", server.gate())).await;
    worker.ready(1).await;
    let long = |flags: u8, n: u64| [&[flags], &n.to_be_bytes()[..]].concat();
    let mut attacks: Vec<Vec<u8>> = Vec::new();
    for n in [1u64 << 33, 1 << 40, 1 << 46, 1 << 62, u64::MAX] {
        attacks.push([greeting(b"NULL"), long(6, n)].concat());
        attacks.push([greeting(b"NULL"), long(2, n)].concat());
        attacks.push([opening(), long(2, n)].concat());
    }
    attacks.push([opening(), [1, 0].repeat(1_000_000)].concat());
    attacks.push([opening(), b"\x04\x05\x04PING".to_vec()].concat());
    attacks.push(greeting(b"CURVE"));
    attacks.push(
        (0..100_000u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect(),
    );
    attacks.push(b"GET /ows/ HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec());
    attacks.push(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec());
    let _silent = tokio::net::TcpStream::connect(server.gate()).await.unwrap();
    for attack in attacks {
        let mut peer = tokio::net::TcpStream::connect(server.gate()).await.unwrap();
        // The gate may hang up while it is still coming.
        let _ = peer.write_all(&attack).await;
        let mut answer = Vec::new();
        let ended = timeout(LONG, peer.read_to_end(&mut answer)).await;
        let start = &attack[..attack.len().min(80)];
        assert!(ended.is_ok(), "still open after {start:?}");
        let call = server.call(get("GetMap"));
        worker.serve().await;
        assert!(call.await.unwrap().is_ok());
    }
    assert_eq!(server.handle.status().await.workers.len(), 1);
}

#[tokio::test]
async fn a_restart_is_counted_once_and_a_new_connection_is_none() {
    let server = Server::start(|_| ()).await;
    let mut first = server.worker(1).await;
    let mut second = Fake::connect(&server.broker.endpoint).await;
    second.ready_because(2, Because::Frozen).await;
    server.until(|it| it.workers.len() == 2).await;
    // It says the same again, and one more connects anew.
    second.ready_because(2, Because::Frozen).await;
    let mut anew = Fake::connect(&server.broker.endpoint).await;
    anew.ready_because(1, Because::Reconnected).await;
    assert_eq!(first.hear().await, None);
    let counted: Vec<_> = server.handle.metrics().restarts().collect();
    let happened: Vec<_> = counted.iter().filter(|(_, n)| *n > 0).collect();
    assert_eq!(happened, [&("frozen", 1)]);
}
