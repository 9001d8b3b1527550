//! How soon qgisserver is there, how soon it is there again, what it weighs.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::Client;
use crate::memory;
use crate::peers::{self, InProcess, Place, Server};
use crate::stats::{Demands, median, ms, worst};

const STARTS: usize = 7;
const DEATHS: usize = 10;

pub fn start(place: &Place, demands: &mut Demands) {
    const CAPABILITIES: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities";
    let mut alone = Vec::new();
    let mut taken = Vec::new();
    let mut idle = Vec::new();
    for _ in 0..STARTS {
        let began = Instant::now();
        InProcess::start(place, "world").calls(1, CAPABILITIES);
        alone.push(ms(began.elapsed()));
        let server = Server::start(place, 2);
        let peer = server.serving("world");
        let target = peer.target(CAPABILITIES);
        peers::until("a first answer", || {
            let reply = Client::connect(peer.address).ok()?.get(&target).ok()?;
            (reply.status == 200).then_some(())
        });
        taken.push(ms(server.started.elapsed()));
        idle.push(memory::resident(server.pid()) as f64 / 1024.0);
    }
    println!("\nStart, 2 workers, {STARTS} times\n");
    println!(
        "- first GetCapabilities of QGIS in a Python program: median {:.0} ms",
        median(alone)
    );
    println!(
        "- first GetCapabilities: median {:.0} ms, worst {:.0} ms",
        median(taken.clone()),
        worst(&taken)
    );
    println!(
        "- the server process alone, resident: median {:.1} MB, worst {:.1} MB",
        median(idle.clone()),
        worst(&idle)
    );
    demands.at_most(
        "from exec to the first GetCapabilities, ms",
        1000.0,
        median(taken),
    );
    demands.at_most("server alone, resident MB", 30.0, worst(&idle));
}

/// SIGKILL to the only worker while it is idle; the next request has to be
/// answered by another process.
pub fn death(place: &Place, demands: &mut Demands) {
    let server = Server::start(place, 1);
    // A project that takes no time to load, which a fresh worker has to do.
    let peer = server.serving("empty");
    let target = peer.target("SERVICE=NOTHING&REQUEST=Nothing");
    let mut taken = Vec::new();
    for _ in 0..DEATHS {
        settle(&peer.pids);
        let victim = serving(&mut peer.connect(), &target).expect("a warm worker");
        peers::signal(victim, Signal::SIGKILL);
        let killed = Instant::now();
        peers::until("another worker", || {
            serving(&mut peer.connect(), &target).filter(|pid| *pid != victim)
        });
        taken.push(ms(killed.elapsed()));
    }
    println!("\nAn idle worker is killed, 1 worker and its spare, {DEATHS} times\n");
    println!(
        "- the next request is answered after: median {:.1} ms, worst {:.1} ms",
        median(taken.clone()),
        worst(&taken)
    );
    demands.at_most("after the death of an idle worker, ms", 50.0, median(taken));
}

/// The pid that the service that does nothing answers with.
fn serving(client: &mut Client, target: &str) -> Option<i32> {
    let reply = client
        .get(target)
        .ok()
        .filter(|reply| reply.status == 200)?;
    std::str::from_utf8(&reply.start).ok()?.parse().ok()
}

/// Waits until the spare is warm: until the pool uses the processor no more.
fn settle(pids: &[u32]) {
    let mut before = Duration::ZERO;
    peers::until("a new spare", || {
        // What is spent is a matter of time.
        std::thread::sleep(Duration::from_millis(500));
        let now = memory::cpu(pids);
        let spent = now.abs_diff(std::mem::replace(&mut before, now));
        (spent <= Duration::from_millis(30)).then_some(())
    });
}
