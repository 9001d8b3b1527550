//! A client with one connection, which it uses again as long as the server lets
//! it, and which notices every byte that it did not ask for.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};

use super::http;

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Came {
    Whole {
        status: u16,
        id: String,
        body: Vec<u8>,
    },
    /// The connection ended before the body did.
    Cut {
        status: u16,
        id: String,
        body: Vec<u8>,
    },
    /// Not even a head.
    Nothing(String),
    /// Bytes after the end of the answer, before the next question.
    TooMuch(Vec<u8>),
}

pub struct Client {
    server: SocketAddr,
    connection: Option<TcpStream>,
    /// Read, and not yet looked at.
    ahead: Vec<u8>,
}

struct Head {
    status: u16,
    id: String,
    length: Option<usize>,
    closes: bool,
}

impl Client {
    pub fn new(server: SocketAddr) -> Self {
        Self {
            server,
            connection: None,
            ahead: Vec::new(),
        }
    }

    pub fn ask(&mut self, question: &[u8]) -> Came {
        let came = self.try_ask(question).unwrap_or_else(Came::Nothing);
        if !matches!(came, Came::Whole { .. }) {
            self.hang_up();
        }
        if self.ahead.is_empty() {
            return came;
        }
        let stray = std::mem::take(&mut self.ahead);
        self.hang_up();
        Came::TooMuch(stray)
    }

    /// Sends, and is gone.
    pub fn ask_and_leave(&mut self, question: &[u8]) {
        let _ = self.send(question);
        self.hang_up();
    }

    /// The next question goes over a new connection.
    pub fn hang_up(&mut self) {
        self.connection = None;
        self.ahead.clear();
    }

    fn send(&mut self, question: &[u8]) -> std::io::Result<()> {
        if self.connection.is_none() {
            let connection = http::try_connect(self.server)?;
            connection.set_nodelay(true)?;
            self.connection = Some(connection);
        }
        let connection = self.connection.as_mut().expect("there is one by now");
        connection.write_all(question)
    }

    fn try_ask(&mut self, question: &[u8]) -> Result<Came, String> {
        self.send(question)
            .map_err(|error| format!("sending: {error}"))?;
        let Head {
            status,
            id,
            length,
            closes,
        } = self.head()?;
        let (body, is_whole) = match length {
            Some(length) => self.take(length),
            None => self.chunks(),
        };
        if closes && is_whole {
            self.connection = None;
        }
        Ok(match is_whole {
            true => Came::Whole { status, id, body },
            false => Came::Cut { status, id, body },
        })
    }

    fn head(&mut self) -> Result<Head, String> {
        let text = self.line_of(b"\r\n\r\n").map_err(|read| {
            format!(
                "the connection ended after {:?}",
                String::from_utf8_lossy(&read)
            )
        })?;
        let text = String::from_utf8(text).map_err(|error| error.to_string())?;
        let field = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(": "));
            lines
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_owned())
        };
        let status = text
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok());
        Ok(Head {
            status: status.ok_or_else(|| format!("no status in {text:?}"))?,
            id: field("x-request-id").unwrap_or_default(),
            length: field("content-length").map(|n| n.parse().expect("a length is a number")),
            closes: field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")),
        })
    }

    /// The body of a chunked answer, and whether its last chunk came.
    fn chunks(&mut self) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        loop {
            let Ok(line) = self.line_of(b"\r\n") else {
                return (body, false);
            };
            let size = std::str::from_utf8(&line)
                .ok()
                .and_then(|line| usize::from_str_radix(line.trim(), 16).ok());
            let Some(size) = size else {
                panic!(
                    "not the size of a chunk: {:?}",
                    String::from_utf8_lossy(&line)
                );
            };
            let (mut chunk, is_whole) = self.take(size + 2);
            chunk.truncate(size.min(chunk.len()));
            body.extend(chunk);
            if !is_whole || size == 0 {
                return (body, is_whole);
            }
        }
    }

    /// Up to and with `end`; what there is instead if the connection ends before.
    fn line_of(&mut self, end: &[u8]) -> Result<Vec<u8>, Vec<u8>> {
        let mut seen = 0;
        loop {
            let found = memchr::memmem::find(&self.ahead[seen..], end);
            if let Some(at) = found {
                return Ok(self.ahead.drain(..seen + at + end.len()).collect());
            }
            seen = self.ahead.len().saturating_sub(end.len());
            if !self.read() {
                return Err(std::mem::take(&mut self.ahead));
            }
        }
    }

    /// So many bytes, or those that came.
    fn take(&mut self, n: usize) -> (Vec<u8>, bool) {
        while self.ahead.len() < n {
            if !self.read() {
                return (std::mem::take(&mut self.ahead), false);
            }
        }
        (self.ahead.drain(..n).collect(), true)
    }

    fn read(&mut self) -> bool {
        let Some(connection) = &mut self.connection else {
            return false;
        };
        let mut buffer = [0; 16 << 10];
        match http::read(connection, &mut buffer) {
            Ok(n @ 1..) => {
                self.ahead.extend_from_slice(&buffer[..n]);
                true
            }
            _ => false,
        }
    }
}
