//! Flags that are accepted out of habit, do nothing, and are named in one warning line.

use std::path::PathBuf;

use clap::Args;

/// Flags of vLLM that mean nothing here.
#[derive(Debug, Clone, Args)]
pub(super) struct IgnoredFlags {
    #[arg(long, hide = true)]
    trust_remote_code: bool,
    #[arg(long, hide = true)]
    worker_use_ray: bool,
    #[arg(long, hide = true)]
    distributed_executor_backend: Option<String>,
    #[arg(long, hide = true)]
    max_seq_len_to_capture: Option<u32>,
    #[arg(long, hide = true)]
    swap_space: Option<f64>,
    #[arg(long, hide = true)]
    cpu_offload_gb: Option<f64>,
    #[arg(long, short = 'q', hide = true)]
    quantization: Option<String>,
    #[arg(long, hide = true)]
    revision: Option<String>,
    #[arg(long, hide = true)]
    source: Option<String>,
    #[arg(long, hide = true)]
    download_dir: Option<PathBuf>,
    #[arg(long, hide = true)]
    tokenizer_mode: Option<String>,
    #[arg(long, hide = true)]
    enable_auto_tool_choice: bool,
    #[arg(long, hide = true)]
    disable_log_requests: bool,
    #[arg(long, hide = true)]
    uvicorn_log_level: Option<String>,
    /// Prompts are always computed in chunks: obeyed by nature, so not among the ignored.
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    enable_chunked_prefill: Option<bool>,
}

impl IgnoredFlags {
    /// Those that were given, for one warning line.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--trust-remote-code", self.trust_remote_code),
            ("--worker-use-ray", self.worker_use_ray),
            ("--distributed-executor-backend", self.distributed_executor_backend.is_some()),
            ("--max-seq-len-to-capture", self.max_seq_len_to_capture.is_some()),
            ("--swap-space", self.swap_space.is_some()),
            ("--cpu-offload-gb", self.cpu_offload_gb.is_some()),
            ("--quantization", self.quantization.is_some()),
            ("--revision", self.revision.is_some()),
            ("--source", self.source.is_some()),
            ("--download-dir", self.download_dir.is_some()),
            ("--tokenizer-mode", self.tokenizer_mode.is_some()),
            ("--enable-auto-tool-choice", self.enable_auto_tool_choice),
            ("--disable-log-requests", self.disable_log_requests),
            ("--uvicorn-log-level", self.uvicorn_log_level.is_some()),
            ("--enable-chunked-prefill=false", self.enable_chunked_prefill == Some(false)),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }
}
