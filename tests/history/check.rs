//! What may have happened to a request, given what was broken: the judge of a history.

use std::collections::BTreeMap;
use std::time::Duration;

use super::chaos::Faults;
use super::question::{CHUNK, Kind, Question};
use crate::common::client::Came;

/// How a request ended, as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// 200, and all of the right answer.
    Right,
    /// 200 and a part of the right answer, visibly cut.
    Cut,
    Refused(u16),
    /// The client left.
    Left,
    /// Anything else; never right.
    Wrong(String),
}

impl End {
    pub fn of(question: &Question, came: Came) -> Self {
        let is_own = |id: &str| id == question.tag;
        match came {
            Came::Whole { id, .. } | Came::Cut { id, .. } if !is_own(&id) => {
                Self::Wrong(format!("the answer to {id:?}"))
            }
            Came::Whole {
                status: 200, body, ..
            } => match body == question.right_answer() {
                true => Self::Right,
                false => Self::Wrong(format!("another body: {}", shown(&body))),
            },
            Came::Whole { status, .. } => Self::Refused(status),
            Came::Cut {
                status: 200, body, ..
            } => {
                let right = question.right_answer();
                match body.len() < right.len() && right.starts_with(&body) {
                    true => Self::Cut,
                    // All of it, and yet no end: the worker died before it said so.
                    false if body == right => Self::Cut,
                    false => Self::Wrong(format!("cut, and another body: {}", shown(&body))),
                }
            }
            Came::Cut { status, .. } => Self::Wrong(format!("{status}, cut")),
            Came::Nothing(why) => Self::Wrong(format!("no answer: {why}")),
            Came::TooMuch(bytes) => Self::Wrong(format!("more than one answer: {}", shown(&bytes))),
        }
    }
}

fn shown(body: &[u8]) -> String {
    format!(
        "{} bytes, {:.80}",
        body.len(),
        String::from_utf8_lossy(body)
    )
}

/// One request of the history.
#[derive(Debug, Clone)]
pub struct Record {
    pub index: u64,
    pub end: End,
    pub took: Duration,
}

/// What is known besides the word of the clients.
#[derive(Debug, Default)]
pub struct Evidence {
    /// How often a request was begun by a worker, and ended by one.
    pub runs: BTreeMap<u64, (u8, u8)>,
    /// Pids of the workers that the server lost while they had a request.
    pub deaths: BTreeMap<u64, Vec<i32>>,
}

impl Evidence {
    pub fn gather(journal: &[String], log: &str) -> Self {
        let mut evidence = Self::default();
        journal.iter().for_each(|line| evidence.note(line));
        for line in log
            .lines()
            .filter(|line| line.contains("gone while serving"))
        {
            evidence.buried(line);
        }
        evidence
    }

    /// How many requests lost a worker that had been hurt.
    pub fn n_hit_by(&self, faults: &Faults) -> usize {
        let is_hurt = |pid: &i32| faults.by_pid.contains_key(pid);
        let hit = self.deaths.values().filter(|pids| pids.iter().any(is_hurt));
        hit.count()
    }

    fn note(&mut self, line: &str) {
        let Some(index) = line.get(1..).and_then(Question::index_of) else {
            return;
        };
        let (begun, ended) = self.runs.entry(index).or_default();
        match line.as_bytes()[0] {
            b'+' => *begun += 1,
            _ => *ended += 1,
        }
    }

    fn buried(&mut self, line: &str) {
        let after = |what: &str| {
            let rest = line.split_once(what)?.1;
            rest.split([' ', '"', ')']).find(|word| !word.is_empty())
        };
        let index = after("request_id=").and_then(Question::index_of);
        let pid = after("(pid ").and_then(|pid| pid.parse().ok());
        if let (Some(index), Some(pid)) = (index, pid) {
            self.deaths.entry(index).or_default().push(pid);
        }
    }
}

/// What no request may take longer than, and what they have to be.
pub struct Judge<'a> {
    pub seed: u64,
    pub n: u64,
    /// `server.timeout`.
    pub timeout: Duration,
    /// From question to answer, whatever happens.
    pub bound: Duration,
    pub evidence: &'a Evidence,
    pub faults: &'a Faults,
}

impl Judge<'_> {
    /// Everything in the history that should not be there.
    pub fn complaints(&self, history: &[Record]) -> Vec<String> {
        let mut complaints = self.missing(history);
        for record in history {
            let question = Question::new(self.seed, record.index);
            let complaint = self.of_one(&question, record);
            complaints.extend(complaint.map(|why| {
                let Question { tag, kind, .. } = &question;
                format!(
                    "{tag} {kind:?} {:?} after {:?}: {why}",
                    record.end, record.took
                )
            }));
        }
        complaints.extend(self.unexplained_deaths());
        complaints
    }

    /// Each request is in the history once.
    fn missing(&self, history: &[Record]) -> Vec<String> {
        let mut seen = vec![0; self.n as usize];
        history
            .iter()
            .for_each(|record| seen[record.index as usize] += 1);
        let odd = seen.iter().enumerate().filter(|(_, n)| **n != 1);
        odd.map(|(index, n)| format!("request {index} is in the history {n} times"))
            .collect()
    }

    fn of_one(&self, question: &Question, record: &Record) -> Option<String> {
        let (begun, ended) = self
            .evidence
            .runs
            .get(&record.index)
            .copied()
            .unwrap_or_default();
        let deaths = self.evidence.deaths.get(&record.index).map_or(0, Vec::len);
        let allowed = if question.is_retryable() { 2 } else { 1 };
        if begun > allowed {
            return Some(format!("it ran {begun} times"));
        }
        if usize::from(begun) > 1 + deaths {
            return Some(format!(
                "it ran {begun} times, and {deaths} of its workers died"
            ));
        }
        if record.took > self.bound {
            return Some("too late".into());
        }
        // In one piece it is whole or not there; and what came of it, came.
        let has_parts = question.right_answer().len() as u64 > CHUNK;
        let fine = match &record.end {
            End::Wrong(_) => false,
            End::Left => question.kind == Kind::Left,
            End::Right => ended >= 1 && question.kind != Kind::Stuck,
            End::Cut => has_parts && deaths >= 1,
            // One worker died with it, or two if it may be asked for twice.
            End::Refused(502) => deaths >= usize::from(allowed),
            // At the deadline, of what takes longer or lost the time with a worker.
            End::Refused(504) => {
                record.took >= self.timeout && (question.kind == Kind::Stuck || deaths > 0)
            }
            End::Refused(_) => false,
        };
        (!fine).then(|| format!("begun {begun}, ended {ended} times, {deaths} of its workers died"))
    }

    /// A worker dies of a fault, or of a request that is stuck.
    fn unexplained_deaths(&self) -> Vec<String> {
        let mut by_pid: BTreeMap<i32, Vec<u64>> = BTreeMap::new();
        for (index, pids) in &self.evidence.deaths {
            if Question::new(self.seed, *index).kind != Kind::Stuck {
                pids.iter()
                    .for_each(|pid| by_pid.entry(*pid).or_default().push(*index));
            }
        }
        let odd = by_pid
            .iter()
            .filter(|(pid, with)| with.len() > self.faults.by_pid.get(pid).copied().unwrap_or(0));
        odd.map(|(pid, with)| {
            format!("worker {pid} died with requests {with:?}, and nobody hurt it so often")
        })
        .collect()
    }
}

/// How many requests ended how.
pub fn tally(seed: u64, history: &[Record]) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for record in history {
        let kind = match Question::new(seed, record.index).kind {
            Kind::Stream { .. } => "Stream".to_owned(),
            kind => format!("{kind:?}"),
        };
        let end = match &record.end {
            End::Wrong(_) => "Wrong".to_owned(),
            end => format!("{end:?}"),
        };
        *tally.entry(format!("{kind} {end}")).or_default() += 1;
    }
    tally
}

/// A judge that finds nothing proves nothing.
#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 1;

    /// The first question of a kind, asked in a world without faults.
    fn question(is_it: impl Fn(Kind) -> bool) -> (u64, Question) {
        let all = (0..).map(|index| (index, Question::new(SEED, index)));
        let mut found = all.filter(|(_, question)| is_it(question.kind));
        found.next().expect("there are all kinds")
    }

    fn whole(question: &Question, status: u16, body: Vec<u8>) -> Came {
        let id = question.tag.clone();
        Came::Whole { status, id, body }
    }

    /// What the judge says of one request that ran `runs` times and lost `deaths` workers.
    fn complains(index: u64, end: End, runs: u8, deaths: usize) -> bool {
        let mut evidence = Evidence::default();
        evidence.runs.insert(index, (runs, runs.min(1)));
        evidence.deaths.insert(index, vec![7; deaths]);
        let judge = Judge {
            seed: SEED,
            n: 1,
            timeout: Duration::from_secs(1),
            bound: Duration::from_secs(2),
            evidence: &evidence,
            faults: &Faults::default(),
        };
        let took = Duration::from_millis(1500);
        let record = Record { index, end, took };
        judge.of_one(&Question::new(SEED, index), &record).is_some()
    }

    #[test]
    fn an_answer_to_another_request_is_noticed() {
        let (index, mine) = question(|kind| kind == Kind::Get);
        let other = Question::new(SEED, index + 1);
        let right = mine.right_answer();
        assert_eq!(End::of(&mine, whole(&mine, 200, right.clone())), End::Right);
        for came in [
            whole(&mine, 200, other.right_answer()),
            whole(&mine, 200, [&right[..], b"x"].concat()),
            whole(&mine, 200, Vec::new()),
            whole(&other, 200, right),
            whole(&other, 502, Vec::new()),
            Came::Nothing("closed".into()),
            Came::TooMuch(b"HTTP/1.1 200 OK".to_vec()),
        ] {
            assert!(
                matches!(End::of(&mine, came.clone()), End::Wrong(_)),
                "{came:?}"
            );
        }
    }

    #[test]
    fn a_stream_with_another_chunk_is_noticed() {
        let (_, mine) = question(|kind| matches!(kind, Kind::Stream { chunks: 3.. }));
        let cut = |body: Vec<u8>| {
            let id = mine.tag.clone();
            End::of(
                &mine,
                Came::Cut {
                    status: 200,
                    id,
                    body,
                },
            )
        };
        let right = mine.right_answer();
        assert_eq!(cut(right[..right.len() / 2].to_vec()), End::Cut);
        assert!(matches!(cut(right[1..].to_vec()), End::Wrong(_)));
        let half = right[..right.len() / 2].to_vec();
        let ended = End::of(&mine, whole(&mine, 200, half));
        assert!(matches!(ended, End::Wrong(_)), "cut, and not visibly");
    }

    #[test]
    fn what_no_fault_explains_is_noticed() {
        let (get, _) = question(|kind| kind == Kind::Get);
        let (post, _) = question(|kind| kind == Kind::Post);
        assert!(!complains(get, End::Right, 1, 0));
        assert!(!complains(get, End::Right, 2, 1), "asked for twice");
        assert!(!complains(get, End::Refused(502), 2, 2));
        assert!(!complains(post, End::Refused(502), 1, 1));
        assert!(
            complains(get, End::Refused(502), 1, 1),
            "it could be asked for twice"
        );
        assert!(complains(post, End::Refused(502), 1, 0), "no worker died");
        assert!(complains(post, End::Right, 2, 1), "a POST that ran twice");
        assert!(complains(get, End::Right, 2, 0), "twice for nothing");
        assert!(complains(get, End::Right, 0, 0), "an answer from nowhere");
        assert!(complains(get, End::Refused(504), 1, 0));
        assert!(complains(get, End::Refused(503), 0, 0));
        assert!(complains(get, End::Cut, 1, 1), "too short to be cut");
    }

    #[test]
    fn a_missing_answer_and_a_death_without_a_fault_are_noticed() {
        let (get, _) = question(|kind| kind == Kind::Get);
        let mut evidence = Evidence::default();
        evidence.deaths.insert(get, vec![7]);
        let mut faults = Faults::default();
        let complaints = |faults: &Faults| {
            let (timeout, bound) = (Duration::from_secs(1), Duration::from_secs(2));
            let evidence = &evidence;
            Judge {
                seed: SEED,
                n: 1,
                timeout,
                bound,
                evidence,
                faults,
            }
            .complaints(&[])
            .len()
        };
        assert_eq!(complaints(&faults), 2);
        faults.by_pid.insert(7, 1);
        assert_eq!(complaints(&faults), 1);
    }
}
