//! Projects that are objects in S3: their state, and copies of them.
//!
//! Only GET and HEAD of one object, so that the operator's key needs no other permission.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use qgisserver::config;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use ureq::http::Response;
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

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

    pub fn look(&mut self, uri: &str) -> Result<Option<Stamp>, Trouble> {
        let (bucket, key) = self.object(uri)?;
        let credentials = self.credentials();
        let url = bucket.head_object(credentials.as_ref(), key).sign(SIGNED);
        let timeout = Some(self.timeout);
        let head = |agent: &Agent| {
            let request = agent.head(url.as_str()).config();
            request.timeout_global(timeout).build().call()
        };
        let answer = self.ask(head)?;
        Ok(is_there(&answer)?.then(|| stamp(&answer)))
    }

    /// The copy has the name of the object, in a folder of its own.
    pub fn fetch(&mut self, uri: &str) -> Result<Fetched, Trouble> {
        let (bucket, key) = self.object(uri)?;
        let credentials = self.credentials();
        let url = bucket.get_object(credentials.as_ref(), key).sign(SIGNED);
        let timeout = self.timeout;
        let get = |agent: &Agent| {
            let request = agent.get(url.as_str()).config();
            let request = request
                .timeout_connect(Some(timeout))
                .timeout_recv_response(Some(timeout))
                .timeout_recv_body(Some(timeout * BODY_TIMES));
            request.build().call()
        };
        let answer = self.ask(get)?;
        if !is_there(&answer)? {
            return Err(Trouble::Gone);
        }
        let limit = self.copy_max;
        if answer.body().content_length().is_some_and(|n| n > limit) {
            return Err(Trouble::TooBig { limit });
        }
        let kept = self.keep(uri, key, &mut answer.into_body().into_reader());
        match kept {
            Ok(kept) => kept.ok_or(Trouble::TooBig { limit }),
            Err(error) => Err(Trouble::Away(error.to_string())),
        }
    }

    /// None if there is more than a copy may have.
    fn keep(&self, uri: &str, key: &str, body: &mut impl Read) -> io::Result<Option<Fetched>> {
        let mut hasher = DefaultHasher::new();
        uri.hash(&mut hasher);
        let folder = self.copies.join(format!("{:x}", hasher.finish()));
        std::fs::create_dir_all(&folder)?;
        let kept = Fetched(folder.join(key.rsplit('/').next().unwrap_or(key)));
        let mut file = tempfile::NamedTempFile::new_in(&folder)?;
        let mut body = body.take(self.copy_max + 1);
        if io::copy(&mut body, file.as_file_mut())? > self.copy_max {
            return Ok(None);
        }
        file.persist(&kept.0)?;
        Ok(Some(kept))
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

    /// Once more when a connection broke: it may have been a kept one, which the other
    /// side closed at that moment.
    fn ask(
        &mut self,
        question: impl Fn(&Agent) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, Trouble> {
        let agent = self.agent();
        let answer = match question(agent) {
            Err(ureq::Error::Io(_)) => question(agent),
            answer => answer,
        };
        answer.map_err(away)
    }

    fn agent(&mut self) -> &Agent {
        self.agent.get_or_insert_with(|| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(0)
                .tls_config(TlsConfig::builder().root_certs(trusted()).build());
            config.build().new_agent()
        })
    }
}

/// What a client makes up is refused, too, and must not look as if nobody answered.
/// Without the permission to list, S3 says 403 of what is not there.
fn is_there(answer: &Response<Body>) -> Result<bool, Trouble> {
    match answer.status().as_u16() {
        200 => Ok(true),
        404 => Ok(false),
        403 => {
            tracing::warn!("S3 refuses: absent, or not for projects.s3.access_key_id");
            Ok(false)
        }
        status @ (300..=399 | 429 | 500..) => Err(Trouble::Away(format!("status {status}"))),
        status => {
            tracing::warn!(status, "S3 does not understand the name of a project");
            Ok(false)
        }
    }
}

fn stamp(answer: &Response<Body>) -> Stamp {
    let header = |name| {
        answer
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let date = header("last-modified").unwrap_or_default();
    let modified = httpdate::parse_http_date(date).ok();
    let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let [etag, length] = ["etag", "content-length"].map(|name| header(name).unwrap_or_default());
    let version = format!("{etag} {length} {date}");
    Stamp::stored(&version, modified.map_or(0, |time| time.as_secs()))
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
        let timeout = Duration::from_millis(300);
        (folder, Objects::new(&s3, timeout, copies))
    }

    /// The head of a request, and then `text`.
    fn say(mut stream: TcpStream, text: &str) {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
            head.push(byte[0]);
        }
        let _ = stream.write_all(text.as_bytes());
    }

    const KEY: &str = "s3://maps/a/city.qgs";

    fn look(answer: &'static str) -> Result<Option<Stamp>, Trouble> {
        let (_folder, mut objects) = objects(move |stream| say(stream, answer));
        objects.look(KEY)
    }

    #[test]
    fn what_a_client_makes_up_is_absent_and_a_server_in_trouble_is_away() {
        for refused in ["404 Not Found", "403 Forbidden", "400 Bad Request"] {
            let answer = format!("HTTP/1.1 {refused}\r\ncontent-length: 0\r\n\r\n").leak();
            assert!(matches!(look(answer), Ok(None)), "{refused}");
        }
        for trouble in ["500 Oops", "503 Slow Down", "301 Moved", "429 Too Many"] {
            let answer = format!("HTTP/1.1 {trouble}\r\ncontent-length: 0\r\n\r\n").leak();
            assert!(matches!(look(answer), Err(Trouble::Away(_))), "{trouble}");
        }
        assert!(matches!(look("no HTTP at all"), Err(Trouble::Away(_))));
        assert!(matches!(look(""), Err(Trouble::Away(_))));
    }

    #[test]
    fn any_difference_is_another_state() {
        let state = |etag: &str, date: &str| {
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\netag: {etag}\r\nlast-modified: {date}\r\n\r\n"
            );
            look(head.leak()).unwrap().unwrap()
        };
        let first = state("\"a\"", "Thu, 01 Jan 1970 00:01:00 GMT");
        assert_eq!(first.modified(), Some(60));
        assert_eq!(first, state("\"a\"", "Thu, 01 Jan 1970 00:01:00 GMT"));
        assert_ne!(first, state("\"b\"", "Thu, 01 Jan 1970 00:01:00 GMT"));
        assert_ne!(first, state("\"a\"", "Thu, 01 Jan 1970 00:00:59 GMT"));
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
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_copy_has_the_name_of_its_object_and_a_folder_of_its_own() {
        let (_folder, mut objects) = objects(|stream| {
            say(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n<qgis/>",
            )
        });
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
        let (_folder, mut objects) = objects(|stream| {
            say(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n<qgis/>",
            )
        });
        let copy = objects.fetch(KEY).unwrap();
        assert!(copy.0.exists());
        drop(copy);
        assert_eq!(std::fs::read_dir(&objects.copies).unwrap().count(), 0);
    }

    #[test]
    fn what_is_too_big_is_no_project_whether_its_length_is_told_or_not() {
        for head in ["content-length: 9\r\n", "connection: close\r\n"] {
            let answer = format!("HTTP/1.1 200 OK\r\n{head}\r\n<qgis />x").leak();
            let (_folder, mut objects) = objects(move |stream| say(stream, answer));
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
        let answer = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
        let (_folder, mut objects) = objects(move |stream| say(stream, answer));
        assert!(matches!(objects.fetch(KEY), Err(Trouble::Gone)));
    }
}
