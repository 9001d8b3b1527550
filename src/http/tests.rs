//! The front through real sockets, with a fake in place of the broker.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::body::Chunks;
use super::{Backend, serve};
use crate::broker::{Call, Error, Lost, Outcome, Status};
use crate::config::{Config, Http, Tls};
use crate::protocol::{Failure, Head, Validator};

/// Nothing here takes longer unless it hangs.
const BOUND: Duration = Duration::from_secs(10);

const GET_MAP: &str = "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=city";

// ---- the fake broker

type Answer = Pin<Box<dyn Future<Output = Result<(Head, FakeBody), Error>> + Send>>;

struct Fake {
    answer: Box<dyn Fn(Call) -> Answer + Send + Sync>,
    calls: Mutex<Vec<Call>>,
    is_ready: AtomicBool,
}

#[derive(Clone)]
struct Broker(Arc<Fake>);

impl Broker {
    fn new<F: Future<Output = Result<(Head, FakeBody), Error>> + Send + 'static>(
        answer: impl Fn(Call) -> F + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Fake {
            answer: Box::new(move |call| Box::pin(answer(call))),
            calls: Mutex::default(),
            is_ready: AtomicBool::new(true),
        }))
    }

    /// Always the same whole answer.
    fn saying(text: &'static str) -> Self {
        Self::new(move |_| async move { Ok((head(200), FakeBody::whole(text))) })
    }

    fn failing(error: Error) -> Self {
        Self::new(move |_| std::future::ready(Err(error.clone())))
    }

    fn calls(&self) -> Vec<Call> {
        self.0.calls.lock().expect("calls").clone()
    }

    fn only_call(&self) -> Call {
        let mut calls = self.calls();
        assert_eq!(calls.len(), 1);
        calls.remove(0)
    }
}

impl Backend for Broker {
    type Body = FakeBody;

    async fn call(&self, call: Call) -> Result<(Head, FakeBody), Lost> {
        self.0.calls.lock().expect("calls").push(call.clone());
        (self.0.answer)(call).await.map_err(Lost::from)
    }

    fn is_ready(&self) -> bool {
        self.0.is_ready.load(Ordering::Relaxed)
    }

    async fn status(&self) -> Status {
        Status {
            n_waiting: 3,
            ..Status::default()
        }
    }
}

struct FakeBody {
    chunks: mpsc::Receiver<Result<Bytes, Error>>,
    outcome: Option<Outcome>,
}

impl FakeBody {
    fn whole(text: impl Into<Bytes>) -> Self {
        let (tx, chunks) = mpsc::channel(1);
        tx.try_send(Ok(text.into())).expect("room for one");
        Self {
            chunks,
            outcome: Some(Outcome::default()),
        }
    }

    /// What is sent into the channel, with room for one chunk.
    fn stream() -> (mpsc::Sender<Result<Bytes, Error>>, Self) {
        let (tx, chunks) = mpsc::channel(1);
        (
            tx,
            Self {
                chunks,
                outcome: None,
            },
        )
    }
}

impl Chunks for FakeBody {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        self.chunks.poll_recv(cx)
    }

    fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    fn is_complete(&self) -> bool {
        self.outcome.is_some()
    }
}

fn head(status: u16) -> Head {
    Head {
        status,
        headers: vec![("Content-Type".into(), "text/plain".into())],
        ..Head::default()
    }
}

/// A broker whose one reply is a stream; its sender comes out of the second half.
fn streaming() -> (Broker, mpsc::Receiver<mpsc::Sender<Result<Bytes, Error>>>) {
    streaming_of(None)
}

/// The same, of an announced length.
fn streaming_of(
    length: Option<u64>,
) -> (Broker, mpsc::Receiver<mpsc::Sender<Result<Bytes, Error>>>) {
    let (out, senders) = mpsc::channel(8);
    let broker = Broker::new(move |_| {
        let out = out.clone();
        async move {
            let (tx, body) = FakeBody::stream();
            out.send(tx).await.expect("the test listens");
            let head = Head {
                length,
                ..head(200)
            };
            Ok((head, body))
        }
    });
    (broker, senders)
}

// ---- the server

struct Server {
    shared: Arc<super::Server<Broker>>,
    config: Http,
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    fn start(broker: &Broker, change: impl FnOnce(&mut Http)) -> Self {
        Self::start_with_drain(broker, BOUND, change)
    }

    fn start_with_drain(broker: &Broker, drain: Duration, change: impl FnOnce(&mut Http)) -> Self {
        let mut config = Config::default().http;
        change(&mut config);
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel();
        let shutdown = async move {
            _ = stopped.await;
        };
        let cut = async move {
            tokio::time::sleep(drain).await;
            drain
        };
        let tls = super::tls::load("server", config.tls.as_ref()).expect("a certificate");
        let shared = super::Server::new(config.clone(), tls, broker.clone());
        let shared = Arc::new(shared.expect("it starts"));
        let threads = super::threads(&config).expect("threads can be started");
        let served = serve(shared.clone(), threads, vec![listener], shutdown, cut);
        Self {
            shared,
            config,
            addr,
            stop: Some(stop),
            task: tokio::spawn(served),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Http)) -> Result<(), super::tls::Error> {
        let mut config = self.config.clone();
        change(&mut config);
        let loaded = super::tls::load("server", config.tls.as_ref());
        self.shared.change(config, loaded)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr)
            .await
            .expect("the server listens")
    }

    /// Sends `request` raw and reads until the server closes.
    async fn raw(&self, request: impl AsRef<[u8]>) -> Answered {
        let mut tcp = self.connect().await;
        // A server that refuses early may close before it has read everything.
        _ = tcp.write_all(request.as_ref()).await;
        Answered::read(&mut tcp).await
    }

    async fn get(&self, target: &str) -> Answered {
        self.send("GET", target, "", "").await
    }

    /// `headers` are whole lines.
    async fn send(&self, method: &str, target: &str, headers: &str, body: &str) -> Answered {
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n{headers}{length}\r\n"
        );
        self.raw(head + body).await
    }

    async fn stopped(mut self) {
        drop(self.stop.take());
        timeout(BOUND, self.task)
            .await
            .expect("in time")
            .expect("no panic");
    }
}

struct Answered {
    status: u16,
    headers: BTreeMap<String, String>,
    /// As on the wire, chunk sizes included.
    body: String,
}

impl Answered {
    async fn read(tcp: &mut TcpStream) -> Self {
        let mut raw = Vec::new();
        let read = timeout(BOUND, tcp.read_to_end(&mut raw))
            .await
            .expect("the server closes");
        // A reset after the answer is a close, too.
        assert!(read.is_ok() || !raw.is_empty(), "{read:?}");
        Self::parse(&raw)
    }

    fn parse(raw: &[u8]) -> Self {
        let text = String::from_utf8_lossy(raw);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let mut lines = head.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .and_then(|status| status.parse().ok());
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Self {
            status: status.unwrap_or(0),
            headers,
            body: body.to_owned(),
        }
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// Reads until `end` has come.
async fn read_until(tcp: &mut TcpStream, end: &str) -> String {
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains(end) {
        let mut some = [0; 4096];
        let n = timeout(BOUND, tcp.read(&mut some))
            .await
            .expect("in time")
            .expect("no error");
        assert!(
            n > 0,
            "closed before {end:?}: {:?}",
            String::from_utf8_lossy(&got)
        );
        got.extend_from_slice(&some[..n]);
    }
    String::from_utf8_lossy(&got).into_owned()
}

fn header<'a>(call: &'a Call, name: &str) -> Option<&'a str> {
    call.headers
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.as_str())
}

// ---- requests and replies

#[tokio::test]
async fn a_request_reaches_the_broker_and_its_reply_the_client() {
    let broker = Broker::saying("a picture");
    let server = Server::start(&broker, |_| {});
    let target = "/ows/?service=WMS&Request=GetMap&map=other&MAP=a%2Fcity&styles=";
    let headers =
        "X-Request-Id: abc\r\nX-Qgis-Role: r\r\nX-Other: o\r\nAccept: image/png\r\nCookie: c=1\r\n";
    let answered = server.send("GET", target, headers, "").await;

    let call = broker.only_call();
    assert_eq!(
        call.url,
        "http://example.org/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=a%2Fcity&STYLES="
    );
    assert_eq!(
        call.project.as_ref().map(ToString::to_string).as_deref(),
        Some("file:a/city")
    );
    assert_eq!(
        (call.method.as_str(), call.operation.as_str()),
        ("GET", "GetMap")
    );
    assert_eq!(
        (call.retry, call.cancel, call.request_id.as_str()),
        (true, true, "abc")
    );
    assert_eq!(header(&call, "Host"), Some("example.org"));
    assert_eq!(header(&call, "X-Qgis-Role"), Some("r"));
    assert_eq!(header(&call, "Accept"), Some("image/png"));
    assert_eq!(header(&call, "X-Request-Id"), Some("abc"));
    assert_eq!(
        header(&call, "X-Qgis-Forwarded-Url"),
        Some("http://example.org/ows/")
    );
    assert_eq!(
        (header(&call, "X-Other"), header(&call, "Cookie")),
        (None, None)
    );

    assert_eq!(
        (answered.status, answered.body.as_str()),
        (200, "a picture")
    );
    assert_eq!(answered.header("content-length"), "9");
    assert_eq!(answered.header("content-type"), "text/plain");
    assert_eq!(answered.header("x-map-id"), "a/city");
    assert_eq!(answered.header("x-request-id"), "abc");
    assert_eq!(
        answered.header("server"),
        concat!("qgisserver/", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(answered.header("last-modified"), "");
    server.stopped().await;
}

/// A broker whose answer is a document with the tag `t`.
fn keeping(status: u16, private: bool) -> Broker {
    Broker::new(move |_| async move {
        let validator = Validator {
            tag: "t".into(),
            modified: Some(784_111_777).filter(|_| !private),
            private,
        };
        let head = Head {
            validator: Some(validator),
            ..head(status)
        };
        let text = if status == 304 { "" } else { "x" };
        Ok((head, FakeBody::whole(text)))
    })
}

const GET_CAPABILITIES: &str = "/ows/?SERVICE=WMS&REQUEST=GetCapabilities&MAP=city";

#[tokio::test]
async fn a_document_has_a_tag_and_a_date_and_is_asked_for_again() {
    let server = Server::start(&keeping(200, false), |_| {});
    for method in ["GET", "HEAD"] {
        let answered = server.send(method, GET_CAPABILITIES, "", "").await;
        assert_eq!(answered.header("etag"), "\"t\"");
        assert_eq!(answered.header("cache-control"), "no-cache");
        assert_eq!(
            answered.header("last-modified"),
            "Sun, 06 Nov 1994 08:49:37 GMT"
        );
        assert_eq!(answered.header("content-length"), "1", "{method}");
        assert_eq!(answered.header("vary"), "");
    }
    let page = server.get("/wfs3/collections?MAP=city").await;
    assert_eq!(
        (page.header("etag"), page.header("vary")),
        ("\"t\"", "Accept")
    );
    let server = Server::start(&keeping(200, true), |_| {});
    let answered = server.get(GET_CAPABILITIES).await;
    assert_eq!(answered.header("cache-control"), "private, no-cache");
    assert_eq!(answered.header("last-modified"), "");
}

#[tokio::test]
async fn a_client_that_has_a_document_gets_its_headers_and_no_body() {
    let server = Server::start(&keeping(304, false), |config| config.cross_origin = false);
    for path in [GET_CAPABILITIES, "/wfs3/collections?MAP=city"] {
        let answered = server.send("GET", path, "Origin: http://o\r\n", "").await;
        assert_eq!((answered.status, &*answered.body), (304, ""), "{path}");
        assert_eq!(answered.header("etag"), "\"t\"");
        assert_eq!(answered.header("cache-control"), "no-cache");
        assert!(answered.header("vary").contains("Origin"));
        assert_eq!(answered.header("access-control-allow-origin"), "http://o");
        assert_eq!(answered.header("content-length"), "");
    }
    for path in [GET_CAPABILITIES, "/wfs3/collections?MAP=city"] {
        let answered = server.get(path).await;
        assert_eq!(answered.header("x-map-id"), "city", "{path}");
    }
}

#[tokio::test]
async fn a_worker_is_told_what_the_client_has_of_a_document_and_of_nothing_else() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let lines =
        "If-None-Match: \"a\", W/\"b\"\r\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
    for (method, path, is_document) in [
        ("GET", GET_CAPABILITIES, true),
        ("HEAD", GET_CAPABILITIES, true),
        ("POST", GET_CAPABILITIES, false),
        ("GET", GET_MAP, false),
        ("GET", "/wfs3/collections?MAP=city", true),
        ("GET", "/wfs3/collections/a/items?MAP=city", false),
        ("DELETE", "/wfs3/collections?MAP=city", false),
    ] {
        server.send(method, path, lines, "").await;
        let calls = broker.calls();
        let document = calls.last().expect("a call").document.as_ref();
        let tags = document.map(|document| document.held.tags.clone());
        let expected = is_document.then(|| vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(tags, expected, "{method} {path}");
    }
}

#[tokio::test]
async fn a_request_id_is_made_when_none_is_sane() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for line in [
        String::new(),
        "X-Request-Id: a b\r\n".into(),
        format!("X-Request-Id: {}\r\n", "x".repeat(129)),
    ] {
        let id = server
            .send("GET", GET_MAP, &line, "")
            .await
            .header("x-request-id")
            .to_owned();
        assert!(uuid::Uuid::parse_str(&id).is_ok(), "{id}");
        assert_eq!(broker.calls().last().expect("a call").request_id, id);
    }
}

#[tokio::test]
async fn a_project_may_come_by_header_or_be_the_default() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| {
        http.default_project = Some("fallback".into())
    });
    server
        .send(
            "GET",
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=",
            "X-Qgis-Project: by/header\r\n",
            "",
        )
        .await;
    let default = server.get("/ows/?SERVICE=WMS&REQUEST=GetMap").await;
    let paths: Vec<_> = broker
        .calls()
        .into_iter()
        .map(|call| call.project.expect("a project").path)
        .collect();
    assert_eq!(paths, ["by/header", "fallback"]);
    assert_eq!(
        default.header("x-map-id"),
        "",
        "what the operator chose is not told"
    );
}

#[tokio::test]
async fn what_is_missing_is_an_exception_and_no_call() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for (target, locator) in [
        ("/ows/", "SERVICE"),
        ("/ows?MAP=city", "SERVICE"),
        ("/ows/?MAP=city&SERVICE=WMS", "REQUEST"),
        ("/ows/?SERVICE=WMS&REQUEST=GetMap", "MAP"),
    ] {
        let answered = server.get(target).await;
        assert_eq!(
            (answered.status, answered.header("content-type")),
            (400, "text/xml; charset=utf-8")
        );
        let document = roxmltree::Document::parse(&answered.body).expect("XML");
        let exception = document
            .root_element()
            .first_element_child()
            .expect("an exception");
        assert_eq!(
            exception.attribute("code"),
            Some("MissingParameterValue"),
            "{target}"
        );
        assert_eq!(exception.attribute("locator"), Some(locator), "{target}");
    }
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn a_forbidden_project_looks_like_an_absent_one() {
    let broker = Broker::failing(Error::Failed(Failure::ProjectNotFound));
    let server = Server::start(&broker, |_| {});
    let of = |map: &'static str| {
        let target = format!("/ows/?SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&MAP={map}");
        let server = &server;
        async move {
            let mut answered = server.get(&target).await;
            for varying in ["date", "x-request-id", "x-map-id", "content-length"] {
                answered.headers.remove(varying);
            }
            let body = answered.body.replace(map, "X");
            (answered.status, answered.headers, body)
        }
    };
    let absent = of("absent").await;
    assert_eq!(broker.calls().len(), 1);
    assert_eq!(absent.0, 404);
    assert!(
        absent.2.contains("Project &apos;X&apos; not found"),
        "{}",
        absent.2
    );
    for map in [
        "../absent",
        "postgresql:x",
        "http://h/x",
        "a\\b",
        "/vsicurl/x",
    ] {
        assert_eq!(of(map).await, absent, "{map}");
    }
    assert_eq!(broker.calls().len(), 1, "no worker was troubled");
}

#[tokio::test]
async fn a_form_is_a_get_that_is_not_repeated() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\n";
    let body = "service=WFS&request=GetFeature&map=body&filter=%3Ca%3E+b";
    server.send("POST", "/ows/?map=query", kind, body).await;
    let call = broker.only_call();
    assert_eq!(
        call.url,
        "http://example.org/ows/?MAP=query&SERVICE=WFS&REQUEST=GetFeature&FILTER=%3Ca%3E+b"
    );
    assert_eq!(
        (
            call.method.as_str(),
            call.body.len(),
            header(&call, "Content-Type")
        ),
        ("GET", 0, None)
    );
    assert_eq!((call.retry, call.cancel), (false, true));
}

#[tokio::test]
async fn xml_is_passed_on_whatever_it_calls_itself() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for kind in ["text/xml", "application/x-www-form-urlencoded"] {
        let line = format!("Content-Type: {kind}\r\n");
        server
            .send(
                "POST",
                "/ows/?MAP=city",
                &line,
                "<wfs:Transaction service='WFS'/>",
            )
            .await;
        let call = broker.calls().pop().expect("a call");
        assert_eq!(
            (call.method.as_str(), call.operation.as_str()),
            ("POST", "Transaction")
        );
        assert_eq!(call.body, "<wfs:Transaction service='WFS'/>");
        assert_eq!(header(&call, "Content-Type"), Some(kind));
        assert_eq!((call.retry, call.cancel), (false, false));
    }
}

#[tokio::test]
async fn a_transaction_by_get_is_neither_repeated_nor_cancelled() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    server
        .get("/ows/?SERVICE=WFS&REQUEST=transaction&MAP=city&OPERATION=Delete")
        .await;
    let call = broker.only_call();
    assert_eq!((call.retry, call.cancel), (false, false));
}

#[tokio::test]
async fn a_post_is_cancelled_with_its_client_if_all_it_can_do_is_read() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let form = "Content-Type: application/x-www-form-urlencoded\r\n";
    let xml = "Content-Type: text/xml\r\n";
    for (kind, query, body, cancel) in [
        (form, "", "SERVICE=WMS&REQUEST=getmap", true),
        (form, "", "SERVICE=WFS&REQUEST=Transaction", false),
        (form, "", "SERVICE=X&REQUEST=OfAPlugin", false),
        (xml, "", "<wfs:GetFeature service='WFS'/>", true),
        (xml, "", "<wfs:LockFeature service='WFS'/>", false),
        (xml, "", "<OfAPlugin/>", false),
        (xml, "&REQUEST=GetFeature", "<Transaction/>", false),
        (xml, "&REQUEST=Transaction", "<GetFeature/>", false),
        (
            xml,
            "&REQUEST=GetFeature",
            "<!DOCTYPE a><Transaction/>",
            false,
        ),
        (xml, "&SERVICE=WMS&REQUEST=GetMap", "", true),
    ] {
        let target = format!("/ows/?MAP=city{query}");
        let answered = server.send("POST", &target, kind, body).await;
        assert_eq!(answered.status, 200, "{body}");
        let call = broker.calls().pop().expect("a call");
        assert_eq!((call.retry, call.cancel), (false, cancel), "{query} {body}");
    }
}

#[tokio::test]
async fn the_operator_says_what_runs_on_without_its_client() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.run_on = vec!["GetPdf".into()]);
    let ends_with_client = async |server: &Server, query: &str| {
        server.get(&format!("/ows/?MAP=city&{query}")).await;
        broker.calls().pop().expect("a call").cancel
    };
    assert!(!ends_with_client(&server, "SERVICE=X&REQUEST=getpdf").await);
    assert!(ends_with_client(&server, "SERVICE=WMS&REQUEST=GetMap").await);
    let transaction = "SERVICE=WFS&REQUEST=Transaction";
    assert!(!ends_with_client(&server, transaction).await);
    let server = Server::start(&broker, |http| http.cancel_writes = true);
    assert!(ends_with_client(&server, transaction).await);
    assert!(!broker.calls().pop().expect("a call").retry);
}

#[tokio::test]
async fn a_client_is_its_address_unless_a_trusted_proxy_says_whose_it_is() {
    let broker = Broker::saying("x");
    let told = "X-Forwarded-For: 2001:db8:1:2:3::4\r\nX-User: ada\r\nX-None: \r\n";
    let client = async |change: fn(&mut Http)| {
        let server = Server::start(&broker, change);
        server.send("GET", GET_MAP, told, "").await;
        broker.calls().pop().expect("a call").client
    };
    assert_eq!(&*client(|_| {}).await, "127.0.0.1");
    let untrusted = |http: &mut Http| http.client_header = Some("x-user".into());
    assert_eq!(&*client(untrusted).await, "127.0.0.1");
    // Whoever has one address of IPv6 has more than can be counted.
    assert_eq!(
        &*client(|http| http.http_proxy = true).await,
        "2001:db8:1:2::/64"
    );
    let by_header = |http: &mut Http| {
        (http.http_proxy, http.client_header) = (true, Some("x-user".into()));
    };
    assert_eq!(&*client(by_header).await, "ada");
    let by_nothing = |http: &mut Http| {
        (http.http_proxy, http.client_header) = (true, Some("x-none".into()));
    };
    assert_eq!(&*client(by_nothing).await, "2001:db8:1:2::/64");
}

#[tokio::test]
async fn what_a_client_sends_before_the_word_of_its_proxy_does_not_say_who_it_is() {
    let broker = Broker::saying("x");
    let told = "Forwarded: for=198.51.100.8\r\nX-Forwarded-For: 198.51.100.7, 192.0.2.1\r\n";
    let client = async |proxies: usize, header: Option<&str>| {
        let server = Server::start(&broker, |http| {
            (http.http_proxy, http.http_proxies) = (true, proxies);
            http.client_header = header.map(str::to_owned);
        });
        server.send("GET", GET_MAP, told, "").await;
        broker.calls().pop().expect("a call").client
    };
    assert_eq!(&*client(1, None).await, "192.0.2.1");
    assert_eq!(&*client(1, Some("x-forwarded-for")).await, "192.0.2.1");
    assert_eq!(&*client(2, None).await, "198.51.100.7");
}

#[tokio::test]
async fn a_request_says_how_large_it_is_and_which_worker_asks() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.allow_headers = vec!["x-".into()]);
    let target = format!("{GET_MAP}&WIDTH=20&HEIGHT=10&LAYERS=a,b");
    let cause = "X-Qgisserver-Worker: abc\r\n";
    server.send("GET", &target, cause, "").await;
    let call = broker.only_call();
    assert_eq!((call.work.pixels, call.work.layers), (200, 2));
    assert_eq!(call.cause.as_deref(), Some("abc"));
    assert_eq!(header(&call, "X-Qgisserver-Worker"), None);
}

#[tokio::test]
async fn a_get_with_a_body_is_a_get() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let body = "<GetFeature service='WFS'/>";
    assert_eq!(
        server.send("GET", "/ows/?MAP=city", "", body).await.status,
        400
    );
    assert!(broker.calls().is_empty());
    assert_eq!(server.send("GET", GET_MAP, "", body).await.status, 200);
    assert_eq!(broker.only_call().body, "");
}

#[tokio::test]
async fn an_api_keeps_its_path_query_method_and_body() {
    let broker = Broker::saying("{}");
    let server = Server::start(&broker, |http| {
        http.apis.push(("landing_page".into(), "/catalog".into()))
    });
    let target = "/wfs3/collections/Z%C3%BCrich/items/a-1.json?map=city&bbox=1,2&f=a&f=b";
    let answered = server
        .send(
            "PUT",
            target,
            "Content-Type: application/geo+json\r\n",
            "{}",
        )
        .await;
    assert_eq!(
        (answered.status, answered.header("x-map-id")),
        (200, "city")
    );
    let call = broker.only_call();
    let url =
        "http://example.org/wfs3/collections/Z%C3%BCrich/items/a-1.json?MAP=city&bbox=1,2&f=a&f=b";
    assert_eq!((call.url.as_str(), call.method.as_str()), (url, "PUT"));
    assert_eq!(
        (&call.body[..], call.retry, call.cancel),
        (&b"{}"[..], false, false)
    );
    assert_eq!(call.project.expect("a project").path, "city");
    server.get("/catalog").await;
    let call = broker.calls().pop().expect("a call");
    assert_eq!(
        (call.url.as_str(), call.project),
        ("http://example.org/catalog", None)
    );
    assert!(call.retry && call.cancel);
}

#[tokio::test]
async fn a_path_of_an_api_is_no_way_to_a_web_service() {
    let broker = Broker::saying("{}");
    let server = Server::start(&broker, |_| {});
    server
        .get("/wfs3/?MAP=city&service=WMS&REQUEST=GetMap")
        .await;
    assert_eq!(
        broker.only_call().url,
        "http://example.org/wfs3/?MAP=city&REQUEST=GetMap"
    );
    let long = format!("{}SERVICE=WMS", "a=&".repeat(50_000));
    let bodies = [
        "SERVICE=WMS&REQUEST=GetMap",
        "<GetFeature service='WFS'/>",
        &long,
    ];
    for body in bodies {
        assert_eq!(
            server
                .send("POST", "/wfs3/?MAP=city", "", body)
                .await
                .status,
            415
        );
    }
    assert_eq!(broker.calls().len(), 1);
}

#[tokio::test]
async fn a_path_that_no_api_takes_does_not_exist() {
    let broker = Broker::new(|_| async {
        let text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ServiceExceptionReport>\n \
                    <ServiceException code=\"Service configuration error\">Service unknown";
        Ok((head(400), FakeBody::whole(text)))
    });
    let server = Server::start(&broker, |_| {});
    let answered = server.get("/ogcapi/collections?MAP=city").await;
    assert_eq!(
        (answered.status, answered.header("content-type")),
        (404, "application/problem+json")
    );
    let ows = server.get("/ows/?SERVICE=X&REQUEST=GetMap&MAP=city").await;
    assert_eq!(ows.status, 400, "QGIS knows its services");
}

#[tokio::test]
async fn failures_speak_the_language_of_the_path() {
    let broker = Broker::failing(Error::QueueFull {
        limit: 1,
        retry_after: Duration::from_millis(6500),
    });
    let server = Server::start(&broker, |_| {});
    let ows = server
        .get("/ows/?SERVICE=WFS&REQUEST=GetFeature&MAP=city")
        .await;
    assert_eq!((ows.status, ows.header("retry-after")), (503, "7"));
    assert!(
        ows.body.contains("http://www.opengis.net/ows/1.1"),
        "{}",
        ows.body
    );
    let api = server.get("/wfs3/?MAP=city").await;
    assert_eq!((api.status, api.header("retry-after")), (503, "7"));
    assert_eq!(api.header("content-type"), "application/problem+json");
    let problem: serde_json::Value = serde_json::from_str(&api.body).expect("JSON");
    assert_eq!(
        (&problem["status"], &problem["title"]),
        (&503.into(), &"Service Unavailable".into())
    );
    assert!(!api.header("x-request-id").is_empty());
}

#[tokio::test]
async fn the_advertised_url_follows_the_proxy_only_when_it_is_trusted() {
    let broker = Broker::saying("x");
    let lines = "X-Forwarded-Url: https://public/base\r\nX-Qgis-Service-Url: https://evil/\r\nX-Forwarded-For: 192.0.2.1\r\n";
    let server = Server::start(&broker, |_| {});
    server.send("GET", GET_MAP, lines, "").await;
    let trusting = Server::start(&broker, |http| http.http_proxy = true);
    trusting.send("GET", GET_MAP, lines, "").await;
    let [plain, proxied] = &broker.calls()[..] else {
        panic!("two calls")
    };
    assert!(
        plain.url.starts_with("http://example.org/ows/?"),
        "{}",
        plain.url
    );
    assert_eq!(header(plain, "X-Qgis-Service-Url"), None);
    assert_eq!(header(plain, "X-Forwarded-For"), None);
    assert!(
        proxied.url.starts_with("https://public/base/ows/?"),
        "{}",
        proxied.url
    );
    assert_eq!(header(proxied, "Host"), Some("public"));
    assert_eq!(header(proxied, "X-Forwarded-Proto"), Some("https"));
    assert_eq!(header(proxied, "X-Qgis-Service-Url"), Some("https://evil/"));
    assert_eq!(
        header(proxied, "X-Qgis-Forwarded-Url"),
        Some("https://public/base/ows/")
    );
}

/// QGIS looks for an API wherever in a path its name stands, and our rules see only the
/// path that is asked for.
#[tokio::test]
async fn what_a_client_says_of_its_proxy_makes_no_request_one_for_an_api() {
    let broker = Broker::saying("x");
    let apis = vec![("own".to_owned(), "/own".to_owned())];
    let server = Server::start(&broker, |http| {
        (http.http_proxy, http.apis) = (true, apis.clone());
    });
    let named = ["/wfs3", "/a/ogcapi/", "/%77fs3/collections/secret", "/own"];
    let lines = named.iter().flat_map(|path| {
        [
            format!("X-Forwarded-Prefix: {path}\r\n"),
            format!("X-Forwarded-Url: http://example.org{path}\r\n"),
            format!("X-Qgis-Forwarded-Url: http://example.org{path}\r\n"),
        ]
    });
    let mut n = 0;
    for line in lines {
        server.send("POST", "/ows/?MAP=city", &line, "<a/>").await;
        let call = broker.calls().pop().expect("a call");
        assert_eq!(call.url, "http://example.org/ows/?MAP=city", "{line}");
        n += 1;
    }
    assert_eq!(broker.calls().len(), n);
    // The catalogue of projects may be anywhere.
    let catalogue = "X-Qgis-Forwarded-Url: http://example.org/index.json\r\n";
    for (method, path, body, public) in [
        ("GET", "/ows/?SERVICE=WMS&REQUEST=a", "", "/index.json?"),
        ("POST", "/ows/?MAP=a", "<a/>", "/index.json/ows/?"),
        (
            "POST",
            "/ows/?MAP=a&SERVICE=WMS",
            "<a/>",
            "/index.json/ows/?",
        ),
    ] {
        let path = format!("{path}&MAP=a");
        server.send(method, &path, catalogue, body).await;
        let url = broker.calls().pop().expect("a call").url;
        let start = format!("http://example.org{public}");
        assert!(url.starts_with(&start), "{method} {path}: {url}");
    }
    let fixed = Server::start(&broker, |http| {
        (http.http_proxy, http.proxy_url) = (true, Some("https://public/wfs3".into()));
    });
    fixed.get(GET_MAP).await;
    let call = broker.calls().pop().expect("a call");
    assert!(
        call.url.starts_with("https://public/wfs3/ows/?"),
        "{}",
        call.url
    );
}

#[tokio::test]
async fn options_is_answered_everywhere_without_a_worker() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for (target, allow) in [
        ("/ows/", "GET, POST, HEAD, OPTIONS"),
        (
            "/wfs3/collections",
            "GET, POST, HEAD, PUT, DELETE, PATCH, OPTIONS",
        ),
        ("/", "GET, HEAD, OPTIONS"),
        ("*", "GET, POST, HEAD, PUT, DELETE, PATCH, OPTIONS"),
    ] {
        let lines = "Origin: https://map.example\r\nAccess-Control-Request-Headers: x-a\r\n";
        let answered = server.send("OPTIONS", target, lines, "").await;
        assert_eq!(
            (answered.status, answered.header("allow")),
            (200, allow),
            "{target}"
        );
        assert_eq!(answered.header("access-control-allow-origin"), "*");
        assert_eq!(answered.header("access-control-allow-methods"), allow);
        assert_eq!(answered.header("access-control-allow-headers"), "x-a");
    }
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn an_origin_is_told_what_it_may_read() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.cross_origin = false);
    let answered = server
        .send("GET", GET_MAP, "Origin: https://map.example\r\n", "")
        .await;
    assert_eq!(
        answered.header("access-control-allow-origin"),
        "https://map.example"
    );
    assert_eq!(answered.header("vary"), "Origin");
    let without = server.get(GET_MAP).await;
    assert_eq!(without.header("access-control-allow-origin"), "");
    assert_eq!(without.header("vary"), "Origin");
    let open = Server::start(&broker, |_| {});
    let without = open.get(GET_MAP).await;
    assert_eq!(without.header("access-control-allow-origin"), "*");
    assert_eq!(without.header("vary"), "");
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let server = Server::start(&Broker::saying("a picture"), |_| {});
    let answered = server.send("HEAD", GET_MAP, "", "").await;
    assert_eq!(
        (
            answered.status,
            answered.header("content-length"),
            answered.body.as_str()
        ),
        (200, "9", "")
    );
    let ping = server.send("HEAD", "/ping", "", "").await;
    assert_eq!((ping.status, ping.body.as_str()), (200, ""));
    let absent = server.send("HEAD", "/nowhere", "", "").await;
    assert_eq!((absent.status, absent.body.as_str()), (404, ""));
}

#[tokio::test]
async fn head_of_a_stream_lets_the_worker_go() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |_| {});
    let answered = server.send("HEAD", GET_MAP, "", "").await;
    assert_eq!(
        (
            answered.status,
            answered.header("content-length"),
            answered.body.as_str()
        ),
        (200, "", "")
    );
    assert_eq!(broker.only_call().method, "GET");
    let sender = senders.recv().await.expect("a stream");
    timeout(BOUND, sender.closed())
        .await
        .expect("the stream was dropped");
}

#[tokio::test]
async fn the_server_answers_for_itself() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.status_page = true);
    let ping = server.get("/ping").await;
    assert_eq!(
        (ping.status, ping.body.as_str()),
        (200, r#"{"status": "ok"}"#)
    );
    assert_eq!(
        (ping.header("cache-control"), ping.header("x-server-status")),
        ("no-store", "ok")
    );
    assert_eq!(server.get("/ready").await.status, 200);
    broker.0.is_ready.store(false, Ordering::Relaxed);
    assert_eq!(server.get("/ready").await.status, 503);
    assert_eq!(server.get("/ping").await.status, 200);
    let status: serde_json::Value =
        serde_json::from_str(&server.get("/status").await.body).expect("JSON");
    assert_eq!(status["waiting"], 3);
    let root: serde_json::Value = serde_json::from_str(&server.get("/").await.body).expect("JSON");
    assert_eq!(root["servers"][0]["url"], "http://example.org/");
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn paths_and_methods_that_are_not_ours_are_refused() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for target in [
        "/nowhere",
        "/OWS/",
        "/status",
        "/static/../x",
        "/static/%2e%2e/x",
        "/wfs3/%00",
    ] {
        let answered = server.get(target).await;
        assert_eq!(
            (answered.status, answered.header("content-type")),
            (404, "application/problem+json"),
            "{target}"
        );
    }
    let answered = server.send("DELETE", "/ows/?MAP=city", "", "").await;
    assert_eq!(
        (answered.status, answered.header("allow")),
        (405, "GET, POST, HEAD, OPTIONS")
    );
    assert_eq!(server.send("POST", "/ping", "", "x").await.status, 405);
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn a_panic_is_a_500_and_the_server_lives() {
    let first = AtomicUsize::new(0);
    let broker = Broker::new(move |_| {
        let is_first = first.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            assert!(!is_first, "this panic is part of the test");
            Ok((head(200), FakeBody::whole("x")))
        }
    });
    let server = Server::start(&broker, |_| {});
    let answered = server.get(GET_MAP).await;
    assert_eq!(
        (answered.status, answered.header("content-type")),
        (500, "text/xml; charset=utf-8")
    );
    assert!(!answered.header("x-request-id").is_empty());
    assert_eq!(server.get(GET_MAP).await.status, 200);
}

// ---- bad input

#[tokio::test]
async fn a_malformed_host_is_refused() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for lines in [
        "",
        "Host: a b\r\n",
        "Host: u@h\r\n",
        "Host: a\r\nHost: b\r\n",
        "Host: <script>\r\n",
    ] {
        let answered = server
            .raw(format!(
                "GET {GET_MAP} HTTP/1.1\r\n{lines}Connection: close\r\n\r\n"
            ))
            .await;
        assert_eq!(answered.status, 400, "{lines:?}");
    }
    assert!(broker.calls().is_empty());
    let old = server.raw(format!("GET {GET_MAP} HTTP/1.0\r\n\r\n")).await;
    assert_eq!(old.status, 200, "HTTP/1.0 has no Host");
}

#[tokio::test]
async fn garbage_is_a_400_that_says_so_and_nothing_more() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for garbage in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let answered = server.raw(garbage).await;
        assert!(
            matches!(answered.status, 0 | 400 | 505),
            "{garbage:?}: {}",
            answered.status
        );
        // Who speaks HTTP/2 in clear text would not understand.
        if garbage.starts_with("PRI") {
            continue;
        }
        assert_eq!(answered.header("content-type"), "text/xml; charset=utf-8");
        let length = answered.body.len().to_string();
        assert_eq!(answered.header("content-length"), length, "{garbage:?}");
        let exception = "<ServiceException code=\"NoApplicableCode\">This is no HTTP request<";
        assert!(answered.body.contains(exception), "{}", answered.body);
    }
    assert!(broker.calls().is_empty());
    assert_eq!(server.get(GET_MAP).await.status, 200);
}

#[tokio::test]
async fn two_lengths_never_smuggle_a_request() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let smuggled = "GET /ows/?SERVICE=WMS&REQUEST=GetMap&MAP=smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let request = format!(
        "POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        smuggled.len() + 5,
    );
    let answered = server.raw(request).await;
    assert_eq!(answered.status, 400);
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn a_body_that_is_too_long_is_a_413_before_it_is_read() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.body_max = 10);
    let start = "POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\n";
    let announced = server
        .raw(format!("{start}Content-Length: 11\r\n\r\n"))
        .await;
    assert_eq!(
        (announced.status, announced.header("connection")),
        (413, "close")
    );
    let chunked = server
        .raw(format!(
            "{start}Transfer-Encoding: chunked\r\n\r\nb\r\n<a>________\r\n"
        ))
        .await;
    assert_eq!(chunked.status, 413);
    let exact = server
        .raw(format!(
            "{start}Connection: close\r\nContent-Length: 10\r\n\r\n<a>_______"
        ))
        .await;
    assert_eq!(exact.status, 200);
    assert_eq!(broker.calls().len(), 1);
}

#[tokio::test]
async fn a_client_that_still_sends_reads_its_413() {
    let server = Server::start(&Broker::saying("x"), |http| http.body_max = 10);
    let mut tcp = server.connect().await;
    let length = 8 << 20;
    let head =
        format!("POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.expect("written");
    let (mut read, mut write) = tcp.split();
    let sending = async { _ = write.write_all(&vec![b'x'; length]).await };
    let reading = async {
        let mut raw = Vec::new();
        let result = read.read_to_end(&mut raw).await;
        (result, raw)
    };
    let ((result, raw), ()) = timeout(BOUND, async { tokio::join!(reading, sending) })
        .await
        .expect("in time");
    assert_eq!(Answered::parse(&raw).status, 413, "{result:?}");
}

/// A socket that is closed with bytes in it would be reset, and the answer lost.
#[tokio::test]
async fn whoever_is_refused_early_may_send_to_the_end_and_reads_why() {
    let server = Server::start(&Broker::saying("x"), |_| {});
    let long = "x".repeat(40 << 10);
    for (start, status) in [
        ("POST /nowhere HTTP/1.1\r\nHost: a", 404),
        ("POST /ping HTTP/1.1\r\nHost: a", 405),
        ("POST /ows/ HTTP/1.1\r\nHost: a b", 400),
        ("GET /ping HTTP/1.1\r\nHost: a", 200),
        (&format!("POST /ows/?{long} HTTP/1.1\r\nHost: a"), 414),
        (
            &format!("POST /ows/ HTTP/1.1\r\nHost: a\r\nX: {long}{long}"),
            431,
        ),
        (
            &format!("POST /ows/ HTTP/1.1\r\nHost: a{}", "\r\nX: y".repeat(200)),
            431,
        ),
    ] {
        let mut tcp = server.connect().await;
        let length = 20 << 20;
        let head = format!("{start}\r\nContent-Length: {length}\r\n\r\n");
        tcp.write_all(head.as_bytes()).await.expect("written");
        let body = vec![b'x'; length];
        let sent = timeout(BOUND, tcp.write_all(&body)).await.expect("in time");
        let start = &start[..20];
        assert!(sent.is_ok(), "{start}: {sent:?}");
        let mut raw = Vec::new();
        let read = timeout(BOUND, tcp.read_to_end(&mut raw)).await;
        let read = read.expect("in time");
        let answered = Answered::parse(&raw);
        assert!(read.is_ok(), "{start}: {read:?}");
        assert_eq!(
            (answered.status, answered.header("connection")),
            (status, "close"),
            "{start}"
        );
    }
}

#[tokio::test]
async fn nobody_may_send_for_ever_after_a_refusal() {
    let server = Server::start(&Broker::saying("x"), |http| {
        http.linger_timeout = Duration::from_millis(100)
    });
    let mut tcp = server.connect().await;
    let head = "POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    tcp.write_all(head.as_bytes()).await.expect("written");
    read_until(&mut tcp, "Invalid resource path").await;
    let sending = async {
        while tcp.write_all(b"1\r\nx\r\n").await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(BOUND, sending).await.expect("closed in the end");
}

#[tokio::test]
async fn a_body_that_stops_coming_is_a_408() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| {
        http.body_timeout = Duration::from_millis(50)
    });
    let request = "POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n<a>";
    let answered = server.raw(request).await;
    assert_eq!(
        (answered.status, answered.header("connection")),
        (408, "close")
    );
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn a_uri_that_is_too_long_is_a_414_and_a_head_a_431() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| {
        (http.uri_max, http.header_max) = (16 << 10, 16 << 10)
    });
    let long = "x".repeat(16 << 10);
    assert_eq!(server.get(&format!("{GET_MAP}{long}")).await.status, 414);
    assert_eq!(
        server
            .send("GET", GET_MAP, &format!("X-Long: {long}\r\n"), "")
            .await
            .status,
        431
    );
    // Beyond what is read at all.
    let longer = format!("X-Long: {long}{long}{long}\r\n");
    let refused = server.send("GET", GET_MAP, &longer, "").await;
    assert_eq!(refused.status, 431);
    let why = "The headers have more than 16384 bytes, or are more than 100<";
    assert!(refused.body.contains(why), "{}", refused.body);
    assert_eq!(
        server
            .send("GET", GET_MAP, &"X-Many: x\r\n".repeat(200), "")
            .await
            .status,
        431
    );
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn how_many_headers_there_may_be_is_a_setting() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.headers_max = 300);
    let status = async |n| {
        let lines = "X-Many: x\r\n".repeat(n);
        server.send("GET", GET_MAP, &lines, "").await.status
    };
    assert_eq!((status(200).await, status(300).await), (200, 431));
}

#[tokio::test]
async fn a_form_in_parts_is_a_form() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let field = |name, value| {
        format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    let fields = [
        field("SERVICE", "WMS"),
        field("REQUEST", "GetPrint"),
        field("map", "a/b"),
    ];
    let body = format!("{}--b--\r\n", fields.concat());
    let kind = "Content-Type: multipart/form-data; boundary=b\r\n";
    server.send("POST", "/ows/", kind, &body).await;
    let url = "http://example.org/ows/?SERVICE=WMS&REQUEST=GetPrint&MAP=a%2Fb";
    assert_eq!(
        (
            broker.only_call().url.as_str(),
            broker.only_call().method.as_str()
        ),
        (url, "GET")
    );
}

#[tokio::test]
async fn a_form_that_no_message_could_carry_is_a_413() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let body = format!(
        "SERVICE=WMS&REQUEST=GetMap&MAP=city&SLD_BODY={}",
        "x".repeat(1 << 20)
    );
    assert_eq!(server.send("POST", "/ows/", kind, &body).await.status, 413);
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn a_form_of_a_thousand_fields_is_a_413() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let form = |n: usize| {
        let fields: String = (0..n).map(|i| format!("&F{i}=")).collect();
        format!("SERVICE=WMS&REQUEST=GetMap&MAP=city{fields}")
    };
    let refused = server.send("POST", "/ows/", kind, &form(1000)).await;
    assert_eq!(refused.status, 413, "{}", refused.body);
    assert!(broker.calls().is_empty());
    let taken = server.send("POST", "/ows/", kind, &form(900)).await;
    assert_eq!(taken.status, 200);
}

/// A form is one from its first character on, and that is looked for near the start.
#[tokio::test]
async fn a_form_of_blanks_is_no_xml() {
    let server = Server::start(&Broker::saying("x"), |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let body = format!("{}<a/>", " ".repeat(600 << 10));
    assert_eq!(server.send("POST", "/ows/", kind, &body).await.status, 413);
}

/// Each raw byte of a value takes three in the URL.
#[tokio::test]
async fn a_form_that_grows_too_long_in_the_url_is_a_413() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let body = |n| {
        let raw = "\"".repeat(n);
        format!("SERVICE=WMS&REQUEST=GetMap&MAP=city&SLD_BODY={raw}")
    };
    let refused = server.send("POST", "/ows/", kind, &body(400 << 10)).await;
    assert_eq!(refused.status, 413, "{}", refused.body);
    assert!(broker.calls().is_empty());
    let taken = server.send("POST", "/ows/", kind, &body(300 << 10)).await;
    assert_eq!(taken.status, 200);
}

#[tokio::test]
async fn a_long_form_is_refused_before_all_of_it_is_here() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    for (kind, body) in [
        ("multipart/form-data; boundary=x", ""),
        ("application/x-www-form-urlencoded", "a=b&"),
    ] {
        let start = format!(
            "POST /ows/ HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 50000000\r\n\r\n{body}"
        );
        let answered = server.raw(start).await;
        assert_eq!(answered.status, 413, "{kind}");
    }
}

#[tokio::test]
async fn long_xml_is_no_long_form_whatever_it_calls_itself() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |_| {});
    let kind = "Content-Type: application/x-www-form-urlencoded\r\n";
    let body = format!("\u{FEFF}\n<Transaction>{}", " ".repeat(2 << 20));
    let answered = server.send("POST", "/ows/?MAP=city", kind, &body).await;
    assert_eq!(answered.status, 200);
    assert_eq!(broker.only_call().body.len(), body.len());
}

#[tokio::test]
async fn failures_of_xml_requests_are_in_the_form_of_their_service() {
    let broker = Broker::failing(Error::WorkerDied);
    let server = Server::start(&broker, |_| {});
    let body = "<wfs:Transaction service='WFS' version='1.1.0'/>";
    let answered = server
        .send("POST", "/ows/?MAP=city", "Content-Type: text/xml\r\n", body)
        .await;
    assert_eq!(answered.status, 502);
    assert!(
        answered.body.contains("\"http://www.opengis.net/ows\""),
        "{}",
        answered.body
    );
}

#[tokio::test]
async fn more_bodies_than_there_is_memory_for_are_told_to_come_back_unless_they_are_small() {
    let broker = Broker::new(|_| std::future::pending());
    let server = Server::start(&broker, |http| http.body_memory = 400 << 10);
    let request = |length: usize| {
        let body = "x".repeat(length - 3);
        format!(
            "POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n<a>{body}"
        )
    };
    let mut busy = Vec::new();
    for (n, length) in [100, 100, 100, 100, 64].into_iter().enumerate() {
        if n == 4 {
            let fifth = server.raw(request(100 << 10)).await;
            assert_eq!((fifth.status, fifth.header("retry-after")), (503, "1"));
        }
        let mut tcp = server.connect().await;
        let request = request(length << 10);
        tcp.write_all(request.as_bytes()).await.expect("written");
        busy.push(tcp);
        let called = async {
            while broker.calls().len() <= n {
                tokio::task::yield_now().await;
            }
        };
        timeout(BOUND, called).await.expect("a call");
    }
}

/// Sends a byte of a body now and then until the server has had enough.
async fn trickle(server: &Server) -> Answered {
    let mut tcp = server.connect().await;
    let head = "POST /ows/?MAP=city HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n<a>";
    tcp.write_all(head.as_bytes()).await.expect("written");
    let (mut read, mut write) = tcp.split();
    let sending = async {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        while write.write_all(b" ").await.is_ok() {
            tick.tick().await;
        }
        std::future::pending().await
    };
    let answer = async { read_until_end(&mut read).await };
    tokio::select! {
        answered = timeout(BOUND, answer) => answered.expect("in time"),
        () = sending => unreachable!("it waits for the answer"),
    }
}

async fn read_until_end(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> Answered {
    let mut raw = Vec::new();
    _ = from.read_to_end(&mut raw).await;
    Answered::parse(&raw)
}

#[tokio::test]
async fn a_body_that_trickles_is_a_408() {
    let broker = Broker::saying("x");
    let slow = Server::start(&broker, |http| {
        http.body_timeout = Duration::from_millis(100);
        http.body_rate_min = 10 << 10;
    });
    assert_eq!(trickle(&slow).await.status, 408);
    let long = Server::start(&broker, |http| {
        http.body_rate_min = 1;
        http.body_time_max = Duration::from_millis(200);
    });
    assert_eq!(trickle(&long).await.status, 408);
    assert!(broker.calls().is_empty());
}

// ---- time

#[tokio::test]
async fn a_head_that_does_not_end_closes_the_connection() {
    let server = Server::start(&Broker::saying("x"), |http| {
        http.header_timeout = Duration::from_millis(100)
    });
    for start in ["", "GET /ping HTTP/1.1\r\nHo"] {
        let answered = server.raw(start).await;
        assert_eq!(answered.status, 0, "closed without an answer");
    }
}

#[tokio::test]
async fn a_kept_alive_connection_may_idle_longer_than_a_head_may_take() {
    let server = Server::start(&Broker::saying("x"), |http| {
        http.header_timeout = Duration::from_millis(500);
        http.idle_timeout = Duration::from_secs(4);
    });
    let mut tcp = server.connect().await;
    let request = "GET /ping HTTP/1.1\r\nHost: a\r\n\r\n";
    tcp.write_all(request.as_bytes()).await.expect("written");
    read_until(&mut tcp, "ok\"}").await;
    let quiet = timeout(Duration::from_secs(1), tcp.read(&mut [0; 1])).await;
    assert!(quiet.is_err(), "still open");
    tcp.write_all(request.as_bytes()).await.expect("written");
    read_until(&mut tcp, "ok\"}").await;
    let closed = timeout(BOUND, tcp.read(&mut [0; 1]))
        .await
        .expect("closed in the end");
    assert_eq!(closed.expect("closed properly"), 0);
}

#[tokio::test]
async fn a_stream_arrives_as_it_is_made() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    let got = read_until(&mut tcp, "first\r\n").await;
    assert!(got.contains("transfer-encoding: chunked"), "{got}");
    sender.send(Ok("second".into())).await.expect("taken");
    drop(sender);
    read_until(&mut tcp, "6\r\nsecond\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_finished_reply_in_parts_has_its_length() {
    let (broker, mut senders) = streaming_of(Some(11));
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    let got = read_until(&mut tcp, "first").await;
    assert!(got.contains("content-length: 11\r\n"), "{got}");
    assert!(!got.contains("chunked"), "{got}");
    sender.send(Ok("second".into())).await.expect("taken");
    drop(sender);
    read_until(&mut tcp, "second").await;
    tcp.write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .expect("the connection lives");
    read_until(&mut tcp, "ok\"}").await;
    let head = server.send("HEAD", GET_MAP, "", "").await;
    assert_eq!(head.header("content-length"), "11");
}

#[tokio::test]
async fn a_reply_of_another_length_than_announced_does_not_end_properly() {
    for parts in [&["first"][..], &["first", "second", "third"]] {
        let (broker, mut senders) = streaming_of(Some(11));
        let server = Server::start(&broker, |_| {});
        let mut tcp = server.connect().await;
        tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await
            .expect("written");
        let sender = senders.recv().await.expect("a stream");
        for part in parts {
            _ = sender.send(Ok((*part).into())).await;
        }
        drop(sender);
        let mut raw = Vec::new();
        let end = timeout(BOUND, tcp.read_to_end(&mut raw)).await;
        let reset = end.expect("in time").expect_err("no proper end");
        assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(Answered::parse(&raw).body.len() < 11, "{parts:?}");
    }
}

#[tokio::test]
async fn a_reply_that_is_here_and_has_another_length_than_announced_is_a_500() {
    let broker = Broker::new(|_| async {
        let head = Head {
            length: Some(2),
            ..head(200)
        };
        Ok((head, FakeBody::whole("x")))
    });
    let server = Server::start(&broker, |_| {});
    assert_eq!(server.get(GET_MAP).await.status, 500);
}

#[tokio::test]
async fn a_reply_that_is_cut_off_does_not_end_properly() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    read_until(&mut tcp, "first\r\n").await;
    sender.send(Err(Error::WorkerDied)).await.expect("taken");
    let mut rest = Vec::new();
    _ = timeout(BOUND, tcp.read_to_end(&mut rest))
        .await
        .expect("closed");
    assert_eq!(rest, b"", "no last chunk");
}

/// Not even a head would look like a server that went away.
#[tokio::test]
async fn what_came_of_a_reply_leaves_before_it_is_cut_off() {
    let broker = Broker::new(async |_| {
        let (tx, chunks) = mpsc::channel(2);
        let items = [Ok("first".into()), Err(Error::WorkerDied)];
        for item in items {
            tx.try_send(item).expect("room for two");
        }
        let outcome = None;
        Ok((head(200), FakeBody { chunks, outcome }))
    });
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let mut all = Vec::new();
    _ = timeout(BOUND, tcp.read_to_end(&mut all))
        .await
        .expect("closed");
    let all = String::from_utf8_lossy(&all).into_owned();
    assert!(all.starts_with("HTTP/1.1 200 OK\r\n"), "{all:?}");
    assert!(all.ends_with("first\r\n"), "no last chunk: {all:?}");
}

/// To HTTP/1.0 a closed connection is a proper end, so it must be a reset.
#[tokio::test]
async fn a_reply_that_is_cut_off_is_a_reset_for_http_1_0() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.0\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    read_until(&mut tcp, "first").await;
    sender.send(Err(Error::WorkerDied)).await.expect("taken");
    let end = timeout(BOUND, tcp.read(&mut [0; 1]))
        .await
        .expect("in time");
    assert_eq!(
        end.expect_err("no proper end").kind(),
        std::io::ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off_and_its_request_dropped() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |http| {
        http.write_timeout = Duration::from_millis(200)
    });
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    let chunk = Bytes::from(vec![b'x'; 256 << 10]);
    let pushing = async { while sender.send(Ok(chunk.clone())).await.is_ok() {} };
    timeout(BOUND, pushing)
        .await
        .expect("the stream was dropped");
}

/// Each byte alone would keep the connection for ever.
#[tokio::test]
async fn a_client_that_reads_too_slowly_is_cut_off() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |http| {
        http.write_timeout = Duration::from_millis(500);
        http.write_rate_min = 1 << 30;
    });
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    let chunk = Bytes::from(vec![b'x'; 256 << 10]);
    let pushing = async { while sender.send(Ok(chunk.clone())).await.is_ok() {} };
    let reading = async {
        let (mut some, mut tick) = (
            vec![0; 64 << 10],
            tokio::time::interval(Duration::from_millis(10)),
        );
        while tcp.read(&mut some).await.is_ok_and(|n| n > 0) {
            tick.tick().await;
        }
    };
    timeout(BOUND, async { tokio::join!(pushing, reading) })
        .await
        .expect("the stream was dropped");
}

/// The last chunk is ours no more, but the client still reads it.
#[tokio::test]
async fn the_end_of_a_reply_has_the_time_of_a_reply() {
    let broker = Broker::new(|_| async { Ok((head(200), FakeBody::whole(vec![b'x'; 32 << 20]))) });
    let server = Server::start(&broker, |http| {
        http.header_timeout = Duration::from_millis(500);
        http.idle_timeout = Duration::from_millis(500);
    });
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let early = timeout(Duration::from_millis(1500), std::future::pending::<()>()).await;
    assert!(early.is_err());
    let mut raw = Vec::new();
    let read = timeout(BOUND, tcp.read_to_end(&mut raw)).await;
    assert!(read.expect("in time").is_ok());
    assert!(raw.len() > 32 << 20, "{}", raw.len());
}

#[tokio::test]
async fn a_front_that_is_dropped_ends_its_connections() {
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    server.task.abort();
    timeout(BOUND, sender.closed())
        .await
        .expect("the stream was dropped");
}

#[tokio::test]
async fn a_client_that_leaves_withdraws_its_request() {
    let (out, mut called) = mpsc::channel(1);
    let broker = Broker::new(move |_| {
        let out = out.clone();
        async move {
            let (_held, dropped) = oneshot::channel::<()>();
            out.send(dropped).await.expect("the test listens");
            std::future::pending().await
        }
    });
    let server = Server::start(&broker, |_| {});
    let mut tcp = server.connect().await;
    let request = format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.expect("written");
    let dropped = called.recv().await.expect("a call");
    drop(tcp);
    let withdrawn = timeout(BOUND, dropped).await.expect("in time");
    assert!(withdrawn.is_err(), "the call was dropped, not answered");
}

#[tokio::test]
async fn a_stop_lets_a_running_request_finish_and_takes_no_other() {
    let (broker, mut senders) = streaming();
    let mut server = Server::start(&broker, |_| {});
    let mut idle = server.connect().await;
    idle.write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .expect("written");
    read_until(&mut idle, "ok\"}").await;
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    read_until(&mut tcp, "first").await;
    drop(server.stop.take());
    let closed = timeout(BOUND, idle.read(&mut [0; 1]))
        .await
        .expect("idle connections are closed soon");
    assert_eq!(closed.expect("closed properly"), 0);
    assert!(
        TcpStream::connect(server.addr).await.is_err(),
        "nobody listens"
    );
    sender.send(Ok("second".into())).await.expect("taken");
    drop(sender);
    read_until(&mut tcp, "second\r\n0\r\n\r\n").await;
    server.stopped().await;
}

#[tokio::test]
async fn a_stop_cuts_off_what_runs_longer_than_the_drain() {
    let (broker, mut senders) = streaming();
    let server = Server::start_with_drain(&broker, Duration::from_millis(50), |_| {});
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    server.stopped().await;
    timeout(BOUND, sender.closed())
        .await
        .expect("the stream was dropped");
}

#[tokio::test]
async fn a_connection_too_many_waits_for_its_turn() {
    let server = Server::start(&Broker::saying("x"), |http| http.connections_max = 1);
    let mut first = server.connect().await;
    first
        .write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .expect("written");
    read_until(&mut first, "ok\"}").await;
    let mut second = server.connect().await;
    second
        .write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .expect("written");
    let waits = timeout(Duration::from_millis(100), second.read(&mut [0; 1])).await;
    assert!(waits.is_err(), "not answered yet");
    drop(first);
    read_until(&mut second, "ok\"}").await;
}

#[tokio::test]
async fn an_address_that_has_its_connections_is_refused_more_and_counted() {
    let server = Server::start(&Broker::saying("x"), |http| {
        http.client_connections = Some(1)
    });
    let ping = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut first = server.connect().await;
    first.write_all(ping).await.expect("written");
    read_until(&mut first, "ok\"}").await;
    let mut second = server.connect().await;
    // It may be closed before it has said anything.
    let _ = second.write_all(ping).await;
    let said = timeout(BOUND, second.read(&mut [0; 1])).await;
    assert!(matches!(said.expect("at once"), Ok(0) | Err(_)));
    let metrics = server.shared.rules.load().front.books.metrics.clone();
    assert_eq!(metrics.connections_refused.get(), 1);
    server
        .change(|http| http.client_connections = Some(2))
        .expect("no certificate");
    let mut third = server.connect().await;
    third.write_all(ping).await.expect("written");
    read_until(&mut third, "ok\"}").await;
}

/// Nobody is accepted here, so all wait in the kernel; if it has no room for
/// one, that one is not heard for a second, and not at all if the burst goes on.
#[tokio::test]
async fn a_burst_of_connections_finds_room() {
    let broker = Broker::saying("x");
    let server = Server::start(&broker, |http| http.connections_max = 1);
    let mut waiting = Vec::new();
    for _ in 0..600 {
        let connected = timeout(BOUND, server.connect()).await;
        waiting.push(connected.expect("there is room"));
    }
}

#[tokio::test]
async fn a_stop_answers_what_was_on_its_way_and_says_that_it_is_the_last() {
    let (broker, mut senders) = streaming();
    let mut server = Server::start(&broker, |http| http.drain_idle = BOUND);
    let get = format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n");
    let (mut fresh, mut idle) = (server.connect().await, server.connect().await);
    let mut running = server.connect().await;
    let ping = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n";
    idle.write_all(ping).await.expect("written");
    read_until(&mut idle, "ok\"}").await;
    running.write_all(get.as_bytes()).await.expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    read_until(&mut running, "first").await;
    drop(server.stop.take());
    while TcpStream::connect(server.addr).await.is_ok() {}
    // What was silent until now speaks, and so does who has just got the end of its reply.
    drop(sender);
    read_until(&mut running, "0\r\n\r\n").await;
    for tcp in [&mut fresh, &mut idle, &mut running] {
        tcp.write_all(ping).await.expect("written");
        let last = Answered::read(tcp).await;
        assert_eq!(last.status, 200);
        assert_eq!(last.header("connection"), "close");
    }
    server.stopped().await;
}

#[tokio::test]
async fn a_request_goes_by_the_settings_that_are_in_force_when_it_comes() {
    let server = Server::start(&Broker::saying("x"), |_| {});
    let mut tcp = server.connect().await;
    let get = format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n");
    tcp.write_all(get.as_bytes()).await.expect("written");
    let first = read_until(&mut tcp, "\r\n\r\nx").await;
    assert!(first.starts_with("HTTP/1.1 200"), "{first}");
    server
        .change(|http| http.uri_max = GET_MAP.len() - 1)
        .expect("no certificate is wrong");
    tcp.write_all(get.as_bytes()).await.expect("written");
    read_until(&mut tcp, " 414 ").await;
}

#[tokio::test]
async fn more_and_fewer_connections_can_be_allowed_while_some_are_open() {
    let server = Server::start(&Broker::saying("x"), |http| http.connections_max = 2);
    let ping = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut open = Vec::new();
    for max in [2, 3] {
        server
            .change(|http| http.connections_max = max)
            .expect("no certificate");
        while open.len() < max {
            let mut tcp = server.connect().await;
            tcp.write_all(ping).await.expect("written");
            read_until(&mut tcp, "ok\"}").await;
            open.push(tcp);
        }
    }
    server
        .change(|http| http.connections_max = 1)
        .expect("no certificate");
    let mut late = server.connect().await;
    late.write_all(ping).await.expect("written");
    let waits = timeout(Duration::from_millis(50), late.read(&mut [0; 1])).await;
    assert!(waits.is_err(), "as many are open as before");
    // Whoever stood in line before the change may still have the first place.
    drop(open);
    read_until(&mut late, "ok\"}").await;
    drop(late);
    server.stopped().await;
}

#[test]
fn a_shortage_of_descriptors_makes_accept_wait_longer_and_longer() {
    let shortage = std::io::Error::from_raw_os_error(libc::EMFILE);
    let first = super::pause_after(&shortage, Duration::ZERO);
    assert!(!first.is_zero());
    assert_eq!(super::pause_after(&shortage, first), first * 2);
    assert_eq!(
        super::pause_after(&shortage, BOUND),
        super::ACCEPT_PAUSE_MAX
    );
    let gone = std::io::Error::from_raw_os_error(libc::ECONNABORTED);
    assert_eq!(super::pause_after(&gone, first), Duration::ZERO);
}

// ---- TLS and HTTP/2

/// A server with a certificate of its own, and how to trust it.
struct Secure {
    server: Server,
    roots: RootCertStore,
    _files: tempfile::TempDir,
}

type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

impl Secure {
    fn start(broker: &Broker, change: impl FnOnce(&mut Http)) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
        let files = tempfile::tempdir().expect("a directory");
        let (cert, key) = (files.path().join("cert.pem"), files.path().join("key.pem"));
        std::fs::write(&cert, made.cert.pem()).expect("written");
        std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
        let mut roots = RootCertStore::empty();
        roots
            .add(PemObject::from_pem_file(&cert).expect("PEM"))
            .expect("a root");
        let server = Server::start(broker, |http| {
            http.tls = Some(Tls { cert, key });
            change(http);
        });
        Self {
            server,
            roots,
            _files: files,
        }
    }

    /// Puts another certificate into the files, and trusts it alone.
    fn renew(&mut self) {
        let made = rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
        let file = |name| self._files.path().join(name);
        std::fs::write(file("cert.pem"), made.cert.pem()).expect("written");
        std::fs::write(file("key.pem"), made.signing_key.serialize_pem()).expect("written");
        self.roots = RootCertStore::empty();
        self.roots.add(made.cert.der().clone()).expect("a root");
    }

    async fn connect(&self, protocol: &str) -> TlsStream {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config
            .expect("versions")
            .with_root_certificates(self.roots.clone());
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from("localhost").expect("a name");
        connector
            .connect(name, self.server.connect().await)
            .await
            .expect("a handshake")
    }

    async fn http2(&self) -> http2::SendRequest<Empty<Bytes>> {
        let io = TokioIo::new(self.connect("h2").await);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        let builder = builder.initial_stream_window_size(65_535);
        let (client, connection) = builder.handshake(io).await.expect("HTTP/2");
        tokio::spawn(connection);
        client
    }
}

fn get_map() -> Request<Empty<Bytes>> {
    let uri = format!("https://localhost{GET_MAP}");
    Request::get(uri).body(Empty::new()).expect("a request")
}

#[tokio::test]
async fn tls_speaks_http_2_and_http_1_by_alpn() {
    let broker = Broker::saying("a picture");
    let secure = Secure::start(&broker, |_| {});
    let reply = secure
        .http2()
        .await
        .send_request(get_map())
        .await
        .expect("a reply");
    assert_eq!(
        (reply.status().as_u16(), reply.version()),
        (200, hyper::Version::HTTP_2)
    );
    assert_eq!(
        reply.into_body().collect().await.expect("whole").to_bytes(),
        "a picture"
    );
    let call = broker.only_call();
    assert!(
        call.url.starts_with("https://localhost/ows/?SERVICE=WMS"),
        "{}",
        call.url
    );
    assert_eq!(header(&call, "Host"), Some("localhost"));

    let mut tls = secure.connect("http/1.1").await;
    tls.write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await
        .expect("written");
    let mut raw = Vec::new();
    timeout(BOUND, tls.read_to_end(&mut raw))
        .await
        .expect("in time")
        .expect("closed properly");
    assert_eq!(Answered::parse(&raw).status, 200);
}

#[tokio::test]
async fn clear_text_on_a_tls_port_is_no_request() {
    let broker = Broker::saying("x");
    let secure = Secure::start(&broker, |http| {
        http.header_timeout = Duration::from_millis(100)
    });
    assert_ne!(secure.server.get(GET_MAP).await.status, 200);
    assert_eq!(
        secure.server.raw("").await.status,
        0,
        "a silent handshake ends"
    );
    assert!(broker.calls().is_empty());
}

#[tokio::test]
async fn an_http_2_stream_that_is_cut_off_is_reset_and_its_connection_lives() {
    let (broker, mut senders) = streaming();
    let secure = Secure::start(&broker, |_| {});
    let mut client = secure.http2().await;
    let reply = client.send_request(get_map()).await.expect("a reply");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    let mut body = reply.into_body();
    let first = timeout(BOUND, body.frame())
        .await
        .expect("in time")
        .expect("a frame")
        .expect("no error");
    assert_eq!(first.into_data().expect("data"), "first");
    sender.send(Err(Error::WorkerDied)).await.expect("taken");
    assert!(
        timeout(BOUND, body.frame())
            .await
            .expect("in time")
            .expect("not the end")
            .is_err()
    );
    let ping = Request::get("https://localhost/ping")
        .body(Empty::new())
        .expect("a request");
    let ping = timeout(BOUND, client.send_request(ping))
        .await
        .expect("in time");
    assert_eq!(ping.expect("the connection lives").status(), 200);
}

#[tokio::test]
async fn an_http_2_client_that_gives_no_window_is_cut_off_and_its_request_dropped() {
    let (broker, mut senders) = streaming();
    let secure = Secure::start(&broker, |http| {
        http.write_timeout = Duration::from_millis(200)
    });
    let mut client = secure.http2().await;
    let _unread = client.send_request(get_map()).await.expect("a reply");
    let sender = senders.recv().await.expect("a stream");
    let chunk = Bytes::from(vec![b'x'; 64 << 10]);
    let pushing = async { while sender.send(Ok(chunk.clone())).await.is_ok() {} };
    timeout(BOUND, pushing)
        .await
        .expect("the stream was dropped");
}

#[tokio::test]
async fn one_http_2_connection_has_no_more_requests_at_once_than_it_may() {
    let (broker, mut senders) = streaming();
    let secure = Secure::start(&broker, |http| http.streams_max = 2);
    let mut client = secure.http2().await;
    // From the first reply on the client knows the limit.
    let ping = Request::get("https://localhost/ping").body(Empty::new());
    let ping = client.send_request(ping.expect("a request")).await;
    assert_eq!(ping.expect("a reply").status(), 200);
    let mut replies = Vec::new();
    for _ in 0..3 {
        let reply = client.send_request(get_map());
        let whole = async { reply.await.expect("a reply").into_body().collect().await };
        replies.push(tokio::spawn(whole));
    }
    let first = senders.recv().await.expect("a stream");
    let _second = senders.recv().await.expect("a stream");
    let third = timeout(Duration::from_millis(100), senders.recv()).await;
    assert!(third.is_err(), "the third waits");
    drop(first);
    timeout(BOUND, senders.recv())
        .await
        .expect("in time")
        .expect("the third");
}

#[tokio::test]
async fn an_http_2_reset_withdraws_its_request_alone() {
    let (broker, mut senders) = streaming();
    let secure = Secure::start(&broker, |_| {});
    let mut client = secure.http2().await;
    let one = client.send_request(get_map()).await.expect("a reply");
    let other = client.send_request(get_map()).await.expect("a reply");
    let of_one = senders.recv().await.expect("a stream");
    let of_other = senders.recv().await.expect("a stream");
    drop(one);
    timeout(BOUND, of_one.closed())
        .await
        .expect("the stream was dropped");
    of_other.send(Ok("x".into())).await.expect("taken");
    drop(of_other);
    let whole = timeout(BOUND, other.into_body().collect())
        .await
        .expect("in time");
    assert_eq!(whole.expect("whole").to_bytes(), "x");
}

// ---- the access log

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("log").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The access lines, once there are `n`.
    async fn lines(&self, n: usize) -> Vec<String> {
        let lines = || {
            let text = String::from_utf8_lossy(&self.0.lock().expect("log")).into_owned();
            text.lines()
                .filter(|line| line.contains(" access: "))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let enough = async {
            while lines().len() < n {
                tokio::task::yield_now().await;
            }
        };
        timeout(BOUND, enough).await.expect("in time");
        lines()
    }
}

/// All on one thread, so its subscriber hears the server.
#[tokio::test]
async fn each_request_is_one_line_of_the_access_log() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone());
    let _heard = tracing::subscriber::set_default(subscriber.finish());
    let (broker, mut senders) = streaming();
    let server = Server::start(&broker, |http| http.threads = 1);

    server
        .send("GET", "/ping?x=%0a", "X-Request-Id: one\r\n", "")
        .await;
    let mut tcp = server.connect().await;
    tcp.write_all(format!("GET {GET_MAP} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let sender = senders.recv().await.expect("a stream");
    sender.send(Ok("first".into())).await.expect("taken");
    read_until(&mut tcp, "first").await;
    drop(tcp);
    timeout(BOUND, sender.closed())
        .await
        .expect("the stream was dropped");

    let lines = log.lines(2).await;
    for part in [
        r#"request_id="one""#,
        "client=127.0.0.1",
        "method=GET",
        r#"uri="/ping?x=%0a""#,
        "status=200",
        "bytes=16",
        "ms=",
        "stream_ms=",
        r#"end="whole""#,
    ] {
        assert!(lines[0].contains(part), "{part} in {}", lines[0]);
    }
    for part in ["status=200", "bytes=5", r#"end="client left""#] {
        assert!(lines[1].contains(part), "{part} in {}", lines[1]);
    }
    assert_eq!(lines.len(), 2);
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_trace_goes_with_the_request_and_a_malformed_one_does_not() {
    for (parent, is_passed) in [(PARENT, true), ("00-x", false)] {
        let broker = Broker::saying("");
        // Not even if the operator lets all headers through.
        let server = Server::start(&broker, |http| http.allow_headers.push("trace".into()));
        let headers = format!("traceparent: {parent}\r\ntracestate: a=1\r\n");
        server.send("GET", GET_MAP, &headers, "").await;
        let call = broker.only_call();
        let passed = call
            .headers
            .iter()
            .filter(|(name, _)| name == "Traceparent");
        assert_eq!(passed.count(), usize::from(is_passed));
        assert_eq!(header(&call, "Traceparent"), is_passed.then_some(parent));
        assert_eq!(header(&call, "Tracestate"), is_passed.then_some("a=1"));
        let trace = call.trace.map(|trace| (trace.parent, trace.state));
        let expected = (parent.to_owned(), Some("a=1".to_owned()));
        assert_eq!(trace, is_passed.then_some(expected));
    }
}

#[tokio::test]
async fn server_timing_is_silent_unless_it_is_wanted() {
    let broker = Broker::saying("a picture");
    let silent = Server::start(&broker, |_| {});
    assert_eq!(silent.get(GET_MAP).await.header("server-timing"), "");
    let telling = Server::start(&broker, |http| http.server_timing = true);
    let answered = telling.get(GET_MAP).await;
    assert_eq!(answered.header("server-timing"), "load;dur=0, render;dur=0");
    assert_eq!(answered.header("timing-allow-origin"), "*");
    // Nothing took any of that time.
    assert_eq!(telling.get("/ping").await.header("server-timing"), "");
    let failing = Server::start(&Broker::failing(Error::WorkerDied), |http| {
        http.server_timing = true;
    });
    assert_eq!(failing.get(GET_MAP).await.header("server-timing"), "");
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections_and_a_broken_one_for_nobody() {
    let mut secure = Secure::start(&Broker::saying("x"), |_| {});
    let ping = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut old = secure.connect("http/1.1").await;
    let mut buffer = [0; 1000];
    old.write_all(ping).await.expect("written");
    assert!(old.read(&mut buffer).await.expect("a reply") > 0);
    let folder = secure._files.path().to_owned();
    std::fs::write(folder.join("cert.pem"), "broken").expect("written");
    let error = secure.server.change(|_| {}).expect_err("it is broken");
    assert!(
        error.to_string().starts_with("server.ssl_cert: "),
        "{error}"
    );
    // This client trusts the first certificate alone.
    drop(secure.connect("h2").await);
    secure.renew();
    secure.server.change(|_| {}).expect("it is good");
    // And this one the second alone.
    drop(secure.connect("h2").await);
    old.write_all(ping).await.expect("written");
    assert!(old.read(&mut buffer).await.expect("a reply") > 0);
}

#[tokio::test]
async fn a_stop_lets_the_streams_of_http_2_end_and_refuses_others_without_a_reset() {
    let (broker, mut senders) = streaming();
    let mut secure = Secure::start(&broker, |_| {});
    let mut client = secure.http2().await;
    let request = |target: &str| {
        Request::get(format!("https://localhost{target}"))
            .body(Empty::<Bytes>::new())
            .expect("a request")
    };
    let running = client.send_request(request(GET_MAP));
    let (running, sender) = tokio::join!(running, async {
        let sender = senders.recv().await.expect("a stream");
        sender.send(Ok("first".into())).await.expect("taken");
        sender
    });
    let running = running.expect("a response");
    drop(secure.server.stop.take());
    // What still comes is answered, until GOAWAY tells the client to ask elsewhere.
    timeout(BOUND, async {
        while client.ready().await.is_ok() {
            match client.send_request(request("/ping")).await {
                Ok(response) => assert_eq!(response.status(), 200),
                Err(_) => break,
            }
        }
    })
    .await
    .expect("in time");
    sender.send(Ok("second".into())).await.expect("taken");
    drop(sender);
    let whole = running.into_body().collect().await.expect("the whole body");
    assert_eq!(whole.to_bytes(), "firstsecond");
    secure.server.stopped().await;
}
