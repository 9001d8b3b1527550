//! What the workers say of their plugins, as JSON: `/plugins` and `/plugins/<name>`.
//!
//! Workers of one pool load the same, but not at the same moment, and pools may differ:
//! a plugin is as well as the worst of its reports. What it raised in requests is told
//! beside that: it is loaded, after all.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::broker::{Exceptions, Status, Worker};
use crate::protocol::{Plugin, PluginStatus};

/// A plugin and the workers that told of it.
type Told<'a> = Vec<(&'a Worker, &'a Plugin)>;

/// All plugins.
pub fn list(broker: &Status) -> String {
    let plugins: Vec<Value> = told(&broker.workers)
        .iter()
        .map(|(name, told)| line(name, told, exceptions(broker, name)))
        .collect();
    json!({ "plugins": plugins }).to_string()
}

/// One of them, by its folder or by the name in its metadata; None if nobody knows it.
pub fn one(broker: &Status, name: &str) -> Option<String> {
    let all = told(&broker.workers);
    let titled = |told: &Told| {
        told.iter()
            .any(|(_, plugin)| plugin.metadata.get("name").is_some_and(|it| it == name))
    };
    let (folder, told) = match all.get_key_value(name) {
        Some(found) => found,
        None => all.iter().find(|(_, told)| titled(told))?,
    };
    let exceptions = exceptions(broker, folder);
    let mut page = line(folder, told, exceptions);
    let (_, worst) = worst(told);
    page["path"] = json!(worst.path);
    page["metadata"] = json!(worst.metadata);
    page["error_log"] = json!(worst.error);
    page["last_exception"] = json!(exceptions.map(last_exception));
    page["workers"] = told
        .iter()
        .map(|(worker, plugin)| of_worker(worker, plugin))
        .collect();
    Some(page.to_string())
}

/// By folder. Of two folders with one name in different places, both are there.
fn told(workers: &[Worker]) -> BTreeMap<&str, Told<'_>> {
    let mut all = BTreeMap::<&str, Told>::new();
    for worker in workers {
        for plugin in &worker.ready.plugin_reports {
            all.entry(&plugin.name).or_default().push((worker, plugin));
        }
    }
    all
}

fn exceptions<'a>(broker: &'a Status, name: &str) -> Option<&'a Exceptions> {
    broker.exceptions.iter().find(|it| it.plugin == name)
}

fn last_exception(it: &Exceptions) -> Value {
    json!({ "seconds_ago": it.ago.as_secs(), "traceback": it.last })
}

/// None of the lists is empty.
fn worst<'a>(told: &Told<'a>) -> (&'a Worker, &'a Plugin) {
    let rank = |plugin: &Plugin| match plugin.status {
        PluginStatus::Failed => 3,
        PluginStatus::Loaded => 2,
        PluginStatus::Conflict | PluginStatus::Unknown => 1,
    };
    let worst = told.iter().max_by_key(|(_, plugin)| rank(plugin));
    *worst.expect("a plugin that somebody told of")
}

fn line(name: &str, told: &Told, exceptions: Option<&Exceptions>) -> Value {
    let (_, worst) = worst(told);
    let conflicts = told
        .iter()
        .filter(|(_, plugin)| plugin.status == PluginStatus::Conflict);
    let mut paths: Vec<&str> = conflicts.map(|(_, plugin)| plugin.path.as_str()).collect();
    paths.sort_unstable();
    paths.dedup();
    json!({
        "name": name,
        "title": worst.metadata.get("name"),
        "version": worst.metadata.get("version"),
        "status": worst.status,
        "raised_in_requests": exceptions.map_or(0, |it| it.n_requests),
        "left_out": paths,
        "link": format!("/plugins/{}", percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC)),
    })
}

fn of_worker(worker: &Worker, plugin: &Plugin) -> Value {
    let ready = &worker.ready;
    json!({
        "pool": ready.pool,
        "host": ready.host,
        "pid": ready.pid,
        "path": plugin.path,
        "status": plugin.status,
        "version": plugin.metadata.get("version"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Ready;
    use std::time::Duration;

    fn plugin(name: &str, path: &str, status: PluginStatus) -> Plugin {
        Plugin {
            name: name.into(),
            path: path.into(),
            status,
            metadata: [("name".to_owned(), format!("The {name}"))].into(),
            error: (status == PluginStatus::Failed).then(|| "Traceback".into()),
        }
    }

    fn worker(pid: u32, plugin_reports: Vec<Plugin>) -> Worker {
        Worker {
            ready: Ready {
                pid,
                plugin_reports,
                ..Ready::default()
            },
            n_served: 0,
            connected_for: Duration::ZERO,
            memory_kb: 0,
            projects: Vec::new(),
            request: None,
        }
    }

    #[test]
    fn a_plugin_is_as_well_as_the_worst_of_its_reports() {
        use PluginStatus::{Conflict, Failed, Loaded};
        let workers = vec![
            worker(
                1,
                vec![
                    plugin("a b", "/1/a b", Loaded),
                    plugin("c", "/1/c", Loaded),
                    plugin("c", "/2/c", Conflict),
                ],
            ),
            worker(
                2,
                vec![
                    plugin("a b", "/1/a b", Failed),
                    plugin("c", "/1/c", Loaded),
                    plugin("c", "/2/c", Conflict),
                ],
            ),
        ];
        let raised = Exceptions {
            plugin: "c".into(),
            last: "what it raised".into(),
            n_requests: 3,
            ago: Duration::from_secs(4),
        };
        let broker = Status {
            workers,
            exceptions: vec![raised],
            ..Status::default()
        };
        let page: Value = serde_json::from_str(&list(&broker)).expect("JSON");
        let plugins = page["plugins"].as_array().expect("plugins");
        assert_eq!(plugins.len(), 2);
        assert_eq!(plugins[0]["status"], "failed");
        assert_eq!(plugins[0]["link"], "/plugins/a%20b");
        assert_eq!(plugins[1]["status"], "loaded");
        assert_eq!(plugins[1]["left_out"], json!(["/2/c"]));
        assert_eq!(plugins[0]["raised_in_requests"], 0);
        assert_eq!(plugins[1]["raised_in_requests"], 3);
        for name in ["a b", "The a b"] {
            let page = one(&broker, name).expect("it is known");
            let page: Value = serde_json::from_str(&page).expect("JSON");
            assert_eq!(page["error_log"], "Traceback", "{name}");
            assert_eq!(page["workers"].as_array().expect("workers").len(), 2);
        }
        let page = one(&broker, "c").expect("it is known");
        let page: Value = serde_json::from_str(&page).expect("JSON");
        let last = json!({ "seconds_ago": 4, "traceback": "what it raised" });
        assert_eq!(page["last_exception"], last);
        assert_eq!(one(&broker, "x"), None);
        assert_eq!(list(&Status::default()), r#"{"plugins":[]}"#);
    }
}
