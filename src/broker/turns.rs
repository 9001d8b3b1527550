//! Deficit round robin: whose turn it is among those who have something to send.
//!
//! In each round everybody gets a quantum of milliseconds. Whoever takes more has
//! a deficit and sits out the rounds until it is paid; rounds in which everybody
//! would sit out are skipped, so no worker waits for them. Who comes anew, or
//! again after its deficit was paid, joins the present round behind those who
//! are in it, and has saved nothing from rounds in which it had nothing to send.
//!
//! Nothing here is slower than a look-up in a tree, however many take part.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// What a round gives to everybody, in milliseconds.
pub const QUANTUM: u64 = 100;

/// When it is whose turn: the round, then the order in which they joined it.
type Turn = (u64, u64);

#[derive(Debug)]
pub struct Turns<K> {
    round: u64,
    n_joined: u64,
    order: BTreeMap<Turn, K>,
    members: HashMap<K, Member>,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    /// What it has taken, as if it had taken all that the rounds before its first gave.
    taken: u64,
    /// None: it has nothing to send, but may have a deficit.
    turn: Option<Turn>,
}

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self {
            round: 0,
            n_joined: 0,
            order: BTreeMap::new(),
            members: HashMap::new(),
        }
    }
}

impl<K: Clone + Eq + Hash> Turns<K> {
    /// `key` has something to send.
    pub fn join(&mut self, key: &K) {
        let taken = match self.members.get(key) {
            Some(Member { turn: Some(_), .. }) => return,
            Some(Member { taken, .. }) => *taken,
            None => 0,
        };
        self.queue_up(key.clone(), taken);
    }

    /// `key` has nothing to send any more.
    pub fn leave(&mut self, key: &K) {
        let Some(member) = self.members.get_mut(key) else {
            return;
        };
        if let Some(turn) = member.turn.take() {
            self.order.remove(&turn);
        }
        if self.order.is_empty() {
            // Nobody was kept waiting, so nobody owes anything.
            *self = Self::default();
        }
    }

    /// Whose turn it is, and then whose if those before may not have theirs now.
    pub fn in_turn(&self) -> impl Iterator<Item = &K> {
        self.order.values()
    }

    /// `key`, which had something to send, took so much.
    pub fn charge(&mut self, key: &K, cost: u32) {
        let Some(Member {
            taken,
            turn: Some(turn),
        }) = self.members.get(key).copied()
        else {
            return;
        };
        self.order.remove(&turn);
        self.round = self.round.max(turn.0);
        self.queue_up(key.clone(), taken + u64::from(cost));
        self.forget_the_paid();
    }

    fn queue_up(&mut self, key: K, taken: u64) {
        let taken = taken.max(self.round * QUANTUM);
        let turn = (taken / QUANTUM, self.n_joined);
        self.n_joined += 1;
        self.order.insert(turn, key.clone());
        let turn = Some(turn);
        self.members.insert(key, Member { taken, turn });
    }

    /// Those with nothing to send and no deficit are as good as strangers.
    fn forget_the_paid(&mut self) {
        if self.members.len() <= 2 * self.order.len() + 16 {
            return;
        }
        let paid = self.round * QUANTUM;
        self.members
            .retain(|_, member| member.turn.is_some() || member.taken > paid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who is served in `n` turns, everybody always having more to send at its price.
    fn served(prices: &[(&'static str, u32)], n: usize) -> Vec<&'static str> {
        let mut turns = Turns::default();
        prices.iter().for_each(|(name, _)| turns.join(name));
        let prices: HashMap<_, _> = prices.iter().copied().collect();
        let mut turn = || {
            let name = *turns.in_turn().next().expect("all have something to send");
            turns.charge(&name, prices[name]);
            name
        };
        (0..n).map(|_| turn()).collect()
    }

    #[test]
    fn equals_take_turns() {
        assert_eq!(
            served(&[("a", 100), ("b", 100), ("c", 100)], 6),
            ["a", "b", "c", "a", "b", "c"]
        );
    }

    #[test]
    fn who_takes_ten_times_as_much_goes_a_tenth_as_often() {
        let served = served(&[("large", 1000), ("small", 100)], 110);
        let n_large = served.iter().filter(|name| **name == "large").count();
        assert!((10..=11).contains(&n_large), "{n_large}");
    }

    #[test]
    fn nobody_saves_turns_while_it_has_nothing_to_send() {
        let mut turns = Turns::default();
        turns.join(&"busy");
        for _ in 0..100 {
            turns.charge(&"busy", 500);
        }
        turns.join(&"late");
        let next = |turns: &mut Turns<_>| {
            let name = *turns.in_turn().next().unwrap();
            turns.charge(&name, 500);
            name
        };
        assert_eq!(next(&mut turns), "late");
        assert_eq!(next(&mut turns), "busy");
        assert_eq!(next(&mut turns), "late");
    }

    #[test]
    fn a_deficit_is_not_forgotten_by_leaving_for_a_moment() {
        let mut turns = Turns::default();
        turns.join(&"greedy");
        turns.join(&"modest");
        turns.charge(&"greedy", 1000);
        turns.leave(&"greedy");
        turns.join(&"greedy");
        for _ in 0..9 {
            assert_eq!(turns.in_turn().next(), Some(&"modest"));
            turns.charge(&"modest", 100);
        }
    }

    #[test]
    fn who_left_takes_no_room_for_long() {
        let mut turns = Turns::default();
        turns.join(&0);
        for passer_by in 1..10_000 {
            turns.join(&passer_by);
            turns.charge(&passer_by, 1000);
            turns.leave(&passer_by);
            turns.charge(&0, 100);
        }
        assert!(turns.members.len() < 100, "{}", turns.members.len());
        turns.leave(&0);
        assert!(turns.members.is_empty());
    }

    proptest::proptest! {
        /// What any two who always have something to send got, divided by what they
        /// may have, differs by a quantum and one request each.
        #[test]
        fn shares_differ_by_no_more_than_one_request(costs in proptest::collection::vec(1u32..5000, 200)) {
            let mut turns = Turns::default();
            let mut taken = [0u64; 3];
            (0..3).for_each(|member| turns.join(&member));
            for cost in costs {
                let member = *turns.in_turn().next().unwrap();
                turns.charge(&member, cost);
                taken[member] += u64::from(cost);
                let spread = taken.iter().max().unwrap() - taken.iter().min().unwrap();
                proptest::prop_assert!(spread <= 5000 + QUANTUM, "{taken:?}");
            }
        }
    }
}
