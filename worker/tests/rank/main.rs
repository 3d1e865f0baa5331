//! Whole ranks in one process, as threads: start-up, steps, sampling, failures.

#[cfg(test)]
mod failures;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod group;
#[cfg(test)]
mod sampling;
