//! Projects that are objects in S3: their state, and copies of them.
//!
//! Only GET and HEAD of one object, so that the operator's key needs no other permission.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use qgisserver::config;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use ureq::http::Response;
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::companions;
use crate::places::Stamp;
use crate::storages::{Fetched, Trouble};

/// For how long a signed address is good: clocks differ.
const SIGNED: Duration = Duration::from_secs(300);

/// Where Debian keeps whom to trust, unless `SSL_CERT_FILE` says otherwise.
const TRUSTED: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A copy may take so many times as long as an answer.
const BODY_TIMES: u32 = 6;

/// A project with its auxiliary data is far smaller, and the place for copies may be memory.
const COPY_MAX: u64 = 1 << 30;

/// Questions about one project at the same time: each connection serves again.
const ASKED_MAX: usize = 5;

/// The objects that one set of credentials opens.
pub struct Objects {
    s3: config::S3,
    timeout: Duration,
    copies: PathBuf,
    copy_max: u64,
    /// Made at the first use: most workers need none.
    agent: Option<Agent>,
}

impl Objects {
    pub fn new(s3: &config::S3, timeout: Duration, copies: PathBuf) -> Self {
        Self {
            s3: s3.clone(),
            timeout,
            copies,
            copy_max: COPY_MAX,
            agent: None,
        }
    }

    /// With what lies beside it: all are asked at the same time.
    pub fn look(&mut self, uri: &str) -> Result<Option<Stamp>, Trouble> {
        let (bucket, key) = self.object(uri)?;
        let (agent, credentials) = (self.agent(), self.credentials());
        let head = |key: &str| {
            let url = bucket.head_object(credentials.as_ref(), key).sign(SIGNED);
            let head = || {
                let request = agent.head(url.as_str()).config();
                request.timeout_global(Some(self.timeout)).build().call()
            };
            ask(head)
        };
        let names = beside(key);
        let (own, companions) = thread::scope(|scope| {
            let ahead = |key| {
                let thread = thread::Builder::new();
                thread.spawn_scoped(scope, move || head(key)).ok()
            };
            let others: Vec<_> = names.iter().map(|key| (key, ahead(key))).collect();
            let own = head(key)?;
            // What got no thread is asked now.
            let others = others.into_iter().map(|(key, thread)| {
                let answer = thread.and_then(|thread| thread.join().ok());
                answer.unwrap_or_else(|| head(key))
            });
            Ok((own, others.collect::<Result<Vec<_>, _>>()?))
        })?;
        let companions: Vec<_> = companions.into_iter().map(Answer::companion).collect();
        Ok(own.project().map(|own| stamp(&own, &companions)))
    }

    /// The copy has the name of the object, and what lies beside it lies beside the copy.
    pub fn fetch(&mut self, uri: &str) -> Result<Fetched, Trouble> {
        let (bucket, key) = self.object(uri)?;
        let (agent, credentials) = (self.agent(), self.credentials());
        let timeout = self.timeout;
        let get = |key: &str| {
            let url = bucket.get_object(credentials.as_ref(), key).sign(SIGNED);
            let get = || {
                let request = agent.get(url.as_str()).config();
                let request = request
                    .timeout_connect(Some(timeout))
                    .timeout_recv_response(Some(timeout))
                    .timeout_recv_body(Some(timeout * BODY_TIMES));
                request.build().call()
            };
            ask(get)
        };
        let own = get(key)?.project().ok_or(Trouble::Gone)?;
        let copy = Fetched(self.folder(uri).join(file_name(key)));
        let mut n_free = self.keep(&copy.0, own, self.copy_max)?;
        for key in beside(key) {
            if let Some(companion) = get(&key)?.companion() {
                let path = copy.0.with_file_name(file_name(&key));
                n_free = self.keep(&path, companion, n_free)?;
            }
        }
        Ok(copy)
    }

    /// One of its own, so that nothing else lies beside the copy.
    fn folder(&self, uri: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        uri.hash(&mut hasher);
        self.copies.join(format!("{:x}", hasher.finish()))
    }

    /// How many of `n_free` bytes are left for other files.
    fn keep(&self, path: &Path, answer: Response<Body>, n_free: u64) -> Result<u64, Trouble> {
        let too_big = Trouble::TooBig {
            limit: self.copy_max,
        };
        if answer.body().content_length().is_some_and(|n| n > n_free) {
            return Err(too_big);
        }
        let body = answer.into_body().into_reader();
        let written = std::fs::create_dir_all(path.parent().unwrap_or(path))
            .and_then(|()| File::create(path))
            .and_then(|mut file| io::copy(&mut body.take(n_free + 1), &mut file));
        let written = written.map_err(|error| Trouble::Away(error.to_string()))?;
        n_free.checked_sub(written).ok_or(too_big)
    }

    fn object<'a>(&self, uri: &'a str) -> Result<(Bucket, &'a str), Trouble> {
        let rest = uri.strip_prefix("s3://").unwrap_or(uri);
        let (name, key) = rest.split_once('/').unwrap_or((rest, ""));
        let region = &self.s3.region;
        let endpoint = match &self.s3.endpoint {
            Some(url) => url.clone(),
            None => format!("https://s3.{region}.amazonaws.com"),
        };
        let style = match self.s3.path_style {
            true => UrlStyle::Path,
            false => UrlStyle::VirtualHost,
        };
        let url = endpoint
            .parse()
            .map_err(|_| Trouble::Away("projects.s3.endpoint is no URL".into()))?;
        let bucket = Bucket::new(url, style, name.to_owned(), region.clone());
        let bucket = bucket.map_err(|error| Trouble::Away(error.to_string()))?;
        Ok((bucket, key))
    }

    fn credentials(&self) -> Option<Credentials> {
        let secret = self.s3.secret_access_key.as_ref()?;
        Some(Credentials::new(
            self.s3.access_key_id.clone()?,
            secret.0.clone(),
        ))
    }

    fn agent(&mut self) -> Agent {
        let agent = self.agent.get_or_insert_with(|| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(0)
                .max_idle_connections_per_host(ASKED_MAX)
                .tls_config(TlsConfig::builder().root_certs(trusted()).build());
            config.build().new_agent()
        });
        agent.clone()
    }
}

/// What a server that is well says of an object.
enum Answer {
    There(Response<Body>),
    Absent,
    /// What a client makes up is refused, too, and must not look as if nobody answered.
    /// Without the permission to list, S3 says 403 of what is not there.
    Refused(u16),
}

impl Answer {
    fn of(answer: Response<Body>) -> Result<Self, Trouble> {
        match answer.status().as_u16() {
            200 => Ok(Self::There(answer)),
            404 => Ok(Self::Absent),
            status @ (300..=399 | 429 | 500..) => Err(Trouble::Away(format!("status {status}"))),
            status => Ok(Self::Refused(status)),
        }
    }

    fn project(self) -> Option<Response<Body>> {
        match self {
            Self::There(answer) => return Some(answer),
            Self::Absent => (),
            Self::Refused(403) => {
                tracing::warn!("S3 refuses: absent, or not for projects.s3.access_key_id");
            }
            Self::Refused(status) => {
                tracing::warn!(status, "S3 does not understand the name of a project");
            }
        }
        None
    }

    /// Most projects have none.
    fn companion(self) -> Option<Response<Body>> {
        match self {
            Self::There(answer) => Some(answer),
            Self::Absent | Self::Refused(_) => None,
        }
    }
}

/// Once more when a connection broke: it may have been a kept one, which the other
/// side closed at that moment.
fn ask(question: impl Fn() -> Result<Response<Body>, ureq::Error>) -> Result<Answer, Trouble> {
    let answer = match question() {
        Err(ureq::Error::Io(_)) => question(),
        answer => answer,
    };
    Answer::of(answer.map_err(away)?)
}

fn file_name(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// The keys of what QGIS looks for beside a project.
fn beside(key: &str) -> Vec<String> {
    let name = file_name(key);
    let folder = &key[..key.len() - name.len()];
    let names = companions::names(name).into_iter();
    names.map(|name| format!("{folder}{name}")).collect()
}

fn stamp(own: &Response<Body>, companions: &[Option<Response<Body>>]) -> Stamp {
    let (mut version, mut modified) = state(own);
    for companion in companions {
        let (its_version, its_modified) = companion.as_ref().map(state).unwrap_or_default();
        version = format!("{version}\n{its_version}");
        modified = modified.max(its_modified);
    }
    let is_alone = companions.iter().all(Option::is_none);
    Stamp::stored(&version, modified).with_companions(!is_alone)
}

/// What tells this state of an object from others, and when it began; in seconds since
/// 1970, or 0 if S3 does not say.
fn state(answer: &Response<Body>) -> (String, u64) {
    let header = |name| {
        let value = answer.headers().get(name);
        value.and_then(|value| value.to_str().ok()).unwrap_or("")
    };
    let date = header("last-modified");
    let modified = httpdate::parse_http_date(date).ok();
    let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let [etag, length] = ["etag", "content-length"].map(header);
    let version = format!("{etag} {length} {date}");
    (version, modified.map_or(0, |time| time.as_secs()))
}

/// The address in an error would be a signed one.
fn away(error: ureq::Error) -> Trouble {
    Trouble::Away(match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Timeout(what) => format!("no answer in time ({what})"),
        ureq::Error::HostNotFound => "its host is not found".into(),
        ureq::Error::ConnectionFailed => "no connection".into(),
        ureq::Error::Tls(what) => format!("TLS: {what}"),
        ureq::Error::Rustls(error) => format!("TLS: {error}"),
        _ => "it does not speak HTTP".into(),
    })
}

fn trusted() -> RootCerts {
    let path = std::env::var_os("SSL_CERT_FILE").unwrap_or(TRUSTED.into());
    let text = std::fs::read(&path).unwrap_or_default();
    let items = ureq::tls::parse_pem(&text);
    let certificates = items.filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    RootCerts::Specific(Arc::new(certificates.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    /// A server that gives each connection to `answer`.
    fn objects(answer: impl Fn(TcpStream) + Send + 'static) -> (tempfile::TempDir, Objects) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || listener.incoming().flatten().for_each(answer));
        let s3 = config::S3 {
            endpoint: Some(endpoint),
            region: "r".into(),
            access_key_id: Some("me".into()),
            secret_access_key: Some(config::Secret("hush".into())),
            path_style: true,
        };
        let folder = tempfile::tempdir().unwrap();
        let copies = folder.path().join("copies");
        let timeout = Duration::from_secs(2);
        (folder, Objects::new(&s3, timeout, copies))
    }

    /// Reads a request and answers with what `text` has for its path.
    fn say<'a>(mut stream: TcpStream, text: impl Fn(&str) -> &'a str) {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let path = head.split([' ', '?']).nth(1).unwrap_or_default();
        let _ = stream.write_all(text(path).as_bytes());
    }

    const KEY: &str = "s3://maps/a/city.qgs";

    const ABSENT: &str = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";

    const FOUND: &str = "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n<qgis/>";

    /// Beside no project there is anything.
    fn projects(answer: &'static str) -> (tempfile::TempDir, Objects) {
        let of = |path: &str| path.ends_with(".qgs");
        objects(move |stream| say(stream, |path| if of(path) { answer } else { ABSENT }))
    }

    fn look(answer: &'static str) -> Result<Option<Stamp>, Trouble> {
        let (_folder, mut objects) = projects(answer);
        objects.look(KEY)
    }

    fn answer(head: &str) -> &'static str {
        format!("HTTP/1.1 {head}\r\n\r\n").leak()
    }

    #[test]
    fn what_a_client_makes_up_is_absent_and_a_server_in_trouble_is_away() {
        for refused in ["404 Not Found", "403 Forbidden", "400 Bad Request"] {
            let answer = answer(&format!("{refused}\r\ncontent-length: 0"));
            assert!(matches!(look(answer), Ok(None)), "{refused}");
        }
        for trouble in ["500 Oops", "503 Slow Down", "301 Moved", "429 Too Many"] {
            let answer = answer(&format!("{trouble}\r\ncontent-length: 0"));
            assert!(matches!(look(answer), Err(Trouble::Away(_))), "{trouble}");
        }
        assert!(matches!(look("no HTTP at all"), Err(Trouble::Away(_))));
        assert!(matches!(look(""), Err(Trouble::Away(_))));
    }

    #[test]
    fn any_difference_is_another_state() {
        let state = |etag: &str, date: &str| {
            let head =
                format!("200 OK\r\ncontent-length: 9\r\netag: {etag}\r\nlast-modified: {date}");
            look(answer(&head)).unwrap().unwrap()
        };
        let first = state("\"a\"", "Thu, 01 Jan 1970 00:01:00 GMT");
        assert_eq!(first.modified(), Some(60));
        assert_eq!(first, state("\"a\"", "Thu, 01 Jan 1970 00:01:00 GMT"));
        assert_ne!(first, state("\"b\"", "Thu, 01 Jan 1970 00:01:00 GMT"));
        assert_ne!(first, state("\"a\"", "Thu, 01 Jan 1970 00:00:59 GMT"));
    }

    #[test]
    fn what_lies_beside_a_project_is_part_of_its_state_and_of_its_copy() {
        let zip = "/maps/a/city_attachments.zip";
        let dated = |second: u64| {
            let date = format!("Thu, 01 Jan 1970 00:00:{second} GMT");
            let head = format!("200 OK\r\ncontent-length: 2\r\nlast-modified: {date}");
            &*format!("{}PK", answer(&head)).leak()
        };
        let refused = answer("403 Forbidden\r\ncontent-length: 0");
        let looks = [ABSENT, dated(20), dated(40), refused].map(|companion| {
            let (_folder, mut objects) = objects(move |stream| {
                say(stream, |path| match path {
                    "/maps/a/city.qgs" => dated(30),
                    path if path == zip => companion,
                    _ => ABSENT,
                })
            });
            let copy = objects.fetch(KEY).unwrap();
            let beside = copy.0.with_file_name("city_attachments.zip");
            let is_there = ![ABSENT, refused].contains(&companion);
            assert_eq!(std::fs::read(beside).ok(), is_there.then(|| b"PK".into()));
            let folder = copy.0.parent().unwrap().to_owned();
            drop(copy);
            assert!(!folder.exists());
            objects.look(KEY).unwrap().unwrap()
        });
        let [without, old, new, refused] = looks;
        assert_eq!(without, refused);
        assert!(old != without && new != without && old != new);
        let facts = |stamp: Stamp| (stamp.modified(), stamp.has_companions());
        assert_eq!(facts(without), (Some(30), false));
        assert_eq!(facts(old), (Some(30), true));
        assert_eq!(facts(new), (Some(40), true));
    }

    #[test]
    fn without_an_answer_about_its_companions_nobody_knows_the_state_of_a_project() {
        let away = answer("503 Slow Down\r\ncontent-length: 0");
        let (_folder, mut objects) = objects(move |stream| {
            say(
                stream,
                |path| if path.ends_with(".qgd") { away } else { FOUND },
            );
        });
        assert!(matches!(objects.look(KEY), Err(Trouble::Away(_))));
        assert!(matches!(objects.fetch(KEY), Err(Trouble::Away(_))));
        let archive = objects.look("s3://maps/a/city.qgz").unwrap().unwrap();
        assert!(!archive.has_companions(), "they are inside");
    }

    #[test]
    fn a_project_and_what_lies_beside_it_have_one_limit() {
        let (_folder, mut objects) = objects(|stream| say(stream, |_| FOUND));
        for (limit, is_enough) in [(21, true), (20, false), (8, false)] {
            objects.copy_max = limit;
            assert_eq!(objects.fetch(KEY).is_ok(), is_enough, "{limit}");
        }
        assert_eq!(std::fs::read_dir(&objects.copies).unwrap().count(), 0);
    }

    #[test]
    fn a_silent_server_is_away_in_time_and_no_signature_is_told() {
        let (_folder, mut objects) = objects(std::mem::forget);
        let start = std::time::Instant::now();
        for trouble in [objects.look(KEY).map(drop), objects.fetch(KEY).map(drop)] {
            let Err(Trouble::Away(why)) = trouble else {
                panic!("{trouble:?}");
            };
            assert!(why.contains("in time") && !why.contains("X-Amz"), "{why}");
        }
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_copy_has_the_name_of_its_object_and_a_folder_of_its_own() {
        let (_folder, mut objects) = projects(FOUND);
        let one = objects.fetch(KEY).unwrap();
        let other = objects.fetch("s3://maps/b/city.qgs").unwrap();
        assert!(one.0.ends_with("city.qgs") && other.0.ends_with("city.qgs"));
        assert_ne!(one.0, other.0);
        assert_eq!(std::fs::read_to_string(&one.0).unwrap(), "<qgis/>");
        let path = one.0.clone();
        drop(one);
        assert_eq!(objects.fetch(KEY).unwrap().0, path);
    }

    #[test]
    fn no_copy_stays_when_it_was_read() {
        let (_folder, mut objects) = projects(FOUND);
        let copy = objects.fetch(KEY).unwrap();
        assert!(copy.0.exists());
        drop(copy);
        assert_eq!(std::fs::read_dir(&objects.copies).unwrap().count(), 0);
    }

    #[test]
    fn what_is_too_big_is_no_project_whether_its_length_is_told_or_not() {
        for head in ["content-length: 9\r\n", "connection: close\r\n"] {
            let answer = format!("HTTP/1.1 200 OK\r\n{head}\r\n<qgis />x").leak();
            let (_folder, mut objects) = projects(answer);
            objects.copy_max = 9;
            assert!(objects.fetch(KEY).is_ok(), "{head}");
            objects.copy_max = 8;
            let fetched = objects.fetch(KEY);
            assert!(
                matches!(fetched, Err(Trouble::TooBig { limit: 8 })),
                "{fetched:?}"
            );
            let left = std::fs::read_dir(&objects.copies).into_iter().flatten();
            assert_eq!(left.count(), 0, "{head}");
        }
    }

    #[test]
    fn what_went_since_it_was_looked_for_is_gone_and_nobody_is_away() {
        let (_folder, mut objects) = projects(ABSENT);
        assert!(matches!(objects.fetch(KEY), Err(Trouble::Gone)));
    }
}
