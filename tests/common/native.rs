//! QGIS's own server, whose answers ours should be.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{Reply, Server, free_address, http, poll};

/// It needs its time to start.
const START: Duration = Duration::from_secs(60);

/// `qgis_mapserver`, which does what QGIS's FastCGI program does.
pub struct Native {
    child: Child,
    base: String,
    _home: tempfile::TempDir,
}

impl Native {
    /// With these variables in its environment.
    pub fn start(variables: &[(&str, &Path)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let address = free_address();
        let child = Command::new("qgis_mapserver")
            .arg(address.to_string())
            .envs(variables.iter().copied())
            .env("QT_QPA_PLATFORM", "offscreen")
            .env("QT_HASH_SEED", "0")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("HOME", home.path())
            .env("TMPDIR", home.path())
            .env("LANG", "C.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let connect = || std::net::TcpStream::connect(address).ok();
        let native = Self {
            child,
            base: format!("http://{address}"),
            _home: home,
        };
        assert!(
            poll(START, connect).is_some(),
            "qgis_mapserver does not listen"
        );
        native
    }

    pub fn get(&self, path: &str) -> Reply {
        http::ask("GET", &format!("{}{path}", self.base), &[], b"").unwrap()
    }

    /// Asserts that `server` answers as it does, but for address and time; and tells what.
    pub fn agrees(&self, server: &Server, path: &str) -> Reply {
        let (ours, theirs) = (server.get(path), self.get(path));
        let own = server.url("");
        let shown = |reply: &Reply, base: &str| {
            let kind = reply.header("content-type").map(str::to_owned);
            let body = match std::str::from_utf8(&reply.body) {
                Ok(text) => without_time(&text.replace(base, "")).into_bytes(),
                Err(_) => reply.body.clone(),
            };
            (reply.status, kind, body)
        };
        let (our, their) = (shown(&ours, &own), shown(&theirs, &self.base));
        assert!(our == their, "{path}: {ours:?}\n{theirs:?}");
        ours
    }
}

/// Without the time at which it was made.
fn without_time(text: &str) -> String {
    let (before, after) = text.split_once("\"timeStamp\":\"").unwrap_or((text, ""));
    format!("{before}{}", after.split_once('"').unwrap_or_default().1)
}

impl Drop for Native {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
