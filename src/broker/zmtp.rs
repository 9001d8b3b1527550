//! What a peer of the gate may send: the lengths of ZMTP 3, checked as the bytes come.
//!
//! ```text
//! greeting  FF 8×any 7F | major ≥ 3 | minor | mechanism "NULL" padded to 20 | as-server | 31×any
//! frame     flags (00000 command long more) | length, 1 or 8 bytes | that many bytes
//! ```
//!
//! After the greeting comes one command, READY of a DEALER without an identity,
//! and after that only messages. Specification: <https://rfc.zeromq.org/spec/23/>.

use crate::protocol::{BODY_MAX, HEAD_MAX};

const GREETING: usize = 64;
const HANDSHAKE_MAX: u64 = 4 << 10;
const FRAME_MAX: u64 = BODY_MAX as u64;
const MESSAGE_MAX: u64 = FRAME_MAX + HEAD_MAX as u64;
const PARTS_MAX: u32 = 16;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a peer was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    NoGreeting,
    Version(u8),
    Mechanism,
    Flags(u8),
    NoHandshake,
    HandshakeTooLong(u64),
    Handshake,
    SocketType(String),
    Identity,
    Command,
    FrameTooLong(u64),
    MessageTooLong(u64),
    TooManyParts,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoGreeting => write!(f, "it does not speak ZMTP"),
            Self::Version(major) => write!(f, "it speaks ZMTP {major}, not 3"),
            Self::Mechanism => write!(f, "its security mechanism is not NULL"),
            Self::Flags(flags) => write!(f, "a frame has the reserved flags {flags:#04x}"),
            Self::NoHandshake => write!(f, "a message before the handshake"),
            Self::HandshakeTooLong(n) => {
                write!(f, "a handshake of {n} bytes, more than {HANDSHAKE_MAX}")
            }
            Self::Handshake => write!(f, "a malformed handshake"),
            Self::SocketType(name) => write!(f, "its socket is a {name:?}, not a DEALER"),
            Self::Identity => write!(f, "it chose its own identity"),
            Self::Command => write!(f, "a command after the handshake"),
            Self::FrameTooLong(n) => write!(f, "a frame of {n} bytes, more than {FRAME_MAX}"),
            Self::MessageTooLong(n) => write!(f, "a message of {n} bytes, more than {MESSAGE_MAX}"),
            Self::TooManyParts => write!(f, "a message of more than {PARTS_MAX} frames"),
        }
    }
}

/// Follows one direction of one connection.
#[derive(Debug)]
pub struct Guard {
    state: State,
    /// The greeting, then the handshake.
    kept: Vec<u8>,
    is_open: bool,
    parts: u32,
    message: u64,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Greeting,
    Flags,
    Length { flags: u8, missing: u8, value: u64 },
    Body { flags: u8, missing: u64 },
}

impl Guard {
    pub fn new() -> Self {
        let state = State::Greeting;
        Self {
            state,
            kept: Vec::with_capacity(GREETING),
            is_open: false,
            parts: 0,
            message: 0,
        }
    }

    /// Greeting and handshake are complete.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether these bytes may follow those before.
    pub fn check(&mut self, mut bytes: &[u8]) -> Result<(), Refusal> {
        while let [first, rest @ ..] = bytes {
            bytes = match self.state {
                State::Greeting => {
                    self.greeting(*first)?;
                    rest
                }
                State::Flags => {
                    self.flags(*first)?;
                    rest
                }
                State::Length {
                    flags,
                    missing,
                    value,
                } => {
                    self.length(flags, missing, value << 8 | u64::from(*first))?;
                    rest
                }
                State::Body { flags, missing } => self.body(flags, missing, bytes)?,
            };
        }
        Ok(())
    }

    fn greeting(&mut self, byte: u8) -> Result<(), Refusal> {
        let at = self.kept.len();
        self.kept.push(byte);
        match at {
            0 if byte != 0xff => return Err(Refusal::NoGreeting),
            9 if byte != 0x7f => return Err(Refusal::NoGreeting),
            10 if byte < 3 => return Err(Refusal::Version(byte)),
            31 if &self.kept[12..] != b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" => {
                return Err(Refusal::Mechanism);
            }
            63 => {
                self.kept.clear();
                self.state = State::Flags;
            }
            _ => {}
        }
        Ok(())
    }

    fn flags(&mut self, flags: u8) -> Result<(), Refusal> {
        let is_command = flags & COMMAND != 0;
        if flags & !(MORE | LONG | COMMAND) != 0 || (is_command && flags & MORE != 0) {
            return Err(Refusal::Flags(flags));
        }
        match (self.is_open, is_command) {
            (false, false) => return Err(Refusal::NoHandshake),
            (true, true) => return Err(Refusal::Command),
            _ => {}
        }
        let missing = if flags & LONG != 0 { 8 } else { 1 };
        self.state = State::Length {
            flags,
            missing,
            value: 0,
        };
        Ok(())
    }

    fn length(&mut self, flags: u8, missing: u8, value: u64) -> Result<(), Refusal> {
        if missing > 1 {
            self.state = State::Length {
                flags,
                missing: missing - 1,
                value,
            };
            return Ok(());
        }
        match self.is_open {
            false if value > HANDSHAKE_MAX => return Err(Refusal::HandshakeTooLong(value)),
            false => {}
            true => self.count(value)?,
        }
        self.state = State::Body {
            flags,
            missing: value,
        };
        // An empty frame has no byte that would end it.
        if value == 0 {
            self.end_of_frame(flags)?;
        }
        Ok(())
    }

    fn count(&mut self, frame: u64) -> Result<(), Refusal> {
        if frame > FRAME_MAX {
            return Err(Refusal::FrameTooLong(frame));
        }
        self.parts += 1;
        self.message += frame;
        if self.parts > PARTS_MAX {
            return Err(Refusal::TooManyParts);
        }
        if self.message > MESSAGE_MAX {
            return Err(Refusal::MessageTooLong(self.message));
        }
        Ok(())
    }

    fn body<'a>(&mut self, flags: u8, missing: u64, bytes: &'a [u8]) -> Result<&'a [u8], Refusal> {
        let n = bytes
            .len()
            .min(usize::try_from(missing).unwrap_or(usize::MAX));
        let (ours, rest) = bytes.split_at(n);
        if !self.is_open {
            self.kept.extend_from_slice(ours);
        }
        let missing = missing - n as u64;
        self.state = State::Body { flags, missing };
        if missing == 0 {
            self.end_of_frame(flags)?;
        }
        Ok(rest)
    }

    fn end_of_frame(&mut self, flags: u8) -> Result<(), Refusal> {
        self.state = State::Flags;
        if !self.is_open {
            handshake(&std::mem::take(&mut self.kept))?;
            self.is_open = true;
        } else if flags & MORE == 0 {
            (self.parts, self.message) = (0, 0);
        }
        Ok(())
    }
}

/// READY and its properties: name length and name, value length (4 bytes) and value.
fn handshake(command: &[u8]) -> Result<(), Refusal> {
    let mut rest = command
        .strip_prefix(b"\x05READY")
        .ok_or(Refusal::Handshake)?;
    let mut socket_type = None;
    while !rest.is_empty() {
        let (name, value, next) = property(rest).ok_or(Refusal::Handshake)?;
        // Names of properties are not case-sensitive.
        match &*name.to_ascii_lowercase() {
            b"identity" if !value.is_empty() => return Err(Refusal::Identity),
            b"socket-type" => socket_type = Some(value),
            _ => {}
        }
        rest = next;
    }
    match socket_type {
        Some(b"DEALER") => Ok(()),
        other => {
            let name = &other.unwrap_or_default()[..other.map_or(0, |name| name.len().min(16))];
            Err(Refusal::SocketType(
                String::from_utf8_lossy(name).into_owned(),
            ))
        }
    }
}

fn property(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    Some((name, value, rest))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn greeting(mechanism: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        (bytes[0], bytes[9], bytes[10]) = (0xff, 0x7f, 3);
        bytes[12..12 + mechanism.len()].copy_from_slice(mechanism);
        bytes
    }

    pub fn ready(properties: &[(&str, &str)]) -> Vec<u8> {
        let mut body = b"\x05READY".to_vec();
        for (name, value) in properties {
            body.push(name.len() as u8);
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&(value.len() as u32).to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        }
        [&[COMMAND, body.len() as u8], &body[..]].concat()
    }

    pub fn opening() -> Vec<u8> {
        [
            greeting(b"NULL"),
            ready(&[("Socket-Type", "DEALER"), ("Identity", "")]),
        ]
        .concat()
    }

    fn long(flags: u8, length: u64) -> Vec<u8> {
        [&[flags | LONG], &length.to_be_bytes()[..]].concat()
    }

    fn check(parts: &[&[u8]]) -> Result<(), Refusal> {
        Guard::new().check(&parts.concat())
    }

    #[test]
    fn a_worker_passes_however_its_bytes_are_cut() {
        let message = [
            &[MORE, 2, b'a', b'b', MORE, 0],
            &long(0, 300)[..],
            &[7; 300],
        ]
        .concat();
        let bytes = [&opening()[..], &message, &message].concat();
        for size in [1, 2, 7, 64, bytes.len()] {
            let mut guard = Guard::new();
            assert_eq!(bytes.chunks(size).try_for_each(|c| guard.check(c)), Ok(()));
            assert!(guard.is_open());
        }
    }

    #[test]
    fn what_is_no_zmtp_is_refused_at_its_first_byte() {
        for garbage in [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x03\x01\x02\x00", b"\0"] {
            assert_eq!(check(&[garbage]), Err(Refusal::NoGreeting));
        }
        let mut old = greeting(b"NULL");
        old[10] = 1;
        assert_eq!(check(&[&old]), Err(Refusal::Version(1)));
    }

    #[test]
    fn only_the_null_mechanism_passes() {
        for mechanism in [&b"CURVE"[..], b"PLAIN", b"NULLX", b""] {
            assert_eq!(check(&[&greeting(mechanism)]), Err(Refusal::Mechanism));
        }
    }

    #[test]
    fn huge_lengths_are_refused_before_and_after_the_handshake() {
        for n in [FRAME_MAX + 1, 1 << 40, 1 << 62, u64::MAX] {
            let before = check(&[&greeting(b"NULL"), &long(COMMAND, n)]);
            assert_eq!(before, Err(Refusal::HandshakeTooLong(n)));
            let after = check(&[&opening(), &long(0, n)]);
            assert_eq!(after, Err(Refusal::FrameTooLong(n)));
        }
        assert_eq!(check(&[&opening(), &long(0, FRAME_MAX)]), Ok(()));
    }

    #[test]
    fn many_parts_are_refused_even_if_empty() {
        let parts = |n: usize| [MORE, 0].repeat(n);
        assert_eq!(check(&[&opening(), &parts(16)]), Ok(()));
        assert_eq!(check(&[&opening(), &parts(17)]), Err(Refusal::TooManyParts));
        let messages = [parts(15), vec![0, 0]].concat().repeat(3);
        assert_eq!(check(&[&opening(), &messages]), Ok(()));
    }

    #[test]
    fn reserved_flags_and_late_commands_are_refused() {
        assert_eq!(check(&[&opening(), &[0x80]]), Err(Refusal::Flags(0x80)));
        assert_eq!(
            check(&[&greeting(b"NULL"), &[COMMAND | MORE]]),
            Err(Refusal::Flags(5))
        );
        assert_eq!(
            check(&[&greeting(b"NULL"), &[0]]),
            Err(Refusal::NoHandshake)
        );
        assert_eq!(check(&[&opening(), &[COMMAND]]), Err(Refusal::Command));
    }

    #[test]
    fn only_a_nameless_dealer_passes() {
        let with = |properties: &[(&str, &str)]| check(&[&greeting(b"NULL"), &ready(properties)]);
        assert_eq!(with(&[("socket-type", "DEALER")]), Ok(()));
        assert_eq!(
            with(&[("Socket-Type", "SUB")]),
            Err(Refusal::SocketType("SUB".into()))
        );
        assert_eq!(with(&[]), Err(Refusal::SocketType(String::new())));
        let named = [("Socket-Type", "DEALER"), ("Identity", "x")];
        assert_eq!(with(&named), Err(Refusal::Identity));
        assert_eq!(
            check(&[&greeting(b"NULL"), &[COMMAND, 0]]),
            Err(Refusal::Handshake)
        );
        let cut = [COMMAND, 9, 5, b'R', b'E', b'A', b'D', b'Y', 200, b'x', b'y'];
        assert_eq!(check(&[&greeting(b"NULL"), &cut]), Err(Refusal::Handshake));
    }

    proptest::proptest! {
        /// Whatever comes, checking returns, and a cut changes nothing.
        #[test]
        fn cuts_do_not_matter(tail: Vec<u8>, at: proptest::sample::Index) {
            let bytes = [opening(), tail].concat();
            let (one, two) = bytes.split_at(at.index(bytes.len()));
            let mut guard = Guard::new();
            let cut = guard.check(one).and_then(|()| guard.check(two));
            assert_eq!(cut, Guard::new().check(&bytes));
        }
    }
}
