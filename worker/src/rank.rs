//! The process of one rank: its bond to the agent, its device thread, its session.
//!
//! **Invariant:** the process ends when its agent does, whatever its other threads are at: the kernel kills it with the thread
//! that started it, and a thread of its own kills it when the pipe from the agent ends.

use std::io::{self, BufRead, Read};
use std::time::Duration;

use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::signal::{Signal, raise};
use nix::sys::stat::{Mode, umask};
use nix::unistd::getppid;
use phalanx_kernels::cuda::ModuleSettings;
use phalanx_proto::{DeviceKind, RankHello, VERSION};
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tracing::{error, error_span, info, warn};

use crate::agent::launch::RankLaunch;
use crate::backend;
use crate::device_thread::{self, DeviceHandle, RankSetup};
use crate::error::WorkerError;
use crate::head_note::Heads;
use crate::session::{HeadTarget, HeadTrust, Session, SessionError};

/// Longest launch line, bytes.
const LAUNCH_BYTES_MAX: u64 = 64 * 1024;

/// Why a rank's process ends in failure.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// It was not started by an agent.
    #[error("this is started by another process of this program, never by hand: {reason}")]
    NotLaunched {
        /// What is missing.
        reason: String,
    },
    /// The system refuses a thread, a signal or a runtime.
    #[error("the rank cannot run: {0}")]
    System(#[from] io::Error),
    /// The device thread cannot be started.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The session ended.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Ties this process to the agent that started it, and learns from it which rank this is.
///
/// # Errors
/// No agent started this process.
pub fn bind_to_agent() -> Result<RankLaunch, RankError> {
    bind_to_parent(|launch: &RankLaunch| launch.agent_pid)
}

/// Ties this process to the one that started it, and takes its one line of JSON. `parent` is where the line names that process.
///
/// # Errors
/// No such line, or its author is gone.
pub fn bind_to_parent<T: DeserializeOwned>(parent: impl Fn(&T) -> u32) -> Result<T, RankError> {
    let refused = |reason: String| RankError::NotLaunched { reason };
    set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)?;
    // It runs nothing that has more rights than itself, and what it writes is for its owner.
    set_no_new_privs().map_err(io::Error::from)?;
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let mut line = String::new();
    io::stdin().lock().take(LAUNCH_BYTES_MAX).read_line(&mut line).map_err(|e| refused(e.to_string()))?;
    let launch: T = serde_json::from_str(&line).map_err(|e| refused(format!("no launch line ({e})")))?;
    // The parent may have ended before the kernel was asked to tell.
    if getppid().as_raw() != parent(&launch).cast_signed() {
        return Err(refused("whoever started it is gone".into()));
    }
    std::thread::Builder::new().name("bond".into()).spawn(end_with_pipe)?;
    Ok(launch)
}

/// Nothing more is ever written to the pipe: it ends when the agent does, or when the agent wants this rank to end.
fn end_with_pipe() {
    // Whatever is read, be it an error, only the end of it counts.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    // Neither exit handlers nor the device thread may hold the end up.
    let _ = raise(Signal::SIGKILL);
    std::process::abort();
}

/// Runs the rank until the head ends it, or is gone for longer than its grace.
///
/// # Errors
/// Everything but an end that the head asked for.
pub fn run(launch: RankLaunch) -> Result<(), RankError> {
    let grace = launch.head_grace();
    let key = &launch.key;
    // Of the highest level, so that what it says stands beside every line that is written at all.
    let span = error_span!("rank", deployment = %key.deployment, replica = key.replica, rank = key.rank.0,
        incarnation = key.incarnation.0, node_id = %launch.node_id);
    // One thread, one task: whatever runs here is this rank's.
    let _entered = span.enter();
    let setup = RankSetup {
        rank: launch.key.rank,
        incarnation: launch.key.incarnation,
        node_id: launch.node_id.clone(),
        device: device_of(launch.device),
        num_threads: launch.num_threads as usize,
        head_grace: grace,
    };
    backend::cuda::prepare(
        ModuleSettings::new(launch.kernel_cache_dir.clone(), launch.cuda_home.as_deref()),
        launch.cuda_home.as_deref(),
    );
    let trust = launch.trust_dir.clone().map_or(HeadTrust::Plain, HeadTrust::Certificate);
    let socket = launch.head_socket.clone().map(Into::into);
    let heads = Heads::new(HeadTarget { address: launch.head.clone(), socket, trust }, launch.head_note.clone());
    let device = device_thread::spawn(setup)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(serve(&heads, hello(launch), device, grace));
    match ended {
        Ok(reason) => {
            info!(reason, "rank ends");
            Ok(())
        }
        Err(error) => {
            error!(%error, "rank ends");
            Err(error.into())
        }
    }
}

/// Serves one head after the other, as long as none is gone for longer than the grace.
async fn serve(
    heads: &Heads,
    hello: RankHello,
    mut device: DeviceHandle,
    grace: Duration,
) -> Result<String, SessionError> {
    let mut session = Session::open(heads, hello.clone(), &mut device).await?;
    loop {
        let led = session.led().clone();
        let lost = tokio::select! {
            ended = session.run() => match ended {
                Err(error @ SessionError::HeadGone { .. }) => error,
                ended => return ended,
            },
            () = heads.superseded(&led) => SessionError::HeadGone { reason: "another head leads".into() },
        };
        // What has not been ready has nothing worth waiting with.
        let Some(kept) = session.into_kept().filter(|_| !grace.is_zero()) else { return Err(lost) };
        warn!(error = %lost, ?grace, "waiting for a head");
        session = Session::resume(heads, &hello, &mut device, kept, Instant::now() + grace).await?;
    }
}

fn hello(launch: RankLaunch) -> RankHello {
    RankHello {
        deployment: launch.key.deployment,
        replica: launch.key.replica,
        rank: launch.key.rank,
        incarnation: launch.key.incarnation,
        node_id: launch.node_id,
        pid: std::process::id(),
        launch_token: launch.launch_token,
        version: VERSION.into(),
        device: launch.device_name,
        resumes: None,
    }
}

fn device_of(kind: DeviceKind) -> backend::DeviceKind {
    match kind {
        DeviceKind::Cpu => backend::DeviceKind::Cpu,
        DeviceKind::Cuda => backend::DeviceKind::Cuda,
        DeviceKind::Rocm => backend::DeviceKind::Rocm,
    }
}
