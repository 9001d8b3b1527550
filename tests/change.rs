//! Change without loss: settings, certificates and the program itself are replaced while
//! clients ask without pause, and none of them notices.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use common::load::{EVERY_MANNER, Load};
use common::process::{self, is_alive, parent, threads, try_parent, user_of};
use common::tls::Certificate;
use common::{MANAGED, Pool, SOON, Server, World, eventually, http, kill, path_of, poll};
use nix::sys::signal::Signal;
use tokio_rustls::rustls;

const PROGRAM: &str = env!("CARGO_BIN_EXE_qgisserver");

/// Files that an operator changes: the settings, and a copy of the program.
struct Files {
    file: PathBuf,
    program: PathBuf,
}

impl Files {
    fn of(world: &World, settings: &str) -> Self {
        let files = Self {
            file: world.path("q.conf"),
            program: world.path("qgisserver"),
        };
        files.write(settings);
        files.install(Path::new(PROGRAM));
        files
    }

    fn write(&self, settings: &str) {
        std::fs::write(&self.file, settings).unwrap();
    }

    /// Reading a pipe into which nobody writes is like reading from a server that is gone.
    fn hang(&self) {
        std::fs::remove_file(&self.file).unwrap();
        nix::unistd::mkfifo(&self.file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }

    /// It is a file with `settings` again. Whoever waits for it still gets what is too late,
    /// and nobody comes to wait for it meanwhile.
    fn come_back(&self, too_late: &str, settings: &str) {
        let [pipe, new] = ["pipe", "new"].map(|name| self.file.with_extension(name));
        std::fs::hard_link(&self.file, &pipe).unwrap();
        std::fs::write(&new, settings).unwrap();
        std::fs::rename(new, &self.file).unwrap();
        std::fs::write(&pipe, too_late).unwrap();
        std::fs::remove_file(pipe).unwrap();
    }

    /// As a package manager does it: the running program's file goes, another has its name.
    fn install(&self, program: &Path) {
        let new = self.program.with_extension("new");
        process::install(program, &new);
        std::fs::rename(new, &self.program).unwrap();
    }

    fn install_script(&self, script: &str) {
        let new = self.program.with_extension("sh");
        process::install_script(script, &new);
        std::fs::rename(new, &self.program).unwrap();
    }
}

fn start(settings: &str, flags: &str) -> (Server, Files) {
    let world = World::stub();
    let files = Files::of(&world, settings);
    let server = Server::start_from(world, &files.program, &files.file, flags);
    (server.ready(), files)
}

// Settings.

#[test]
fn sighup_brings_new_limits_a_new_log_level_and_more_workers() {
    let (server, files) = start("[server]\nworkers = 2\n", "");
    let before = server.workers();
    let long = format!("/ows/?MAP=city&X={}", "x".repeat(300));
    assert_eq!(server.get(&long).status, 400);
    assert_eq!(server.process.log.count(" DEBUG "), 0);
    files.write(
        "[server]\nworkers = 3\nuri_max = 256\nhttp_threads = 3\n[logging]\nlevel = debug\n\
         [api:own]\nWELCOME = 1\n[metadata]\ntitle = New\n",
    );
    server.signal(Signal::SIGHUP);
    server.wait_replaced(&before, 3);
    assert_eq!(server.get(&long).status, 414);
    assert!(server.get("/").text().contains("New"));
    server.process.log.wait_line(" DEBUG ");
    let log = &server.process.log;
    let line = log.wait_line("server.http_threads");
    assert!(
        line.contains("WARN") && line.contains(r#"server.http_threads: "3", was "2""#),
        "{line}"
    );
    assert!(
        log.wait_line("server.uri_max")
            .contains(r#""256", was "32K""#)
    );
    let environment = server.act("DO=echo").json()["environment"].to_string();
    assert!(environment.contains("WELCOME"), "{environment}");
    files.write("[server]\nworkers = 1\n[logging]\njson = yes\n");
    server.signal(Signal::SIGHUP);
    server.wait_workers(1);
    assert_eq!(server.get(&long).status, 400);
    eventually("a line of JSON", || {
        let text = log.text();
        text.lines()
            .last()
            .filter(|line| line.starts_with('{'))
            .map(drop)
    });
    eventually("the variable went", || {
        let environment = server.act("DO=echo").json()["environment"].to_string();
        (!environment.contains("WELCOME")).then_some(())
    });
}

#[test]
fn a_stop_waits_for_what_runs_on_as_long_as_the_settings_say_by_then() {
    let calm = "[server]\ntimeout = 1\ndrain_timeout = 300\nrun_on_timeout = ";
    let (mut server, files) = start(&format!("{calm}300\n"), "");
    server.leave_behind("DO=wait&FOR=nothing&MARK=running");
    files.write(&format!("{calm}0.1\n"));
    server.signal(Signal::SIGHUP);
    server.process.log.wait_line("replacing the workers");
    // It would take five minutes.
    assert!(server.process.stop().success());
}

#[test]
fn sighup_with_a_broken_file_changes_nothing_and_reports_every_mistake() {
    let (server, files) = start("[server]\nuri_max = 32K\n", "");
    let before = server.workers();
    files.write("[server]\nuri_max = 256\nworkers = none\nprot = 1\n");
    server.signal(Signal::SIGHUP);
    let log = &server.process.log;
    for (line, name) in [(3, "server.workers"), (4, "server.prot")] {
        let said = log.wait_line(&format!("q.conf:{line}: {name}"));
        assert!(said.contains("ERROR"), "{said}");
    }
    log.wait_line("nothing changes");
    let long = format!("/ows/?MAP=city&X={}", "x".repeat(300));
    assert_eq!(server.get(&long).status, 400);
    // Once it is mended, it counts. Nobody was replaced meanwhile.
    assert_eq!(server.workers(), before);
    files.write("[server]\nuri_max = 256\n");
    server.signal(Signal::SIGHUP);
    eventually("the limit is new", || {
        (server.get(&long).status == 414).then_some(())
    });
    log.wait_line("replacing the workers, one");
    assert_eq!(log.count("replacing the workers, one"), 1);
}

/// A pool on its own reads its own file.
#[test]
fn a_pool_on_its_own_reads_its_settings_again_and_keeps_them_when_they_are_broken() {
    let world = World::stub();
    let gate = common::free_address();
    let file = world.path("pool.conf");
    std::fs::write(&file, "[server]\nworkers = 1\n").unwrap();
    let server = Server::proxy_at(world, SocketAddr::from(([127, 0, 0, 1], 0)), gate, "");
    let pool = Pool::start_from(&server.world, gate, &file);
    server.wait_workers(1);
    let first = server.workers();
    std::fs::write(&file, "[server]\nworkers = 2\n").unwrap();
    pool.process.signal(Signal::SIGHUP);
    pool.process.log.wait_line("left for a newer one");
    server.wait_replaced(&first, 2);
    let before = server.workers();
    std::fs::write(&file, "[server]\nworkers = lots\n").unwrap();
    // The server's own word reaches it, too.
    server.signal(Signal::SIGHUP);
    pool.process.log.wait_line("pool.conf:2: server.workers");
    assert_eq!(server.workers(), before);
}

/// A pool whose file cannot be read yet can hear nothing.
#[test]
fn a_pool_that_is_told_to_read_its_settings_again_while_it_starts_lives_on() {
    let world = World::stub();
    let file = world.path("pool.conf");
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let gate = common::free_address();
    let http = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::proxy_at(world, http, gate, "");
    let pool = Pool::start_from(&server.world, gate, &file);
    // It reads, because this could be opened; and what it reads has no end yet.
    let mut writer = std::fs::File::options().write(true).open(&file).unwrap();
    pool.process.signal(Signal::SIGHUP);
    // Not before it read the settings for the first time.
    std::fs::remove_file(&file).unwrap();
    let settings = "[server]\nworkers = 1\n";
    std::fs::write(&file, settings).unwrap();
    writer.write_all(settings.as_bytes()).unwrap();
    drop(writer);
    server.wait_workers(1);
    pool.process.log.wait_line("replacing the workers");
}

/// The certificate that a new connection gets.
fn shown(address: SocketAddr, certificate: &Certificate) -> Vec<u8> {
    let mut client = certificate.client("http/1.1");
    let mut socket = http::connect(address);
    while client.is_handshaking() {
        client.complete_io(&mut socket).unwrap();
    }
    client.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn a_handshake_that_began_before_the_stop_is_finished_and_its_request_answered() {
    let world = World::stub();
    let certificate = Certificate::of(&world);
    let settings = format!("{}server.drain_idle = 10", certificate.settings("server"));
    let mut server = Server::start_tls(world, &settings);
    let mut client = certificate.client("http/1.1");
    let mut socket = http::connect(server.address);
    client.write_tls(&mut socket).unwrap();
    // Its answer is here: the server has accepted.
    socket.peek(&mut [0]).unwrap();
    server.signal(Signal::SIGTERM);
    eventually("nobody listens", || {
        TcpStream::connect(server.address).err()
    });
    let mut stream = rustls::Stream::new(&mut client, &mut socket);
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        path_of("DO=echo")
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    drop(socket);
    assert!(server.process.stop().success());
}

#[test]
fn sighup_brings_a_new_certificate_and_keeps_the_old_one_when_it_is_broken() {
    renew_the_certificate("server", "", |server| server.address);
}

#[test]
fn sighup_brings_the_management_a_new_certificate_and_keeps_the_old_one_when_it_is_broken() {
    renew_the_certificate("management", MANAGED, |server| {
        let address = server.management();
        address.strip_prefix("https://").unwrap().parse().unwrap()
    });
}

fn renew_the_certificate(section: &str, more: &str, address: impl Fn(&Server) -> SocketAddr) {
    let world = World::stub();
    let mut certificate = Certificate::of(&world);
    let settings = format!("{}{more}", certificate.settings(section));
    let server = Server::start_tls(world, &settings);
    let address = address(&server);
    let first = shown(address, &certificate);
    std::fs::write(&certificate.key, "broken").unwrap();
    server.signal(Signal::SIGHUP);
    let line = server.process.log.wait_line("the old certificate stays");
    assert!(
        line.contains("ERROR") && line.contains(&format!("{section}.ssl_key")),
        "{line}"
    );
    assert_eq!(shown(address, &certificate), first);
    let second = certificate.renew().to_vec();
    server.signal(Signal::SIGHUP);
    eventually("the new certificate", || {
        (shown(address, &certificate) == second).then_some(())
    });
}

#[test]
fn a_file_system_that_hangs_holds_up_no_request_and_no_stop() {
    let (mut server, files) = start("[server]\nreload_timeout = 2\n", "");
    let before = server.workers();
    let hang = || {
        files.hang();
        server.signal(Signal::SIGHUP);
    };
    hang();
    let log = server.process.log.clone();
    log.wait_line("SIGHUP: reading");
    assert_eq!(server.act("DO=echo").status, 200);
    let line = log.wait_line("server.reload_timeout");
    assert!(
        line.contains("ERROR") && line.contains("nothing changes"),
        "{line}"
    );
    server.signal(Signal::SIGHUP);
    log.wait_line("still being read");
    files.come_back(
        "[server]\nworkers = 1\n",
        "[server]\nuri_max = 256\nreload_timeout = 2\n",
    );
    assert_eq!(server.workers(), before);
    let long = format!("/ows/?MAP=city&X={}", "x".repeat(300));
    server.signal(Signal::SIGHUP);
    eventually("the next one counts", || {
        (server.get(&long).status == 414).then_some(())
    });
    // The pool has read them, too.
    log.wait_line("replacing the workers, one");
    hang();
    eventually("it hangs again", || {
        (log.count("(server.reload_timeout)") >= 2).then_some(())
    });
    assert!(server.process.stop().success());
}

/// Nobody stands by to touch it a second time.
#[test]
fn a_touch_while_the_file_system_hangs_counts_when_that_is_back() {
    let world = World::stub();
    let files = Files::of(&world, "[server]\nreload_timeout = 2\n");
    let touched = world.path("restartmon");
    std::fs::write(&touched, "").unwrap();
    let flags = format!(
        "server.restartmon = {}\nserver.restartmon_check_time = 100",
        touched.display()
    );
    let server = Server::start_from(world, &files.program, &files.file, &flags).ready();
    files.hang();
    let file = std::fs::File::options().write(true).open(&touched).unwrap();
    let later = SystemTime::now() + Duration::from_secs(5);
    file.set_modified(later).unwrap();
    server.process.log.wait_line("(server.reload_timeout)");
    files.come_back("", "[server]\nuri_max = 256\n");
    let long = format!("/ows/?MAP=city&X={}", "x".repeat(300));
    eventually("the touch counts", || {
        (server.get(&long).status == 414).then_some(())
    });
}

/// Their server could read them a moment ago.
#[test]
fn a_pool_whose_settings_hang_goes_on_to_replace_workers_and_to_end() {
    let settings = "[server]\nreload_timeout = 1000\n[logging]\nlevel = debug\n";
    let (mut server, files) = start(settings, "");
    let before = server.workers();
    files.hang();
    kill(parent(before[0]), Signal::SIGHUP);
    let log = server.process.log.clone();
    log.wait_line("a child reads the pool's settings");
    kill(before[0], Signal::SIGKILL);
    server.wait_replaced(&before[..1], 2);
    assert_eq!(server.act("DO=echo").status, 200);
    assert!(server.process.stop().success());
    assert_eq!(log.count("settings cannot be read"), 0);
}

#[test]
fn a_pool_gives_up_settings_that_hang_and_reads_them_when_they_are_back() {
    let settings = "[server]\nreload_timeout = 2\n[logging]\nlevel = debug\n";
    let (server, files) = start(settings, "");
    let before = server.workers();
    let pool = parent(before[0]);
    files.hang();
    kill(pool, Signal::SIGHUP);
    let log = &server.process.log;
    let line = log.wait_line("the pool's settings cannot be read within 2s");
    assert!(
        line.contains("ERROR") && line.contains("server.reload_timeout"),
        "{line}"
    );
    // Told twice, it reads twice.
    kill(pool, Signal::SIGHUP);
    let n_tries = || log.count("a child reads the pool's settings");
    eventually("another try", || (n_tries() == 2).then_some(()));
    kill(pool, Signal::SIGHUP);
    eventually("one more", || (n_tries() == 3).then_some(()));
    assert_eq!(server.workers(), before);
    std::fs::remove_file(&files.file).unwrap();
    files.write("[server]\nworkers = 3\n[worker]\nrecycle_requests = lots\n");
    kill(pool, Signal::SIGHUP);
    let line = log.wait_line("worker.recycle_requests");
    assert!(
        line.contains("ERROR") && line.contains("q.conf:4"),
        "{line}"
    );
    files.write("[server]\nworkers = 3\n");
    kill(pool, Signal::SIGHUP);
    server.wait_replaced(&before, 3);
}

// Restarts.

#[test]
fn three_rolling_restarts_under_load_lose_nothing() {
    let (server, _) = start("", "");
    let load = Load::on(&server);
    for _ in 0..3 {
        let before = server.workers();
        server.signal(Signal::SIGHUP);
        server.wait_replaced(&before, 2);
    }
    load.assert_served();
}

/// A download may take longer than anybody would wait for a worker that has to go.
#[test]
fn a_restart_waits_for_a_request_that_takes_longer_than_a_stop_would_allow() {
    let (server, _) = start("[worker]\ndrain_timeout = 0.2\n", "server.timeout = 60");
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    let before = server.workers();
    server.signal(Signal::SIGHUP);
    // Both places have new workers, and the one that is busy is still there.
    let left = eventually("all but the busy one are replaced", || {
        let now = server.workers();
        let old: Vec<i32> = now
            .iter()
            .copied()
            .filter(|it| before.contains(it))
            .collect();
        (now.len() == 3 && old.len() == 1).then_some(old[0])
    });
    // Its second beat after the bound: it would have been killed by now.
    outlive(Duration::from_secs(1));
    assert!(is_alive(left));
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    server.wait_replaced(&before, 2);
    assert_eq!(server.process.log.count("worker.drain_timeout)"), 0);
}

/// That nothing happened for so long is no event one could wait for.
fn outlive(bound: Duration) {
    std::thread::sleep(bound);
}

// Upgrades.

/// A successor has taken over, and the server that had this pid is gone: its pid.
fn upgrade(server: &Server, pid: i32) -> i32 {
    let done = server.process.log.count("the successor serves");
    kill(pid, Signal::SIGUSR2);
    let successor = eventually("a successor", || {
        let text = server.process.log.text();
        let line = text
            .lines()
            .filter(|it| it.contains("the successor serves"))
            .nth(done)?;
        let (_, rest) = line.split_once("pid=")?;
        rest.split(' ').next()?.parse().ok()
    });
    assert_ne!(successor, pid);
    eventually("the old one is gone", || (!is_alive(pid)).then_some(()));
    successor
}

/// The server whose pool this worker is of.
fn server_of(worker: i32) -> i32 {
    parent(parent(worker))
}

fn stop(pid: i32) {
    kill(pid, Signal::SIGTERM);
    eventually("its end", || (!is_alive(pid)).then_some(()));
}

/// The number that stays the same for half a second.
fn still(number: impl Fn() -> usize) -> usize {
    let mut seen = (number(), Instant::now());
    eventually("a number that stays the same", || {
        let now = number();
        if now != seen.0 {
            seen = (now, Instant::now());
        }
        (seen.1.elapsed() > Duration::from_millis(500)).then_some(now)
    })
}

/// Sockets, pipes and files that a process has open.
fn n_descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

#[test]
fn three_upgrades_of_the_program_under_load_lose_nothing_and_leak_nothing() {
    let (server, files) = start("", "");
    let load = Load::on(&server);
    let mut pid = server.process.pid();
    for _ in 0..3 {
        files.install(Path::new(PROGRAM));
        pid = upgrade(&server, pid);
        let executable = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(executable, files.program, "the new file runs");
    }
    load.assert_served();
    // Whatever belongs to connections is closed by now, or soon.
    let before = still(|| n_descriptors(pid));
    assert!(before < 40, "{before} descriptors");
    pid = upgrade(&server, pid);
    server.wait_ready();
    let mut now = 0;
    let is_as_before = poll(SOON, || {
        now = n_descriptors(pid);
        (now <= before + 2).then_some(())
    });
    assert!(is_as_before.is_some(), "{now} descriptors, {before} before");
    pid = upgrade(&server, pid);
    stop(pid);
}

/// A server that handed over while it serves a request: the thread that waits for that.
fn upgrade_beside_a_request(server: &Server) -> JoinHandle<Result<http::Reply, String>> {
    let old = server.process.pid();
    let running = server.act_later("DO=wait&FOR=go&MARK=running");
    server.world.wait_count("running", 1);
    kill(old, Signal::SIGUSR2);
    server.process.log.wait_line("the successor serves");
    eventually("another server answers", || {
        let pid = server.act("DO=echo").json()["pid"].as_i64()? as i32;
        // One of the old server may have left by now.
        let its_server = try_parent(try_parent(pid)?)?;
        let is_other = its_server != old && server.process.family().contains_key(&its_server);
        is_other.then_some(())
    });
    running
}

const SHORT_DRAIN: &str = "[server]\ndrain_timeout = 0.2\n[worker]\ndrain_timeout = 0.2\n";

#[test]
fn an_upgrade_waits_for_a_request_that_takes_longer_than_a_stop_would_allow() {
    let (server, _) = start(SHORT_DRAIN, "server.timeout = 60");
    let old = server.process.pid();
    let running = upgrade_beside_a_request(&server);
    outlive(Duration::from_secs(1));
    assert!(is_alive(old));
    server.world.tell("go");
    assert_eq!(running.join().unwrap().unwrap().status, 200);
    eventually("the old one is gone", || (!is_alive(old)).then_some(()));
    stop(server_of(server.workers()[0]));
}

/// Nobody waits for it, and yet it must not be left half done.
#[test]
fn an_upgrade_waits_for_a_transaction_whose_client_left() {
    let (server, _) = start(SHORT_DRAIN, "");
    let old = server.process.pid();
    let workers = server.workers();
    server.leave_behind("DO=wait&FOR=go&MARK=running");
    kill(old, Signal::SIGUSR2);
    server.process.log.wait_line("the successor serves");
    outlive(Duration::from_secs(2));
    assert!(is_alive(old) && workers.iter().all(|pid| is_alive(*pid)));
    server.world.tell("go");
    eventually("the old one is gone", || (!is_alive(old)).then_some(()));
    assert_eq!(server.process.log.count("gone while serving"), 0);
    stop(server_of(server.workers()[0]));
}

#[test]
fn a_server_that_handed_over_and_is_told_to_stop_cuts_off_what_runs() {
    let (server, _) = start(SHORT_DRAIN, "server.timeout = 60");
    let old = server.process.pid();
    let running = upgrade_beside_a_request(&server);
    stop(old);
    server.process.log.wait_line("(server.drain_timeout)");
    let reply = running.join().unwrap();
    assert!(reply.is_err() || reply.is_ok_and(|reply| reply.status >= 500));
    stop(server_of(server.workers()[0]));
}

#[test]
fn an_upgrade_to_a_program_that_fails_leaves_the_old_one_serving() {
    let (server, files) = start("[worker]\nstart_timeout = 60\n", "");
    let load = Load::on(&server);
    let log = &server.process.log;
    for (script, said) in [
        ("exit 3", "ended with status 3"),
        ("kill -9 $$", "ended with signal 9"),
        // Closes all that it got, and lives.
        (
            "exec 3>&- 4>&-; echo $$ > $(dirname $0)/hanging; exec sleep 1000",
            "could not serve within",
        ),
    ] {
        if script.contains("sleep") {
            files.write("[worker]\nstart_timeout = 4\n");
            server.signal(Signal::SIGHUP);
            log.wait_line("worker.start_timeout: \"4\"");
        }
        files.install_script(script);
        server.signal(Signal::SIGUSR2);
        let line = log.wait_line(said);
        assert!(
            line.contains("ERROR") && line.contains("this server goes on"),
            "{line}"
        );
    }
    let hanging = std::fs::read_to_string(server.world.path("hanging")).unwrap();
    let hanging: i32 = hanging.trim().parse().unwrap();
    eventually("it was ended", || (!is_alive(hanging)).then_some(()));
    std::fs::remove_file(&files.program).unwrap();
    server.signal(Signal::SIGUSR2);
    log.wait_line("does not start");
    load.assert_served();
    // A program that works is still welcome.
    files.write("");
    files.install(Path::new(PROGRAM));
    server.signal(Signal::SIGHUP);
    log.wait_line("worker.start_timeout: \"60\"");
    let pid = upgrade(&server, server.process.pid());
    stop(pid);
}

#[test]
fn a_successor_whose_settings_are_wrong_does_not_succeed() {
    let (server, files) = start("", "");
    files.write("[server]\nprot = 1\n");
    server.signal(Signal::SIGUSR2);
    server.process.log.wait_line("ended with status 78");
    assert_eq!(server.act("DO=echo").status, 200);
}

/// What waits for a restart gets it.
#[test]
fn an_upgrade_takes_up_what_a_reload_cannot() {
    let (server, files) = start("", "");
    // Others come and go.
    let n_http_threads = |pid| {
        let names = threads(pid).into_iter();
        names.filter(|name| name.starts_with("http-")).count()
    };
    let old = n_http_threads(server.process.pid());
    files.write("[server]\nhttp_threads = 5\n");
    let pid = upgrade(&server, server.process.pid());
    server.wait_ready();
    assert_eq!(n_http_threads(pid), old + 3);
    stop(pid);
}

#[test]
fn a_server_that_is_told_to_stop_takes_its_unfinished_successor_along() {
    let (mut server, _) = start("", "");
    server.world.tell("hang-at-start");
    server.signal(Signal::SIGUSR2);
    eventually("a successor starts", || {
        (server.process.log.count("pool started") == 2).then_some(())
    });
    // No process and no file is left: see the harness.
    assert!(server.process.stop().success());
}

#[test]
fn an_upgrade_of_a_proxy_loses_nothing_and_its_pools_come_along() {
    let world = World::stub();
    let gate = common::free_address();
    let proxy = Server::proxy_at(world, SocketAddr::from(([127, 0, 0, 1], 0)), gate, "");
    let _pool = Pool::start(&proxy.world, gate, "server.workers = 3");
    proxy.wait_workers(3);
    let load = Load::on(&proxy);
    let mut pid = proxy.process.pid();
    for _ in 0..3 {
        pid = upgrade(&proxy, pid);
        proxy.wait_workers(3);
    }
    load.assert_served();
    stop(pid);
}

/// Real maps from real QGIS, while everything that makes them is replaced.
#[test]
fn with_real_qgis_a_rolling_restart_and_an_upgrade_lose_no_map() {
    let server = Server::real("server.workers = 2");
    let map = "/ows/?MAP=world&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&LAYERS=land&STYLES=\
               &CRS=EPSG:4326&BBOX=-90,-180,90,180&WIDTH=100&HEIGHT=50&FORMAT=image/png";
    let load = Load::start(server.address, map, EVERY_MANNER).served();
    let before = server.workers();
    server.signal(Signal::SIGHUP);
    server.wait_replaced(&before, 2);
    let pid = upgrade(&server, server.process.pid());
    load.assert_served();
    stop(pid);
}

/// The successor of a server that gave up its rights has none to give up.
#[test]
fn an_upgrade_after_setuid_stays_that_user() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not tried: only root can become somebody else");
        return;
    }
    let world = World::stub();
    world.open_to_everybody();
    let worker = world.path("qgisserver-worker");
    process::install(
        &Path::new(PROGRAM).with_file_name("qgisserver-worker"),
        &worker,
    );
    let files = Files::of(&world, "");
    let flags = format!(
        "server.setuid = nobody\nworker.program = {}",
        worker.display()
    );
    let server = Server::start_from(world, &files.program, &files.file, &flags).ready();
    let pid = upgrade(&server, server.process.pid());
    assert_eq!(server.act("DO=echo").status, 200);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let family = eventually("server, pool and workers", || {
        let family = server.process.family();
        (family.contains_key(&pid) && family.len() >= 4).then_some(family)
    });
    for user in family.into_keys().filter_map(user_of) {
        assert_eq!(user, nobody.uid.as_raw());
    }
    stop(pid);
}

// Socket activation.

/// A server that gets `listener` as systemd would pass it.
fn activated(world: &World, tmp: &Path, listener: &TcpListener) -> Child {
    let fd = listener.as_raw_fd();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\"", PROGRAM])
        .args(["-b", "10.9.8.7", "-p", "1", "-w", "1", "--rootdir"])
        .arg(world.projects())
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "qgisserver.socket")
        .env("TMPDIR", tmp)
        .env("PYTHONPATH", world.path("stub"))
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: both are async-signal-safe, and what they leave stays open after exec.
    unsafe {
        command.pre_exec(move || {
            let kept = match fd {
                3 => libc::fcntl(fd, libc::F_SETFD, 0),
                _ => libc::dup2(fd, 3),
            };
            match kept {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
    command.spawn().unwrap()
}

fn end(mut server: Child) {
    kill(server.id() as i32, Signal::SIGTERM);
    eventually("its end", || server.try_wait().unwrap());
}

#[test]
fn with_socket_activation_a_restart_makes_clients_wait_and_refuses_nobody() {
    let world = World::stub();
    let tmp = tempfile::Builder::new().prefix("qs").tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let ask = || {
        http::ask(
            "GET",
            &format!("http://{address}{}", path_of("DO=echo")),
            &[],
            b"",
        )
    };
    let server = activated(&world, tmp.path(), &listener);
    assert_eq!(ask().unwrap().status, 200);
    end(server);
    let mut waiting = http::connect(address);
    http::send_get(&mut waiting, &path_of("DO=echo"));
    let load = Load::start(address, &path_of("DO=echo"), EVERY_MANNER);
    let server = activated(&world, tmp.path(), &listener);
    let (reply, _) = http::read_all(&mut waiting);
    assert!(
        reply.starts_with(b"HTTP/1.1 200"),
        "{:?}",
        String::from_utf8_lossy(&reply)
    );
    load.assert_served();
    end(server);
}
