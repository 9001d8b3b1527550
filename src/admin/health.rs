//! How the server fares, as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::broker::{BadLayers, Name, Status, Worker};
use crate::http::pages;
use crate::metrics::Metrics;
use crate::protocol::NotOpened;

/// This process answers, and does what it is told.
pub fn ok() -> String {
    json!({ "status": "ok" }).to_string()
}

/// A request would find a worker.
pub fn ready() -> String {
    json!({ "status": "ready" }).to_string()
}

/// Everything at a glance. No setting and nothing of the environment; a part of the
/// broker that has more to say gets one more line here.
pub fn status(is_ready: bool, up: Duration, broker: &Status, counted: &Metrics) -> String {
    let gone: Map<String, Value> = broker
        .departures
        .iter()
        .map(|(reason, n)| (reason.to_owned(), n.into()))
        .collect();
    let restarts: Map<String, Value> = counted
        .restarts()
        .map(|(because, n)| (because.to_owned(), n.into()))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": is_ready,
        "up_seconds": up.as_secs(),
        "queue": {
            "waiting": broker.n_waiting,
            "running": broker.n_running,
            "lanes": broker.lanes.iter().map(pages::lane).collect::<Map<_, _>>(),
            "long": { "running": broker.n_long, "max": broker.long_max },
        },
        "top_clients": broker.top_clients.iter().map(named).collect::<Vec<_>>(),
        "top_projects": broker.top_projects.iter().map(named).collect::<Vec<_>>(),
        "retries": counted.retries.get(),
        "workers_gone": gone,
        "worker_restarts": restarts,
        "storm": broker.storm,
        "quarantined": broker.quarantined.iter().map(pages::quarantined).collect::<Vec<_>>(),
        "stalled": broker.stalled.iter().map(|it| &**it).collect::<Vec<_>>(),
        "breakers": broker.breakers.iter().map(pages::breaker).collect::<Vec<_>>(),
        "bad_layers": broker.bad_layers.iter().map(bad_layers).collect::<Vec<_>>(),
        "not_opened_ahead": not_opened_ahead(&broker.workers),
        "pools": pools(&broker.workers),
        "workers": broker.workers.iter().map(worker).collect::<Vec<_>>(),
    })
    .to_string()
}

fn named((name, n): &(Name, usize)) -> Value {
    json!({ "name": &**name, "requests": n })
}

fn bad_layers(it: &BadLayers) -> Value {
    json!({
        "project": it.project,
        "layers": it.layers,
        "refused": it.is_refused,
        "since_seconds": it.since.as_secs(),
    })
}

/// Each project and reason once, and how many workers said so when they started.
fn not_opened_ahead(workers: &[Worker]) -> Vec<Value> {
    let mut counts: BTreeMap<&NotOpened, usize> = BTreeMap::new();
    for it in workers.iter().flat_map(|worker| &worker.ready.not_opened) {
        *counts.entry(it).or_default() += 1;
    }
    let one = |(it, n): (&NotOpened, usize)| json!({ "project": it.project, "why": it.why, "workers": n });
    counts.into_iter().map(one).collect()
}

/// Pools by their parents: two may have the same name.
fn pools(workers: &[Worker]) -> Vec<Value> {
    let mut pools: BTreeMap<(&str, &str), Vec<&Worker>> = BTreeMap::new();
    for worker in workers {
        let ready = &worker.ready;
        let of = pools.entry((&ready.pool, &ready.pool_instance));
        of.or_default().push(worker);
    }
    let pool = |((name, _), workers): ((&str, &str), Vec<&Worker>)| {
        let n_busy = workers.iter().filter(|it| it.request.is_some()).count();
        json!({
            "pool": name,
            "host": workers[0].ready.host,
            "workers": workers.len(),
            "busy": n_busy,
            "served": workers.iter().map(|it| it.n_served).sum::<u64>(),
            "memory_kb": workers.iter().map(|it| it.memory_kb).sum::<u64>(),
        })
    };
    pools.into_iter().map(pool).collect()
}

/// What is public of a worker, and whom it serves.
fn worker(worker: &Worker) -> Value {
    let mut shown = pages::worker(worker);
    let projects = worker.projects.iter().map(|it| &**it);
    shown["projects"] = projects.collect::<Vec<_>>().into();
    shown["request"] = match &worker.request {
        None => Value::Null,
        Some(request) => json!({
            "request_id": request.request_id,
            "operation": request.operation,
            "project": request.project,
            "seconds": request.since.as_secs_f64(),
        }),
    };
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Running;
    use crate::protocol::Ready;

    fn of(pool: &str, instance: &str, request: Option<Running>) -> Worker {
        Worker {
            ready: Ready {
                pool: pool.into(),
                pool_instance: instance.into(),
                ..Ready::default()
            },
            n_served: 2,
            connected_for: Duration::ZERO,
            memory_kb: 10,
            projects: Vec::new(),
            request,
        }
    }

    #[test]
    fn workers_are_told_by_pool_and_with_what_they_serve() {
        let request = Running {
            request_id: "r-1".into(),
            operation: "GetMap".into(),
            project: "file:city".into(),
            since: Duration::from_millis(1500),
        };
        let broker = Status {
            workers: vec![
                of("a", "1", None),
                of("a", "1", Some(request)),
                of("a", "2", None),
            ],
            ..Status::default()
        };
        let text = status(true, Duration::from_secs(7), &broker, &Metrics::default());
        let page: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(page["pools"].as_array().expect("pools").len(), 2);
        assert_eq!(page["pools"][0]["busy"], 1);
        assert_eq!(page["pools"][0]["memory_kb"], 20);
        assert_eq!(page["workers"][0]["request"], Value::Null);
        assert_eq!(page["workers"][1]["request"]["request_id"], "r-1");
        assert_eq!(page["workers"][1]["request"]["seconds"], 1.5);
        assert_eq!(page["workers_gone"]["serving"], 0);
        assert_eq!(page["up_seconds"], 7);
    }
}
