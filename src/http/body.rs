//! The body of a response: here already, or as the worker produces it.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::access::{End, Line};
use super::watch::Running;
use crate::broker::{self, Outcome};

/// Chunks of a reply, as the broker gives them.
pub trait Chunks: Send + Unpin + 'static {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, broker::Error>>>;
    /// What the end of the reply said, if it is here.
    fn outcome(&self) -> Option<&Outcome>;
    /// All chunks are here.
    fn is_complete(&self) -> bool;
}

impl Chunks for broker::Body {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, broker::Error>>> {
        self.poll_next(cx)
    }

    fn outcome(&self) -> Option<&Outcome> {
        self.outcome()
    }

    fn is_complete(&self) -> bool {
        self.is_complete()
    }
}

/// What is still to be sent.
#[derive(Debug)]
pub enum Content<C> {
    Here(VecDeque<Bytes>),
    Coming(C),
}

impl<C> Content<C> {
    pub fn empty() -> Self {
        Self::Here(VecDeque::new())
    }

    /// Its length, if that is known.
    pub fn len(&self) -> Option<u64> {
        match self {
            Self::Here(chunks) => Some(chunks.iter().map(|chunk| chunk.len() as u64).sum()),
            Self::Coming(_) => None,
        }
    }
}

impl<C> From<String> for Content<C> {
    fn from(text: String) -> Self {
        Self::Here(VecDeque::from([Bytes::from(text)]))
    }
}

impl<C: Chunks> Content<C> {
    /// A reply that needs no more from its worker has a length; any other is a stream.
    pub fn of_reply(mut chunks: C) -> Result<Self, broker::Error> {
        if !chunks.is_complete() {
            return Ok(Self::Coming(chunks));
        }
        let mut here = VecDeque::new();
        loop {
            match chunks.poll_next(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(chunk))) if chunk.is_empty() => {}
                Poll::Ready(Some(Ok(chunk))) => here.push_back(chunk),
                Poll::Ready(None) => return Ok(Self::Here(here)),
                Poll::Ready(Some(Err(error))) => return Err(error),
                // It said that everything is here. Believe the worker, not us.
                Poll::Pending => return Err(broker::Error::WorkerDied),
            }
        }
    }
}

/// A body that knows its access log line and tells the watch how it moves.
#[derive(Debug)]
pub struct Outgoing<C> {
    content: Content<C>,
    line: Line,
    running: Running,
}

/// The reply is cut off: the connection or stream ends without its proper end.
#[derive(Debug)]
pub struct CutOff(broker::Error);

impl fmt::Display for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the reply is cut off: {}", self.0)
    }
}

impl std::error::Error for CutOff {}

impl<C> Outgoing<C> {
    pub fn new(content: Content<C>, mut line: Line, running: Running) -> Self {
        if content.len() == Some(0) {
            line.end = End::Whole;
        }
        Self {
            content,
            line,
            running,
        }
    }

    fn sent(&mut self, chunk: Bytes) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        self.line.bytes += chunk.len() as u64;
        self.running.handed_over();
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn ended(&mut self, end: End) {
        self.line.end = end;
        self.content = Content::empty();
    }
}

impl<C: Chunks> hyper::body::Body for Outgoing<C> {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        self.running.asked();
        let next = match &mut self.content {
            Content::Here(chunks) => Poll::Ready(chunks.pop_front().map(Ok)),
            Content::Coming(chunks) => chunks.poll_next(cx),
        };
        match next {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(chunk))) => {
                if self.content.len() == Some(0) {
                    self.line.end = End::Whole;
                }
                self.sent(chunk)
            }
            Poll::Ready(None) => {
                if let Content::Coming(chunks) = &self.content {
                    self.line.timings = chunks.outcome().map(|outcome| outcome.timings);
                }
                self.ended(End::Whole);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::warn!(request_id = self.line.request_id, %error, "reply cut off");
                self.running.cut_off();
                self.ended(End::CutOff);
                Poll::Ready(Some(Err(CutOff(error))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.content.len() == Some(0) && self.line.end != End::CutOff
    }

    fn size_hint(&self) -> SizeHint {
        self.content
            .len()
            .map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}
