//! In-process QGIS, nginx + FastCGI and qgisserver, side by side in one run.
//!
//! Runs on loopback, ends by itself, leaves nothing behind. Prints Markdown.
//!
//! `cargo bench --bench compare -- [part]...` with parts out of `single`,
//! `crowd`, `lanes`, `start`, `stream` and `death`; without, all.

mod client;
mod lanes;
mod life;
mod memory;
mod peers;
mod speed;
mod stats;
mod stream;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use peers::Place;
use stats::Demands;

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let place = prepare(scratch.path());
    let mut demands = Demands::default();
    // Others who use the processors blur everything but what is paired or counted.
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("Load of the machine before: {}", load.trim());
    if wants("single") || wants("crowd") {
        speed::compare(&place, wants("single"), wants("crowd"), &mut demands);
    }
    if wants("lanes") {
        lanes::compare(&place, &mut demands);
    }
    if wants("start") {
        life::start(&place, &mut demands);
    }
    if wants("stream") {
        stream::compare(&place, &mut demands);
    }
    if wants("death") {
        life::death(&place, &mut demands);
    }
    demands.print();
}

/// The example projects, one with many features and one with nothing.
fn prepare(scratch: &Path) -> Place {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = Place {
        scratch: scratch.to_owned(),
        projects: scratch.join("projects"),
        plugins: source.join("benches/compare/plugins"),
    };
    copy(&source.join("examples/projects"), &place.projects);
    let written = place
        .command(peers::PYTHON)
        .arg(source.join("benches/compare/projects.py"))
        .arg(&place.projects)
        .stderr(Stdio::null())
        .status();
    assert!(
        written.expect("python3 is installed").success(),
        "QGIS writes projects"
    );
    place
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("scratch is writable");
    for entry in fs::read_dir(from)
        .expect("the examples are there")
        .flatten()
    {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("scratch is writable");
        }
    }
}
