//! What server and worker say to each other.
//!
//! ZMTP multipart messages in the style of the Majordomo protocol; the server
//! holds the ROUTER, each worker a DEALER. Every message is
//!
//! | frame | content |
//! |---|---|
//! | 0 | `qgisserver/1`: the protocol and its version |
//! | 1 | the word, in ASCII |
//! | 2 | the head: JSON, one type per word; absent where the table says none |
//! | 3 | the body: raw bytes; only where the table says so |
//!
//! | word | from | head | body | meaning |
//! |---|---|---|---|---|
//! | `READY` | worker | [`Ready`] | | I am idle and this is who I am; first message of a connection |
//! | `REQUEST` | server | [`Request`] | request body | serve this |
//! | `PARTIAL` | worker | [`Partial`] | bytes | the reply goes on; costs one credit |
//! | `FINAL` | worker | [`Final`] | bytes | the reply ends; I am idle unless `leaving` |
//! | `CREDIT` | server | [`Credit`] | | the client took `n` chunks, send as many more |
//! | `CANCEL` | server | [`Cancel`] | | nobody waits for this request any more |
//! | `HEARTBEAT` | both | none | | I am alive |
//! | `DISCONNECT` | both | [`Disconnect`] | | see [`Reason`]; a worker's is answered with the same word, and the answer proves that everything before it arrived |
//!
//! A message of another version is [`Error::Version`]: it is refused with a log
//! line and never guessed at. Nothing here is executable: heads are data, bodies
//! are opaque.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Frame 0 of every message.
pub const VERSION: &str = "qgisserver/1";

/// Upper bound of a head, in bytes; a longer one is refused unread.
pub const HEAD_MAX: usize = 1 << 20;

/// Upper bound of the head of a READY, which the server keeps as long as the worker.
pub const READY_MAX: usize = 64 << 10;

/// Upper bound of the body of one PARTIAL or FINAL, in bytes; a longer reply is several.
pub const BODY_MAX: usize = 8 << 20;

/// A worker introduces itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Name of the pool, for logs: `--identity` or the host name.
    pub pool: String,
    /// Random, one per life of the pool's parent: workers with the same value share a parent.
    pub pool_instance: String,
    /// Random, one per worker process life.
    pub instance: String,
    /// Number of the worker in its pool, from 1.
    pub number: u32,
    pub host: String,
    pub pid: u32,
    pub versions: Versions,
    /// Names of the QGIS server plugins that loaded.
    #[serde(default)]
    pub plugins: Vec<String>,
    /// Names of the plugins that did not load.
    #[serde(default)]
    pub plugins_failed: Vec<String>,
    /// What there is to say about each of both.
    #[serde(default)]
    pub plugin_reports: Vec<Plugin>,
    /// Plugins may answer what is no whole request: one without a project or a service.
    #[serde(default)]
    pub plugins_answer: bool,
    /// No access control and no server filter is loaded, so answers depend on the request alone.
    #[serde(default)]
    pub may_cache: bool,
    /// Why this worker serves.
    #[serde(default)]
    pub born: Born,
    /// Projects that it opened already, the first of them if there are many.
    #[serde(default)]
    pub projects: Vec<ProjectRef>,
    /// Projects that it should have opened and did not, the first of them if there are many.
    #[serde(default)]
    pub not_opened: Vec<NotOpened>,
}

/// A project that was to be open before its first client came, and is not.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NotOpened {
    /// As settings name it.
    pub project: String,
    /// For the operator.
    pub why: String,
}

/// A QGIS server plugin that a worker found. Texts are cut so that READY stays small.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// Of its folder.
    pub name: String,
    pub path: String,
    pub status: PluginStatus,
    /// From its `metadata.txt`.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Why it did not load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What became of a plugin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PluginStatus {
    #[default]
    Loaded,
    /// Another plugin has its name, and came first.
    Conflict,
    Failed,
    /// Of a newer worker than this server knows.
    #[serde(other)]
    Unknown,
}

/// Where a worker comes from, so that a server can count restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Born {
    #[serde(default)]
    pub because: Because,
}

/// An enumeration, and the list of all that it has.
macro_rules! listed {
    ($(#[$about:meta])* pub enum $name:ident { $($(#[$of_one:meta])* $one:ident,)* }) => {
        $(#[$about])*
        pub enum $name {
            $($(#[$of_one])* $one,)*
        }

        impl $name {
            /// Each, in this order.
            pub const ALL: &[Self] = &[$(Self::$one,)*];
        }
    };
}

listed! {
    /// Why a worker took its place: the pool was started or renewed, or the worker that
    /// had the place is gone, and this is why.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Because {
        /// The place was new.
        #[default]
        Start,
        /// Not new at all: it was known before, and its connection broke.
        Reconnected,
        /// By a signal that was not ours.
        Killed,
        /// By itself, with an exit status.
        Exited,
        /// Its request was overdue or cancelled, and QGIS did not stop.
        Stuck,
        /// It gave no sign of life.
        Frozen,
        /// The kernel or the limit of its memory ended it.
        OutOfMemory,
        /// A C++ exception left QGIS in doubt.
        QgisFailed,
        /// A mistake of ours.
        Panicked,
        /// The pool was told to renew itself.
        Restart,
        RecycledRequests,
        RecycledAge,
        RecycledMemory,
        /// All workers together took too much memory, and this one the most.
        HighWaterMark,
        /// Of a newer worker than this server knows.
        #[serde(other)]
        Unknown,
    }
}

impl Because {
    /// As it is spelt in READY, for metrics and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Reconnected => "reconnected",
            Self::Killed => "killed",
            Self::Exited => "exited",
            Self::Stuck => "stuck",
            Self::Frozen => "frozen",
            Self::OutOfMemory => "out_of_memory",
            Self::QgisFailed => "qgis_failed",
            Self::Panicked => "panicked",
            Self::Restart => "restart",
            Self::RecycledRequests => "recycled_requests",
            Self::RecycledAge => "recycled_age",
            Self::RecycledMemory => "recycled_memory",
            Self::HighWaterMark => "high_water_mark",
            Self::Unknown => "unknown",
        }
    }

    /// Another worker had the place before.
    pub fn is_restart(self) -> bool {
        !matches!(self, Self::Start | Self::Reconnected)
    }
}

/// Versions of what answers; each as its own library reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    pub worker: String,
    pub qgis: String,
    pub python: String,
    pub gdal: String,
    pub proj: String,
    pub geos: String,
}

/// A project as the operator's configuration sees it: never a file name, URL or
/// connection that a client made up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProjectRef {
    /// The scheme alias, as [`alias`] spells it; `file` is the root directory.
    pub alias: String,
    /// `/`-separated, without `..`; the suffix may be missing. Unless the alias is `file`
    /// a query may follow, as a storage of projects wants it.
    pub path: String,
}

/// The alias of projects in files below the root, which may be left out.
pub const FILE: &str = "file";

/// The alias of projects in the catalogue of QGIS, which has an identifier for each. No client
/// can write it as a scheme.
pub const CATALOG: &str = "catalog/project";

/// The name of a project, which may be written with the suffix of its file or without.
pub fn without_suffix(name: &str) -> &str {
    let bare = name.strip_suffix(".qgs");
    bare.or_else(|| name.strip_suffix(".qgz")).unwrap_or(name)
}

/// One spelling of a scheme: dashes and case count for nothing, and PostgreSQL has one name.
pub fn alias(name: &str) -> String {
    match name.trim().to_ascii_lowercase().replace('-', "_") {
        name if name == "postgres" => "postgresql".into(),
        name => name,
    }
}

impl std::fmt::Display for ProjectRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.alias, self.path)
    }
}

/// One request for one worker. Its body is the message's body frame.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Unique per server life; replies name it.
    pub id: u64,
    /// `X-Request-Id`, the one in every log line.
    pub request_id: String,
    /// Time left until the first byte must be out, in milliseconds. More than the client
    /// waits, if the request may run on without it: then CANCEL is the deadline.
    pub first_byte_ms: u64,
    /// From then on the time between any two chunks, in milliseconds.
    pub chunk_ms: u64,
    /// How many PARTIALs may be unacknowledged.
    pub window: u32,
    pub method: String,
    /// Public URL with its query, as the client would write it.
    pub url: String,
    /// Names in Title-Case, as QGIS looks them up.
    pub headers: Vec<(String, String)>,
    /// None for requests that need no project (landing page).
    pub project: Option<ProjectRef>,
    /// For the log and the obituary: `GetMap`, `/wfs3/collections`.
    pub operation: String,
    /// The trace that the request is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
    /// What went out of the project before.
    #[serde(default)]
    pub seen: Seen,
    /// Nobody asks: load what the project is now, beside what answers until the server
    /// says otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prepare: bool,
    /// Only where access policies in Python are enabled, which then have to agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visitor: Option<Visitor>,
    /// The client may keep the answer, and may have kept one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<Document>,
}

/// What access policies want to know of a client, besides what QGIS gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visitor {
    pub address: String,
    /// Decoded and in one spelling: `/ows/`, `/ows/p/<profile>/`, `/wfs3/…`.
    pub path: String,
    /// Its profile is known, so that no policy needs to take it up.
    pub is_known: bool,
    /// All headers, by their lower-case names.
    pub headers: Vec<(String, String)>,
    /// Parameters that the body sets, as QGIS reads it.
    #[serde(default)]
    pub said: Vec<(String, String)>,
}

/// What clients have seen of a project, so that none of them is sent back in time by a
/// worker that has an older copy. The default knows nothing, and asks for the newest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// So long ago, in milliseconds, something new went out of it. Whoever looked whether
    /// the project changed before that looks again.
    pub since_ms: u64,
    /// What goes out of it; None if that is not certain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A copy of that version answers though the project changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
}

impl Seen {
    /// Whether a copy need not be compared with its project once more, when that was
    /// done so long `ago`. The time on the wire only makes the worker look once too often.
    pub fn trusts(&self, ago: Duration, check_interval: Duration) -> bool {
        ago < check_interval && ago < Duration::from_millis(self.since_ms)
    }

    /// Whether a copy of this version may still answer: nobody has seen a newer one.
    pub fn allows(&self, version: &str) -> bool {
        self.version.as_deref() == Some(version)
    }
}

/// A document that clients keep, and what this one has of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// It changes with its project, so its date is the project's.
    #[serde(default)]
    pub dated: bool,
    /// Nothing but its project and the software goes into it, data aside.
    #[serde(default)]
    pub fixed: bool,
    /// What it depends on that neither its URL nor its worker knows.
    #[serde(default)]
    pub basis: String,
    #[serde(default)]
    pub held: Held,
}

/// What a client has of a document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The tags of its copies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Some copy, and any will do.
    #[serde(default)]
    pub any: bool,
    /// A copy of then, in seconds since 1970.
    #[serde(default)]
    pub since: Option<u64>,
}

/// What tells one state of a document from another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validator {
    /// No two states have the same; without quotes.
    pub tag: String,
    /// Since when it is so, in seconds since 1970.
    #[serde(default)]
    pub modified: Option<u64>,
    /// Plugins had a hand in it: it is for this client and no other.
    #[serde(default)]
    pub private: bool,
}

/// Who asked, in the words of W3C Trace Context; checked by the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The value of `traceparent`.
    pub parent: String,
    /// The value of `tracestate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

impl Trace {
    /// What all spans of the trace share, for logs; empty if there is none.
    pub fn id(&self) -> &str {
        self.parent.split('-').nth(1).unwrap_or_default()
    }
}

/// Status line and headers of a reply.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    /// Bytes of the whole body; known unless QGIS still produces it.
    #[serde(default)]
    pub length: Option<u64>,
    /// Of a document, whole or, with status 304, as the client has it already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validator: Option<Validator>,
}

impl Head {
    /// The first header of that name, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let is_it = |(known, _): &&(String, String)| known.eq_ignore_ascii_case(name);
        let found = self.headers.iter().find(is_it);
        found.map(|(_, value)| value.as_str())
    }
}

/// Part of a reply; the first part carries the head.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    pub id: u64,
    pub head: Option<Head>,
    /// With the head: what FINAL will say of the project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edition: Option<Edition>,
    /// With the head: what FINAL will say in [`Timings`], since it may never come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_us: Option<u64>,
}

/// Of which state of which project an answer is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edition {
    /// One number per project, whatever the spelling of its name.
    pub place: u64,
    /// Changes whenever the project does.
    pub version: String,
    /// The project is not like this any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outdated: bool,
}

/// The end of a reply. `head` is present unless a PARTIAL carried it, or `failure` says why there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    pub id: u64,
    pub head: Option<Head>,
    pub failure: Option<Failure>,
    pub timings: Timings,
    /// Where the project was; None without one.
    #[serde(default)]
    pub found: Option<Found>,
    /// Resident memory of the worker, in kilobytes.
    pub memory_kb: u64,
    /// The worker takes no more requests.
    pub leaving: bool,
    /// Projects that the worker keeps open.
    #[serde(default)]
    pub n_projects: u32,
    /// None without a project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edition: Option<Edition>,
    /// Names of the project's invalid layers, the first of them if there are many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bad_layers: Vec<String>,
    /// The first plugin that raised in the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raised: Option<Raised>,
}

/// What a plugin raised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Raised {
    /// Its folder's name, as in READY.
    pub plugin: String,
    /// The end of the traceback.
    pub trace: String,
}

/// Where the time of a request went inside the worker, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    pub load_us: u64,
    pub render_us: u64,
}

impl Timings {
    pub fn load(self) -> Duration {
        Duration::from_micros(self.load_us)
    }

    pub fn render(self) -> Duration {
        Duration::from_micros(self.render_us)
    }
}

/// Whether a worker had the project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    Cached,
    Loaded,
    /// It had another state of the file.
    Reloaded,
}

/// Why a worker has no reply from QGIS. Facts only: the texts are the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// Absent, outside the allowed root, or not a project: the client cannot tell which.
    ProjectNotFound,
    /// Where the project is kept does not answer; the log says why. Nobody knows whether
    /// the project is there.
    StorageAway,
    /// The file is there and QGIS cannot read it.
    ProjectUnreadable,
    /// Strict mode, and some layers are invalid; the log names them.
    BadLayers,
    /// A Python exception while the request ran; the log has the traceback.
    PluginRaised,
    /// A C++ exception left QGIS in doubt; the worker leaves.
    QgisFailed,
    /// QGIS gave up without a word to the client; the log has its reason. It may go on.
    GaveUp,
    /// QGIS could not make an answer of that size, mostly for want of memory, and said so.
    TooLarge,
    /// The request was cancelled before it ended.
    Cancelled,
    /// A Python exception in an access policy; the log has the traceback.
    PolicyRaised,
}

impl Failure {
    /// The word for it in metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::ProjectNotFound => "project_not_found",
            Self::StorageAway => "storage_away",
            Self::ProjectUnreadable => "project_unreadable",
            Self::BadLayers => "bad_layers",
            Self::PluginRaised => "plugin_raised",
            Self::QgisFailed => "qgis_failed",
            Self::GaveUp => "gave_up",
            Self::TooLarge => "too_large",
            Self::Cancelled => "cancelled",
            Self::PolicyRaised => "policy_raised",
        }
    }
}

/// The client took `n` chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    pub id: u64,
    pub n: u32,
}

/// Nobody waits for request `id` any more. The worker asks QGIS to stop and,
/// when it has not within `grace_ms`, exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    pub id: u64,
    pub grace_ms: u64,
}

/// See [`Reason`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disconnect {
    pub reason: Reason,
}

/// Why one side says DISCONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// From a worker: I leave. From the server: I saw that you leave.
    Leaving,
    /// From the server: I go away; finish nothing for me, look for my successor.
    Stopping,
    /// From the server: renew your pool, one worker after the other. The connection stays.
    Restart,
    /// From the server: I do not know you (you were silent too long); connect anew.
    Unknown,
}

/// One message of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Ready(Ready),
    Request(Request, Bytes),
    Partial(Partial, Bytes),
    Final(Final, Bytes),
    Credit(Credit),
    Cancel(Cancel),
    Heartbeat,
    Disconnect(Disconnect),
}

/// Why a message was refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    Version {
        got: String,
    },
    Word {
        got: String,
    },
    Frames {
        word: &'static str,
        expected: usize,
        got: usize,
    },
    HeadTooLong {
        word: &'static str,
        bytes: usize,
    },
    Head {
        word: &'static str,
        why: String,
    },
    Empty,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version { got } => write!(f, "speaks {got:?}, not {VERSION:?}"),
            Self::Word { got } => write!(f, "unknown word {got:?}"),
            Self::Frames {
                word,
                expected,
                got,
            } => {
                write!(f, "{word} has {expected} frames, got {got}")
            }
            Self::HeadTooLong { word, bytes } => {
                write!(
                    f,
                    "the head of {word} has {bytes} bytes, more than {}",
                    head_max(word)
                )
            }
            Self::Head { word, why } => write!(f, "the head of {word} is malformed: {why}"),
            Self::Empty => write!(f, "a message without frames"),
        }
    }
}

impl std::error::Error for Error {}

impl Message {
    /// The word of frame 1.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Ready(_) => "READY",
            Self::Request(..) => "REQUEST",
            Self::Partial(..) => "PARTIAL",
            Self::Final(..) => "FINAL",
            Self::Credit(_) => "CREDIT",
            Self::Cancel(_) => "CANCEL",
            Self::Heartbeat => "HEARTBEAT",
            Self::Disconnect(_) => "DISCONNECT",
        }
    }

    /// The frames of this message, without any ZeroMQ identity. Bodies are not copied.
    pub fn encode(self) -> Vec<Bytes> {
        let word = Bytes::from_static(self.word().as_bytes());
        let mut frames = vec![Bytes::from_static(VERSION.as_bytes()), word];
        match self {
            Self::Heartbeat => {}
            Self::Ready(head) => frames.push(json(&head)),
            Self::Credit(head) => frames.push(json(&head)),
            Self::Cancel(head) => frames.push(json(&head)),
            Self::Disconnect(head) => frames.push(json(&head)),
            Self::Request(head, body) => frames.extend([json(&head), body]),
            Self::Partial(head, body) => frames.extend([json(&head), body]),
            Self::Final(head, body) => frames.extend([json(&head), body]),
        }
        frames
    }

    /// The message in `frames`, which have no ZeroMQ identity any more.
    pub fn decode(frames: &[Bytes]) -> Result<Self, Error> {
        let [version, rest @ ..] = frames else {
            return Err(Error::Empty);
        };
        if version != VERSION.as_bytes() {
            return Err(Error::Version {
                got: printable(version),
            });
        }
        let [word, rest @ ..] = rest else {
            return Err(Error::Word { got: String::new() });
        };
        Ok(match &word[..] {
            b"READY" => Self::Ready(head_only("READY", rest)?),
            b"CREDIT" => Self::Credit(head_only("CREDIT", rest)?),
            b"CANCEL" => Self::Cancel(head_only("CANCEL", rest)?),
            b"DISCONNECT" => Self::Disconnect(head_only("DISCONNECT", rest)?),
            b"HEARTBEAT" => {
                count("HEARTBEAT", rest, 0)?;
                Self::Heartbeat
            }
            b"REQUEST" => {
                let (head, body) = head_and_body("REQUEST", rest)?;
                Self::Request(head, body)
            }
            b"PARTIAL" => {
                let (head, body) = head_and_body("PARTIAL", rest)?;
                Self::Partial(head, body)
            }
            b"FINAL" => {
                let (head, body) = head_and_body("FINAL", rest)?;
                Self::Final(head, body)
            }
            other => {
                return Err(Error::Word {
                    got: printable(other),
                });
            }
        })
    }
}

fn json(head: &impl Serialize) -> Bytes {
    serde_json::to_vec(head)
        .expect("heads are plain structs with string keys")
        .into()
}

fn head_only<T: for<'a> Deserialize<'a>>(word: &'static str, rest: &[Bytes]) -> Result<T, Error> {
    count(word, rest, 1)?;
    head(word, &rest[0])
}

fn head_and_body<T: for<'a> Deserialize<'a>>(
    word: &'static str,
    rest: &[Bytes],
) -> Result<(T, Bytes), Error> {
    count(word, rest, 2)?;
    Ok((head(word, &rest[0])?, rest[1].clone()))
}

fn count(word: &'static str, rest: &[Bytes], expected: usize) -> Result<(), Error> {
    match rest.len() == expected {
        true => Ok(()),
        false => Err(Error::Frames {
            word,
            expected: expected + 2,
            got: rest.len() + 2,
        }),
    }
}

fn head<T: for<'a> Deserialize<'a>>(word: &'static str, frame: &[u8]) -> Result<T, Error> {
    if frame.len() > head_max(word) {
        return Err(Error::HeadTooLong {
            word,
            bytes: frame.len(),
        });
    }
    serde_json::from_slice(frame).map_err(|error| Error::Head {
        word,
        why: error.to_string(),
    })
}

fn head_max(word: &str) -> usize {
    match word {
        "READY" => READY_MAX,
        _ => HEAD_MAX,
    }
}

/// What a peer sent, short and fit for a log line.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let head = Head {
            status: 200,
            headers: vec![("Content-Type".into(), "image/png".into())],
            length: Some(2),
            validator: Some(Validator {
                tag: "1-2".into(),
                ..Validator::default()
            }),
        };
        vec![
            Message::Ready(Ready {
                pool: "p".into(),
                pid: 7,
                may_cache: true,
                ..Ready::default()
            }),
            Message::Request(
                Request {
                    id: u64::MAX,
                    project: Some(ProjectRef {
                        alias: "file".into(),
                        path: "a/b".into(),
                    }),
                    document: Some(Document {
                        dated: true,
                        ..Document::default()
                    }),
                    ..Request::default()
                },
                Bytes::from_static(b"<GetFeature/>"),
            ),
            Message::Partial(
                Partial {
                    id: 1,
                    head: Some(head),
                    edition: Some(Edition {
                        place: u64::MAX,
                        version: "v".into(),
                        outdated: true,
                    }),
                    load_us: Some(17),
                },
                Bytes::from_static(&[0, 255]),
            ),
            Message::Final(
                Final {
                    id: 1,
                    failure: Some(Failure::BadLayers),
                    raised: Some(Raised {
                        plugin: "guard".into(),
                        trace: "Traceback\n".into(),
                    }),
                    ..Final::default()
                },
                Bytes::new(),
            ),
            Message::Credit(Credit { id: 1, n: 3 }),
            Message::Cancel(Cancel {
                id: 1,
                grace_ms: 100,
            }),
            Message::Heartbeat,
            Message::Disconnect(Disconnect {
                reason: Reason::Restart,
            }),
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        for message in samples() {
            assert_eq!(Message::decode(&message.clone().encode()), Ok(message));
        }
    }

    #[test]
    fn why_a_worker_took_its_place_is_spelt_the_same_everywhere() {
        for because in Because::ALL {
            let written = serde_json::to_value(because).unwrap();
            assert_eq!(written, because.name());
        }
    }

    /// Servers and pools are not renewed at the same moment.
    #[test]
    fn a_worker_of_another_age_is_understood() {
        let mut head = serde_json::to_value(Ready::default()).unwrap();
        let understood = |head: &serde_json::Value| {
            let head = head.to_string();
            let frames = [VERSION.as_bytes(), b"READY", head.as_bytes()];
            match Message::decode(&frames.map(Bytes::copy_from_slice)) {
                Ok(Message::Ready(ready)) => ready.born.because,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(understood(&head), Because::Start);
        head["born"] = serde_json::json!({"because": "bored", "mood": 3});
        assert_eq!(understood(&head), Because::Unknown);
        head.as_object_mut().unwrap().remove("born");
        assert_eq!(understood(&head), Because::Start);
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let frames = [
            Bytes::from_static(b"qgisserver/2"),
            Bytes::from_static(b"HEARTBEAT"),
        ];
        let error = Message::decode(&frames).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"speaks "qgisserver/2", not "qgisserver/1""#
        );
    }

    #[test]
    fn missing_and_surplus_frames_are_refused() {
        for message in samples() {
            let word = message.word();
            let mut frames = message.encode();
            frames.push(Bytes::new());
            assert!(
                matches!(Message::decode(&frames), Err(Error::Frames { .. })),
                "{word}"
            );
            frames.truncate(1);
            assert!(
                matches!(Message::decode(&frames), Err(Error::Word { .. })),
                "{word}"
            );
        }
        assert_eq!(Message::decode(&[]), Err(Error::Empty));
    }

    #[test]
    fn a_head_that_is_too_long_is_refused_unread() {
        for (word, limit) in [("READY", READY_MAX), ("CREDIT", HEAD_MAX)] {
            let frames = ["qgisserver/1", word].map(|s| Bytes::from_static(s.as_bytes()));
            let decode = |n| {
                let spaces = Bytes::from(vec![b' '; n]);
                Message::decode(&[&frames[..], &[spaces]].concat()).unwrap_err()
            };
            let bytes = limit + 1;
            assert_eq!(decode(bytes), Error::HeadTooLong { word, bytes });
            assert!(matches!(decode(limit), Error::Head { .. }));
        }
    }

    proptest::proptest! {
        /// Whatever the frames say, decoding returns.
        #[test]
        fn no_frames_panic(frames: Vec<Vec<u8>>, word in 0usize..9) {
            let words: [&'static [u8]; 9] = [b"READY", b"REQUEST", b"PARTIAL", b"FINAL", b"CREDIT", b"CANCEL", b"HEARTBEAT", b"DISCONNECT", b"?"];
            let known = [VERSION.as_bytes(), words[word]].map(Bytes::from_static);
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            let _ = Message::decode(&frames);
            let _ = Message::decode(&[&known[..], &frames[..]].concat());
        }
    }
}
