//! Distributions of what was measured.

use std::time::Duration;

use serde::Serialize;

/// Mean, middle and tail of a set of samples; all zero where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Distribution {
    /// How many samples.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// The middle.
    pub p50: f64,
    /// 90 % are at most this.
    pub p90: f64,
    /// 99 % are at most this.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

impl Distribution {
    /// Of any samples.
    pub fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let count = samples.len();
        Self {
            count,
            mean: samples.iter().sum::<f64>() / count.max(1) as f64,
            min: samples.first().copied().unwrap_or_default(),
            p50: percentile(&samples, 0.5),
            p90: percentile(&samples, 0.9),
            p99: percentile(&samples, 0.99),
            max: samples.last().copied().unwrap_or_default(),
        }
    }

    /// Of times, in milliseconds.
    pub fn of_ms(times: impl IntoIterator<Item = Duration>) -> Self {
        Self::new(times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect())
    }
}

/// Linear between the two nearest samples.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * sorted.len().saturating_sub(1) as f64;
    let low = sorted.get(place.floor() as usize).copied().unwrap_or_default();
    let high = sorted.get(place.ceil() as usize).copied().unwrap_or_default();
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(samples: &[f64], mean: f64, p50: f64, p99: f64) {
        let told = Distribution::new(samples.to_vec());
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(told.mean, mean) && near(told.p50, p50) && near(told.p99, p99), "{told:?}");
    }

    #[test]
    fn percentiles_lie_between_samples() {
        check(&[], 0.0, 0.0, 0.0);
        check(&[3.0], 3.0, 3.0, 3.0);
        check(&[4.0, 1.0, 3.0, 2.0], 2.5, 2.5, 3.97);
    }
}
