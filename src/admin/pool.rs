//! The pages by which scripts written for py-qgis-server look after workers: `/`, `/pool`
//! and `/cache`. What the server does not know of a worker's projects is not there.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::broker::{Status, Worker};

/// Where the pages are, for whoever found the listener at `base`.
pub fn links(base: &str) -> String {
    let link = |(path, title): (&str, &str)| json!({ "href": format!("{base}{path}"), "title": title, "type": "application/json" });
    let pages = [
        ("/status", "Server status"),
        ("/plugins", "Plugins"),
        ("/cache", "Projects that workers have open"),
        ("/pool", "Workers"),
    ];
    json!({ "links": pages.map(link) }).to_string()
}

/// The workers of all pools, with the projects that they have open.
pub fn report(broker: &Status) -> String {
    let workers = broker.workers.iter().map(worker);
    let workers: Vec<_> = workers.collect();
    json!({ "num_workers": workers.len(), "workers": workers }).to_string()
}

fn worker(worker: &Worker) -> Value {
    let ready = &worker.ready;
    let cache = worker.projects.iter().map(|it| json!({ "key": &**it }));
    json!({
        "pid": ready.pid,
        "host": ready.host,
        "pool": ready.pool,
        "mem_usage": worker.memory_kb << 10,
        "cache": cache.collect::<Vec<_>>(),
    })
}

/// The projects that are open, and in how many workers.
pub fn cached(broker: &Status) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for name in broker.workers.iter().flat_map(|it| &it.projects) {
        *counts.entry(name).or_default() += 1;
    }
    let cached = counts.iter();
    let cached = cached.map(|(name, n)| json!({ "name": name, "workers": n }));
    json!({ "cached": cached.collect::<Vec<_>>() }).to_string()
}
