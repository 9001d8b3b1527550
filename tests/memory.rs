//! Memory has bounds, workers that reach them are replaced, and no request notices.

mod common;

use common::load::Load;
use common::process::is_alive;
use common::{Reply, Server, eventually};

/// Workers are looked at often, and none is missed on a busy machine.
const QUICK: &str = "zmq.heartbeat = 0.1\nzmq.heartbeat_misses = 50";

/// All workers are replaced because of `setting`, never with one less at a time, and
/// clients who ask all the time do not notice.
fn assert_recycled(server: &Server, setting: &str) {
    let before = server.workers();
    let load = Load::on(server);
    // There may be one more of them already.
    let fewest = server.wait_replaced(&before, 2);
    load.assert_served();
    assert!(fewest >= 2, "only {fewest} workers at a time");
    server.process.log.wait_line(setting);
}

fn pid(reply: &Reply) -> i32 {
    reply.json()["pid"].as_i64().expect("the stub says its pid") as i32
}

#[test]
fn workers_that_served_enough_are_replaced_and_no_request_fails() {
    let server = Server::stub(&format!("worker.recycle_requests = 40\n{QUICK}"));
    assert_recycled(&server, "worker.recycle_requests");
    server.process.log.wait_line("because=RecycledRequests");
    assert_eq!(server.process.log.count("ERROR"), 0);
}

#[test]
fn workers_that_are_old_enough_are_replaced_and_no_request_fails() {
    let server = Server::stub(&format!("worker.recycle_seconds = 4\n{QUICK}"));
    assert_recycled(&server, "worker.recycle_seconds");
}

#[test]
fn a_worker_that_grew_too_large_is_replaced() {
    let server = Server::stub("worker.recycle_memory = 200M\nworker.memory_check_seconds = 0.1");
    let large = pid(&server.act("DO=grow&MB=300"));
    eventually("it is gone", || (!is_alive(large)).then_some(()));
    server.process.log.wait_line("worker.recycle_memory");
    assert_eq!(server.act("DO=echo").status, 200);
    server.wait_workers(2);
}

/// A part of this machine's memory that is `megabytes`.
fn part_of_memory(megabytes: u64) -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total = total.unwrap().trim().split(' ').next().unwrap();
    (megabytes << 10) as f64 / total.parse::<f64>().unwrap()
}

#[test]
fn above_the_high_water_mark_the_largest_worker_is_replaced() {
    let mark = part_of_memory(500);
    let server = Server::stub(&format!(
        "server.memory_high_water_mark = {mark}\nworker.memory_check_seconds = 0.1"
    ));
    let large = pid(&server.act("DO=grow&MB=600"));
    let line = server.process.log.wait_line("replacing the largest worker");
    assert!(line.contains("server.memory_high_water_mark"), "{line}");
    eventually("it is gone", || (!is_alive(large)).then_some(()));
    server.process.log.wait_line("and it the most");
    assert_eq!(server.act("DO=echo").status, 200);
    server.wait_workers(2);
}

#[test]
fn a_pool_that_is_always_above_its_mark_says_so_and_goes_on_serving() {
    let server =
        Server::stub("server.memory_high_water_mark = 0.000001\nworker.memory_check_seconds = 0.1");
    let before = server.workers();
    server.process.log.wait_line("no worker has grown");
    assert_eq!(server.act("DO=echo").status, 200);
    assert_eq!(server.workers(), before);
}

#[test]
fn a_worker_allocates_no_more_than_its_limit() {
    let server = Server::stub("worker.memory_limit = 600M");
    assert_eq!(server.act("DO=grow&MB=100").status, 200);
    let reply = server.act("DO=grow&MB=1000");
    assert_eq!(reply.status, 500, "{}", reply.text());
    assert!(
        reply.text().contains("ServiceException"),
        "{}",
        reply.text()
    );
    server.wait_workers(2);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_worker_that_aborts_at_its_limit_has_an_obituary_that_says_so() {
    let server = Server::stub("worker.memory_limit = 600M\nserver.workers = 1");
    assert_eq!(server.act("DO=grow&MB=450").status, 200);
    server.act("DO=take&MB=500");
    let line = server.process.log.wait_line("out of memory: it had");
    assert!(
        line.contains("600M") && line.contains("GetMap of file:city"),
        "{line}"
    );
    server.process.log.wait_line("because=OutOfMemory");
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn for_want_of_memory_the_kernel_kills_a_worker_before_anybody_else() {
    let server = Server::stub("");
    let score = |pid: i32| -> i32 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
        text.unwrap().trim().parse().unwrap()
    };
    let worker = server.workers()[0];
    let pool = common::process::parent(worker);
    assert!(score(worker) > score(pool));
    assert_eq!(score(pool), score(server.process.pid()));
}

#[test]
fn an_answer_that_qgis_could_not_make_is_an_ogc_exception_and_costs_no_worker() {
    let server = Server::stub("");
    let before = server.workers();
    for what in ["DO=blank", "DO=give_up"] {
        let reply = server.act(what);
        assert_eq!(reply.status, 500, "{what}: {}", reply.text());
        let text = reply.text();
        assert!(text.contains("ServiceException"), "{what}: {text}");
    }
    assert_eq!(server.workers(), before);
}
