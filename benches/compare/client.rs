//! A keep-alive HTTP/1.1 client that knows when each byte came.
//!
//! As thin as it can be, because what it takes is part of what is measured.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    stream: BufReader<TcpStream>,
}

pub struct Reply {
    pub status: u16,
    pub bytes: usize,
    /// The first bytes of the body.
    pub start: Vec<u8>,
    pub first_byte: Duration,
    pub total: Duration,
}

/// What the head says about the length of the body.
enum Length {
    Known(usize),
    Chunked,
}

impl Client {
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream: BufReader::with_capacity(64 << 10, stream),
        })
    }

    pub fn get(&mut self, target: &str) -> io::Result<Reply> {
        self.get_slowly(target, usize::MAX)
    }

    /// The reply, which has to be a good one.
    pub fn expect(&mut self, target: &str) -> Reply {
        let reply = self.get(target).expect("the server answers");
        assert_eq!(
            reply.status,
            200,
            "{target}: {}",
            String::from_utf8_lossy(&reply.start)
        );
        reply
    }

    /// Takes no more than `rate` bytes of the body in a second.
    pub fn get_slowly(&mut self, target: &str, rate: usize) -> io::Result<Reply> {
        let asked = Instant::now();
        write!(
            self.stream.get_mut(),
            "GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )?;
        let (status, length) = self.head()?;
        let first_byte = asked.elapsed();
        let mut body = Body {
            start: Vec::new(),
            bytes: 0,
            rate,
            since: Instant::now(),
        };
        match length {
            Length::Known(bytes) => self.take(bytes, &mut body)?,
            Length::Chunked => while self.chunk(&mut body)? {},
        }
        Ok(Reply {
            status,
            bytes: body.bytes,
            start: body.start,
            first_byte,
            total: asked.elapsed(),
        })
    }

    fn head(&mut self) -> io::Result<(u16, Length)> {
        let first = self.line()?;
        let status = first
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .ok_or_else(garbage)?;
        let mut length = Length::Known(0);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line
                .split_once(':')
                .map(|(name, value)| (name, value.trim()))
            {
                None => return Ok((status, length)),
                Some(("content-length", value)) => {
                    length = Length::Known(value.parse().map_err(|_| garbage())?)
                }
                Some(("transfer-encoding", "chunked")) => length = Length::Chunked,
                Some(_) => {}
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    fn chunk(&mut self, body: &mut Body) -> io::Result<bool> {
        let size = usize::from_str_radix(&self.line()?, 16).map_err(|_| garbage())?;
        self.take(size, body)?;
        self.line()?;
        Ok(size > 0)
    }

    fn take(&mut self, mut left: usize, body: &mut Body) -> io::Result<()> {
        let mut buffer = [0; 64 << 10];
        while left > 0 {
            let most = left.min(buffer.len());
            let n = self.stream.read(&mut buffer[..most])?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            body.add(&buffer[..n]);
            left -= n;
        }
        Ok(())
    }
}

struct Body {
    start: Vec<u8>,
    bytes: usize,
    rate: usize,
    since: Instant,
}

impl Body {
    fn add(&mut self, piece: &[u8]) {
        let room = 1024_usize.saturating_sub(self.start.len());
        self.start
            .extend_from_slice(&piece[..piece.len().min(room)]);
        self.bytes += piece.len();
        if self.rate != usize::MAX {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.rate as f64);
            std::thread::sleep(due.saturating_sub(self.since.elapsed()));
        }
    }
}

fn garbage() -> io::Error {
    io::Error::other("not HTTP/1.1")
}
