//! `worker cuda-check`: what a rank needs of a CUDA device, tried one by one.

use anyhow::bail;
use clap::Args;
use phalanx_kernels::cuda;

use crate::config::{Config, Environment, Flags};

#[derive(Args)]
pub(super) struct CudaCheckArgs {
    /// Ordinal among the visible devices
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: u32,
    /// Leave out what compiles device code that this program holds already
    #[arg(long)]
    quick: bool,
}

/// Prints a line for each check; fails where one does.
pub(super) fn cuda_check(args: &CudaCheckArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(flags, Environment::read())?;
    if let Some(home) = &config.cuda_home {
        cuda::search_also(cuda::toolkit_folders(home));
    }
    let mut settings = cuda::ModuleSettings::new(config.home.kernel_cache_dir(), config.cuda_home.as_deref());
    if args.quick && cuda::has_images() {
        // Without a folder for it, nothing is compiled for the sake of the check.
        settings.cache_dir = None;
    }
    let mut num_failed = 0;
    cuda::self_check(args.device, &settings, |line| {
        match &line.outcome {
            Ok(found) => println!("ok    {}: {found}", line.name),
            Err(reason) => println!("FAIL  {}: {reason}", line.name),
        }
        num_failed += usize::from(line.outcome.is_err());
    });
    if num_failed > 0 {
        bail!("{num_failed} checks failed");
    }
    Ok(())
}
