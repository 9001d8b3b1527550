//! What is no request gets an answer with a body. hyper refuses it by itself, before anybody
//! is asked, with a head alone; so the first bytes of a connection that had no request are
//! that head, and here it is given its exception.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::body::Content;
use super::reply::{Dialect, Refusal};
use super::respond::SERVER;
use super::watch::Watch;
use crate::config::Http;

/// The bounds of a head.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    uri: usize,
    bytes: usize,
    fields: usize,
}

impl Bounds {
    pub fn of(config: &Http) -> Self {
        Self {
            uri: config.uri_max,
            bytes: config.header_max,
            fields: config.headers_max,
        }
    }
}

/// A connection. HTTP/2 never begins like a refusal of HTTP/1.
#[derive(Debug)]
pub struct Explaining<I> {
    io: I,
    watch: Arc<Watch>,
    bounds: Bounds,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nothing was written yet.
    Silent,
    /// What is written is an answer to a request.
    Answering,
    /// What is still to be written in the place of what was, which was all.
    Refusing(Bytes),
}

impl<I> Explaining<I> {
    pub fn new(io: I, watch: Arc<Watch>, bounds: Bounds) -> Self {
        Self {
            io,
            watch,
            bounds,
            state: State::Silent,
        }
    }

    /// `buf` is written first.
    fn begin(&mut self, buf: &[u8]) {
        let refusal = match self.watch.had_request() {
            true => None,
            false => explained(buf, self.bounds),
        };
        self.state = refusal.map_or(State::Answering, State::Refusing);
    }
}

/// hyper's `head` with a body and what belongs to that; None if it is another one than we know.
fn explained(head: &[u8], bounds: Bounds) -> Option<Bytes> {
    const NO_BODY: &str = "content-length: 0\r\n";
    let head = std::str::from_utf8(head).ok()?;
    let refusal = match head.strip_prefix("HTTP/1.1 ")?.get(..3)? {
        "400" => Refusal::NoHttp,
        "414" => Refusal::UriTooLong { limit: bounds.uri },
        "431" => Refusal::HeadRefused {
            bytes: bounds.bytes,
            fields: bounds.fields,
        },
        _ => return None,
    };
    let dialect = Dialect::Ows {
        service: None,
        version: None,
        by_qgis: false,
    };
    let response: Response<Content<Infallible>> = refusal.into_response(&dialect, None);
    let kind = response.headers().get(CONTENT_TYPE);
    let kind = kind
        .and_then(|kind| HeaderValue::to_str(kind).ok())?
        .to_owned();
    let Content::Here(chunks) = response.into_body() else {
        return None;
    };
    let body = chunks.iter().flatten().copied().collect::<Vec<u8>>();
    let fields = format!(
        "server: {SERVER}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n",
        body.len()
    );
    let (before, after) = head.split_once(NO_BODY)?;
    let whole = [
        before.as_bytes(),
        fields.as_bytes(),
        after.as_bytes(),
        &body,
    ]
    .concat();
    Some(whole.into())
}

impl<I: AsyncRead + Unpin> AsyncRead for Explaining<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Explaining<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let State::Silent = self.state {
            self.begin(buf);
        }
        let Self { io, state, .. } = &mut *self;
        let State::Refusing(rest) = state else {
            return Pin::new(io).poll_write(cx, buf);
        };
        while !rest.is_empty() {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, rest))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            rest.advance(n);
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let State::Answering = self.state {
            return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        }
        let first = bufs.iter().find(|buf| !buf.is_empty());
        self.poll_write(cx, first.map_or(&[], |buf| buf))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
