//! Whole ranks in one process, as threads: start-up, steps, sampling, failures.

mod failures;
mod goldens;
mod group;
mod sampling;
