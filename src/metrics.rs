//! What is counted; `admin/metrics.rs` shows it.
//!
//! Broker and front count as things happen, and counting is a few atomic
//! additions. The values of every label stand in a table here, so whatever
//! clients write, the number of series has a bound.

use std::sync::OnceLock;
use std::time::Duration;

use prometheus::core::{Atomic, GenericCounter, GenericCounterVec, GenericGauge};
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
};

use crate::broker::Line;
use crate::protocol::Because;

/// Upper bounds of the buckets, in seconds: from a tile to a print.
const BUCKETS: [f64; 15] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0,
];

/// What the answers have been; anything else is `other`.
const STATUSES: [u16; 30] = [
    200, 201, 202, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 406, 408, 409,
    413, 414, 415, 422, 429, 431, 499, 500, 502, 503, 504,
];

const OTHER: &str = "other";

/// Services and operations that have series of their own; of a service, the last
/// one stands for all others.
const KINDS: [(&str, &str); 38] = [
    ("server", "page"),
    ("WMS", "GetMap"),
    ("WMS", "GetFeatureInfo"),
    ("WMS", "GetLegendGraphic"),
    ("WMS", "GetCapabilities"),
    ("WMS", "GetProjectSettings"),
    ("WMS", "GetPrint"),
    ("WMS", "GetPrintAtlas"),
    ("WMS", "GetContext"),
    ("WMS", "GetDxf"),
    ("WMS", "GetStyles"),
    ("WMS", "DescribeLayer"),
    ("WMS", "GetSchemaExtension"),
    ("WMS", OTHER),
    ("WFS", "GetFeature"),
    ("WFS", "Transaction"),
    ("WFS", "DescribeFeatureType"),
    ("WFS", "GetCapabilities"),
    ("WFS", "GetPropertyValue"),
    ("WFS", "ListStoredQueries"),
    ("WFS", "DescribeStoredQueries"),
    ("WFS", OTHER),
    ("WCS", "GetCoverage"),
    ("WCS", "DescribeCoverage"),
    ("WCS", "GetCapabilities"),
    ("WCS", OTHER),
    ("WMTS", "GetTile"),
    ("WMTS", "GetFeatureInfo"),
    ("WMTS", "GetCapabilities"),
    ("WMTS", OTHER),
    ("API", "wfs3"),
    ("API", "ogcapi"),
    ("API", "static"),
    ("API", OTHER),
    ("LIZMAP", OTHER),
    ("EXPRESSION", OTHER),
    ("CADASTRE", OTHER),
    (OTHER, OTHER),
];

/// Service and operation of a request, as far as they are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(usize);

impl Kind {
    /// What the server answers by itself, refusals before anything is understood included.
    pub const PAGE: Self = Self(0);

    /// A request for a web service.
    pub fn ows(service: Option<&str>, operation: &str) -> Self {
        let is_same = |one: &str, other: &str| one.eq_ignore_ascii_case(other);
        let service = service.unwrap_or_default();
        let of_service = |at: &usize| is_same(KINDS[*at].0, service);
        let mut candidates = (0..KINDS.len()).filter(of_service);
        let exact = candidates.find(|at| is_same(KINDS[*at].1, operation));
        Self(exact.unwrap_or_else(|| {
            let last = (0..KINDS.len()).rfind(of_service);
            last.filter(|at| KINDS[*at].1 == OTHER)
                .unwrap_or(KINDS.len() - 1)
        }))
    }

    /// A request for an API: its root counts, since the rest is the client's.
    pub fn api(path: &str) -> Self {
        let root = path.trim_start_matches('/').split(['/', '.']).next();
        Self::ows(Some("API"), root.unwrap_or_default())
    }

    pub fn service(self) -> &'static str {
        KINDS[self.0].0
    }

    pub fn operation(self) -> &'static str {
        KINDS[self.0].1
    }
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    replies: Vec<Lazy<IntCounter>>,
    reply_family: IntCounterVec,
    requests: Durations,
    loads: Durations,
    renders: Durations,
    waits: [Histogram; Line::ALL.len()],
    failures: IntCounterVec,
    restarts: IntCounterVec,
    pub retries: IntCounter,
    /// Left the queue with their clients.
    pub cancelled_waiting: IntCounter,
    /// A worker was asked to stop.
    pub cancelled_running: IntCounter,
    pub projects_cached: IntCounter,
    pub projects_loaded: IntCounter,
    pub projects_reloaded: IntCounter,
    received: IntCounter,
    sent: IntCounter,
    connections: IntGauge,
    connections_total: IntCounter,
    /// Their addresses had as many as they may.
    pub connections_refused: IntCounter,
}

/// A series that is made when it is first needed.
type Lazy<T> = OnceLock<T>;

/// Times by service and operation.
#[derive(Debug)]
struct Durations {
    family: HistogramVec,
    by_kind: Vec<Lazy<Histogram>>,
}

impl Durations {
    fn new(registry: &Registry, name: &str, help: &str) -> Self {
        let options = HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
        let family = HistogramVec::new(options, &["service", "operation"]).expect(PLAIN);
        registry.register(Box::new(family.clone())).expect(ONCE);
        let by_kind = KINDS.map(|_| Lazy::new()).into();
        Self { family, by_kind }
    }

    fn observe(&self, kind: Kind, duration: Duration) {
        let made = self.by_kind[kind.0].get_or_init(|| {
            self.family
                .with_label_values(&[kind.service(), kind.operation()])
        });
        made.observe(duration.as_secs_f64());
    }
}

/// Counts a connection as long as it lives.
#[derive(Debug)]
pub struct Connected(IntGauge);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What is known of a request when its reply is over.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    pub kind: Kind,
    pub status: u16,
    pub taken: Duration,
    pub load: Option<Duration>,
    pub render: Option<Duration>,
    pub received: u64,
    pub sent: u64,
}

impl Metrics {
    /// The reply to a request is over, one way or the other.
    pub fn replied(&self, request: &Request) {
        let services = KINDS.len();
        let status = STATUSES.iter().position(|known| *known == request.status);
        let at = status.unwrap_or(STATUSES.len()) * services + self.first_of(request.kind);
        let label = || status.map_or(OTHER.to_owned(), |at| STATUSES[at].to_string());
        let made = self.replies[at].get_or_init(|| {
            self.reply_family
                .with_label_values(&[request.kind.service(), &label()])
        });
        made.inc();
        self.requests.observe(request.kind, request.taken);
        if let Some(load) = request.load {
            self.loads.observe(request.kind, load);
        }
        if let Some(render) = request.render {
            self.renders.observe(request.kind, render);
        }
        self.received.inc_by(request.received);
        self.sent.inc_by(request.sent);
    }

    /// All kinds of one service share a series.
    fn first_of(&self, kind: Kind) -> usize {
        let first = KINDS
            .iter()
            .position(|(service, _)| *service == kind.service());
        first.unwrap_or_default()
    }

    /// A request waited in `line` for a worker, and got one.
    pub fn waited(&self, line: Line, duration: Duration) {
        self.waits[line as usize].observe(duration.as_secs_f64());
    }

    /// A request ended without a reply from QGIS. `reason` is one of a few.
    pub fn failed(&self, reason: &'static str) {
        self.failures.with_label_values(&[reason]).inc();
    }

    /// A worker serves in a place of which it said `because`. One that was known before
    /// and one whose place is new restart nothing.
    pub fn took_place(&self, because: Because) {
        if because.is_restart() {
            self.restarts.with_label_values(&[because.name()]).inc();
        }
    }

    /// Why workers were replaced, and how many; reasons that never came about included.
    pub fn restarts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        restarts().map(|why| (why, self.restarts.with_label_values(&[why]).get()))
    }

    pub fn connected(&self) -> Connected {
        self.connections_total.inc();
        self.connections.inc();
        Connected(self.connections.clone())
    }

    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }
}

fn restarts() -> impl Iterator<Item = &'static str> {
    let reasons = Because::ALL.iter().filter(|it| it.is_restart());
    reasons.map(|it| it.name())
}

/// Names and labels below are constants that a test registers.
const PLAIN: &str = "a plain name and plain labels";
const ONCE: &str = "each name is registered once";

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> IntCounter { counter(&registry, name, help) };
        let family =
            |name: &str, help: &str, labels: &[&str]| family(&registry, name, help, labels);
        let cancelled = family(
            "qgisserver_cancellations_total",
            "Requests that were withdrawn from the queue or stopped in a worker",
            &["stage"],
        );
        let projects = family(
            "qgisserver_projects_total",
            "Projects that requests found open in their worker, had to load, or to load again",
            &["found"],
        );
        let restarted = family(
            "qgisserver_worker_restarts_total",
            "Workers that took the place of one that is gone, by what became of that one",
            &["because"],
        );
        // A series that begins at one is no increase.
        restarts().for_each(|why| restarted.with_label_values(&[why]).reset());
        let options = HistogramOpts::new(
            "qgisserver_queue_seconds",
            "Time that requests waited for a worker",
        );
        let waits = HistogramVec::new(options.buckets(BUCKETS.to_vec()), &["lane"]).expect(PLAIN);
        registry.register(Box::new(waits.clone())).expect(ONCE);
        let connections = gauge(
            &registry,
            "qgisserver_connections",
            "Open client connections",
        );
        Self {
            replies: (0..KINDS.len() * (STATUSES.len() + 1))
                .map(|_| Lazy::new())
                .collect(),
            reply_family: family(
                "qgisserver_replies_total",
                "Replies to clients; 499 is a client that left before",
                &["service", "status"],
            ),
            requests: Durations::new(
                &registry,
                "qgisserver_request_seconds",
                "Time from the head of a request to the end of its reply",
            ),
            loads: Durations::new(
                &registry,
                "qgisserver_load_seconds",
                "Time that workers took to find the project, or to load it",
            ),
            renders: Durations::new(
                &registry,
                "qgisserver_render_seconds",
                "Time that QGIS took",
            ),
            waits: Line::ALL.map(|line| waits.with_label_values(&[line.name()])),
            failures: family(
                "qgisserver_failures_total",
                "Requests that ended without a reply from QGIS, by reason",
                &["reason"],
            ),
            restarts: restarted,
            retries: counter(
                "qgisserver_retries_total",
                "Requests that were sent to a second worker because the first was lost",
            ),
            cancelled_waiting: cancelled.with_label_values(&["waiting"]),
            cancelled_running: cancelled.with_label_values(&["running"]),
            projects_cached: projects.with_label_values(&["cached"]),
            projects_loaded: projects.with_label_values(&["loaded"]),
            projects_reloaded: projects.with_label_values(&["reloaded"]),
            received: counter("qgisserver_received_bytes_total", "Bytes of request bodies"),
            sent: counter("qgisserver_sent_bytes_total", "Bytes of reply bodies"),
            connections,
            connections_total: counter(
                "qgisserver_connections_total",
                "Client connections since the start",
            ),
            connections_refused: counter(
                "qgisserver_connections_refused_total",
                "Connections that were closed because their address had as many as it may",
            ),
            registry,
        }
    }
}

fn counter<P: Atomic + 'static>(registry: &Registry, name: &str, help: &str) -> GenericCounter<P> {
    let counter = GenericCounter::with_opts(Opts::new(name, help)).expect(PLAIN);
    registry.register(Box::new(counter.clone())).expect(ONCE);
    counter
}

fn family<P: Atomic + 'static>(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> GenericCounterVec<P> {
    let family = GenericCounterVec::new(Opts::new(name, help), labels).expect(PLAIN);
    registry.register(Box::new(family.clone())).expect(ONCE);
    family
}

fn gauge<P: Atomic + 'static>(registry: &Registry, name: &str, help: &str) -> GenericGauge<P> {
    let gauge = GenericGauge::with_opts(Opts::new(name, help)).expect(PLAIN);
    registry.register(Box::new(gauge.clone())).expect(ONCE);
    gauge
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n_series(metrics: &Metrics) -> usize {
        let families = metrics.gather();
        families.iter().map(|it| it.get_metric().len()).sum()
    }

    #[test]
    fn operations_are_told_apart_whatever_their_case() {
        let kind = |service, operation| {
            let kind = Kind::ows(service, operation);
            (kind.service(), kind.operation())
        };
        assert_eq!(kind(Some("wms"), "GETMAP"), ("WMS", "GetMap"));
        assert_eq!(kind(Some("WFS"), "GetMap"), ("WFS", OTHER));
        assert_eq!(kind(Some("WMTS"), "GetTile"), ("WMTS", "GetTile"));
        assert_eq!(kind(Some("a plugin's"), "GetMap"), (OTHER, OTHER));
        assert_eq!(kind(Some("server"), "x"), (OTHER, OTHER));
        assert_eq!(kind(None, "GetMap"), (OTHER, OTHER));
        assert_eq!(Kind::api("/wfs3.json").operation(), "wfs3");
        assert_eq!(Kind::api("/wfs3/collections/x").operation(), "wfs3");
        assert_eq!(Kind::api("/catalog"), Kind::ows(Some("API"), "x"));
    }

    #[test]
    fn clients_cannot_make_series_without_end() {
        let metrics = Metrics::default();
        for n in 0..5000u16 {
            let word = format!("W{n}");
            for service in ["WMS", "WFS", word.as_str()] {
                metrics.replied(&Request {
                    kind: Kind::ows(Some(service), &word),
                    status: n,
                    taken: Duration::ZERO,
                    load: Some(Duration::ZERO),
                    render: Some(Duration::ZERO),
                    received: 1,
                    sent: 1,
                });
            }
            metrics.waited(Line::ALL[usize::from(n) % Line::ALL.len()], Duration::ZERO);
        }
        let replies = 3 * (STATUSES.len() + 1);
        let n = n_series(&metrics);
        assert!(n > replies && n < replies + 50, "{n}");
    }

    #[test]
    fn a_series_of_replies_is_a_service_and_a_status() {
        let metrics = Metrics::default();
        let request = |operation, status| Request {
            kind: Kind::ows(Some("WMS"), operation),
            status,
            taken: Duration::ZERO,
            load: None,
            render: None,
            received: 0,
            sent: 0,
        };
        metrics.replied(&request("GetMap", 200));
        metrics.replied(&request("GetPrint", 200));
        metrics.replied(&request("GetMap", 502));
        let count = |status: &str| metrics.reply_family.with_label_values(&["WMS", status]);
        assert_eq!((count("200").get(), count("502").get()), (2, 1));
    }

    #[test]
    fn a_connection_counts_as_long_as_it_lives() {
        let metrics = Metrics::default();
        let (one, other) = (metrics.connected(), metrics.connected());
        assert_eq!(metrics.connections.get(), 2);
        drop((one, other));
        assert_eq!(metrics.connections.get(), 0);
        assert_eq!(metrics.connections_total.get(), 2);
    }
}
