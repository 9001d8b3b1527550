//! What the text of a setting may say, and what it then means.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tracing::Level;

/// No wait of ours may exceed a year: clocks can always add that.
const LONGEST: f64 = 365.0 * 86_400.0;

/// A count without a limit of its own. Queues and semaphores can count to it.
pub const MANY: u64 = 1_000_000_000;

/// The port of the gate when an address names none.
const GATE_PORT: u16 = 18080;

/// What kind of text a setting accepts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// As Python's configparser: yes, true, on, 1 and no, false, off, 0.
    Bool,
    Count {
        min: u64,
        max: u64,
    },
    /// A whole number of any sign.
    Integer,
    /// 0 means any free one.
    Port,
    /// A millisecond or more; fractions allowed.
    Seconds,
    /// Zero has a meaning of its own.
    SecondsOrZero,
    Milliseconds,
    /// A number, or one with K, M or G: powers of 1024.
    Bytes {
        min: u64,
        max: u64,
    },
    /// Between 0 and 1.
    Fraction,
    Text,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Text that is never shown.
    Secret,
    /// Relative ones are taken from the working directory.
    Path,
    /// Separated by commas.
    Words,
    /// Separated by colons or commas.
    Paths,
    /// IP addresses, separated by commas.
    Addresses,
    /// `tcp://host:port` or `ipc:///path`; a bare host gets the scheme and the usual port.
    Endpoint,
    Level,
}

/// What a text turned out to mean.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Count(u64),
    Integer(i64),
    Duration(Duration),
    Fraction(f64),
    Text(String),
    Path(PathBuf),
    Words(Vec<String>),
    Paths(Vec<PathBuf>),
    Addresses(Vec<IpAddr>),
    Level(Level),
}

impl Kind {
    /// The meaning of `text`; `None` when it is not of this kind.
    pub fn parse(self, text: &str) -> Option<Value> {
        let text = text.trim();
        Some(match self {
            Self::Bool => Value::Bool(boolean(text)?),
            Self::Count { min, max } => Value::Count(within(text.parse().ok()?, min, max)?),
            Self::Integer => Value::Integer(text.parse().ok()?),
            Self::Port => Value::Count(text.parse::<u16>().ok()?.into()),
            Self::Seconds => Value::Duration(wait(text, 1.0)?),
            Self::SecondsOrZero => Value::Duration(duration(text, 1.0)?),
            Self::Milliseconds => Value::Duration(wait(text, 1e-3)?),
            Self::Bytes { min, max } => Value::Count(within(bytes(text)?, min, max)?),
            Self::Fraction => Value::Fraction(within(text.parse().ok()?, 0.0, 1.0)?),
            Self::Text | Self::Secret => Value::Text(text.into()),
            Self::OneOf(words) => Value::Text(
                words
                    .iter()
                    .find(|word| word.eq_ignore_ascii_case(text))?
                    .to_string(),
            ),
            Self::Path => Value::Path(text.into()),
            Self::Words => Value::Words(parts(text, ',').map(str::to_owned).collect()),
            Self::Paths => {
                let paths = text.split(':').flat_map(|text| parts(text, ','));
                Value::Paths(paths.map(PathBuf::from).collect())
            }
            Self::Addresses => Value::Addresses(addresses(text)?),
            Self::Endpoint => Value::Text(endpoint(text)?),
            Self::Level => Value::Level(level(text)?),
        })
    }

    /// What belongs here, for `expected …, found …`.
    pub fn expected(self) -> String {
        match self {
            Self::Bool => "yes or no".into(),
            Self::Count { min: 0, max: MANY } => "a count".into(),
            Self::Count { min, max: MANY } => format!("a count, at least {min}"),
            Self::Count { min, max } => format!("a count from {min} to {max}"),
            Self::Integer => "a whole number".into(),
            Self::Port => "a port, 0 to 65535".into(),
            Self::Seconds => "seconds, at least 0.001".into(),
            Self::SecondsOrZero => "seconds".into(),
            Self::Milliseconds => "milliseconds, at least 1".into(),
            Self::Bytes { min, max } => format!("bytes such as 64K or 100M, from {min} to {max}"),
            Self::Fraction => "a fraction from 0 to 1".into(),
            Self::Text | Self::Secret => "text".into(),
            Self::OneOf(words) => words.join(" or "),
            Self::Path => "a path".into(),
            Self::Words => "words separated by commas".into(),
            Self::Paths => "paths separated by colons or commas".into(),
            Self::Addresses => "IP addresses separated by commas".into(),
            Self::Endpoint => "an address such as tcp://127.0.0.1:18080".into(),
            Self::Level => "debug, info, warning or error".into(),
        }
    }
}

impl Value {
    /// Says nothing more than "not that": for settings that wait to be implemented.
    pub fn is_off(&self) -> bool {
        match self {
            Self::Bool(on) => !on,
            Self::Integer(n) => *n < 0,
            Self::Text(text) => text.is_empty(),
            Self::Path(path) => path.as_os_str().is_empty(),
            Self::Words(words) => words.is_empty(),
            _ => false,
        }
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "1" => Some(true),
        "no" | "false" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn within<T: PartialOrd>(value: T, min: T, max: T) -> Option<T> {
    (min <= value && value <= max).then_some(value)
}

fn duration(text: &str, unit: f64) -> Option<Duration> {
    let seconds = text.parse::<f64>().ok()? * unit;
    Duration::try_from_secs_f64(within(seconds, 0.0, LONGEST)?).ok()
}

/// Not so short that waiting for it again and again would be all we do.
fn wait(text: &str, unit: f64) -> Option<Duration> {
    duration(text, unit).filter(|wait| *wait >= Duration::from_millis(1))
}

fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.chars().last()?.to_ascii_uppercase() {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Lists of TOML files and values on several lines arrive with newlines.
fn parts(text: &str, separator: char) -> impl Iterator<Item = &str> {
    text.split([separator, '\n'])
        .map(str::trim)
        .filter(|part| !part.is_empty())
}

fn addresses(text: &str) -> Option<Vec<IpAddr>> {
    let all: Vec<_> = parts(text, ',').map(address).collect::<Option<_>>()?;
    (!all.is_empty()).then_some(all)
}

fn address(text: &str) -> Option<IpAddr> {
    match text {
        "*" => Some(Ipv4Addr::UNSPECIFIED.into()),
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        _ => text
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .ok(),
    }
}

fn endpoint(text: &str) -> Option<String> {
    if let Some(path) = text.strip_prefix("ipc://") {
        return path.starts_with('/').then(|| text.to_owned());
    }
    let place = text.strip_prefix("tcp://").unwrap_or(text);
    let (host, port) = host_and_port(place)?;
    let port = match port {
        Some(port) => port.parse().ok()?,
        None if place == text => GATE_PORT,
        None => return None,
    };
    let host = match address(host) {
        Some(ip) if host != "*" => SocketAddr::from((ip, port)).to_string(),
        _ => format!("{host}:{port}"),
    };
    Some(format!("tcp://{host}"))
}

/// `host`, `host:port`, `::1` or `[::1]:port`.
fn host_and_port(place: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = match place.rsplit_once(':') {
        _ if place.parse::<IpAddr>().is_ok() || place.ends_with(']') => (place, None),
        Some((host, port)) => (host, Some(port)),
        None => (place, None),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.*:[]".contains(c);
    (!host.is_empty() && host.chars().all(is_name)).then_some((host, port))
}

/// The socket behind a `tcp://` endpoint, or why it may not be used: whoever
/// reaches the gate receives requests and answers them, and only this machine
/// is trusted to do that without encryption.
pub fn loopback(endpoint: &str) -> Result<SocketAddr, String> {
    let place = endpoint.strip_prefix("tcp://").unwrap_or(endpoint);
    match place.parse::<SocketAddr>() {
        Ok(socket) if socket.ip().is_loopback() => Ok(socket),
        _ => Err(format!(
            "{endpoint} is refused: workers on other machines wait for encryption (mTLS); \
             until then only loopback addresses such as tcp://127.0.0.1:{GATE_PORT} are allowed"
        )),
    }
}

fn level(text: &str) -> Option<Level> {
    match text.to_ascii_lowercase().as_str() {
        "debug" => Some(Level::DEBUG),
        "info" => Some(Level::INFO),
        "warning" | "warn" => Some(Level::WARN),
        "error" | "critical" => Some(Level::ERROR),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: Kind, text: &str) -> Option<Value> {
        kind.parse(text)
    }

    #[test]
    fn a_bool_is_what_configparser_takes_for_one() {
        for yes in ["yes", "True", "ON", "1", " yes "] {
            assert_eq!(parse(Kind::Bool, yes), Some(Value::Bool(true)), "{yes}");
        }
        for no in ["no", "FALSE", "off", "0"] {
            assert_eq!(parse(Kind::Bool, no), Some(Value::Bool(false)), "{no}");
        }
        assert_eq!(parse(Kind::Bool, "maybe"), None);
    }

    #[test]
    fn waits_are_positive_finite_and_may_have_fractions() {
        let half = Value::Duration(Duration::from_millis(500));
        assert_eq!(parse(Kind::Seconds, "0.5"), Some(half.clone()));
        assert_eq!(parse(Kind::Milliseconds, "500"), Some(half));
        for wrong in ["0", "1e-9", "-1", "inf", "NaN", "1e300", "20 s", ""] {
            assert_eq!(parse(Kind::Seconds, wrong), None, "{wrong}");
        }
        assert_eq!(
            parse(Kind::SecondsOrZero, "0"),
            Some(Value::Duration(Duration::ZERO))
        );
    }

    #[test]
    fn bytes_may_carry_a_unit() {
        let kind = Kind::Bytes {
            min: 1,
            max: 1 << 40,
        };
        assert_eq!(parse(kind, "100M"), Some(Value::Count(100 << 20)));
        assert_eq!(parse(kind, "64 k"), Some(Value::Count(64 << 10)));
        assert_eq!(parse(kind, "12"), Some(Value::Count(12)));
        for wrong in [
            "0",
            "M",
            "-1",
            "99999999999999999999",
            "18446744073709551615G",
            "1Mé",
        ] {
            assert_eq!(parse(kind, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn lists_lose_blanks_and_empty_parts() {
        let words = |list: &[&str]| Value::Words(list.iter().map(|w| w.to_string()).collect());
        assert_eq!(
            parse(Kind::Words, " X-Qgis- ,,X-Lizmap-\nX-Own-"),
            Some(words(&["X-Qgis-", "X-Lizmap-", "X-Own-"]))
        );
        assert_eq!(parse(Kind::Words, ""), Some(words(&[])));
        assert_eq!(
            parse(Kind::Paths, "/a:/b, /c\n/d"),
            Some(Value::Paths(
                ["/a", "/b", "/c", "/d"].map(PathBuf::from).into()
            ))
        );
    }

    #[test]
    fn a_choice_has_its_words_and_no_others() {
        let kind = Kind::OneOf(&["external", "auto"]);
        assert_eq!(parse(kind, "AUTO"), Some(Value::Text("auto".into())));
        assert_eq!(parse(kind, ""), None);
        assert_eq!(kind.expected(), "external or auto");
    }

    #[test]
    fn an_endpoint_may_be_a_bare_host() {
        for (text, means) in [
            ("127.0.0.1", "tcp://127.0.0.1:18080"),
            ("localhost", "tcp://127.0.0.1:18080"),
            ("localhost:7000", "tcp://127.0.0.1:7000"),
            ("::1", "tcp://[::1]:18080"),
            ("[::1]:7000", "tcp://[::1]:7000"),
            ("tcp://router:18080", "tcp://router:18080"),
            ("tcp://*:18080", "tcp://*:18080"),
            ("ipc:///run/q/0", "ipc:///run/q/0"),
        ] {
            assert_eq!(
                parse(Kind::Endpoint, text),
                Some(Value::Text(means.into())),
                "{text}"
            );
        }
        for wrong in [
            "",
            "tcp://",
            "tcp://host",
            "host:many",
            "ipc://relative",
            "http://host:1",
            "a b:1",
        ] {
            assert_eq!(parse(Kind::Endpoint, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_loopback_needs_no_encryption() {
        assert!(loopback("tcp://127.0.0.1:18080").is_ok());
        assert!(loopback("tcp://[::1]:0").is_ok());
        for open in [
            "tcp://*:18080",
            "tcp://0.0.0.0:18080",
            "tcp://10.0.0.1:18080",
            "tcp://router:1",
        ] {
            assert!(loopback(open).unwrap_err().contains("encryption"), "{open}");
        }
    }

    #[test]
    fn levels_come_in_any_case() {
        assert_eq!(
            parse(Kind::Level, "WARNING"),
            Some(Value::Level(Level::WARN))
        );
        assert_eq!(
            parse(Kind::Level, "Debug"),
            Some(Value::Level(Level::DEBUG))
        );
        assert_eq!(parse(Kind::Level, "loud"), None);
    }
}
