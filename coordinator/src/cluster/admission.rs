//! The look at a model before anything is placed: what can never work is refused at once, before weights are read.
//!
//! **Invariant:** only headers are read, on a blocking thread, within a deadline.

use std::path::Path;
use std::time::Duration;

use phalanx_formats::{Geometry, ModelError, ModelFiles};

use super::deployment::{CheckedSpec, DeployFailure, DeployFailureCode};
use super::spec::DeploymentSpec;

/// Time for reading headers.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Reads the model's headers and checks the wish against them.
///
/// # Errors
/// The files are no model, damaged or of an unknown architecture; or values contradict each other.
pub(super) async fn check(spec: DeploymentSpec) -> Result<CheckedSpec, DeployFailure> {
    let fail = |code, message| DeployFailure { code, message, hint: String::new() };
    let (path, dummy) = (spec.model_path.clone(), spec.load_format == "dummy");
    let read = tokio::task::spawn_blocking(move || geometry(&path, dummy));
    let geometry = match tokio::time::timeout(DEADLINE, read).await {
        Ok(Ok(Ok(geometry))) => geometry,
        Ok(Ok(Err(error))) => return Err(fail(DeployFailureCode::Model, error.to_string())),
        Ok(Err(error)) => return Err(fail(DeployFailureCode::Model, format!("reading headers failed: {error}"))),
        Err(_) => {
            let message = format!("reading {} took longer than {} s", spec.model_path.display(), DEADLINE.as_secs());
            return Err(fail(DeployFailureCode::Model, message));
        }
    };
    spec.check(&geometry).map_err(|message| fail(DeployFailureCode::Invalid, message))?;
    Ok(CheckedSpec { spec, geometry })
}

fn geometry(path: &Path, dummy: bool) -> Result<Geometry, ModelError> {
    let files = if dummy { ModelFiles::open_config(path)? } else { ModelFiles::open(path)? };
    Ok(files.geometry().clone())
}
