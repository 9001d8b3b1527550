//! How many requests each client and each project has here, waiting or running.

use std::collections::HashMap;

use super::waiting::Name;

#[derive(Debug, Default)]
pub struct Crowd {
    clients: HashMap<Name, usize>,
    projects: HashMap<Name, usize>,
}

impl Crowd {
    pub fn enter(&mut self, client: &Name, project: &Name) {
        *self.clients.entry(client.clone()).or_default() += 1;
        *self.projects.entry(project.clone()).or_default() += 1;
    }

    pub fn leave(&mut self, client: &Name, project: &Name) {
        one_less(&mut self.clients, client);
        one_less(&mut self.projects, project);
    }

    pub fn of_client(&self, client: &Name) -> usize {
        self.clients.get(client).copied().unwrap_or(0)
    }

    pub fn of_project(&self, project: &Name) -> usize {
        self.projects.get(project).copied().unwrap_or(0)
    }

    /// The `n` with most requests, most first.
    pub fn top_clients(&self, n: usize) -> Vec<(Name, usize)> {
        top(&self.clients, n)
    }

    pub fn top_projects(&self, n: usize) -> Vec<(Name, usize)> {
        top(&self.projects, n)
    }
}

fn one_less(of: &mut HashMap<Name, usize>, name: &Name) {
    let Some(n) = of.get_mut(name) else {
        return;
    };
    *n -= 1;
    if *n == 0 {
        of.remove(name);
    }
}

fn top(of: &HashMap<Name, usize>, n: usize) -> Vec<(Name, usize)> {
    let mut all: Vec<_> = of.iter().map(|(name, n)| (name.clone(), *n)).collect();
    all.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all.truncate(n);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_those_who_left_are_forgotten() {
        let mut crowd = Crowd::default();
        let name = Name::from;
        for (client, n) in [("a", 1), ("b", 3), ("c", 2)] {
            (0..n).for_each(|_| crowd.enter(&name(client), &name("city")));
        }
        crowd.leave(&name("a"), &name("city"));
        assert_eq!(crowd.of_client(&name("a")), 0);
        assert_eq!(crowd.top_clients(2), [(name("b"), 3), (name("c"), 2)]);
        assert_eq!(crowd.top_projects(2), [(name("city"), 5)]);
        assert_eq!(crowd.clients.len(), 2);
    }
}
