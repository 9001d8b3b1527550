//! The local pool: one `qgisserver-worker` as our child, started again when it dies.
//!
//! The pool looks after its workers; this looks after the pool. Its standard
//! input is a pipe whose other end closes with us, however we end, and that is
//! how it knows.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::config;
use crate::directory;

const PROGRAM: &str = "qgisserver-worker";
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// For the workers of a pool that died: the kernel was asked to see to it.
const TIME_TO_DIE: Duration = Duration::from_secs(2);

/// How to start the pool, and how patient to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    program: PathBuf,
    args: Vec<OsString>,
    young: Duration,
    backoff_max: Duration,
    /// How long the pool may take to end once it was told to.
    patience: Duration,
}

impl Recipe {
    /// The pool that `config` describes, with workers that connect to `endpoint`.
    pub fn new(config: &config::Config, endpoint: &str) -> Self {
        let mut args = config.pool_args();
        args.extend(["--connect".into(), endpoint.into()]);
        Self {
            program: program(&config.pool),
            args,
            young: config.pool.young,
            backoff_max: config.pool.backoff_max,
            patience: config.pool.drain_timeout + Duration::from_secs(2),
        }
    }
}

/// The worker program: as configured, beside ours, or wherever PATH finds it.
pub fn program(pool: &config::Pool) -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join(PROGRAM));
    let configured = pool.program.clone();
    configured
        .or_else(|| beside().filter(|path| path.is_file()))
        .unwrap_or_else(|| PROGRAM.into())
}

/// What the pool can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Replace the workers, one after the other. The pool reads its settings again by
    /// itself; these are for the next pool.
    Renew(Recipe),
    /// Let running requests end, then end.
    Stop,
}

/// Keeps a pool alive until it is told to stop, or nobody can tell it any more.
pub async fn keep(mut recipe: Recipe, mut orders: mpsc::Receiver<Order>) {
    let mut pause = FIRST_PAUSE;
    // The next pool would do it, but may be stopped before it can.
    let mut tidying = None;
    loop {
        let born = Instant::now();
        match spawn(&recipe) {
            Ok((mut child, _lifeline)) => {
                let pid = child.id();
                match watch(&mut child, &mut recipe, &mut orders).await {
                    Ended::Stopped => {
                        stop(&mut child, recipe.patience).await;
                        tidied(tidying.take()).await;
                        return tidied(tidy(pid)).await;
                    }
                    Ended::Died(status) => {
                        tracing::error!("the pool died ({status}): starting another");
                        tidying = tidy(pid);
                    }
                }
            }
            Err(error) => {
                let program = recipe.program.display();
                tracing::error!(%program, %error, "the pool does not start (worker.program)");
            }
        }
        pause = match born.elapsed() > recipe.young {
            true => FIRST_PAUSE,
            false => (pause * 2).min(recipe.backoff_max),
        };
        tokio::select! {
            () = sleep(pause) => {}
            order = orders.recv() => match order {
                Some(Order::Renew(new)) => recipe = new,
                Some(Order::Stop) | None => return tidied(tidying).await,
            },
        }
    }
}

type Tidying = Option<JoinHandle<()>>;

/// Removes the temporary files of a pool that could not do so itself.
fn tidy(pid: Option<u32>) -> Tidying {
    let pid = pid?;
    let remove = move || {
        let parent = std::env::temp_dir();
        directory::remove_of(pid, &parent, directory::POOL, TIME_TO_DIE);
    };
    Some(tokio::task::spawn_blocking(remove))
}

async fn tidied(tidying: Tidying) {
    if let Some(tidying) = tidying {
        let _ = tidying.await;
    }
}

enum Ended {
    Stopped,
    Died(ExitStatus),
}

fn spawn(recipe: &Recipe) -> std::io::Result<(Child, ChildStdin)> {
    let mut command = Command::new(&recipe.program);
    // SAFETY: async-signal-safe, and touches no memory of ours.
    unsafe { command.pre_exec(hold_hangup) };
    let mut child = command
        .args(&recipe.args)
        .stdin(Stdio::piped())
        // Ours to tell systemd about.
        .env_remove("NOTIFY_SOCKET")
        // A Ctrl-C in our terminal is for us: the pool goes on until we are done.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    tracing::info!(pid = child.id(), "pool started");
    // Taken out, because waiting for a child closes what it still holds.
    let lifeline = child.stdin.take().expect("it was asked for");
    Ok((child, lifeline))
}

/// Our word to read settings again would end a pool that cannot hear it yet.
fn hold_hangup() -> std::io::Result<()> {
    let mask = SigSet::from_iter([Signal::SIGHUP]);
    Ok(sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?)
}

async fn watch(
    child: &mut Child,
    recipe: &mut Recipe,
    orders: &mut mpsc::Receiver<Order>,
) -> Ended {
    loop {
        // Neither future loses anything when it is dropped.
        tokio::select! {
            status = child.wait() => return Ended::Died(status.unwrap_or_default()),
            order = orders.recv() => match order {
                Some(Order::Renew(new)) => {
                    *recipe = new;
                    signal(child, Signal::SIGHUP);
                }
                Some(Order::Stop) | None => return Ended::Stopped,
            },
        }
    }
}

async fn stop(child: &mut Child, patience: Duration) {
    signal(child, Signal::SIGTERM);
    if timeout(patience, child.wait()).await.is_err() {
        tracing::warn!("the pool did not end within {patience:?}: killing it");
        // The pool's children die with it: the kernel was asked to see to that.
        let _ = child.kill().await;
    }
}

pub fn signal(child: &Child, signal: Signal) {
    // Not reaped yet, or `id` would be None, so the pid is still its own.
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(script: &str) -> Recipe {
        Recipe {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            young: Duration::from_secs(5),
            backoff_max: Duration::from_secs(1),
            patience: Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn a_pool_that_dies_is_started_again_and_one_that_is_told_to_stop_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let lives = folder.path().join("lives");
        // Dies once; the second life makes a pipe's reader see its end when it stops.
        let script = format!(
            "echo x >> {0}; [ $(wc -l < {0}) -lt 2 ] && exit 3; trap 'echo stopped >> {0}; exit 0' TERM; echo up >> {0}; while :; do sleep 0.05; done",
            lives.display()
        );
        let (order, orders) = mpsc::channel(1);
        let keeper = tokio::spawn(keep(recipe(&script), orders));
        let seen = |word: &'static str| {
            let lives = lives.clone();
            async move {
                while !std::fs::read_to_string(&lives)
                    .unwrap_or_default()
                    .contains(word)
                {
                    sleep(Duration::from_millis(5)).await;
                }
            }
        };
        timeout(Duration::from_secs(20), seen("up"))
            .await
            .expect("a second life");
        order.send(Order::Stop).await.unwrap();
        timeout(Duration::from_secs(20), keeper)
            .await
            .expect("the end")
            .unwrap();
        assert_eq!(
            std::fs::read_to_string(&lives).unwrap(),
            "x\nx\nup\nstopped\n"
        );
    }

    /// Otherwise it would die of it if it came before the pool can listen.
    #[tokio::test]
    async fn our_word_to_renew_is_held_for_a_pool_from_its_first_moment() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("status");
        let recipe = Recipe {
            program: "/bin/cp".into(),
            args: vec!["/proc/self/status".into(), status.clone().into()],
            ..recipe("")
        };
        let (mut child, _lifeline) = spawn(&recipe).unwrap();
        assert!(child.wait().await.unwrap().success());
        let text = std::fs::read_to_string(status).unwrap();
        let held = text.lines().find_map(|it| it.strip_prefix("SigBlk:\t"));
        let held = u64::from_str_radix(held.unwrap(), 16).unwrap();
        assert_eq!(held, 1 << (libc::SIGHUP - 1));
    }
}
