//! What the server answers by itself: who it is, whether it lives, how it fares.

use std::collections::BTreeMap;

use hyper::header::{CACHE_CONTROL, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Map, Value, json};

use super::body::Content;
use super::reply::text_response;
use crate::broker::{Lane, Open, Quarantined, Status, Worker};

const JSON: &str = "application/json;charset=utf-8";

/// `/`: a description in the form of an OpenAPI document.
pub fn root<C>(
    base: &str,
    metadata: &BTreeMap<String, String>,
    status: &Status,
) -> Response<Content<C>> {
    let qgis = status
        .workers
        .first()
        .map(|worker| worker.ready.versions.qgis.as_str());
    let of = |key: &str| {
        metadata
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    };
    let object = |pairs: &[(&str, Option<&str>)]| {
        let present = pairs
            .iter()
            .filter_map(|(key, value)| value.map(|value| (key.to_string(), json!(value))));
        Value::Object(present.collect::<Map<_, _>>())
    };
    let mut info = object(&[
        (
            "title",
            of("title").or(Some("QGIS projects as OGC services")),
        ),
        ("description", of("description")),
        ("termsOfService", of("terms_of_service")),
        ("version", Some(env!("CARGO_PKG_VERSION"))),
        ("x-qgis-version", qgis),
    ]);
    info["contact"] = object(&[
        ("name", of("contact_name")),
        ("email", of("contact_email")),
        ("url", of("contact_url")),
        ("x-address", of("contact_address")),
    ]);
    info["license"] = object(&[("name", of("licence_name")), ("url", of("licence_url"))]);
    let docs = object(&[
        ("description", of("external_doc_description")),
        ("url", of("external_doc_url")),
    ]);
    let page = json!({
        "openapi": "3.0.3",
        "info": info,
        "externalDocs": docs,
        "servers": [{ "url": base }],
        "paths": {},
    });
    text_response(StatusCode::OK, JSON, page.to_string())
}

/// `/ping`: this process answers.
pub fn ping<C>() -> Response<Content<C>> {
    let mut response = fresh(StatusCode::OK, r#"{"status": "ok"}"#.into());
    response
        .headers_mut()
        .insert("x-server-status", HeaderValue::from_static("ok"));
    response
}

/// `/ready`: a request would find a worker that stays alive.
pub fn ready<C>(is_ready: bool) -> Response<Content<C>> {
    match is_ready {
        true => fresh(StatusCode::OK, r#"{"status": "ready"}"#.into()),
        false => fresh(
            StatusCode::SERVICE_UNAVAILABLE,
            r#"{"status": "no worker is ready, or none stays alive"}"#.into(),
        ),
    }
}

/// `/status`: workers and queue. Nothing of the environment, no settings, and
/// nothing of other clients' requests: that is for the management listener.
pub fn status<C>(status: &Status) -> Response<Content<C>> {
    let page = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "waiting": status.n_waiting,
        "running": status.n_running,
        "retried": status.n_retried,
        "long": { "running": status.n_long, "max": status.long_max },
        "lanes": status.lanes.iter().map(lane).collect::<Map<_, _>>(),
        "projects": status.top_projects.iter().map(|(name, n)| json!({ "name": &**name, "requests": n })).collect::<Vec<_>>(),
        "requests_of_largest_clients": status.top_clients.iter().map(|(_, n)| n).collect::<Vec<_>>(),
        "workers": status.workers.iter().map(worker).collect::<Vec<_>>(),
        "departures": status.departures.iter().collect::<BTreeMap<_, _>>(),
        "storm": status.storm,
        "quarantined": status.quarantined.iter().map(quarantined).collect::<Vec<_>>(),
        "stalled": status.stalled.iter().map(|it| &**it).collect::<Vec<_>>(),
        "breakers": status.breakers.iter().map(breaker).collect::<Vec<_>>(),
    });
    fresh(StatusCode::OK, page.to_string())
}

pub fn lane(lane: &Lane) -> (String, Value) {
    let n = json!({ "waiting": lane.n_waiting, "running": lane.n_running });
    (lane.name.to_owned(), n)
}

/// What everybody may know of a worker.
pub fn worker(worker: &Worker) -> Value {
    let ready = &worker.ready;
    json!({
        "pool": ready.pool,
        "number": ready.number,
        "host": ready.host,
        "pid": ready.pid,
        "versions": ready.versions,
        "plugins": ready.plugins,
        "plugins_failed": ready.plugins_failed,
        "serving": worker.request.as_ref().map(|request| &request.operation),
        "served": worker.n_served,
        "connected_seconds": worker.connected_for.as_secs(),
        "memory_kb": worker.memory_kb,
    })
}

pub fn quarantined(it: &Quarantined) -> Value {
    json!({
        "fingerprint": it.fingerprint,
        "operation": it.operation,
        "project": it.project,
        "since_seconds": it.since.as_secs(),
        "left_seconds": it.left.as_secs(),
        "refused": it.n_refused,
    })
}

pub fn breaker(it: &Open) -> Value {
    json!({
        "project": it.project,
        "probing": it.is_probing,
        "since_seconds": it.since.as_secs(),
        "left_seconds": it.left.as_secs(),
        "refused": it.n_refused,
    })
}

/// JSON that no cache keeps.
pub fn fresh<C>(status: StatusCode, text: String) -> Response<Content<C>> {
    let mut response = text_response(status, JSON, text);
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_shows_the_operators_metadata_and_nothing_empty() {
        let metadata = [
            ("title", "Maps"),
            ("contact_email", "a@b"),
            ("contact_url", ""),
        ];
        let metadata = metadata
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let response: Response<Content<()>> = root("http://h/", &metadata, &Status::default());
        let Content::Here(chunks) = response.into_body() else {
            panic!("a page is a text")
        };
        let page: Value = serde_json::from_slice(&chunks[0]).expect("JSON");
        assert_eq!(page["info"]["title"], "Maps");
        assert_eq!(page["info"]["contact"], json!({ "email": "a@b" }));
        assert_eq!(page["servers"][0]["url"], "http://h/");
        assert_eq!(page["paths"], json!({}));
    }
}
