//! Those who wait for a worker, and which of them is next.
//!
//! Which line is next is a matter of [`super::lanes`]. Within a line clients take
//! turns, and within a client its projects do ([`super::turns`]); what a client
//! wants of one project goes in order of arrival. A request whose worker died has
//! had its turn and goes ahead of all but our own workers' requests.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::lanes::{Line, PATIENCE};
use super::turns::Turns;

/// The number of a request, as on the wire.
type Id = u64;

/// Of a client or a project. Cheap to clone.
pub type Name = Arc<str>;

/// What decides when a request is next.
#[derive(Debug, Clone)]
pub struct Wish {
    pub line: Line,
    pub client: Name,
    pub project: Name,
    /// Estimated milliseconds.
    pub cost: u32,
    /// It waits no longer than that.
    pub due: Instant,
}

/// All who wait, each with what belongs to it.
#[derive(Debug)]
pub struct Waiting<T> {
    seats: HashMap<Id, Seat<T>>,
    rows: [Row; Line::ALL.len()],
    /// Those that had their turn before, in the order in which they came back.
    again: BTreeMap<u64, Id>,
    dues: BTreeSet<(Instant, Id)>,
    n_came: u64,
}

#[derive(Debug)]
struct Seat<T> {
    wish: Wish,
    /// Of its arrival.
    number: u64,
    is_again: bool,
    item: T,
}

/// One line.
#[derive(Debug, Default)]
struct Row {
    n: usize,
    /// How often another line went first since this one was served or empty.
    passed: u32,
    turns: Turns<Name>,
    clients: HashMap<Name, Client>,
}

/// What one client waits for in one line.
#[derive(Debug, Default)]
struct Client {
    turns: Turns<Name>,
    /// Per project, in order of arrival.
    projects: HashMap<Name, BTreeMap<u64, Id>>,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            seats: HashMap::new(),
            rows: Default::default(),
            again: BTreeMap::new(),
            dues: BTreeSet::new(),
            n_came: 0,
        }
    }
}

impl<T> Waiting<T> {
    pub fn len(&self) -> usize {
        self.seats.len()
    }

    pub fn is_empty(&self) -> bool {
        self.seats.is_empty()
    }

    /// The line in which it waits.
    #[cfg(test)]
    pub fn line_of(&self, id: Id) -> Option<Line> {
        self.seats.get(&id).map(|seat| seat.wish.line)
    }

    pub fn n_in(&self, line: Line) -> usize {
        let again = self
            .again
            .values()
            .filter(|id| self.seats[id].wish.line == line);
        self.rows[line as usize].n + again.count()
    }

    /// Those in `line`.
    pub fn of(&self, line: Line) -> impl Iterator<Item = &T> {
        let again = self
            .again
            .values()
            .filter(move |id| self.seats[id].wish.line == line);
        let ids = self.rows[line as usize].ids().chain(again);
        ids.map(|id| &self.seats[id].item)
    }

    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.seats.iter().map(|(id, seat)| (*id, &seat.item))
    }

    /// When the first of them has waited long enough.
    pub fn next_due(&self) -> Option<Instant> {
        self.dues.first().map(|(due, _)| *due)
    }

    /// It came.
    pub fn push(&mut self, id: Id, wish: Wish, item: T) {
        let seat = self.seat(id, wish, item);
        self.rows[seat.wish.line as usize].push(id, &seat.wish, seat.number);
        self.seats.insert(id, seat);
    }

    /// It was next before, and comes back.
    pub fn push_again(&mut self, id: Id, wish: Wish, item: T) {
        let mut seat = self.seat(id, wish, item);
        seat.is_again = true;
        self.again.insert(seat.number, id);
        self.seats.insert(id, seat);
    }

    fn seat(&mut self, id: Id, wish: Wish, item: T) -> Seat<T> {
        self.n_came += 1;
        self.dues.insert((wish.due, id));
        Seat {
            wish,
            number: self.n_came,
            is_again: false,
            item,
        }
    }

    /// It does not wait any more.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        let seat = self.seats.remove(&id)?;
        self.dues.remove(&(seat.wish.due, id));
        match seat.is_again {
            true => drop(self.again.remove(&seat.number)),
            false => self.rows[seat.wish.line as usize].remove(&seat.wish, seat.number),
        }
        Some(seat.item)
    }

    /// One that has waited long enough.
    pub fn pop_due(&mut self, now: Instant) -> Option<(Id, T)> {
        let (_, id) = *self.dues.first().filter(|(due, _)| *due <= now)?;
        self.remove(id).map(|item| (id, item))
    }

    /// The next one whose line is open and whose project has room; it has had its turn then.
    pub fn pop(
        &mut self,
        is_open: impl Fn(Line) -> bool,
        has_room: impl Fn(&Name) -> bool,
    ) -> Option<(Id, T)> {
        let id = self.next(&is_open, &has_room)?;
        let seat = &self.seats[&id];
        if !seat.is_again {
            let (line, wish) = (seat.wish.line, seat.wish.clone());
            self.pass_over(line, &is_open, &has_room);
            self.rows[line as usize].charge(&wish);
        }
        self.remove(id).map(|item| (id, item))
    }

    /// Who is next if these lines are open and these projects have room.
    pub fn next(
        &self,
        is_open: &impl Fn(Line) -> bool,
        has_room: &impl Fn(&Name) -> bool,
    ) -> Option<Id> {
        if let Some(id) = self.rows[Line::Own as usize].first(&|_| true) {
            return Some(id);
        }
        let may = |id: &&Id| {
            let wish = &self.seats[*id].wish;
            is_open(wish.line) && has_room(&wish.project)
        };
        let again = self.again.values().find(may).copied();
        again.or_else(|| self.next_in_line(is_open, has_room))
    }

    /// Of the first line, unless another one was passed over too often.
    fn next_in_line(
        &self,
        is_open: &impl Fn(Line) -> bool,
        has_room: &impl Fn(&Name) -> bool,
    ) -> Option<Id> {
        let open = Line::ALL.into_iter().filter(|line| is_open(*line));
        let mut lines = open.filter_map(|line| {
            let row = &self.rows[line as usize];
            Some((row.passed, row.first(has_room)?))
        });
        let (_, first) = lines.next()?;
        let impatient = lines.filter(|(passed, _)| *passed >= PATIENCE);
        let most = impatient.max_by_key(|(passed, _)| *passed);
        Some(most.map_or(first, |(_, id)| id))
    }

    fn pass_over(
        &mut self,
        served: Line,
        is_open: &impl Fn(Line) -> bool,
        has_room: &impl Fn(&Name) -> bool,
    ) {
        for line in Line::ALL {
            let row = &mut self.rows[line as usize];
            if line == served || row.n == 0 {
                row.passed = 0;
            } else if is_open(line) && row.first(has_room).is_some() {
                row.passed += 1;
            }
        }
    }

    /// Those of `project` wait in another line from now on, in the order in which they came.
    /// `tell` says it to what belongs to them.
    pub fn move_project(&mut self, project: &Name, to: Line, tell: impl Fn(&mut T)) {
        let mut moved: Vec<(u64, Id)> = self
            .seats
            .iter()
            .filter(|(_, seat)| seat.wish.project == *project && seat.wish.line != Line::Own)
            .map(|(id, seat)| (seat.number, *id))
            .collect();
        moved.sort_unstable();
        for (number, id) in moved {
            let seat = self.seats.get_mut(&id).expect("it was found above");
            if !seat.is_again {
                self.rows[seat.wish.line as usize].remove(&seat.wish, number);
                self.rows[to as usize].push(id, &seat.wish, number);
            }
            seat.wish.line = to;
            tell(&mut seat.item);
        }
    }

    /// All of them go.
    pub fn drain(&mut self) -> impl Iterator<Item = (Id, T)> {
        let seats = std::mem::take(self).seats;
        seats.into_iter().map(|(id, seat)| (id, seat.item))
    }
}

impl Row {
    fn push(&mut self, id: Id, wish: &Wish, number: u64) {
        self.n += 1;
        self.turns.join(&wish.client);
        let client = self.clients.entry(wish.client.clone()).or_default();
        client.turns.join(&wish.project);
        let project = client.projects.entry(wish.project.clone()).or_default();
        project.insert(number, id);
    }

    /// Of the projects that have room.
    fn first(&self, has_room: &impl Fn(&Name) -> bool) -> Option<Id> {
        let mut clients = self.turns.in_turn().map(|name| &self.clients[name]);
        clients.find_map(|client| {
            let project = client.turns.in_turn().find(|project| has_room(project))?;
            client.projects[project].values().next().copied()
        })
    }

    fn ids(&self) -> impl Iterator<Item = &Id> {
        let projects = self
            .clients
            .values()
            .flat_map(|client| client.projects.values());
        projects.flat_map(|project| project.values())
    }

    /// Before it is removed.
    fn charge(&mut self, wish: &Wish) {
        self.turns.charge(&wish.client, wish.cost);
        if let Some(client) = self.clients.get_mut(&wish.client) {
            client.turns.charge(&wish.project, wish.cost);
        }
    }

    fn remove(&mut self, wish: &Wish, number: u64) {
        let client = self.clients.get_mut(&wish.client).expect("it waits here");
        let project = client
            .projects
            .get_mut(&wish.project)
            .expect("it waits here");
        project.remove(&number);
        self.n -= 1;
        if self.n == 0 {
            self.passed = 0;
        }
        if project.is_empty() {
            client.projects.remove(&wish.project);
            client.turns.leave(&wish.project);
        }
        if client.projects.is_empty() {
            self.clients.remove(&wish.client);
            self.turns.leave(&wish.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Requests that remember whose they are.
    struct Room {
        waiting: Waiting<&'static str>,
        now: Instant,
        last: Id,
    }

    impl Room {
        fn new() -> Self {
            Self {
                waiting: Waiting::default(),
                now: Instant::now(),
                last: 0,
            }
        }

        fn come(&mut self, client: &'static str, project: &str, line: Line, cost: u32) -> Id {
            self.last += 1;
            let wish = self.wish(client, project, line, cost);
            self.waiting.push(self.last, wish, client);
            self.last
        }

        fn wish(&self, client: &str, project: &str, line: Line, cost: u32) -> Wish {
            Wish {
                line,
                client: client.into(),
                project: project.into(),
                cost,
                due: self.now + Duration::from_secs(self.last),
            }
        }

        fn map(&mut self, client: &'static str) -> Id {
            self.come(client, "city", Line::Maps, 100)
        }

        fn pop(&mut self) -> Option<Id> {
            self.waiting.pop(|_| true, |_| true).map(|(id, _)| id)
        }

        fn clients(&mut self, n: usize) -> Vec<&'static str> {
            (0..n)
                .map_while(|_| self.waiting.pop(|_| true, |_| true))
                .map(|(_, client)| client)
                .collect()
        }
    }

    #[test]
    fn a_lone_client_is_served_in_order_of_arrival() {
        let mut room = Room::new();
        let came: Vec<Id> = (0..50)
            .map(|n| room.come("a", "city", Line::Maps, 1 + n * 37 % 900))
            .collect();
        let went: Vec<Id> = std::iter::from_fn(|| room.pop()).collect();
        assert_eq!(went, came);
    }

    #[test]
    fn two_hundred_requests_of_one_client_do_not_delay_another_by_more_than_one() {
        let mut room = Room::new();
        for _ in 0..200 {
            room.map("greedy");
        }
        room.clients(20);
        room.map("modest");
        room.map("modest");
        let next = room.clients(4);
        assert_eq!(
            next.iter().filter(|client| **client == "modest").count(),
            2,
            "{next:?}"
        );
    }

    #[test]
    fn a_clients_projects_take_turns() {
        let mut room = Room::new();
        let city: Vec<Id> = (0..3)
            .map(|_| room.come("a", "city", Line::Maps, 100))
            .collect();
        let village = room.come("a", "village", Line::Maps, 100);
        let went: Vec<Id> = std::iter::from_fn(|| room.pop()).collect();
        assert_eq!(went, [city[0], village, city[1], city[2]]);
    }

    #[test]
    fn who_asks_for_expensive_things_gets_fewer_of_them() {
        let mut room = Room::new();
        for _ in 0..100 {
            room.come("large", "city", Line::Maps, 1000);
            room.come("small", "city", Line::Maps, 100);
        }
        let n_large = room
            .clients(77)
            .iter()
            .filter(|client| **client == "large")
            .count();
        assert!((7..=8).contains(&n_large), "{n_large}");
    }

    #[test]
    fn maps_go_ahead_of_legends_which_do_not_starve() {
        let mut room = Room::new();
        let legend = room.come("a", "city", Line::Papers, 10);
        let maps: Vec<Id> = (0..9).map(|_| room.map("a")).collect();
        let went: Vec<Id> = (0..5).filter_map(|_| room.pop()).collect();
        assert_eq!(went[..4], maps[..4]);
        assert_eq!(went[4], legend);
    }

    #[test]
    fn a_closed_line_waits_and_is_not_passed_over_meanwhile() {
        let mut room = Room::new();
        let print = room.come("a", "city", Line::Held, 5000);
        let maps: Vec<Id> = (0..9).map(|_| room.map("a")).collect();
        for map in &maps[..8] {
            let popped = room.waiting.pop(|line| !line.is_long(), |_| true);
            assert_eq!(popped.map(|(id, _)| id), Some(*map));
        }
        assert_eq!(room.pop(), Some(maps[8]));
        assert_eq!(room.waiting.pop(|line| !line.is_long(), |_| true), None);
        assert_eq!(room.pop(), Some(print));
    }

    #[test]
    fn a_project_that_may_not_is_passed_over_and_keeps_its_turn() {
        let mut room = Room::new();
        let city = [room.map("a"), room.map("a")];
        let legend = room.come("a", "city", Line::Papers, 10);
        let lake = ["a", "a", "b"].map(|client| room.come(client, "lake", Line::Maps, 100));
        let pop = |room: &mut Room, closed: &str| {
            let popped = room.waiting.pop(|_| true, |project| **project != *closed);
            popped.map(|(id, _)| id)
        };
        let went = [0; 4].map(|_| pop(&mut room, "city"));
        assert_eq!(went, [Some(lake[0]), Some(lake[2]), Some(lake[1]), None]);
        let village = room.come("a", "village", Line::Maps, 100);
        let went = [0; 4].map(|_| pop(&mut room, ""));
        assert_eq!(went, [city[0], village, city[1], legend].map(Some));
    }

    #[test]
    fn a_request_of_our_own_worker_goes_first_and_one_that_comes_back_second() {
        let mut room = Room::new();
        let map = room.map("a");
        let back = room.map("b");
        let item = room.waiting.remove(back).unwrap();
        let wish = room.wish("b", "city", Line::Maps, 100);
        room.waiting.push_again(back, wish, item);
        let own = room.come("self", "base", Line::Own, 100);
        assert_eq!(
            [room.pop(), room.pop(), room.pop()],
            [Some(own), Some(back), Some(map)]
        );
        assert_eq!(room.pop(), None);
    }

    #[test]
    fn what_comes_back_waits_for_its_lane_and_keeps_nobody() {
        let mut room = Room::new();
        let wish = room.wish("a", "city", Line::Held, 100);
        room.waiting.push_again(99, wish, "a");
        let map = room.map("a");
        let popped = room.waiting.pop(|line| !line.is_long(), |_| true);
        assert_eq!(popped.map(|(id, _)| id), Some(map));
        assert_eq!(room.pop(), Some(99));
    }

    #[test]
    fn a_project_moves_to_another_line_in_order_of_arrival() {
        let mut room = Room::new();
        let city: Vec<Id> = (0..5).map(|_| room.map("a")).collect();
        let village = room.come("a", "village", Line::Maps, 100);
        room.waiting
            .move_project(&"city".into(), Line::Held, |_| {});
        assert_eq!(
            (room.waiting.n_in(Line::Held), room.waiting.n_in(Line::Maps)),
            (5, 1)
        );
        assert_eq!(room.pop(), Some(village));
        let went: Vec<Id> = std::iter::from_fn(|| room.pop()).collect();
        assert_eq!(went, city);
    }

    #[test]
    fn whoever_waited_long_enough_is_found_without_looking_at_the_others() {
        let mut room = Room::new();
        let ids: Vec<Id> = (0..10).map(|_| room.map("a")).collect();
        room.waiting.remove(ids[1]);
        let now = room.now + Duration::from_secs(3);
        let due: Vec<Id> = std::iter::from_fn(|| room.waiting.pop_due(now))
            .map(|(id, _)| id)
            .collect();
        assert_eq!(due, [ids[0], ids[2]]);
        assert_eq!(
            room.waiting.next_due(),
            Some(room.now + Duration::from_secs(4))
        );
    }

    #[test]
    fn ten_thousand_waiting_are_served_in_a_moment() {
        let began = Instant::now();
        let mut room = Room::new();
        const CLIENTS: [&str; 4] = ["a", "b", "c", "d"];
        for n in 0..10_000 {
            room.come(
                CLIENTS[n % 4],
                &format!("project {}", n % 100),
                Line::ALL[n % 5],
                n as u32 % 3000,
            );
        }
        while room.pop().is_some() {}
        // In squares it would take minutes without optimisation.
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    mod whatever_happens {
        use proptest::prelude::*;

        use super::*;

        #[derive(Debug, Clone)]
        enum Event {
            Come {
                client: usize,
                project: usize,
                line: usize,
                cost: u32,
            },
            Pop {
                open: u8,
            },
            Remove(usize),
            Back(usize),
            Move(usize, usize),
        }

        const NAMES: [&str; 4] = ["a", "b", "c", "d"];

        fn event() -> impl Strategy<Value = Event> {
            prop_oneof![
                4 => (0usize..4, 0usize..4, 0usize..5, 1u32..4000)
                    .prop_map(|(client, project, line, cost)| Event::Come { client, project, line, cost }),
                3 => any::<u8>().prop_map(|open| Event::Pop { open }),
                1 => (0usize..64).prop_map(Event::Remove),
                1 => (0usize..64).prop_map(Event::Back),
                1 => (0usize..4, 1usize..5).prop_map(|(project, to)| Event::Move(project, to)),
            ]
        }

        proptest! {
            /// Each is in one place, leaves once, and an open line with somebody in it
            /// always has a next one.
            #[test]
            fn nobody_is_lost_or_served_twice(events in prop::collection::vec(event(), 1..200)) {
                let mut room = Room::new();
                let mut here = Vec::new();
                for event in events {
                    match event {
                        Event::Come { client, project, line, cost } => {
                            here.push(room.come(NAMES[client], NAMES[project], Line::ALL[line], cost));
                        }
                        Event::Pop { open } => {
                            let is_open = |line: Line| line == Line::Own || open & (1 << line as u8) != 0;
                            let waits = Line::ALL.into_iter().any(|line| is_open(line) && room.waiting.n_in(line) > 0);
                            let popped = room.waiting.pop(is_open, |_| true);
                            prop_assert_eq!(popped.is_some(), waits);
                            if let Some((id, _)) = popped {
                                prop_assert!(here.contains(&id), "{} went twice", id);
                                here.retain(|other| *other != id);
                            }
                        }
                        Event::Remove(at) => {
                            if let Some(id) = here.get(at).copied() {
                                prop_assert!(room.waiting.remove(id).is_some());
                                here.remove(at);
                                prop_assert!(room.waiting.remove(id).is_none());
                            }
                        }
                        Event::Back(at) => {
                            if let Some(id) = here.get(at).copied() {
                                let item = room.waiting.remove(id).unwrap();
                                let wish = room.wish(item, "a", Line::Held, 1);
                                room.waiting.push_again(id, wish, item);
                            }
                        }
                        Event::Move(project, to) => {
                            room.waiting.move_project(&NAMES[project].into(), Line::ALL[to], |_| {});
                        }
                    }
                    let n: usize = Line::ALL.into_iter().map(|line| room.waiting.n_in(line)).sum();
                    prop_assert_eq!((n, room.waiting.len()), (here.len(), here.len()));
                }
                while room.pop().is_some() {}
                prop_assert!(room.waiting.is_empty() && room.waiting.next_due().is_none());
            }

            /// A line in which somebody waits is passed over a bounded number of times.
            #[test]
            fn no_line_starves(lines in prop::collection::vec(1usize..5, 100)) {
                let mut room = Room::new();
                let mut passed = [0; 5];
                for line in lines {
                    // Always some of each but `Own`, and a random one more.
                    for line in 1..5 {
                        room.come("a", "city", Line::ALL[line], 10);
                    }
                    room.come("a", "city", Line::ALL[line], 10);
                    let id = room.waiting.next(&|_| true, &|_| true).unwrap();
                    let served = room.waiting.seats[&id].wish.line;
                    room.pop();
                    passed.iter_mut().for_each(|n| *n += 1);
                    passed[served as usize] = 0;
                    let most = PATIENCE as usize + Line::ALL.len();
                    prop_assert!(passed[1..].iter().all(|n| *n <= most), "{:?}", passed);
                }
            }
        }
    }
}
