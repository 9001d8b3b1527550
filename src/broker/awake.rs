//! Whether the broker's thread waits awake for what comes next.
//!
//! To wake a processor that fell asleep takes tens of microseconds, three times for
//! each request of a lonely client, which is more than all that happens to a small
//! one here. So while at most one request runs, the thread looks again and again
//! instead of sleeping; but only where the last wait of that kind was short, that is
//! where answers take less than half a millisecond and their client asks again at
//! once. Beside maps it sleeps as any other server.
//!
//! Whoever is awake has no right to be woken: if other programs want the processor, it
//! gets it back after their turn, which is milliseconds. So it goes to sleep when that
//! happened, and for a while.

use std::time::{Duration, Instant};

/// For the answer of the only request that runs.
const FOR_AN_ANSWER: Duration = Duration::from_micros(500);

/// For the next request when none runs.
const FOR_A_REQUEST: Duration = Duration::from_micros(200);

/// Between two looks hardly anything of ours takes so long. What does, as a handshake of
/// TLS may, costs a short sleep.
const LATE: Duration = Duration::from_micros(300);

/// How long the processor is left to others who wanted it: twice as long each time that
/// they still do.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// What is waited for, and how long it took the last time.
#[derive(Debug)]
pub struct Awake {
    /// There is a processor for us beside the one for QGIS.
    possible: bool,
    n_running: usize,
    since: Instant,
    /// With none running, and with one.
    last: [Duration; 2],
    until: Option<Instant>,
    looked: Instant,
    not_before: Instant,
    pause: Duration,
}

impl Awake {
    pub fn new(now: Instant) -> Self {
        let processors = std::thread::available_parallelism();
        Self {
            possible: processors.is_ok_and(|n| n.get() > 1),
            n_running: 0,
            since: now,
            last: [Duration::MAX; 2],
            until: None,
            looked: now,
            not_before: now,
            pause: Duration::ZERO,
        }
    }

    /// So many requests run now.
    pub fn running(&mut self, n: usize, now: Instant) {
        if n == self.n_running {
            return;
        }
        self.look(now);
        if let Some(last) = self.last.get_mut(self.n_running) {
            *last = now - self.since;
        }
        self.n_running = n;
        self.since = now;
        let limit = match n {
            0 => FOR_A_REQUEST,
            1 => FOR_AN_ANSWER,
            _ => Duration::ZERO,
        };
        let soon = self.last.get(n).is_some_and(|last| *last < limit);
        let wanted = self.possible && soon && now >= self.not_before;
        self.until = wanted.then(|| now + limit);
    }

    /// Notices that others had our processor.
    fn look(&mut self, now: Instant) {
        if self.until.is_some() && now - self.looked > LATE {
            self.until = None;
            self.pause = match now < self.not_before + self.pause {
                true => (self.pause * 2).min(PAUSE_MAX),
                false => PAUSE,
            };
            self.not_before = now + self.pause;
        }
        self.looked = now;
    }

    /// Ends once waiting awake is over; never if it need not begin.
    pub async fn wait(&mut self) {
        if self.until.is_none() {
            return std::future::pending().await;
        }
        loop {
            let now = Instant::now();
            self.look(now);
            if self.until.is_none_or(|until| now >= until) {
                break;
            }
            // Whoever else wants this processor goes first.
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(100);
    const LONG: Duration = Duration::from_millis(10);

    /// Requests one after the other, each so long, with such a pause before it.
    /// Whether the wait for the last answer was awake, and that for the next request.
    fn after(requests: &[(Duration, Duration)]) -> (bool, bool) {
        let mut now = Instant::now();
        let mut awake = Awake::new(now);
        awake.possible = true;
        let mut seen = (false, false);
        for (pause, length) in requests {
            now += *pause;
            awake.running(1, now);
            seen.0 = awake.until.is_some();
            now += *length;
            awake.running(0, now);
            seen.1 = awake.until.is_some();
        }
        seen
    }

    #[test]
    fn a_lonely_client_of_small_requests_finds_us_awake() {
        assert_eq!(after(&[(LONG, SHORT)]), (false, false));
        assert_eq!(after(&[(LONG, SHORT), (SHORT, SHORT)]), (true, true));
    }

    #[test]
    fn maps_and_clients_that_pause_do_not() {
        assert_eq!(after(&[(SHORT, LONG); 3]), (false, true));
        assert_eq!(after(&[(LONG, SHORT); 3]), (true, false));
        assert_eq!(after(&[(LONG, LONG); 3]), (false, false));
    }

    #[test]
    fn several_at_once_are_no_reason_to_wait_awake() {
        let mut now = Instant::now();
        let mut awake = Awake::new(now);
        awake.possible = true;
        for n in [1, 2, 3, 2] {
            now += SHORT;
            awake.running(n, now);
            assert_eq!(awake.until, None);
        }
    }

    #[test]
    fn it_sleeps_for_longer_and_longer_while_others_want_the_processor() {
        let mut now = Instant::now();
        let mut awake = Awake::new(now);
        awake.possible = true;
        let mut request = |awake: &mut Awake, length| {
            now += SHORT;
            awake.running(1, now);
            let was_awake = awake.until.is_some();
            now += length;
            awake.running(0, now);
            was_awake
        };
        let mut slept = Vec::new();
        for _ in 0..10 {
            let mut n = 0;
            while !request(&mut awake, SHORT) {
                n += 1;
            }
            slept.push(SHORT * 2 * n);
            assert!(request(&mut awake, LATE * 2), "nobody knows yet");
        }
        let expected = |i: u32| (PAUSE * (1 << i)).min(PAUSE_MAX);
        for (i, slept) in slept[1..].iter().enumerate() {
            let expected = expected(i as u32);
            assert!(slept.abs_diff(expected) < SHORT * 20, "{i}: {slept:?}");
        }
        // It was calm for longer than it slept.
        while !request(&mut awake, SHORT) {}
        for _ in 0..PAUSE_MAX.div_duration_f64(SHORT) as usize {
            request(&mut awake, SHORT);
        }
        request(&mut awake, LATE * 2);
        assert_eq!(awake.pause, PAUSE);
    }

    #[tokio::test]
    async fn waiting_awake_ends_by_itself_and_once() {
        let now = Instant::now();
        let mut awake = Awake::new(now);
        awake.until = Some(now + SHORT);
        awake.wait().await;
        assert!(Instant::now() >= now + SHORT);
        let again = tokio::time::timeout(LONG, awake.wait()).await;
        assert!(again.is_err(), "it ended twice");
    }
}
