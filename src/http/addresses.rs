//! How many connections each address has open, and whether it may have one more.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::forwarded::network;
use crate::broker::Throttle;
use crate::config::Http;

/// How many connections one address may have; None: any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    remote: Option<usize>,
    loopback: Option<usize>,
}

impl Limit {
    /// What `config` says, or half of all, so that nobody takes everything. Then those who
    /// come through proxies have no limit, since they all have the address of one, and
    /// programs on this machine may be proxies, too.
    pub fn of(config: &Http) -> Self {
        let half = (config.connections_max / 2).max(1);
        let by_itself = (!config.http_proxy).then_some(half);
        match config.client_connections {
            Some(n) => Self {
                remote: (n > 0).then_some(n),
                loopback: (n > 0).then_some(n),
            },
            None => Self {
                remote: by_itself,
                loopback: None,
            },
        }
    }

    fn on(self, address: IpAddr) -> Option<usize> {
        match address.to_canonical().is_loopback() {
            true => self.loopback,
            false => self.remote,
        }
    }
}

/// Those that have connections, and how many.
#[derive(Debug, Default)]
pub struct Addresses {
    n_open: Mutex<HashMap<String, usize>>,
    refusals: Mutex<Throttle>,
}

impl Addresses {
    /// A place for one more connection of `address`, if it may have that many.
    pub fn enter(self: &Arc<Self>, address: IpAddr, limit: Limit) -> Option<Place> {
        let (name, limit) = (network(address), limit.on(address));
        let mut n_open = self.n_open();
        let n = n_open.get(&name).copied().unwrap_or(0);
        if let Some(limit) = limit.filter(|limit| n >= *limit) {
            drop(n_open);
            self.refused(&name, limit);
            return None;
        }
        n_open.insert(name.clone(), n + 1);
        Some(Place {
            name,
            all: self.clone(),
        })
    }

    fn refused(&self, client: &str, limit: usize) {
        let mut refusals = self.refusals.lock().expect(CALM);
        if let Some(suppressed) = refusals.allow(Instant::now()) {
            tracing::warn!(
                client,
                limit,
                suppressed,
                "a connection is refused: its address has as many as it may (limits.client_connections)"
            );
        }
    }

    fn n_open(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.n_open.lock().expect(CALM)
    }
}

const CALM: &str = "no code that holds this lock can panic";

/// Counts for its address as long as it lives.
#[derive(Debug)]
pub struct Place {
    name: String,
    all: Arc<Addresses>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut n_open = self.all.n_open();
        match n_open.get_mut(&self.name) {
            Some(n) if *n > 1 => *n -= 1,
            _ => drop(n_open.remove(&self.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const LOOPBACK: &str = "::ffff:127.0.0.1";

    fn limit(change: impl FnOnce(&mut Http)) -> Limit {
        let mut config = Config::default().http;
        config.connections_max = 7;
        change(&mut config);
        Limit::of(&config)
    }

    fn ip(address: &str) -> IpAddr {
        address.parse().expect("an address")
    }

    #[test]
    fn nobody_takes_all_connections_unless_many_may_have_one_address() {
        let on = |limit: Limit| [LOOPBACK, "192.0.2.1"].map(|it| limit.on(ip(it)));
        assert_eq!(on(limit(|_| {})), [None, Some(3)]);
        assert_eq!(on(limit(|http| http.connections_max = 1)), [None, Some(1)]);
        assert_eq!(on(limit(|http| http.http_proxy = true)), [None, None]);
        let said = |n| {
            on(limit(|http| {
                (http.http_proxy, http.client_connections) = (true, Some(n));
            }))
        };
        assert_eq!((said(5), said(0)), ([Some(5); 2], [None; 2]));
    }

    #[test]
    fn an_address_that_has_its_connections_gets_one_for_each_that_it_gives_back() {
        let all = Arc::new(Addresses::default());
        let limit = limit(|http| http.client_connections = Some(2));
        let mut one = ["192.0.2.1", "::ffff:192.0.2.1"].map(|it| all.enter(ip(it), limit));
        assert!(one.iter().all(Option::is_some));
        assert!(all.enter(ip("192.0.2.1"), limit).is_none());
        assert!(all.enter(ip("192.0.2.2"), limit).is_some());
        one[0] = None;
        let again = all.enter(ip("192.0.2.1"), limit);
        assert!(again.is_some());
        drop((one, again));
        assert!(all.n_open().is_empty());
        // Whoever has one address of IPv6 has more than can be counted.
        let many = ["2001:db8::1", "2001:db8::2", "2001:db8::3"].map(|it| all.enter(ip(it), limit));
        assert_eq!(many.iter().flatten().count(), 2);
    }
}
