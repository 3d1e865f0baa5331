//! `coordinator serve`: a model on the cluster; with no head, one in this process first.
//!
//! **Invariant:** a deployment is asked for in one way, over the cluster's own socket, whether the head is in this process
//! or elsewhere.

use phalanx_proto::DeploymentStatus;

use super::connection;
use super::launch::{end_on_signals, local_address, runtime, start_agent};
use super::progress::Progress;
pub use super::serve_flags::{EngineFlags, OwnHeadFlags, ServeFlags};
use super::{CliError, Outcome, Surroundings};
use crate::cluster::membership::HeadClient;
use crate::cluster::{DeployEvent, DeploymentSpec};
use crate::head::{self, RunningHead};

/// A head in this process, with this machine's agent beside it.
pub struct OwnHead {
    head: RunningHead,
    client: HeadClient,
}

/// A model that answers requests, and what must end with the command that asked for it.
pub struct Served {
    /// Base of the OpenAI-compatible API, without `/v1`.
    pub http: String,
    /// The name that it answers to.
    pub name: String,
    guard: Guard,
}

enum Guard {
    /// It served before.
    Nothing,
    /// It was deployed on a head that runs anyway.
    Undeploy(Box<HeadClient>),
    /// The head was started for it.
    Stop(Box<OwnHead>),
}

impl Served {
    /// Ends what was started for this command.
    ///
    /// # Errors
    /// Processes did not end in time.
    pub async fn end(self) -> Outcome {
        match self.guard {
            Guard::Nothing => Ok(()),
            Guard::Undeploy(client) => Ok(client.undeploy(&self.name).await?),
            Guard::Stop(own) => {
                own.stop().await;
                Ok(())
            }
        }
    }
}

impl OwnHead {
    /// Starts a head in this process and an agent with enough slots for `spec`.
    ///
    /// # Errors
    /// The home or a port is taken, or the agent cannot offer the devices.
    pub async fn start(
        surroundings: &Surroundings,
        flags: &OwnHeadFlags,
        spec: &DeploymentSpec,
    ) -> Result<Self, CliError> {
        let mut options = flags.head().options(surroundings);
        options.cluster.flag = "--cluster-port";
        options.api_keys.clone_from(&flags.api_key);
        let head = head::bind(options)?.start()?;
        end_on_signals(head.cluster.clone())?;
        let ready = async {
            start_agent(surroundings, &head.record, &flags.devices(spec)).await?;
            Ok::<_, CliError>(HeadClient::connect(local_address(&head.record)).await?)
        };
        match ready.await {
            Ok(client) => Ok(Self { head, client }),
            Err(error) => {
                let _ = head.cluster.stop().await;
                head.ended().await;
                Err(error)
            }
        }
    }

    /// Stays until the cluster has stopped.
    pub async fn ended(self) {
        self.head.ended().await;
    }

    /// Stops the cluster and waits for its end.
    pub async fn stop(self) {
        // An error says that it is stopping already.
        let _ = self.head.cluster.stop().await;
        self.head.ended().await;
    }
}

/// Makes sure that `spec` is served: on the head that runs, where it may serve already, or on one of this process.
///
/// # Errors
/// As `serve`.
pub async fn ensure_served(
    surroundings: &Surroundings,
    address: Option<&str>,
    spec: &DeploymentSpec,
    own_head: &OwnHeadFlags,
) -> Result<Served, CliError> {
    let mut progress = Progress::new(false);
    let served = match connection::find(address, surroundings).await? {
        Some(client) => {
            let snapshot = client.status().await?;
            let http = snapshot.head.http;
            let named = |d: &&DeploymentStatus| d.name == spec.name.0 || d.name == spec.model || d.model == spec.model;
            if let Some(known) = snapshot.deployments.iter().find(named).filter(|known| known.state == "ready") {
                return Ok(Served { http, name: known.name.clone(), guard: Guard::Nothing });
            }
            let status = deploy(&client, spec, &mut progress).await?;
            Served { http, name: status.name, guard: Guard::Undeploy(Box::new(client)) }
        }
        None => {
            let own = OwnHead::start(surroundings, own_head, spec).await?;
            match deploy(&own.client, spec, &mut progress).await {
                Ok(status) => {
                    let http = own.head.record.http.clone();
                    Served { http, name: status.name, guard: Guard::Stop(Box::new(own)) }
                }
                Err(error) => {
                    own.stop().await;
                    return Err(error);
                }
            }
        }
    };
    progress.end();
    Ok(served)
}

pub(super) fn run(surroundings: &Surroundings, flags: &ServeFlags) -> Outcome {
    let ignored = flags.ignored();
    if !ignored.is_empty() {
        eprintln!("warning: these flags mean nothing here and are ignored: {}", ignored.join(", "));
    }
    let spec = flags.engine.spec(flags.model())?;
    runtime()?.block_on(async {
        match connection::find(flags.address.address.as_deref(), surroundings).await? {
            Some(client) => on_running_head(&client, &spec, flags).await,
            None => in_foreground(surroundings, &spec, flags).await,
        }
    })
}

async fn on_running_head(client: &HeadClient, spec: &DeploymentSpec, flags: &ServeFlags) -> Outcome {
    if !flags.own_head.api_key.is_empty() {
        let message = "--api-key cannot be given to a head that runs already: its API would stay open to others";
        return Err(CliError::usage(message).with_hint("coordinator stop, then serve with --api-key"));
    }
    let given = flags.own_head.given();
    if !given.is_empty() {
        eprintln!("warning: a head runs already; these flags have no effect on it: {}", given.join(", "));
    }
    let http = client.status().await?.head.http;
    let mut progress = Progress::new(flags.json);
    let status = deploy(client, spec, &mut progress).await;
    progress.end();
    announce(&status?, &http, flags.json)
}

async fn in_foreground(surroundings: &Surroundings, spec: &DeploymentSpec, flags: &ServeFlags) -> Outcome {
    let mut progress = Progress::new(flags.json);
    progress.line("no head runs here: starting one in this process");
    let own = OwnHead::start(surroundings, &flags.own_head, spec).await?;
    let record = own.head.record.clone();
    progress.line(&format!("head {} (pid {}); dashboard {}", record.address, record.process.pid, record.dashboard));
    let status = deploy(&own.client, spec, &mut progress).await;
    progress.end();
    match status {
        Ok(status) => {
            announce(&status, &record.http, flags.json)?;
            if !flags.json {
                eprintln!("serving until Ctrl-C");
            }
            own.ended().await;
            Ok(())
        }
        Err(error) => {
            own.stop().await;
            Err(error)
        }
    }
}

/// Asks a head for a deployment and shows how it goes.
async fn deploy(
    client: &HeadClient,
    spec: &DeploymentSpec,
    progress: &mut Progress,
) -> Result<DeploymentStatus, CliError> {
    let mut events = client.deploy(spec).await?;
    loop {
        match events.next().await? {
            DeployEvent::Progress { rank: Some(rank), phase, fraction, text, .. } => {
                progress.rank(rank, &phase, fraction, &text);
            }
            DeployEvent::Progress { text, .. } => progress.line(&format!("{}: {text}", spec.name)),
            DeployEvent::Ready(status) => return Ok(status),
            DeployEvent::Failed(failure) => return Err(failure.into()),
        }
    }
}

fn announce(status: &DeploymentStatus, http: &str, json: bool) -> Outcome {
    if json {
        let mut object = serde_json::to_value(status).map_err(std::io::Error::other)?;
        object["http"] = http.into();
        println!("{object}");
        return Ok(());
    }
    let (name, size, context) = (&status.name, status.tensor_parallel_size, status.max_model_len);
    let ranks = if status.replicas > 1 { format!("{} x {size}", status.replicas) } else { size.to_string() };
    println!("{name} is ready: {ranks} ranks, context {context}, {} KV blocks", status.num_blocks);
    println!("API  {http}/v1");
    let body = format!(r#"{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}"#);
    println!("try  curl {http}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'");
    Ok(())
}
