//! What is asked, and the only right answer to it.

use super::dice::Dice;

/// `worker.chunk_bytes`, and what an answer in one piece may have: small, so that
/// deaths find many in the middle.
pub const CHUNK: u64 = 4 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// May be sent to a second worker.
    Get,
    /// May not.
    Post,
    Stream {
        chunks: u64,
    },
    /// Takes longer than the server allows.
    Stuck,
    /// The client does not wait for the answer.
    Left,
}

/// Request number `index`; all of it follows from number and seed.
#[derive(Debug, Clone)]
pub struct Question {
    pub tag: String,
    pub kind: Kind,
    size: u64,
}

impl Question {
    pub fn new(seed: u64, index: u64) -> Self {
        let mut dice = Dice::new(seed, index);
        // Few are stuck, for each costs its worker and seconds.
        let kind = match dice.between(0, 10_000) {
            0..2 => Kind::Stuck,
            2..40 => Kind::Left,
            40..100 => Kind::Stream {
                chunks: dice.between(20, 100),
            },
            100..1000 => Kind::Stream {
                chunks: dice.between(1, 8),
            },
            1000..2500 => Kind::Post,
            _ => Kind::Get,
        };
        let size = match kind {
            Kind::Stream { .. } => dice.between(10, CHUNK),
            _ if dice.between(0, 200) == 0 => dice.between(CHUNK, 600_000),
            _ => dice.between(0, CHUNK / 2),
        };
        let tag = format!("t{index}x{:08x}", dice.roll() as u32);
        Self { tag, kind, size }
    }

    /// The number in a tag.
    pub fn index_of(tag: &str) -> Option<u64> {
        tag.strip_prefix('t')?.split_once('x')?.0.parse().ok()
    }

    pub fn is_retryable(&self) -> bool {
        self.kind != Kind::Post
    }

    /// As it goes over the connection.
    pub fn bytes(&self, project: &str) -> Vec<u8> {
        let Self { tag, size, .. } = self;
        let (method, more) = match self.kind {
            Kind::Post => ("POST", String::new()),
            Kind::Stream { chunks } => ("GET", format!("&CHUNKS={chunks}")),
            Kind::Stuck => ("GET", "&STALL=100".into()),
            Kind::Get | Kind::Left => ("GET", String::new()),
        };
        let body = self.body();
        let head = format!(
            "{method} /ows/?SERVICE=ECHO&REQUEST=Echo&MAP={project}&TAG={tag}&SIZE={size}{more} HTTP/1.1\r\n\
             Host: localhost\r\nX-Request-Id: {tag}\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), &body].concat()
    }

    fn body(&self) -> Vec<u8> {
        match self.kind {
            Kind::Post => format!(
                "<Echo of=\"{}\">{}</Echo>",
                self.tag,
                "x".repeat(self.size as usize)
            )
            .into_bytes(),
            _ => Vec::new(),
        }
    }

    pub fn right_answer(&self) -> Vec<u8> {
        let Self { tag, size, .. } = self;
        match self.kind {
            Kind::Stream { chunks } => {
                let chunks: Vec<_> = (0..chunks)
                    .map(|i| fill(&format!("{tag}/{i}of{chunks}"), *size))
                    .collect();
                chunks.concat()
            }
            _ => [fill(tag, *size), self.body()].concat(),
        }
    }
}

fn fill(tag: &str, size: u64) -> Vec<u8> {
    let line = format!("{tag}\n").into_bytes();
    let mut filled = line.repeat(size as usize / line.len() + 1);
    filled.truncate(size as usize);
    filled
}
