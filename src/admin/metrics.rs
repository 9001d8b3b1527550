//! What was counted and what is now, in the text format of Prometheus.

use std::collections::BTreeMap;

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::broker::{Lane, Status};
use crate::log;
use crate::metrics::Metrics;

pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The page: the counters, and gauges that are made of `status` for this page alone.
pub fn page(counted: &Metrics, status: &Status, is_ready: bool) -> String {
    let now = Registry::new();
    gauges(&now, status, is_ready);
    lost_lines(&now);
    let mut families = counted.gather();
    families.extend(now.gather());
    let encoded = TextEncoder::new().encode_to_string(&families);
    encoded.expect("names and labels are plain")
}

fn gauges(now: &Registry, status: &Status, is_ready: bool) {
    let n_busy = status
        .workers
        .iter()
        .filter(|it| it.request.is_some())
        .count();
    let n_idle = status.workers.len() - n_busy;
    let memory_kb: u64 = status.workers.iter().map(|it| it.memory_kb).sum();
    let plain = |name, help, value| gauge(now, name, help, &[], &[(&[], value)]);
    plain(
        "qgisserver_ready",
        "1 if a request would find a worker",
        usize::from(is_ready),
    );
    plain(
        "qgisserver_running",
        "Requests that workers have",
        status.n_running,
    );
    plain(
        "qgisserver_workers_memory_bytes",
        "Resident memory of all workers, what they share counted for each",
        usize::try_from(memory_kb << 10).unwrap_or(usize::MAX),
    );
    let lanes = |n: fn(&Lane) -> usize| -> Vec<([&str; 1], usize)> {
        let lanes = status.lanes.iter();
        lanes.map(|lane| ([lane.name], n(lane))).collect()
    };
    by_label(
        now,
        "qgisserver_waiting",
        "Requests that wait for a worker",
        "lane",
        &lanes(|lane| lane.n_waiting),
    );
    by_label(
        now,
        "qgisserver_running_by_lane",
        "Requests that workers have, by lane",
        "lane",
        &lanes(|lane| lane.n_running),
    );
    gauge(
        now,
        "qgisserver_workers",
        "Workers that are connected",
        &["state"],
        &[(&["busy"], n_busy), (&["idle"], n_idle)],
    );
    gauge(
        now,
        "qgisserver_build_info",
        "1, with the version of the server",
        &["version"],
        &[(&[env!("CARGO_PKG_VERSION")], 1)],
    );
    departures(now, status);
    let mut by_qgis = BTreeMap::<&str, usize>::new();
    for worker in &status.workers {
        *by_qgis.entry(&worker.ready.versions.qgis).or_default() += 1;
    }
    let by_qgis: Vec<_> = by_qgis.into_iter().map(|(qgis, n)| ([qgis], n)).collect();
    by_label(
        now,
        "qgisserver_workers_by_version",
        "Workers that are connected, by version of QGIS",
        "qgis",
        &by_qgis,
    );
}

fn by_label(now: &Registry, name: &str, help: &str, label: &str, values: &[([&str; 1], usize)]) {
    let values: Vec<_> = values.iter().map(|(of, n)| (&of[..], *n)).collect();
    gauge(now, name, help, &[label], &values);
}

/// Of this process; a pool says its own in the log.
fn lost_lines(now: &Registry) {
    let lost = IntCounter::new(
        "qgisserver_log_lines_lost_total",
        "Log lines that nobody read in time",
    );
    let lost = lost.expect("a plain name");
    lost.inc_by(log::n_lost());
    let registered = now.register(Box::new(lost));
    registered.expect("each name is registered once");
}

/// The broker counts them, since its decisions depend on them.
fn departures(now: &Registry, status: &Status) {
    let options = Opts::new(
        "qgisserver_workers_gone_total",
        "Workers that are not there any more, by reason",
    );
    let family = IntCounterVec::new(options, &["reason"]).expect("a plain name");
    for (reason, n) in status.departures.iter() {
        family.with_label_values(&[reason]).inc_by(n);
    }
    let registered = now.register(Box::new(family));
    registered.expect("each name is registered once");
}

fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    values: &[(&[&str], usize)],
) {
    let family = IntGaugeVec::new(Opts::new(name, help), labels).expect("a plain name");
    for (labels, value) in values {
        let value = i64::try_from(*value).unwrap_or(i64::MAX);
        family.with_label_values(labels).set(value);
    }
    let registered = registry.register(Box::new(family));
    registered.expect("each name is registered once");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Worker;
    use crate::protocol::Ready;
    use std::time::Duration;

    #[test]
    fn the_page_has_what_was_counted_and_what_is() {
        let mut ready = Ready::default();
        ready.versions.qgis = "3.22.16 \"Białowieża\"".into();
        let worker = Worker {
            ready,
            n_served: 0,
            connected_for: Duration::ZERO,
            memory_kb: 3,
            projects: Vec::new(),
            request: None,
        };
        let status = Status {
            lanes: vec![Lane {
                name: "maps",
                n_waiting: 4,
                n_running: 0,
            }],
            workers: vec![worker],
            ..Status::default()
        };
        let counted = Metrics::default();
        counted.retries.inc();
        let page = page(&counted, &status, true);
        for line in [
            "qgisserver_retries_total 1",
            "qgisserver_waiting{lane=\"maps\"} 4",
            "qgisserver_workers{state=\"idle\"} 1",
            "qgisserver_workers{state=\"busy\"} 0",
            "qgisserver_workers_memory_bytes 3072",
            "qgisserver_workers_by_version{qgis=\"3.22.16 \\\"Białowieża\\\"\"} 1",
            "qgisserver_ready 1",
            "qgisserver_log_lines_lost_total 0",
        ] {
            assert!(page.lines().any(|it| it == line), "{line} in {page}");
        }
    }
}
