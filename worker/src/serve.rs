//! The life of one worker process, from the fork to its end.
//!
//! QGIS lives on the main thread, which serves one request at a time; the link
//! never waits for QGIS (see `drive.rs`).

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use qgisserver::config;
use qgisserver::protocol::{
    Born, Failure, Final, Found, Head, PluginStatus, Ready, Request, Timings, Trace, Versions,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::board::{Board, Farewell};
use crate::drive::Drive;
use crate::link::{self, Job, Last, Outlet};
use crate::memory::{self, Resident};
use crate::places::{Place, Places, Stamp};
use crate::plugins;
use crate::projects::Projects;
use crate::qgis::{self, Judgement, Project, Qgis, Served, Zygote};
use crate::s3::Objects;
use crate::storages::{self, Everywhere};

/// What a worker says to its parent when it is warm.
pub const READY: u8 = b'R';

/// What a new worker inherits.
pub struct Birth<'a> {
    pub number: u32,
    pub pool: &'a config::Pool,
    pub log: &'a config::Log,
    /// What its environment has that the parent's has not; None takes a variable away.
    pub variables: &'a BTreeMap<String, Option<String>>,
    pub zygote: &'a Zygote,
    pub versions: &'a Versions,
    pub name: &'a str,
    pub pool_instance: &'a str,
    pub board: Arc<Board>,
    pub control: UnixStream,
    /// Its own folder for temporary files; the parent removes it.
    pub tmpdir: PathBuf,
}

/// Starts QGIS, says READY to the parent and serves until the process ends.
pub fn run(birth: Birth<'_>) -> ! {
    die_of_panics(birth.board.clone());
    memory::tell_of_crashes(birth.board.clone());
    let instance = uuid::Uuid::new_v4().simple().to_string();
    let qgis = match start_qgis(&birth, &instance) {
        Ok(qgis) => qgis,
        Err(error) => {
            tracing::error!("{error}");
            birth.board.say_farewell(Farewell::NoStart);
            // SAFETY: ends the process; nothing was promised to anybody yet.
            unsafe { libc::_exit(1) }
        }
    };
    let places = places(&birth, &qgis);
    let (drive, mut jobs) = start_link(&birth, &qgis, instance);
    Server::new(qgis, places, birth.pool).run(&drive, &mut jobs)
}

fn start_qgis(birth: &Birth<'_>, instance: &str) -> Result<Qgis, qgis::Error> {
    let mut qgis = Qgis::start(
        birth.zygote,
        birth.pool,
        &birth.tmpdir,
        birth.variables,
        birth.log.qgis_info,
    )?;
    qgis.warm();
    qgis.introduce(instance)?;
    qgis.load_plugins()?;
    qgis.load_policies()?;
    Ok(qgis)
}

/// Where clients may find projects, and who is asked there.
fn places(birth: &Birth<'_>, qgis: &Qgis) -> Places {
    let pool = birth.pool;
    let finding = &pool.finding;
    let copies = storages::copies(&birth.tmpdir);
    let everywhere = Everywhere {
        objects: Objects::new(&finding.s3, finding.timeout, copies),
        asker: qgis.asker(),
    };
    Places::new(pool, n_projects(pool), Box::new(everywhere))
}

fn n_projects(pool: &config::Pool) -> NonZeroUsize {
    NonZeroUsize::new(pool.cache_size).unwrap_or(NonZeroUsize::MIN)
}

/// A panic of either thread ends the process at once: half a worker would keep
/// beating, and its request would wait for its deadline.
fn die_of_panics(board: Arc<Board>) {
    std::panic::set_hook(Box::new(move |panic| {
        board.say_farewell(Farewell::Panicked);
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(%panic, %backtrace, "the worker panicked");
        // SAFETY: ends the process, without destructors that may trust what is broken.
        unsafe { libc::_exit(1) }
    }));
}

fn start_link(
    birth: &Birth<'_>,
    qgis: &Qgis,
    instance: String,
) -> (Arc<Drive>, UnboundedReceiver<Job>) {
    let pool = birth.pool;
    let settings = link::Settings {
        server: pool.server.clone(),
        heartbeat: pool.heartbeat,
        heartbeat_misses: pool.heartbeat_misses,
        cancel_grace: pool.cancel_grace,
    };
    let ready = Ready {
        pool: birth.name.into(),
        pool_instance: birth.pool_instance.into(),
        instance,
        number: birth.number,
        host: crate::host(),
        pid: std::process::id(),
        versions: birth.versions.clone(),
        plugins: plugins::names(&qgis.plugins, PluginStatus::Loaded),
        plugins_failed: plugins::names(&qgis.plugins, PluginStatus::Failed),
        plugin_reports: plugins::fit(qgis.plugins.clone()),
        plugins_answer: qgis.plugins_answer,
        may_cache: qgis.may_cache,
        born: Born::default(),
    };
    let mut control = birth
        .control
        .try_clone()
        .expect("a descriptor for the link");
    let (board, own) = (
        birth.board.clone(),
        birth.control.try_clone().expect("another one"),
    );
    let (sender, jobs) = unbounded_channel();
    let drive = Drive::new().expect("a runtime needs two descriptors");
    drive.start(link::run(
        settings,
        ready,
        board,
        own,
        sender,
        drive.clone(),
    ));
    // If the parent is gone the link notices, too.
    let _ = control.write_all(&[READY]);
    (drive, jobs)
}

struct Server {
    qgis: Qgis,
    places: Places,
    projects: Projects<Project>,
    memory: Resident,
    chunk_bytes: usize,
}

impl Server {
    fn new(qgis: Qgis, places: Places, pool: &config::Pool) -> Self {
        Self {
            qgis,
            places,
            projects: Projects::new(n_projects(pool), pool.check_interval, pool.broken_for),
            memory: Resident::default(),
            chunk_bytes: pool.chunk_bytes,
        }
    }

    fn run(mut self, drive: &Drive, jobs: &mut UnboundedReceiver<Job>) -> ! {
        // Waiting does not hold the GIL: it is taken for each request alone.
        let mut last = None;
        while let Some(job) = drive.next_job(jobs, last.take(), memory::give_back) {
            last = Some(self.serve(job));
        }
        // SAFETY: the link ended, which only the end of the process does.
        unsafe { libc::_exit(1) }
    }

    fn serve(
        &mut self,
        Job {
            request,
            body,
            outlet,
        }: Job,
    ) -> Last {
        // Whatever is said until the answer is out is about this request. The span is of
        // the highest level, so that it is there whatever `logging.level` says.
        let trace_id = request.trace.as_ref().map(Trace::id);
        let span = tracing::error_span!("request", request_id = request.request_id, trace_id);
        let _inside = span.enter();
        self.qgis.begin(&request);
        let (report, bytes) = self.answer(&request, &body, &outlet);
        self.qgis.end();
        Last {
            outlet,
            report,
            bytes,
        }
    }

    fn answer(&mut self, request: &Request, body: &[u8], outlet: &Arc<Outlet>) -> (Final, Bytes) {
        let changed;
        // Before the project is looked for: who may not ask learns nothing of it.
        let request = match self.qgis.judge(request, body) {
            Judgement::Unchanged => request,
            Judgement::Changed(other) => {
                changed = other;
                &*changed
            }
            Judgement::Refused(head, bytes) => return (self.report(Some(head), None), bytes),
            Judgement::Failed(failure) => {
                return (self.report(None, Some(failure)), Bytes::new());
            }
        };
        let start = Instant::now();
        let found = find(
            &mut self.qgis,
            &mut self.places,
            &mut self.projects,
            request,
        );
        let load_us = micros(start.elapsed());
        let (project, stamp, found) = match found {
            Ok(Some((project, stamp, found))) => (Some(project), Some(stamp), Some(found)),
            Ok(None) => (None, None, None),
            Err(failure) => {
                let timings = Timings {
                    load_us,
                    render_us: 0,
                };
                let report = Final {
                    failure: Some(failure),
                    leaving: failure == Failure::QgisFailed,
                    timings,
                    memory_kb: self.memory.kilobytes(),
                    n_projects: self.projects.n_open(),
                    ..Final::default()
                };
                return (report, Bytes::new());
            }
        };
        let served = self.qgis.serve(request, body, project, outlet.clone());
        if let Err(Failure::TooLarge) = served.answer {
            // Its parts were made; the next request wants to find room.
            memory::give_back();
        }
        let timings = Timings {
            load_us,
            render_us: micros(served.render),
        };
        let report = Final {
            timings,
            memory_kb: self.memory.kilobytes(),
            project_version: stamp.map(|stamp| stamp.version()),
            project_modified: stamp.map(|stamp| stamp.modified()),
            n_projects: self.projects.n_open(),
            found,
            ..Final::default()
        };
        tracing::debug!(
            operation = request.operation,
            load_us,
            render_us = timings.render_us,
            "served"
        );
        finish(outlet, served, report, self.chunk_bytes)
    }

    /// Of a request that QGIS did not see.
    fn report(&mut self, head: Option<Head>, failure: Option<Failure>) -> Final {
        Final {
            head,
            failure,
            memory_kb: self.memory.kilobytes(),
            n_projects: self.projects.n_open(),
            ..Final::default()
        }
    }
}

/// The project of the request, loaded; None if it needs none.
fn find<'a>(
    qgis: &mut Qgis,
    places: &mut Places,
    projects: &'a mut Projects<Project>,
    request: &Request,
) -> Result<Option<(&'a Project, Stamp, Found)>, Failure> {
    let Some(name) = &request.project else {
        return Ok(None);
    };
    let place = places.find(name)?;
    let start = Instant::now();
    let load = |place: &Place| qgis.load(&place.source, places.fetch(place)?.as_deref());
    let (project, stamp, found) = projects.get(&place, start, load)?;
    if found != Found::Cached {
        let ms = start.elapsed().as_millis();
        tracing::info!(project = %name, ms, bad_layers = ?project.bad_layers, "project loaded");
        // QGIS keeps its capabilities for longer than we keep projects.
        qgis.forget(project);
    }
    Ok(Some((project, stamp, found)))
}

/// What is left for FINAL; of much that is left, all but the last chunk is sent here.
fn finish(outlet: &Outlet, served: Served, report: Final, chunk_bytes: usize) -> (Final, Bytes) {
    let (mut head, mut bytes) = match served.answer {
        Ok(answer) => answer,
        Err(failure) => {
            let report = Final {
                failure: Some(failure),
                leaving: failure == Failure::QgisFailed,
                ..report
            };
            return (report, Bytes::new());
        }
    };
    if let Some(head) = &mut head {
        head.length = Some(bytes.len() as u64);
    }
    while bytes.len() > chunk_bytes {
        let part = bytes.split_to(chunk_bytes);
        if outlet.part(head.take(), part).is_err() {
            let failure = Some(Failure::Cancelled);
            return (Final { failure, ..report }, Bytes::new());
        }
    }
    (Final { head, ..report }, bytes)
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::WaitStatus;
    use nix::unistd::ForkResult;

    /// In a process of its own: the hook and the end are the process's.
    #[test]
    fn a_panic_ends_the_worker_at_once_and_its_parent_knows_why() {
        let board = Arc::new(Board::new().unwrap());
        // SAFETY: the child touches nothing that another thread of the test may hold.
        match unsafe { nix::unistd::fork() }.unwrap() {
            ForkResult::Child => {
                die_of_panics(board);
                let _ = std::thread::spawn(|| panic!("as the test wished")).join();
                // SAFETY: as in the hook.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, WaitStatus::Exited(child, 1));
                assert_eq!(board.farewell(), Farewell::Panicked);
            }
        }
    }
}
