//! The programs as an administrator starts them: versions, mistakes, users, certificates.

mod common;

use std::io::{Read, Write};
use std::process::{Command, Output};

use common::process::{Process, install, user_of};
use common::tls::Certificate;
use common::{Server, World, http};
use tokio_rustls::rustls;

fn program(name: &str) -> Command {
    let server = std::path::Path::new(env!("CARGO_BIN_EXE_qgisserver"));
    Command::new(server.with_file_name(name))
}

fn run(name: &str, args: &[&str]) -> Output {
    program(name).args(args).output().unwrap()
}

#[test]
fn both_programs_say_the_versions_of_all_that_answers() {
    for name in ["qgisserver", "qgisserver-worker"] {
        let output = run(name, &["--version"]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines();
        assert_eq!(
            lines.next(),
            Some(&*format!("{name} {}", env!("CARGO_PKG_VERSION")))
        );
        for library in ["QGIS 3.", "GDAL 3.", "PROJ ", "GEOS 3.", "Python 3."] {
            assert!(
                text.lines().any(|line| line.starts_with(library)),
                "{library}: {text}"
            );
        }
    }
}

#[test]
fn wrong_use_is_64_and_a_wrong_configuration_78_and_both_name_the_setting() {
    for (name, args, code, named) in [
        (
            "qgisserver",
            &["--port", "many", "--rootdir", "/"][..],
            64,
            "--port",
        ),
        ("qgisserver", &["--nonsense"], 64, "--nonsense"),
        ("qgisserver", &[], 78, "projects.cache.rootdir"),
        (
            "qgisserver",
            &["-c", "/no/such/file.conf"],
            78,
            "/no/such/file.conf",
        ),
        (
            "qgisserver-worker",
            &["--host", "10.1.2.3", "--rootdir", "/"],
            64,
            "--host",
        ),
        ("qgisserver-worker", &[], 78, "projects.cache.rootdir"),
    ] {
        let output = run(name, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{name} {args:?}: {text}");
        assert!(text.contains(named), "{name} {args:?}: {text}");
    }
}

#[test]
fn check_config_reads_the_certificates_that_the_server_would_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (cert, key, file) = (path("cert.pem"), path("key.pem"), path("q.conf"));
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, "no PEM").unwrap();
    let section = |name: &str| format!("[{name}]\nssl = yes\nssl_cert = {cert}\nssl_key = {key}\n");
    let settings = [section("server"), section("management")].concat();
    std::fs::write(&file, format!("{settings}enabled = yes\n")).unwrap();
    let check = || {
        run(
            "qgisserver",
            &["--rootdir=/", "--check-config", "-c", &file],
        )
    };
    let output = check();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    for what in [
        "q.conf:4: server.ssl_key: ",
        "q.conf:8: management.ssl_key: ",
    ] {
        assert!(text.contains(what), "{what} in {text}");
    }
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    assert!(check().status.success());
}

#[test]
fn a_port_that_is_taken_is_a_wrong_configuration() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let gate = format!("zmq.bindaddr=tcp://127.0.0.1:{port}");
    let management = format!("management.port={port}");
    for (more, named) in [
        (&["-p", &*port.to_string()][..], "server.port"),
        (&["-p", "0", "--proxy", "--set", &gate], "zmq.bindaddr"),
        (
            &[
                "-p",
                "0",
                "--set",
                "management.enabled=yes",
                "--set",
                &management,
            ],
            "management.port",
        ),
    ] {
        let output = run(
            "qgisserver",
            &[&["-b", "127.0.0.1", "--rootdir", "/"], more].concat(),
        );
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains(named), "{text}");
    }
}

#[test]
fn a_worker_program_that_is_none_is_a_wrong_configuration() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    for program in ["/nowhere/qgisserver-worker", "/etc/passwd", "/"] {
        std::fs::write(path, format!("[worker]\nprogram = {program}\n")).unwrap();
        let output = run("qgisserver", &["--rootdir=/", "--check-config", "-c", path]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        let expected = ":2: worker.program: expected a program";
        assert!(text.contains(expected), "{text}");
    }
}

/// Clients that learn from the examples may edit them, and the next ones find them new.
#[test]
fn the_examples_are_served_from_a_copy_and_each_address_that_is_printed_answers() {
    let tmp = common::tmp();
    let script = common::source("examples/serve.sh");
    let command = format!(
        "exec sh {} {} -w 1 >&2",
        script.display(),
        env!("CARGO_BIN_EXE_qgisserver")
    );
    let port = common::free_address().port().to_string();
    let variable = |name: &str| (name.to_owned(), std::env::var(name).unwrap_or_default());
    let mut environment = vec![variable("PATH"), variable("HOME")];
    environment.push(("TMPDIR".into(), tmp.path().display().to_string()));
    environment.push(("PORT".into(), port));
    let shell = std::path::Path::new("/bin/sh");
    let mut process = Process::spawn(shell, &["-c".into(), command], tmp, environment);
    process.log.wait_line("Stop with");
    let text = process.log.text();
    let urls = text
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("http://"));
    let statuses: Vec<_> = urls
        .map(|url| http::ask("GET", url, &[], b"").unwrap().status)
        .collect();
    assert_eq!(statuses, [200; 6], "{text}");
    let arguments = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let copy = format!("--rootdir\0{}", process.tmp().display());
    let is_served = |pid| String::from_utf8_lossy(&arguments(pid)).contains(&copy);
    assert!(process.family().into_keys().any(is_served), "{copy}");
    process.stop();
}

/// It reads them again at each reload, when it is that user.
#[test]
fn a_key_that_the_user_may_not_read_is_found_before_it_is_needed() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let world = World::stub();
    world.open_to_everybody();
    let settings = Certificate::of(&world).settings("server");
    let file = world.path("q.conf");
    std::fs::write(&file, settings).unwrap();
    let key = world.path("key.pem");
    let check = |mode| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
        let file = file.to_str().unwrap();
        run(
            "qgisserver",
            &["--rootdir=/", "--check-config", "-u", "nobody", "-c", file],
        )
    };
    assert!(check(0o644).status.success());
    let output = check(0o600);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("q.conf:3: server.ssl_key: "), "{text}");
}

/// As root everything becomes the user; anybody else is told that it cannot be.
#[test]
fn setuid_takes_the_privileges_of_all_processes_once_the_port_is_bound() {
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    if !nix::unistd::geteuid().is_root() {
        let args = [
            "-b",
            "127.0.0.1",
            "-p",
            "0",
            "--rootdir",
            "/",
            "-u",
            "nobody",
        ];
        let output = run("qgisserver", &args);
        assert_eq!(output.status.code(), Some(78));
        assert!(String::from_utf8_lossy(&output.stderr).contains("--setuid"));
        return;
    }
    let world = World::stub();
    world.open_to_everybody();
    // The build may be in a place that only its owner can enter.
    let worker = world.path("qgisserver-worker");
    install(program("qgisserver-worker").get_program().as_ref(), &worker);
    let settings = format!(
        "server.setuid = nobody\nworker.program = {}",
        worker.display()
    );
    // Which only root may have.
    let low = (600..1024).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let [http, gate] = [0, low.expect("one is free")].map(|port| ([127, 0, 0, 1], port).into());
    let mut proxy = Server::proxy_at(World::stub(), http, gate, "server.setuid = nobody");
    assert!(proxy.process.stop().success());
    let server = Server::start(world, &settings).ready();
    assert_eq!(server.act("DO=echo").status, 200);
    let family = server.process.family();
    assert!(family.len() >= 3, "server, pool and workers: {family:?}");
    for user in family.into_keys().filter_map(user_of) {
        assert_eq!(user, nobody.uid.as_raw());
    }
}

#[test]
fn with_a_certificate_it_speaks_https_and_offers_http_2() {
    let world = World::stub();
    let certificate = Certificate::of(&world);
    let server = Server::start_tls(world, &certificate.settings("server"));
    for protocol in ["http/1.1", "h2"] {
        let mut client = certificate.client(protocol);
        let mut socket = http::connect(server.address);
        let mut stream = rustls::Stream::new(&mut client, &mut socket);
        if protocol == "http/1.1" {
            let request = b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            stream.write_all(request).unwrap();
            let mut reply = String::new();
            stream.read_to_string(&mut reply).unwrap();
            assert!(
                reply.starts_with("HTTP/1.1 200") && reply.contains("ok"),
                "{reply}"
            );
        } else {
            stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .unwrap();
            let mut frame = [0; 9];
            stream.read_exact(&mut frame).unwrap();
            assert_eq!(frame[3], 4, "the server's SETTINGS");
        }
        assert_eq!(client.alpn_protocol(), Some(protocol.as_bytes()));
    }
}
