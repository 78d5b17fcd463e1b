//! PURE: whether a series grows. A robust line, and how sure it is.
//!
//! The slope is that of Theil and Sen, the median of the slopes of all pairs of points; its interval that of Sen (1968) from
//! the variance of Kendall's statistic. Both want independent points, and memory moves in steps: so the series is cut into
//! blocks first, each represented by its medians. One step in the middle of a flat series is then no growth.

/// Most blocks that a series is cut into.
const BLOCKS_MAX: usize = 16;
/// Fewest points with which anything can be said.
const POINTS_MIN: usize = 6;
/// Quantile of the normal distribution for an interval of 99 %.
const Z: f64 = 2.576;
/// From the median of absolute deviations to a standard deviation, for normal noise.
const MAD_TO_SIGMA: f64 = 1.4826;

/// A robust line through a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// Growth for each unit of x.
    pub slope: f64,
    /// Lower end of the slope's interval of 99 %.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// How far points lie from the line, as a standard deviation.
    pub noise: f64,
}

impl Line {
    /// Whether it grows for sure, and by more than is tolerated.
    #[must_use]
    pub fn grows(&self, tolerance: f64) -> bool {
        self.low > 0.0 && self.slope > tolerance
    }
}

/// The line through points in the order of x; `None` of too few.
#[must_use]
pub fn line(points: &[(f64, f64)]) -> Option<Line> {
    if points.len() < POINTS_MIN {
        return None;
    }
    let blocks = BLOCKS_MAX.min(points.len());
    let bound = |n: usize| n * points.len() / blocks;
    let medians: Vec<(f64, f64)> = (0..blocks)
        .map(|n| {
            let block = &points[bound(n)..bound(n + 1)];
            (median(block.iter().map(|p| p.0)), median(block.iter().map(|p| p.1)))
        })
        .collect();
    let mut slopes = Vec::new();
    for (n, a) in medians.iter().enumerate() {
        slopes.extend(medians[n + 1..].iter().filter(|b| b.0 > a.0).map(|b| (b.1 - a.1) / (b.0 - a.0)));
    }
    slopes.sort_by(f64::total_cmp);
    let slope = median(slopes.iter().copied());
    let n = medians.len() as f64;
    // Ties make the variance smaller than this: leaving them out widens the interval.
    let spread = Z * (n * (n - 1.0) * (2.0 * n + 5.0) / 18.0).sqrt();
    let at = |rank: f64| slopes.get((rank.max(0.0) as usize).min(slopes.len() - 1)).copied();
    let pairs = slopes.len() as f64;
    let (low, high) = (at(((pairs - spread) / 2.0).floor())?, at(((pairs + spread) / 2.0).ceil())?);
    let height = median(points.iter().map(|p| p.1 - slope * p.0));
    let noise = MAD_TO_SIGMA * median(points.iter().map(|p| (p.1 - slope * p.0 - height).abs()));
    Some(Line { slope, low, high, noise })
}

/// The median; 0 of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    fn series(of: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (0..240).map(|n| f64::from(n) / 12.0).map(|x| (x, of(x))).collect()
    }

    #[test]
    fn a_leak_is_seen_through_noise_and_spikes() {
        let mut random = StdRng::seed_from_u64(7);
        let mut points = series(|x| 20_000.0 + 50.0 * x);
        for (n, point) in points.iter_mut().enumerate() {
            point.1 += random.random_range(-100.0..100.0) + if n % 17 == 0 { 5_000.0 } else { 0.0 };
        }
        let line = line(&points).unwrap();
        assert!((line.slope - 50.0).abs() < 10.0 && line.low > 0.0 && line.high > line.slope, "{line:?}");
        assert!(line.grows(16.0) && !line.grows(80.0));
        assert!((20.0..200.0).contains(&line.noise), "{line:?}");
    }

    #[test]
    fn what_is_flat_but_for_noise_or_one_step_does_not_grow() {
        let mut random = StdRng::seed_from_u64(8);
        let mut grew = 0;
        for _ in 0..200 {
            let mut points = series(|_| 20_000.0);
            points.iter_mut().for_each(|p| p.1 += random.random_range(-500.0..500.0));
            grew += usize::from(line(&points).unwrap().grows(0.0));
        }
        assert!(grew <= 6, "{grew} of 200 flat series were said to grow");
        let step = line(&series(|x| if x < 9.0 { 20_000.0 } else { 23_000.0 })).unwrap();
        assert!(!step.grows(0.0), "{step:?}");
        assert!(!line(&series(|x| 20_000.0 - 50.0 * x)).unwrap().grows(0.0));
    }

    #[test]
    fn too_few_points_say_nothing() {
        assert_eq!(line(&series(|x| x)[..5]), None);
        assert!(line(&series(|x| x)[..6]).is_some());
    }
}
