//! Parts of replies that have left their workers, and that no connection has taken yet.
//!
//! A worker that waited for every slow client would serve nobody else, so a few
//! megabytes of each reply wait here instead. All of them together have a bound. Beyond it
//! the reply goes whose client has taken nothing for longest: that one is cut off, and
//! everybody else is served. A reply of one part does not pass here.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::queue::Id;

#[derive(Debug)]
pub struct Unsent(Mutex<State>);

#[derive(Debug)]
struct State {
    max: usize,
    bytes: usize,
    replies: HashMap<Id, Reply>,
}

#[derive(Debug)]
struct Reply {
    /// Of the request.
    name: String,
    parts: VecDeque<Bytes>,
    bytes: usize,
    /// When its client took a part, or the first was there to take.
    moved: Instant,
}

/// A reply that had to go.
#[derive(Debug, PartialEq, Eq)]
pub struct Gone {
    pub id: Id,
    /// The request as its client and the log know it.
    pub name: String,
    pub bytes: usize,
    /// For so long its client has taken nothing.
    pub stood: Duration,
}

impl Default for Unsent {
    fn default() -> Self {
        Self(Mutex::new(State {
            max: usize::MAX,
            bytes: 0,
            replies: HashMap::new(),
        }))
    }
}

impl Unsent {
    /// From now on; whatever is too much goes when the next part comes.
    pub fn configure(&self, max: usize) {
        self.state().max = max;
    }

    /// A reply of several parts begins.
    pub fn begin(&self, id: Id, name: &str, now: Instant) {
        let reply = Reply {
            name: name.to_owned(),
            parts: VecDeque::new(),
            bytes: 0,
            moved: now,
        };
        self.state().replies.insert(id, reply);
    }

    /// One more part. Returns the replies that had to go for it.
    pub fn put(&self, id: Id, part: Bytes, now: Instant) -> Vec<Gone> {
        let mut state = self.state();
        let Some(reply) = state.replies.get_mut(&id) else {
            return Vec::new(); // It had to go, or its client left.
        };
        if reply.parts.is_empty() {
            reply.moved = now;
        }
        reply.bytes += part.len();
        let n = part.len();
        reply.parts.push_back(part);
        state.bytes += n;
        let mut gone = Vec::new();
        while state.bytes > state.max {
            // At least that of this one part.
            let Some((id, reply)) = state.slowest().and_then(|id| state.remove(id)) else {
                break;
            };
            gone.push(Gone {
                id,
                name: reply.name,
                bytes: reply.bytes,
                stood: now.saturating_duration_since(reply.moved),
            });
        }
        gone
    }

    /// The part that was put first. None: it had to go.
    pub fn take(&self, id: Id, now: Instant) -> Option<Bytes> {
        let mut state = self.state();
        let reply = state.replies.get_mut(&id)?;
        let part = reply.parts.pop_front()?;
        reply.bytes -= part.len();
        reply.moved = now;
        state.bytes -= part.len();
        Some(part)
    }

    /// Nobody takes any more of it.
    pub fn end(&self, id: Id) {
        drop(self.state().remove(id));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("no code that holds this lock can panic")
    }
}

impl State {
    fn slowest(&self) -> Option<Id> {
        let holding = self.replies.iter().filter(|(_, reply)| reply.bytes > 0);
        let slowest = holding.min_by_key(|(id, reply)| (reply.moved, **id));
        slowest.map(|(id, _)| *id)
    }

    fn remove(&mut self, id: Id) -> Option<(Id, Reply)> {
        let reply = self.replies.remove(&id)?;
        self.bytes -= reply.bytes;
        Some((id, reply))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [Gone; 0] = [];

    fn part(bytes: usize) -> Bytes {
        vec![0; bytes].into()
    }

    #[test]
    fn a_reply_is_taken_as_it_was_put_and_leaves_nothing() {
        let (unsent, now) = (Unsent::default(), Instant::now());
        unsent.begin(1, "r-1", now);
        for text in ["a", "", "b"] {
            assert_eq!(unsent.put(1, text.into(), now), NONE);
        }
        for text in ["a", "", "b"] {
            assert_eq!(unsent.take(1, now), Some(text.into()));
        }
        unsent.put(1, "c".into(), now);
        unsent.end(1);
        assert_eq!(unsent.take(1, now), None);
        let state = unsent.state();
        assert_eq!((state.bytes, state.replies.len()), (0, 0));
    }

    #[test]
    fn beyond_the_bound_the_reply_goes_that_waits_for_longest() {
        let (unsent, start) = (Unsent::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        unsent.configure(100);
        for id in 1..4 {
            unsent.begin(id, &format!("r-{id}"), start);
            assert_eq!(unsent.put(id, part(15), at(id)), NONE);
            assert_eq!(unsent.put(id, part(15), at(id)), NONE);
        }
        // The first one came first, and its client takes something now and then.
        assert_eq!(unsent.take(1, at(4)), Some(part(15)));
        unsent.begin(5, "r-5", at(5));
        let gone = Gone {
            id: 2,
            name: "r-2".into(),
            bytes: 30,
            stood: Duration::from_secs(3),
        };
        assert_eq!(unsent.put(5, part(50), at(5)), [gone]);
        assert_eq!(unsent.take(2, at(6)), None, "cut off");
        assert_eq!(unsent.put(2, part(90), at(6)), NONE, "and it stays so");
        assert_eq!(unsent.take(3, at(6)), Some(part(15)));
        assert_eq!(unsent.state().bytes, 15 + 15 + 50);
    }

    #[test]
    fn a_part_that_is_larger_than_the_bound_ends_its_reply() {
        let (unsent, now) = (Unsent::default(), Instant::now());
        unsent.configure(10);
        unsent.begin(1, "r-1", now);
        assert_eq!(unsent.put(1, part(11), now)[0].bytes, 11);
        assert_eq!(unsent.state().bytes, 0);
    }
}
