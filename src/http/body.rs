//! The body of a response: here already, or as the worker produces it.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::access::{End, Line};
use super::watch::Running;
use crate::broker::{self, Outcome};
use crate::protocol::Failure;

/// Chunks of a reply, as the broker gives them.
pub trait Chunks: Send + Unpin + 'static {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, broker::Error>>>;
    /// What the end of the reply said, if it is here.
    fn outcome(&self) -> Option<&Outcome>;
    /// All chunks are here.
    fn is_complete(&self) -> bool;
    /// How long the request waited for a worker.
    fn queued(&self) -> Option<Duration> {
        None
    }
    /// How long the worker took to find the project; a stream says it with its head.
    fn load(&self) -> Option<Duration> {
        self.outcome().map(|outcome| outcome.timings.load())
    }
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

    fn queued(&self) -> Option<Duration> {
        Some(self.queued())
    }

    fn load(&self) -> Option<Duration> {
        self.load()
    }
}

/// What is still to be sent.
#[derive(Debug)]
pub enum Content<C> {
    Here(VecDeque<Bytes>),
    Coming(C),
    /// Coming, and its length was announced.
    Measured(Measured<C>),
}

/// A stream that must be as long as the worker said.
#[derive(Debug)]
pub struct Measured<C> {
    chunks: C,
    /// What has not come yet.
    missing: u64,
    /// The last chunk is kept back until the worker has said that it is the last:
    /// once the announced bytes are out, nobody can be told that they are wrong.
    last: Option<Bytes>,
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
            Self::Measured(measured) => Some(measured.left()),
        }
    }

    /// Everything was handed over.
    fn is_over(&self) -> bool {
        matches!(self, Self::Here(chunks) if chunks.is_empty())
    }
}

impl<C> From<String> for Content<C> {
    fn from(text: String) -> Self {
        Self::Here(VecDeque::from([Bytes::from(text)]))
    }
}

impl<C: Chunks> Content<C> {
    /// A reply that needs no more from its worker has a length; any other is a stream.
    /// `announced` is its length as its head has it.
    pub fn of_reply(mut chunks: C, announced: Option<u64>) -> Result<Self, broker::Error> {
        if !chunks.is_complete() {
            return Ok(Self::stream(chunks, announced));
        }
        let mut here = VecDeque::new();
        loop {
            match chunks.poll_next(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(chunk))) if chunk.is_empty() => {}
                Poll::Ready(Some(Ok(chunk))) => here.push_back(chunk),
                Poll::Ready(None) => return Self::whole(here, announced),
                Poll::Ready(Some(Err(error))) => return Err(error),
                // It said that everything is here. Believe the worker, not us.
                Poll::Pending => return Err(broker::Error::WorkerDied),
            }
        }
    }

    fn stream(chunks: C, announced: Option<u64>) -> Self {
        match announced {
            // Of an empty body hyper would not fetch the end.
            None | Some(0) => Self::Coming(chunks),
            Some(missing) => Self::Measured(Measured {
                chunks,
                missing,
                last: None,
            }),
        }
    }

    fn whole(here: VecDeque<Bytes>, announced: Option<u64>) -> Result<Self, broker::Error> {
        let content = Self::Here(here);
        match announced.is_none() || announced == content.len() {
            true => Ok(content),
            false => Err(WRONG_LENGTH),
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, broker::Error>>> {
        match self {
            Self::Here(chunks) => Poll::Ready(chunks.pop_front().map(Ok)),
            Self::Coming(chunks) => chunks.poll_next(cx),
            Self::Measured(measured) => measured.poll_next(cx),
        }
    }

    fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Here(_) => None,
            Self::Coming(chunks) => chunks.outcome(),
            Self::Measured(measured) => measured.chunks.outcome(),
        }
    }
}

/// A worker that cannot count is broken.
const WRONG_LENGTH: broker::Error = broker::Error::Failed(Failure::QgisFailed);

impl<C> Measured<C> {
    /// What is still to be handed over.
    fn left(&self) -> u64 {
        self.missing + self.last.as_ref().map_or(0, |last| last.len() as u64)
    }
}

impl<C: Chunks> Measured<C> {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, broker::Error>>> {
        loop {
            let next = ready!(self.chunks.poll_next(cx)).transpose();
            let chunk = match next {
                Ok(Some(chunk)) if chunk.is_empty() => continue,
                Ok(Some(chunk)) => chunk,
                Ok(None) if self.missing > 0 => return Poll::Ready(Some(Err(WRONG_LENGTH))),
                Ok(None) => return Poll::Ready(self.last.take().map(Ok)),
                Err(error) => return Poll::Ready(Some(Err(error))),
            };
            let Some(missing) = self.missing.checked_sub(chunk.len() as u64) else {
                return Poll::Ready(Some(Err(WRONG_LENGTH)));
            };
            self.missing = missing;
            if missing > 0 {
                return Poll::Ready(Some(Ok(chunk)));
            }
            self.last = Some(chunk);
        }
    }
}

/// A body that knows its access log line and tells the watch how it moves.
#[derive(Debug)]
pub struct Outgoing<C> {
    content: Content<C>,
    line: Line,
    running: Running,
    /// Why it will be cut off when hyper asks the next time.
    broken: Option<broker::Error>,
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

impl<C: Chunks> Outgoing<C> {
    pub fn new(content: Content<C>, mut line: Line, running: Running) -> Self {
        if content.is_over() {
            line.end = End::Whole;
        }
        Self {
            content,
            line,
            running,
            broken: None,
        }
    }

    /// hyper throws away what it has not written when a body fails. So that the client
    /// sees at least the head, and what came, it is let write first.
    fn fails(
        &mut self,
        error: broker::Error,
        cx: &Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        self.broken = Some(error);
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn cut_off(&mut self, error: broker::Error) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        tracing::warn!(request_id = self.line.request_id, %error, "reply cut off");
        self.running.cut_off();
        self.line.failure = Some(error.reason());
        self.ended(End::CutOff);
        Poll::Ready(Some(Err(CutOff(error))))
    }

    fn sent(&mut self, chunk: Bytes) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        self.line.bytes += chunk.len() as u64;
        self.running.handed_over();
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn ended(&mut self, end: End) {
        if let Some(outcome) = self.content.outcome() {
            self.line.load = Some(outcome.timings.load());
            self.line.render = Some(outcome.timings.render());
        }
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
        if let Some(error) = self.broken.take() {
            return self.cut_off(error);
        }
        match self.content.poll_next(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(chunk))) => {
                if self.content.len() == Some(0) {
                    self.ended(End::Whole);
                }
                self.sent(chunk)
            }
            Poll::Ready(None) => {
                self.ended(End::Whole);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => self.fails(error, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_over() && self.line.end != End::CutOff
    }

    fn size_hint(&self) -> SizeHint {
        self.content
            .len()
            .map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}
