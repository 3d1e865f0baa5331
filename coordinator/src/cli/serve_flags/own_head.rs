//! Flags of the head that `serve` starts itself.

use clap::Args;

use crate::api::AllowedOrigins;
use crate::cli::launch::{DeviceChoice, DeviceFlags, HeadFlags};
use crate::cluster::{DeploymentSpec, TensorParallelSize};
use crate::config::defaults;
use crate::traces::TraceEndpoint;

/// Where a head listens that `serve` starts itself.
#[derive(Debug, Clone, Args)]
pub struct OwnHeadFlags {
    /// Port of the OpenAI-compatible API; 0 picks a free one
    #[arg(long, visible_alias = "http-port", value_name = "PORT")]
    pub port: Option<u16>,
    /// Host of the OpenAI-compatible API
    #[arg(long)]
    pub host: Option<String>,
    /// Port of the cluster (gRPC); 0 picks a free one
    #[arg(long, value_name = "PORT")]
    pub cluster_port: Option<u16>,
    /// Host of the cluster's port; 0.0.0.0 lets machines join
    #[arg(long, value_name = "HOST")]
    pub cluster_host: Option<String>,
    /// Port of the dashboard; 0 picks a free one
    #[arg(long, value_name = "PORT")]
    pub dashboard_port: Option<u16>,
    /// Host of the dashboard
    #[arg(long, value_name = "HOST")]
    pub dashboard_host: Option<String>,
    /// Key that clients must send
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// Web pages that may use the API: origins with commas between them, a JSON list of them, or * for all [default: none]
    #[arg(long, value_name = "ORIGINS")]
    pub allowed_origins: Option<AllowedOrigins>,
    /// Collector that spans of requests are sent to, by OTLP over gRPC: http://host:4317 [default: none]
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<TraceEndpoint>,
    /// Device slots to offer [default: as many as the ranks need]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub num_gpus: Option<u32>,
    /// Which devices to offer
    #[arg(long, value_enum)]
    pub device: Option<DeviceChoice>,
}

impl OwnHeadFlags {
    /// All ports picked freely: for a head that serves one command.
    pub fn private() -> Self {
        Self {
            port: Some(0),
            host: None,
            cluster_port: Some(0),
            cluster_host: None,
            dashboard_port: Some(0),
            dashboard_host: None,
            api_key: Vec::new(),
            allowed_origins: None,
            otlp_traces_endpoint: None,
            num_gpus: None,
            device: None,
        }
    }

    /// Flags that a head that runs already cannot follow any more.
    pub fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--port", self.port.is_some()),
            ("--host", self.host.is_some()),
            ("--cluster-port", self.cluster_port.is_some()),
            ("--cluster-host", self.cluster_host.is_some()),
            ("--dashboard-port", self.dashboard_port.is_some()),
            ("--dashboard-host", self.dashboard_host.is_some()),
            ("--allowed-origins", self.allowed_origins.is_some()),
            ("--otlp-traces-endpoint", self.otlp_traces_endpoint.is_some()),
            ("--num-gpus", self.num_gpus.is_some()),
            ("--device", self.device.is_some()),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }

    /// The flags of the head that is started.
    pub fn head(&self) -> HeadFlags {
        let host = |given: &Option<String>| given.clone().unwrap_or_else(|| defaults::HOST.to_owned());
        HeadFlags {
            store: None,
            certificate_lifetime: phalanx_trust::CERTIFICATE_LIFETIME,
            port: self.cluster_port.unwrap_or(defaults::CLUSTER_PORT),
            cluster_host: host(&self.cluster_host),
            advertise_address: None,
            http_port: self.port.unwrap_or(defaults::HTTP_PORT),
            host: host(&self.host),
            dashboard_port: self.dashboard_port.unwrap_or(defaults::DASHBOARD_PORT),
            dashboard_host: host(&self.dashboard_host),
            head_grace: defaults::HEAD_GRACE,
            allowed_origins: self.allowed_origins.clone(),
            otlp_traces_endpoint: self.otlp_traces_endpoint.clone(),
            node_timeout: defaults::NODE_TIMEOUT,
        }
    }

    /// The slots of the agent that is started: enough for the deployment.
    pub fn devices(&self, spec: &DeploymentSpec) -> DeviceFlags {
        let needed = match spec.tensor_parallel_size {
            TensorParallelSize::Fixed(_) if spec.replicas_auto => None,
            TensorParallelSize::Fixed(size) => Some(size.saturating_mul(spec.replicas).max(1)),
            TensorParallelSize::Auto => None,
        };
        DeviceFlags { num_gpus: self.num_gpus.or(needed), device: self.device.unwrap_or_default(), labels: Vec::new() }
    }
}
