//! How other servers of QGIS projects fail under faults and load, and the test
//! that shows that this one does not. Those without a test elsewhere are here.
//!
//! | what was seen in py-qgis-server | test |
//! |---|---|
//! | a worker is killed: its client waits the whole timeout, no retry | `faults::a_get_survives_the_death_of_its_worker`, `faults::a_post_whose_worker_dies_is_a_502_at_once_and_is_never_sent_twice` |
//! | requests whose clients left are executed all the same | `faults::a_queued_request_whose_client_left_is_never_run` |
//! | requests that were answered 504 are executed all the same | `overload::of_500_requests_at_once_each_is_served_or_refused_in_time_and_none_runs_for_nobody` |
//! | a full queue is a 500 with a traceback per request | `faults::a_full_queue_is_a_503_with_retry_after_at_once` |
//! | a request that waited too long gets no answer until a worker is free | `faults::a_request_that_waits_too_long_for_a_worker_is_a_504_and_is_never_run` |
//! | a READY that crosses a request makes a busy worker look free: two requests at once | `broker::queue` (unit tests), `history` |
//! | the time of a stream counts from its beginning, however it moves: it is killed at its timeout | [`a_stream_that_moves_may_last_longer_than_the_timeout`] |
//! | a stream that fails ends properly: silent truncation with 200 | `faults::a_stream_that_fails_half_way_aborts_the_connection`, `history` |
//! | clients that read slowly grow the server without bound | `faults::a_slow_client_slows_its_own_stream_and_memory_stays_flat`, `overload::a_thousand_clients_that_hardly_read_disturb_nobody` |
//! | heads and bodies may take for ever | `overload::a_thousand_clients_that_never_end_their_heads_disturb_nobody`, `…_bodies_…` |
//! | HEAD of a missing project, or OPTIONS of an API, ends a worker | [`no_method_costs_a_worker`] |
//! | a remote worker that is killed costs the whole timeout | [`a_remote_worker_that_is_killed_costs_no_timeout`] |
//! | the request for a remote worker that vanished is lost | [`a_remote_worker_that_vanished_costs_no_request`] |
//! | a remote worker that is stuck is never killed | `faults::a_stuck_worker_of_another_pool_is_replaced_as_a_local_one` |
//! | the broker is killed: 502 for ever, and `/ping` says 200 | there is no other process that could be; of the pool: `faults::when_the_parent_of_the_pool_is_killed_a_new_pool_serves` |
//! | a worker that crashes in the first seconds ends the server | `faults::workers_that_die_at_start_are_replaced_with_back_off_and_the_server_lives` |
//! | SIGTERM is a 500 for running requests, or never ends | `faults::sigterm_lets_running_requests_end_and_refuses_new_ones`, `faults::sigterm_waits_no_longer_than_the_drain_timeout` |
//! | a killed server leaves workers and sockets | `faults::a_killed_server_leaves_no_process_and_no_file` |
//! | all workers restart at the same time | `faults::sighup_restarts_the_workers_one_after_the_other_and_no_request_fails` |
//! | whoever reaches the ZeroMQ port executes code and receives requests | `faults::nonsense_on_the_zeromq_port_harms_nobody`, `broker::gate::only_loopback_is_possible` |
//! | a project with an older date than the loaded one is not read | `projects::a_change_in_either_direction_reloads` (worker) |
//! | MAP opens a GeoPackage anywhere, or a connection to any host | `storage::a_project_in_a_geopackage_is_served_from_below_the_root_alone`, `storage::what_is_not_allowed_is_not_asked` |
//! | the name of a project becomes part of a statement in SQL; a database that is away is a 404 | `storage::a_project_in_postgresql_is_served_until_it_is_saved_again_or_deleted`, `storage::a_database_that_is_away_is_a_503_in_time_and_a_project_is_back_with_it` |
//! | a project that cannot be read, or a handler that raises, ends its worker with each request | `bad_input::a_project_that_cannot_be_read_is_a_422_and_an_exception`, `projects::a_broken_project_is_read_once_until_it_changes`, `storage::handlers_that_were_written_for_other_servers_find_and_read_projects` |
//! | a corrupt project in the list of those to open ahead keeps the server from starting | `projects::what_is_listed_is_open_before_the_first_client_comes_and_after_a_death`, `projects::a_project_that_cannot_be_opened_ahead_does_not_keep_the_server_from_starting` |
//! | a project that is deleted keeps others from being read again | `projects::a_project_that_is_deleted_keeps_no_other_from_being_read_again` |
//! | a restartmon file that is made is no change, and remote workers know no restart | `faults::a_restartmon_file_that_is_made_restarts_the_workers`, `faults::a_restart_of_a_proxy_reaches_all_pools_and_no_request_fails` |
//! | an answer of 206 never ends, and another that is not 200 loses all but its beginning | [`a_stream_has_any_status_and_an_end`] |
//! | the filters of the operator see neither a body nor keys in lower case: POST and `map=` get round them | `policies::a_denied_operation_is_denied_however_it_is_written`, `policies::a_filter_refuses_with_its_status_however_a_request_is_written`, `policies::what_qgis_would_do_for_a_body_is_what_rules_refuse` |
//! | `MAP=a&MAP=b` is another project to the server than to QGIS | `ogc::ows::the_last_of_a_repeated_key_wins_for_us_and_for_qgis` |
//! | a MAP with a newline forges lines of the log; any client has its request logged in detail by X-Debug-Id | [`no_client_forges_a_line_of_the_log_or_makes_it_say_more`], `log::no_value_forges_a_line` |
//! | who left is logged with 200, who was given up with 499 | `http::each_request_is_one_line_of_the_access_log`, `management::the_line_of_a_failure_says_where_its_time_went` |
//! | a head that is too long is no answer | `http::a_uri_that_is_too_long_is_a_414_and_a_head_a_431` |
//! | HEAD has another tag than GET; weak tags, lists of them and dates count for nothing; dates are none of HTTP | `py_qgis_server::replies_have_the_headers_that_they_had`, `http::caching` (unit tests) |
//! | X-Qgis-Forwarded-Url of anybody is believed; Forwarded with quotes or a list makes an address that is none | `http::the_advertised_url_follows_the_proxy_only_when_it_is_trusted`, `http::forwarded::forwarded_is_read_with_quotes_and_lists` |
//! | a page shows the environment, another one all settings | [`no_page_shows_the_environment_or_a_password`] |
//! | the management of a proxy fails, waits a second, or cannot be had with HTTPS | `management::each_port_serves_its_own_pages_only`, `change::sighup_brings_the_management_a_new_certificate_and_keeps_the_old_one_when_it_is_broken` |
//! | flags that are documented do not exist; a root that is no folder is a traceback; `--version` fails | `programs::wrong_use_is_64_and_a_wrong_configuration_78_and_both_name_the_setting`, `programs::both_programs_say_the_versions_of_all_that_answers`, `config::command_line::a_pool_names_its_server_in_several_ways` |
//! | privileges are dropped before the port is bound | `programs::setuid_takes_the_privileges_of_all_processes_once_the_port_is_bound` |
//! | the high-water mark is of the whole machine's memory, and the largest worker is killed in its request | `machine::the_narrowest_limit_of_all_groups_around_us_holds` (worker), `memory::above_the_high_water_mark_the_largest_worker_is_replaced` |
//! | each spelling of a project is a copy of it in memory, and links lead out of the root | `places::every_spelling_of_a_project_is_one_file`, `places::nothing_outside_the_root_is_found` (worker) |
//!
//! | what was seen in QJazz | test |
//! |---|---|
//! | DELETE kills a worker, two of them the server | [`no_method_costs_a_worker`] |
//! | a project that changed is loaded again by every request | `projects::a_change_in_either_direction_reloads` (worker) |
//! | requests that time out or leave while they wait keep their place in the queue for ever | [`whoever_waited_too_long_leaves_no_place_taken`], [`whoever_left_while_it_waited_leaves_no_place_taken`] |
//! | a worker that dies in a stream: no end for the client, a core burns, no new worker | `faults::a_stream_that_fails_half_way_aborts_the_connection`, [`a_worker_that_dies_in_a_stream_burns_no_core`] |
//! | what is left of a cancelled answer is parsed as the next one | [`what_is_left_of_a_cancelled_stream_reaches_nobody`] |
//! | the death of a worker is a 200 that says `IO error` | `faults::a_request_that_kills_two_workers_is_a_502_and_both_are_replaced` |
//! | a client that leaves is not noticed | `faults::a_running_request_whose_client_left_is_ended_at_its_deadline_if_qgis_does_not_stop` |
//! | clients that read a little and pause hold every worker | [`whoever_hardly_reads_a_map_holds_no_worker`] |
//! | 40 ms more for each answer on a kept connection | [`a_kept_connection_has_no_pauses`] |
//! | overload is a 500, a timeout a 503 | `faults::a_full_queue_is_a_503_with_retry_after_at_once`, `faults::a_stuck_request_is_a_504_at_its_deadline_and_its_worker_is_replaced` |
//! | `X-Forwarded-Host` of anybody is believed | `http::the_advertised_url_follows_the_proxy_only_when_it_is_trusted` |
//! | a worker killed while it starts blocks all later starts | [`a_worker_killed_while_it_starts_is_in_nobody_s_way`] |
//! | asked to renew all projects, every worker dies of one that changed, and then the server | `faults::sighup_restarts_the_workers_one_after_the_other_and_no_request_fails`, `projects::a_project_that_is_rewritten_under_load_is_never_an_error_nor_older_than_before` |
//! | workers that fail end the server; one failed start keeps the others from starting | `deaths::a_crash_storm_turns_readiness_off_until_it_is_over_and_the_server_serves_on`, `faults::workers_that_die_at_start_are_replaced_with_back_off_and_the_server_lives` |
//! | all workers are replaced at the same time | `change::three_rolling_restarts_under_load_lose_nothing` |
//! | MAP and the paths of the catalogue lead out of the folders of the operator | `bad_input::a_map_outside_the_root_gets_the_answer_of_an_absent_one`, `places::nothing_outside_the_root_is_found` (worker), `ogc::guard::no_name_climbs`, `apis::the_catalogue_leads_to_nothing_that_it_does_not_list` |
//! | a project with a broken layer is read again with each request | `projects::a_broken_project_is_read_once_until_it_changes` |
//! | a project may have no dot in its name | `projects::a_dot_in_the_name_of_a_project_begins_no_suffix` |
//! | a plugin that does not load keeps workers from starting | `bad_input::access_control_is_applied_and_a_plugin_that_does_not_load_is_named` |
//! | `SeRvIcE=WMS` is no service; what workers say of mistakes is JSON in plain text | `py_qgis_server::keys_have_any_case_and_a_form_is_a_query`, `bad_input::missing_and_unknown_parameters_get_an_ogc_exception` |
//! | dates are none of HTTP | `py_qgis_server::replies_have_the_headers_that_they_had` |
//! | a body of 256 KiB is too long, and nobody can allow more | `http::a_body_that_is_too_long_is_a_413_before_it_is_read`: `server.body_max` |
//! | memory that is shared counts once for each worker, and groups of processes have no limit | `machine::this_machine_tells_what_this_process_weighs`, `machine::the_narrowest_limit_of_all_groups_around_us_holds` (worker) |
//! | a variable counts less than the documentation says; its own sample file is refused; a command panics | `config::layers::the_later_layer_wins_and_is_remembered`, `config::every_line_of_the_sample_file_is_the_default_when_uncommented`, `config::command_line::questions_are_answered_without_running` |
//! | whoever reaches the management gets the environment with its secrets | `config::management_is_off_and_on_loopback_unless_the_operator_says_otherwise`, [`no_page_shows_the_environment_or_a_password`], `requests::workers_see_no_environment_but_what_qgis_needs` |
//! | GET of `/ping` is refused, and there is no page at `/` | `py_qgis_server::the_pages_of_the_server_say_what_they_said` |
//!
//! What has no row is about what is not offered here: AMQP monitors, OGC API Maps, and the
//! jobs of OGC API Processes.

mod common;

use std::io::{ErrorKind, Read};
use std::time::{Duration, Instant};

use common::client::{Came, Client};
use common::http::{read, send_get};
use common::process::cpu_time;
use common::relay::far_away;
use common::{MANAGED, SOON, Server, World, eventually, kill, path_of, timed};
use nix::sys::signal::Signal;

/// Clearly less than any time-out in these tests, and bearable for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(8);

fn echo(tag: &str, more: &str) -> String {
    format!("/ows/?SERVICE=ECHO&REQUEST=Echo&MAP=city&TAG={tag}{more}")
}

#[test]
fn a_stream_that_moves_may_last_longer_than_the_timeout() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "server.timeout = 3\nworker.chunk_bytes = 1K").ready();
    let start = Instant::now();
    let reply = server.get(&echo("t", "&CHUNKS=8&SIZE=3000&PAUSE=0.5"));
    assert_eq!((reply.status, reply.body.len()), (200, 24_000));
    assert!(start.elapsed() > Duration::from_secs(3));
}

#[test]
fn no_method_costs_a_worker() {
    let server = Server::stub("");
    let before = server.workers();
    for method in ["HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "BREW"] {
        for path in [
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=city",
            "/ows/?MAP=nope",
            "/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=corrupt",
            "/wfs3/collections?MAP=city",
            "/wfs3/collections?MAP=nope",
        ] {
            let reply = server.request(method, path, &[], b"");
            assert!(reply.status < 500, "{method} {path}: {}", reply.status);
        }
    }
    assert_eq!(server.workers(), before);
    assert_eq!(server.act("DO=echo").status, 200);
}

#[test]
fn a_stream_has_any_status_and_an_end() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "worker.chunk_bytes = 1K").ready();
    for status in [200, 206, 404] {
        let reply = server.get(&echo("t", &format!("&STATUS={status}&CHUNKS=3&SIZE=3000")));
        assert_eq!((reply.status, reply.body.len()), (status, 9000));
    }
}

#[test]
fn no_client_forges_a_line_of_the_log_or_makes_it_say_more() {
    let server = Server::stub("");
    for newline in ["%0a", "%0d", "%0d%0a", "%C2%85", "%E2%80%A8", "%1b%5b2J"] {
        for path in [
            format!("/ows/?SERVICE=WMS&REQUEST=GetMap&MAP=city{newline}forged"),
            format!("/ows/?SERVICE=WMS&REQUEST=Get{newline}forged&MAP=city"),
            format!("/ows/?SERVICE=W{newline}forged&REQUEST=GetMap&MAP=city"),
            format!("/wfs3/collections/a{newline}forged?MAP=city"),
            format!("/nowhere{newline}forged"),
        ] {
            let (id, debug) = (("X-Request-Id", "a forged"), ("X-Debug-Id", "*"));
            let reply = server.request("GET", &path, &[id, debug], b"");
            assert_ne!(reply.header("x-request-id"), Some("a forged"));
        }
    }
    eventually("each is in the log", || {
        (server.process.log.count("forged") >= 30).then_some(())
    });
    // Said after all of it.
    server.get("/nowhere/last");
    server.process.log.wait_line("/nowhere/last");
    let log = server.process.log.text();
    for line in log.lines() {
        let is_ours = line.starts_with("20") && !line.contains(char::is_control);
        assert!(is_ours && !line.contains(" DEBUG "), "{line:?}");
    }
}

/// Neither the pages for everybody nor those for the operator.
#[test]
fn no_page_shows_the_environment_or_a_password() {
    let settings = format!("{MANAGED}\nprojects.s3.secret_access_key = hush-hush");
    let server = Server::start(World::stub(), &settings).ready();
    assert_eq!(server.act("DO=echo").status, 200);
    let inside = ["/", "/ping", "/ready", "/status", "/metrics", "/plugins"];
    let there = inside.map(|path| server.managed(path));
    let outside = ["/", "/ping", "/ready", "/status", "/status/env"];
    let here = outside.map(|path| server.get(path));
    for reply in there.iter().chain(&here) {
        let text = reply.text();
        let secrets = ["MY_SECRET", "secret", "hush-hush", "PYTHONPATH"];
        let shown = secrets.iter().find(|it| text.contains(**it));
        assert!(shown.is_none(), "{shown:?} in {text}");
    }
}

#[test]
fn a_remote_worker_that_is_killed_costs_no_timeout() {
    let (server, _relay, _pool) = far_away(World::stub(), "server.timeout = 20");
    let (reply, took) = timed(|| server.act("DO=signal&N=9&ONCE=victim&MARK=tries"));
    assert_eq!((reply.status, server.world.count("tries")), (200, 2));
    assert!(took < AT_ONCE, "{took:?}");
    let (post, took) = timed(|| server.act_once("DO=signal&N=9"));
    assert_eq!(post.status, 502);
    assert!(took < AT_ONCE, "{took:?}");
}

/// The machine is gone with the request that it had, and nobody said so.
#[test]
fn a_remote_worker_that_vanished_costs_no_request() {
    let settings = "server.timeout = 20\nzmq.heartbeat = 1";
    let (server, relay, _pool) = far_away(World::stub(), settings);
    let asked = [1, 2].map(|i| server.act_later(&format!("DO=wait&FOR=go&MARK=running&ID={i}")));
    server.world.wait_count("running", 2);
    let gone = &relay.links()[0];
    gone.hold(SOON);
    let start = Instant::now();
    server.world.tell("go");
    for (reply, id) in asked.into_iter().zip(1..) {
        let reply = reply.join().unwrap().unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.json()["id"], id.to_string());
    }
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    assert_eq!(server.world.count("running"), 3, "one of them once more");
    // Let go, so that the pool can be stopped.
    gone.cut();
}

/// Three times every place of the queue is taken, and those who have them give up.
fn assert_places_are_given_back(settings: &str, give_up: impl Fn(&Server)) {
    let server = Server::stub(&format!(
        "server.workers = 1\nserver.timeout = 60\nzmq.maxqueue = 10\n{settings}"
    ));
    for round in 0..3 {
        let (go, running) = (format!("go{round}"), format!("running{round}"));
        let holder = server.act_later(&format!("DO=wait&FOR={go}&MARK={running}"));
        server.world.wait_count(&running, 1);
        give_up(&server);
        wait_waiting(&server, 0);
        server.world.tell(&go);
        assert_eq!(holder.join().unwrap().unwrap().status, 200);
    }
    assert_eq!(server.act("DO=echo").status, 200);
}

fn wait_waiting(server: &Server, n: usize) {
    eventually(&format!("{n} wait"), || {
        (server.status()["waiting"] == n).then_some(())
    });
}

/// Without a place it would be a 503, and at once.
#[test]
fn whoever_waited_too_long_leaves_no_place_taken() {
    assert_places_are_given_back("zmq.timeout = 300", |server| {
        let waiters: Vec<_> = (0..10).map(|_| server.act_later("DO=echo")).collect();
        let replies = waiters.into_iter().map(|it| it.join().unwrap().unwrap());
        let statuses: Vec<_> = replies.map(|reply| reply.status).collect();
        assert_eq!(statuses, [504; 10]);
    });
}

#[test]
fn whoever_left_while_it_waited_leaves_no_place_taken() {
    assert_places_are_given_back("zmq.timeout = 60000", |server| {
        let leavers = (0..10).map(|_| {
            let mut leaver = server.connect();
            send_get(&mut leaver, &path_of("DO=echo"));
            leaver
        });
        let leavers: Vec<_> = leavers.collect();
        wait_waiting(server, 10);
        drop(leavers);
    });
}

#[test]
fn a_worker_that_dies_in_a_stream_burns_no_core() {
    let server = Server::stub("");
    for round in 0..4 {
        // Not one and the same, which would be in quarantine after the second.
        let path = path_of(&format!(
            "DO=stream&N=100&SIZE=100000&THEN=signal&ROUND={round}"
        ));
        assert!(server.try_get(&path).is_err(), "it is cut");
    }
    server.wait_workers(2);
    assert_eq!(server.status()["running"], 0);
    let before = cpu_time(server.process.pid());
    // Time has to pass for this to mean anything.
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_time(server.process.pid()) - before;
    assert!(
        used < Duration::from_millis(500),
        "{used:?} in 2 s of nothing"
    );
}

#[test]
fn what_is_left_of_a_cancelled_stream_reaches_nobody() {
    let world = World::stub().with_echo();
    // Each of them ends by itself, however long that takes it.
    let settings = "server.workers = 1\nworker.chunk_bytes = 1K\nzmq.cancel_grace = 15";
    let server = Server::start(world, settings).ready();
    let before = server.workers();
    for i in 0..20 {
        let mut leaver = server.connect();
        send_get(&mut leaver, &echo("left", "&CHUNKS=500&SIZE=5000"));
        leaver.read_exact(&mut [0; 3000]).unwrap();
        drop(leaver);
        let tag = format!("mine{i}");
        let reply = server.get(&echo(&tag, "&CHUNKS=3&SIZE=2000"));
        assert_eq!((reply.status, reply.body.len()), (200, 6000));
        assert!(!reply.text().contains("left"), "{:.100}", reply.text());
    }
    assert_eq!(server.workers(), before);
}

/// A map is whole before it leaves, so it waits in the server and not in a worker.
#[test]
fn whoever_hardly_reads_a_map_holds_no_worker() {
    const SIZE: usize = 4_000_000;
    let world = World::stub().with_echo();
    let server = Server::start(world, "server.timeout = 60").ready();
    let mut slow: Vec<_> = (0..6)
        .map(|i| {
            let mut slow = server.connect();
            send_get(
                &mut slow,
                &echo(&format!("slow{i}"), &format!("&SIZE={SIZE}")),
            );
            slow.read_exact(&mut [0; 1000]).unwrap();
            slow
        })
        .collect();
    let (reply, took) = timed(|| server.act("DO=echo"));
    assert_eq!(reply.status, 200);
    assert!(took < AT_ONCE, "{took:?}");
    eventually("no worker is held", || {
        (server.status()["running"] == 0).then_some(())
    });
    // Not in the buffers of connections, either: without the server there is no more.
    server.signal(Signal::SIGSTOP);
    let n_there: Vec<_> = std::thread::scope(|scope| {
        let reading: Vec<_> = slow
            .iter_mut()
            .map(|it| scope.spawn(|| n_there(it)))
            .collect();
        reading.into_iter().map(|it| it.join().unwrap()).collect()
    });
    server.signal(Signal::SIGCONT);
    assert!(n_there.iter().all(|n| *n < SIZE), "{n_there:?}");
}

/// How many bytes are on their way from a process that stands still.
fn n_there(stream: &mut std::net::TcpStream) -> usize {
    stream
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let (mut n, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        match read(stream, &mut buffer) {
            Ok(0) => return n,
            Ok(read) => n += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return n,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Nagle's algorithm and delayed acknowledgements add 40 ms to each answer that comes
/// in pieces, once a connection is no longer new to the kernel.
#[test]
fn a_kept_connection_has_no_pauses() {
    let world = World::stub().with_echo();
    let server = Server::start(world, "worker.chunk_bytes = 1K").ready();
    let mut client = Client::new(server.address);
    let in_pieces = echo("t", "&CHUNKS=3&SIZE=1100&PAUSE=0.002");
    for path in [path_of("DO=echo"), in_pieces] {
        let question = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut ask = || {
            let (came, took) = timed(|| client.ask(question.as_bytes()));
            assert!(matches!(came, Came::Whole { status: 200, .. }), "{came:?}");
            took
        };
        for _ in 0..30 {
            ask();
        }
        // A busy machine adds to many of them, but not to all.
        let mut n_fast = 0;
        eventually(&format!("four without a pause: {path}"), || {
            n_fast += usize::from(ask() < Duration::from_millis(35));
            (n_fast == 4).then_some(())
        });
    }
}

#[test]
fn a_worker_killed_while_it_starts_is_in_nobody_s_way() {
    let world = World::stub();
    world.tell("hang-at-start");
    let server = Server::start(world, "worker.young = 0\nserver.workers = 2");
    server.world.wait_count("started", 2);
    let starting = std::fs::read_to_string(server.world.path("stub/control/started")).unwrap();
    server.world.untell("hang-at-start");
    for pid in starting.lines() {
        kill(pid.parse().unwrap(), Signal::SIGKILL);
    }
    let server = server.ready();
    assert_eq!(server.act("DO=echo").status, 200);
}
