//! Projects whose layers this same server serves: their workers wait for workers.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Server, http, source};

const PICTURE: &str = "SERVICE=WMS&VERSION=1.3.0&REQUEST=GetMap&STYLES=&CRS=EPSG:4326\
                       &BBOX=35,0,55,20&WIDTH=256&HEIGHT=256&FORMAT=image/png";

/// Well before the deadline of requests, which would end a wedge, too.
const IN_TIME: Duration = Duration::from_secs(60);

/// The project `name`, whose layer is the map `layer` of `of` on the same server.
fn cascade(server: &Server, name: &str, of: &str, layer: &str) {
    let made = Command::new(source("tests/data/make_cascade.py"))
        .arg(server.world.path(&format!("projects/{name}.qgs")))
        .arg(server.url(&format!("/ows/?MAP={of}")))
        .arg(layer)
        .stdout(Stdio::null())
        .status();
    assert!(
        made.expect("python3 is installed").success(),
        "QGIS writes {name}"
    );
}

/// The replies to `n` requests at once.
fn maps(server: &Server, project: &str, layer: &str, n: usize) -> Vec<(u16, usize)> {
    let url = server.url(&format!("/ows/?MAP={project}&LAYERS={layer}&{PICTURE}"));
    let asking: Vec<_> = (0..n)
        .map(|_| url.clone())
        .map(|url| std::thread::spawn(move || http::ask("GET", &url, &[], b"")))
        .collect();
    let replies = asking.into_iter().map(|asked| asked.join().unwrap());
    replies
        .map(|reply| reply.expect("an answer"))
        .map(|reply| (reply.status, reply.body.len()))
        .collect()
}

/// Both workers have a map whose layer needs a worker, and nobody knew.
#[test]
fn a_pool_whose_workers_all_ask_it_for_layers_answers_them_all() {
    let server = Server::real("server.workers = 2\nserver.timeout = 120\nzmq.timeout = 120000");
    cascade(&server, "cascade", "world", "countries");
    let began = Instant::now();
    let replies = maps(&server, "cascade", "cascaded", 6);
    let direct = maps(&server, "world", "countries", 1)[0];
    assert!(began.elapsed() < IN_TIME, "it waited for its deadline");
    for reply in &replies {
        assert_eq!(reply.0, 200, "{replies:?}");
        // The picture is there, not a blank one.
        assert!(reply.1 * 2 > direct.1, "{replies:?} and {direct:?}");
    }
    // One stepped back, or none if the first two maps did not meet. From now on it is
    // known, and nobody has to step back.
    let n_stepped_back = || server.process.log.count("waited for layers of this server");
    let n_before = n_stepped_back();
    assert!(n_before <= 1, "and not because of a deadline");
    let replies = maps(&server, "cascade", "cascaded", 6);
    assert!(
        replies.iter().all(|(status, _)| *status == 200),
        "{replies:?}"
    );
    assert_eq!(n_stepped_back(), n_before);
}

#[test]
fn a_pool_of_one_refuses_itself_at_once_instead_of_waiting_for_itself() {
    let server = Server::real("server.workers = 1\nserver.timeout = 120\nzmq.timeout = 120000");
    cascade(&server, "cascade", "world", "countries");
    let began = Instant::now();
    let (status, _) = maps(&server, "cascade", "cascaded", 1)[0];
    assert!(began.elapsed() < IN_TIME, "it waited for its deadline");
    // Its layer cannot be had, and the project is not served without it.
    assert_eq!(status, 422);
    server
        .process
        .log
        .wait_line("all workers wait for layers of this server");
    assert_eq!(maps(&server, "world", "countries", 1)[0].0, 200);
}
