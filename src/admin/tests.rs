//! The listener through real sockets, before a broker without workers.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::broker::{self, Broker};
use crate::config::{Config, Tls};

/// Nothing here takes longer unless it hangs.
const BOUND: Duration = Duration::from_secs(10);

struct Management {
    address: SocketAddr,
    other: SocketAddr,
    listening: Listening,
    _broker: Broker,
    _directory: tempfile::TempDir,
}

fn settings() -> config::Management {
    config::Management {
        interfaces: vec![[127, 0, 0, 1].into()],
        port: 0,
        tls: None,
        connections_max: 8,
        timeout: BOUND,
    }
}

impl Management {
    async fn start(config: config::Management) -> Result<Self, Error> {
        let directory = tempfile::tempdir().unwrap();
        let mut broker = Config::default().broker;
        broker.runtime_dir = directory.path().to_owned();
        let (handle, broker) = broker::start(&broker, None).await.unwrap();
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let tls = load(&config).expect("a certificate");
        let [address, other] = listeners.each_ref().map(|it| it.local_addr().unwrap());
        Ok(Self {
            listening: prepare(&config, tls, listeners.into(), handle)?.start(),
            address,
            other,
            _broker: broker,
            _directory: directory,
        })
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ask(&self, method: &str, path: &str) -> Answered {
        Self::ask_at(self.address, method, path).await
    }

    async fn ask_at(address: SocketAddr, method: &str, path: &str) -> Answered {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        tcp.write_all(head.as_bytes()).await.unwrap();
        Answered::read(&mut tcp).await
    }
}

struct Answered {
    status: u16,
    head: String,
    body: String,
}

impl Answered {
    /// Until the server hangs up.
    async fn read(io: &mut (impl AsyncRead + Unpin)) -> Self {
        let mut text = String::new();
        let read = timeout(BOUND, io.read_to_string(&mut text)).await;
        read.expect("the server hangs up").expect("text");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        Self {
            status: head.get(9..12).map_or(0, |it| it.parse().unwrap()),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }
}

#[tokio::test]
async fn every_page_is_there_and_no_cache_keeps_it() {
    let management = Management::start(settings()).await.unwrap();
    for (path, status) in [
        ("/ping", 200),
        ("/ready", 503),
        ("/status", 200),
        ("/metrics?x=1", 200),
        ("/status/", 200),
        ("/", 200),
        ("/pool", 200),
        ("/pool/", 200),
        ("/cache/", 200),
    ] {
        let reply = management.ask("GET", path).await;
        assert_eq!(reply.status, status, "{path}");
        assert!(reply.head.contains("cache-control: no-store"), "{path}");
        let head = management.ask("HEAD", path).await;
        assert_eq!((head.status, &*head.body), (status, ""), "{path}");
    }
    let status = management.ask("GET", "/status").await.json();
    assert_eq!(status["queue"]["waiting"], 0);
    assert_eq!(status["ready"], false);
    let metrics = management.ask("GET", "/metrics").await;
    assert!(metrics.head.contains("text/plain; version=0.0.4"));
    assert!(metrics.body.contains("\nqgisserver_ready 0\n"));
}

#[tokio::test]
async fn anything_else_is_a_problem() {
    let management = Management::start(settings()).await.unwrap();
    for (method, path, status) in [
        ("GET", "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=x", 404),
        ("GET", "/status//", 404),
        ("GET", "/cache/content/city", 404),
        ("GET", "/pool/restart", 405),
        ("POST", "/status", 405),
        ("DELETE", "/metrics", 405),
    ] {
        let reply = management.ask(method, path).await;
        assert_eq!(reply.status, status, "{method} {path}");
        assert!(reply.head.contains("application/problem+json"));
        assert_eq!(reply.json()["status"], status);
        let allowed = match (status, path) {
            (405, RESTART) => Some("\r\nallow: post\r\n"),
            (405, _) => Some("\r\nallow: get, head\r\n"),
            _ => None,
        };
        assert_eq!(reply.head.contains("\r\nallow:"), allowed.is_some());
        assert!(allowed.is_none_or(|it| reply.head.contains(it)));
    }
}

#[tokio::test]
async fn a_restart_is_told_once_and_not_by_the_page_of_another_site() {
    let management = Management::start(settings()).await.unwrap();
    let restart = &management.listening.server.restart;
    let is_told = || async { timeout(Duration::ZERO, restart.notified()).await.is_ok() };
    let mut tcp = management.connect().await;
    let head = format!("POST {RESTART} HTTP/1.1\r\nHost: a\r\nOrigin: http://b\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(Answered::read(&mut tcp).await.status, 403);
    assert!(!is_told().await);
    for _ in 0..2 {
        let reply = management.ask("POST", RESTART).await;
        assert_eq!(
            (reply.status, reply.json()["status"].as_str()),
            (200, Some("ok"))
        );
    }
    assert!(is_told().await);
    assert!(!is_told().await, "both are one");
    let links = management.ask("GET", "/").await.json();
    assert_eq!(links["links"][3]["href"], "http://a/pool");
}

/// The places are taken by connections that say nothing, and then they are not.
#[tokio::test]
async fn silent_connections_lose_their_places_in_time() {
    let config = config::Management {
        connections_max: 1,
        timeout: Duration::from_secs(1),
        ..settings()
    };
    let management = Management::start(config).await.unwrap();
    let mut silent = [management.connect().await, management.connect().await];
    // It waits behind them in the backlog, and is served.
    assert_eq!(management.ask("GET", "/ping").await.status, 200);
    for tcp in &mut silent {
        assert_eq!(Answered::read(tcp).await.status, 0);
    }
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused() {
    let management = Management::start(settings()).await.unwrap();
    let path = format!("/ping?{}", "x".repeat(2 * HEAD_MAX));
    let mut tcp = management.connect().await;
    let head = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    // It may hang up before it has read everything.
    let _ = tcp.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let read = timeout(BOUND, tcp.read_to_end(&mut answer)).await;
    let is_refused = read.expect("in time").is_err() || !answer.starts_with(b"HTTP/1.1 200");
    assert!(is_refused, "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn when_it_is_dropped_nobody_listens() {
    let management = Management::start(settings()).await.unwrap();
    let address = management.address;
    drop(management.listening);
    let gone = async { while TcpStream::connect(address).await.is_ok() {} };
    timeout(BOUND, gone).await.expect("the port is free");
}

#[tokio::test]
async fn a_certificate_makes_it_https_and_a_wrong_one_names_its_setting() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let tls = |cert: &str| config::Management {
        tls: Some(Tls {
            cert: path(cert),
            key: path("key"),
        }),
        ..settings()
    };
    let error = load(&tls("none")).err().expect("no file");
    assert!(
        error.to_string().starts_with("management.ssl_cert: "),
        "{error}"
    );
    std::fs::write(path("cert"), made.cert.pem()).unwrap();
    std::fs::write(path("key"), made.signing_key.serialize_pem()).unwrap();
    let management = Management::start(tls("cert")).await.unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let tcp = management.connect().await;
    let mut io = connector.connect(name, tcp).await.unwrap();
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    io.write_all(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(Answered::read(&mut io).await.status, 200);
}

#[tokio::test]
async fn one_connection_at_a_time_is_enough_for_two_listeners() {
    let config = config::Management {
        connections_max: 1,
        ..settings()
    };
    let management = Management::start(config).await.unwrap();
    let (one, other) = (management.address, management.other);
    for address in [one, other, other, one, other] {
        let answered = timeout(BOUND, Management::ask_at(address, "GET", "/ping")).await;
        assert_eq!(answered.expect("nobody is deaf").status, 200);
    }
}
