//! Log lines of both programs, on stderr.
//!
//! Text is `time level [pid] name=value … message`, JSON one object a line.
//! Whatever a client sends stays within its line and its value: control
//! characters are escaped, and text with blanks or quotes is quoted.

mod stderr;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::{self, Debug, Display, Write};
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit, display};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Registry, reload};

use crate::config::Log;
pub use stderr::Aside;
use stderr::{Outlet, Pen};

/// For the last lines before the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

/// What can change while we log.
#[derive(Clone)]
struct Switches {
    json: Arc<AtomicBool>,
    filter: reload::Handle<Targets, Registry>,
}

static SWITCHES: OnceLock<Switches> = OnceLock::new();

static STDERR: LazyLock<Arc<Outlet>> = LazyLock::new(|| Arc::new(Outlet::stderr(lost)));

/// Begins to log, for the rest of the process; children of a fork go on with
/// their own pid. Starts no thread. A second call only does what [`change`] does.
pub fn init(settings: &Log) {
    let colours = io::stderr().is_terminal();
    let (subscriber, switches) = subscriber(settings, colours, || Pen(STDERR.clone()));
    match tracing::subscriber::set_global_default(subscriber) {
        Ok(()) => {
            // Before anybody becomes a user who may not open it.
            LazyLock::force(&STDERR);
            drop(SWITCHES.set(switches));
        }
        Err(_) => change(settings),
    }
}

/// Gives lines to a thread, so that nobody waits for who reads them. Not for a process
/// that forks.
pub fn aside() -> io::Result<Aside> {
    STDERR.aside()
}

/// For those who end the process themselves: waits, not for long, until what was said is out.
pub fn flush() {
    STDERR.flush(LAST_LINES);
}

/// For a child that was forked: what its parent could not say is not its own to confess.
pub fn forked() {
    STDERR.forked();
}

/// For a panic hook: what happened, and where if that is known. It is out, or nobody
/// takes it, before the process ends of it.
pub fn panicked(panic: &PanicHookInfo<'_>, what: &str) {
    tell_of_panic(panic, &Backtrace::capture(), what);
    flush();
}

fn tell_of_panic(panic: &dyn Display, backtrace: &Backtrace, what: &str) {
    let is_known = backtrace.status() == BacktraceStatus::Captured;
    let backtrace = is_known.then(|| display(backtrace));
    tracing::error!(%panic, backtrace, "{what}");
}

/// Lines that nobody took.
pub(crate) fn n_lost() -> u64 {
    STDERR.n_lost()
}

/// Logs with these settings from now on.
pub fn change(settings: &Log) {
    if let Some(switches) = SWITCHES.get() {
        switches.turn(settings);
    }
}

impl Switches {
    fn turn(&self, settings: &Log) {
        self.json.store(settings.json, Ordering::Relaxed);
        // An error means that nobody logs any more.
        let _ = self.filter.reload(filter(settings.level));
    }
}

fn subscriber<W>(
    settings: &Log,
    colours: bool,
    writer: W,
) -> (impl Subscriber + Send + Sync + use<W>, Switches)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let json = Arc::new(AtomicBool::new(settings.json));
    let (filter, handle) = reload::Layer::new(filter(settings.level));
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(colours)
        .with_writer(writer)
        // Complaining on stderr about stderr would panic.
        .log_internal_errors(false)
        .fmt_fields(Fields { json: json.clone() })
        .event_format(Lines { json: json.clone() });
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    let switches = Switches {
        json,
        filter: handle,
    };
    (subscriber, switches)
}

/// The details of the libraries below us help nobody who debugs a request.
fn filter(level: Level) -> Targets {
    let others = level.min(Level::INFO);
    Targets::new()
        .with_default(others)
        .with_target("qgisserver", LevelFilter::from_level(level))
}

/// One event, one line.
struct Lines {
    json: Arc<AtomicBool>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut spans = String::new();
        for span in context
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                spans += &fields.fields;
            }
        }
        match self.json.load(Ordering::Relaxed) {
            true => json_line(out, &spans, event),
            false => text_line(out, &spans, event),
        }
    }
}

fn text_line(mut out: Writer<'_>, spans: &str, event: &Event<'_>) -> fmt::Result {
    let mut text = Text::default();
    event.record(&mut text);
    let (level, pid) = (event.metadata().level(), std::process::id());
    let (colour, plain) = if out.has_ansi_escapes() {
        (colour(level), "\x1b[0m")
    } else {
        ("", "")
    };
    write!(
        out,
        "{} {colour}{level:>5}{plain} [{pid}]{spans}{}",
        now()?,
        text.fields
    )?;
    match text.message.is_empty() {
        true => writeln!(out),
        false => writeln!(out, " {}", text.message),
    }
}

fn json_line(mut out: Writer<'_>, spans: &str, event: &Event<'_>) -> fmt::Result {
    let mut members = Members::default();
    event.record(&mut members);
    let own = [
        ("time".to_owned(), now()?.into()),
        ("level".to_owned(), event.metadata().level().as_str().into()),
        ("pid".to_owned(), std::process::id().into()),
        ("target".to_owned(), event.metadata().target().into()),
    ];
    let spans = format!("{{{}}}", spans.trim_start_matches(','));
    let mut object: Map<String, Value> = serde_json::from_str(&spans).unwrap_or_default();
    object.extend(members.0);
    // Ours come last: no field of an event can pose as one of them.
    object.extend(own);
    writeln!(out, "{}", Value::Object(object))
}

/// A line that tells of those before. It is no event, because it is written while another
/// is.
fn lost(n: u64) -> String {
    let is_json = |it: &Switches| it.json.load(Ordering::Relaxed);
    let (time, pid) = (now().unwrap_or_default(), std::process::id());
    let message = "log lines were lost: nobody read standard error";
    match SWITCHES.get().is_some_and(is_json) {
        true => {
            let object = serde_json::json!({
                "time": time, "level": "WARN", "pid": pid, "target": "qgisserver::log",
                "n": n, "message": message,
            });
            format!("{object}\n")
        }
        false => format!("{time}  WARN [{pid}] n={n} {message}\n"),
    }
}

fn now() -> Result<String, fmt::Error> {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    Ok(time)
}

fn colour(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[2m",
    }
}

/// The fields of a span, kept as text: ` name=value` or `,"name":value` for each.
///
/// A span that was begun before the format changed keeps its own.
struct Fields {
    json: Arc<AtomicBool>,
}

impl<'a> FormatFields<'a> for Fields {
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'a>, fields: R) -> fmt::Result {
        if self.json.load(Ordering::Relaxed) {
            let mut members = Members::default();
            fields.record(&mut members);
            let mut members = members.0.into_iter();
            return members
                .try_for_each(|(name, value)| write!(out, ",{}:{value}", Value::from(name)));
        }
        let mut text = Text::default();
        fields.record(&mut text);
        out.write_str(&text.fields)
    }

    fn add_fields(
        &self,
        current: &'a mut FormattedFields<Self>,
        fields: &tracing::span::Record<'_>,
    ) -> fmt::Result {
        self.format_fields(current.as_writer(), fields)
    }
}

/// Fields as ` name=value`, and the message. Written in place: busy servers log every
/// request.
#[derive(Default)]
struct Text {
    fields: String,
    message: String,
}

impl Text {
    /// Where the value of `field` goes.
    fn place(&mut self, field: &Field) -> &mut String {
        match field.name() {
            "message" => &mut self.message,
            name => {
                self.fields.extend([" ", name, "="]);
                &mut self.fields
            }
        }
    }

    /// What needs no escaping, as numbers do not.
    fn plain(&mut self, field: &Field, value: impl Debug) {
        write!(self.place(field), "{value:?}").expect("a String takes everything");
    }
}

impl Visit for Text {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.plain(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" || is_plain(value) {
            let place = self.place(field);
            let start = place.len();
            place.push_str(value);
            escape(place, start);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_error(&mut self, field: &Field, error: &(dyn std::error::Error + 'static)) {
        self.record_str(field, &error.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let place = self.place(field);
        let start = place.len();
        write!(place, "{value:?}").expect("a String takes everything");
        escape(place, start);
    }
}

/// Fields as members of an object.
#[derive(Default)]
struct Members(Map<String, Value>);

impl Members {
    fn push(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Members {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.push(field, format!("{value:?}"));
    }
}

/// It cannot be mistaken for anything else without quotes.
fn is_plain(text: &str) -> bool {
    let is_plain = |c: char| !c.is_whitespace() && !is_dangerous(c) && c != '"' && c != '\\';
    !text.is_empty() && text.chars().all(is_plain)
}

/// Escapes what is dangerous in `text` from `start` on; it rarely is.
fn escape(text: &mut String, start: usize) {
    let Some(at) = text[start..].find(is_dangerous) else {
        return;
    };
    for c in text.split_off(start + at).chars() {
        match is_dangerous(c) {
            true => text.extend(c.escape_default()),
            false => text.push(c),
        }
    }
}

/// Ends a line, moves the cursor or turns the direction of writing.
fn is_dangerous(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: Level, json: bool, act: impl FnOnce()) -> String {
        logged_with(level, json, |_| act())
    }

    fn logged_with(level: Level, json: bool, act: impl FnOnce(&Switches)) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let settings = Log {
            level,
            qgis_info: false,
            json,
        };
        let (subscriber, switches) = subscriber(&settings, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || act(&switches));
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    const FORGED: &str = "a\r\n2026-01-01T00:00:00Z  INFO [1] forged\x1b[2J\u{85}\u{2028}\u{202e}";

    #[test]
    fn a_line_is_time_level_pid_fields_and_message() {
        let text = logged(Level::INFO, false, || {
            tracing::info!(id = "x1", n = 3, "it {}", "works")
        });
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.ends_with('Z') && time.contains('T'), "{time}");
        assert_eq!(
            rest,
            format!(" INFO [{}] id=x1 n=3 it works\n", std::process::id())
        );
    }

    #[test]
    fn no_value_forges_a_line() {
        let text = logged(Level::INFO, false, || {
            let span = tracing::info_span!("request", map = FORGED, path = %FORGED);
            span.in_scope(
                || tracing::warn!(agent = FORGED, url = %FORGED, other = ?FORGED, "{FORGED}"),
            );
        });
        assert_eq!(
            text.chars()
                .filter(|c| is_dangerous(*c))
                .collect::<String>(),
            "\n"
        );
        assert_eq!(text.matches("[1] forged").count(), 6);
        let objects = logged(
            Level::INFO,
            true,
            || tracing::warn!(agent = FORGED, url = %FORGED, "{FORGED}"),
        );
        assert_eq!(objects.lines().count(), 1);
        assert_eq!(
            serde_json::from_str::<Value>(&objects).unwrap()["agent"],
            FORGED
        );
    }

    #[test]
    fn a_value_with_blanks_does_not_look_like_several_fields() {
        let text = logged(Level::INFO, false, || {
            tracing::info!(agent = "a id=2 \"b\"", "m")
        });
        assert!(text.ends_with("agent=\"a id=2 \\\"b\\\"\" m\n"), "{text}");
    }

    #[test]
    fn fields_of_spans_are_on_every_line_inside() {
        let act = || {
            let span = tracing::info_span!("request", id = "x1", status = tracing::field::Empty);
            span.record("status", 200);
            span.in_scope(|| tracing::info!("done"));
        };
        assert!(logged(Level::INFO, false, act).ends_with(" id=x1 status=200 done\n"));
        let object: Value = serde_json::from_str(&logged(Level::INFO, true, act)).unwrap();
        assert_eq!(
            (&object["id"], &object["status"]),
            (&"x1".into(), &200.into())
        );
    }

    #[test]
    fn json_has_the_same_and_cannot_be_overruled() {
        let text = logged(Level::INFO, true, || {
            tracing::error!(level = "fine", n = 3, ok = true, "no")
        });
        let object: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(object["level"], "ERROR");
        assert_eq!(object["pid"], std::process::id());
        assert_eq!(
            (&object["n"], &object["ok"], &object["message"]),
            (&3.into(), &true.into(), &"no".into())
        );
    }

    #[test]
    fn a_panic_has_a_backtrace_only_if_there_is_one() {
        let without = logged(Level::INFO, false, || {
            tell_of_panic(&"at x.rs:1", &Backtrace::disabled(), "a mistake")
        });
        assert!(
            without.ends_with("] panic=at x.rs:1 a mistake\n"),
            "{without}"
        );
        let with = logged(Level::INFO, false, || {
            tell_of_panic(&"at x.rs:1", &Backtrace::force_capture(), "a mistake")
        });
        assert!(with.contains(" backtrace="), "{with}");
    }

    #[test]
    fn the_level_is_ours_and_libraries_stay_quiet() {
        let act = || {
            tracing::debug!(target: "qgisserver_worker::link", "ours");
            tracing::debug!(target: "h2", "theirs");
            tracing::warn!(target: "h2", "serious");
        };
        let text = logged(Level::DEBUG, false, act);
        assert!(
            text.contains("ours") && text.contains("serious") && !text.contains("theirs"),
            "{text}"
        );
        assert_eq!(logged(Level::ERROR, false, act), "");
    }

    #[test]
    fn level_and_format_change_between_two_lines() {
        let text = logged_with(Level::INFO, false, |switches| {
            let say = |text: &str| tracing::debug!(target: "qgisserver::test", "{text}");
            let turn = |level, json| {
                switches.turn(&Log {
                    level,
                    qgis_info: false,
                    json,
                })
            };
            say("one");
            turn(Level::DEBUG, false);
            say("two");
            turn(Level::DEBUG, true);
            say("three");
            turn(Level::INFO, false);
            say("four");
        });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].ends_with(" two"));
        assert_eq!(
            serde_json::from_str::<Value>(lines[1]).unwrap()["message"],
            "three"
        );
    }
}
